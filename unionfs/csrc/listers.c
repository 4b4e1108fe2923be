/*
 * Directories that are opened again.
 *
 * The kernel keeps the listing of a directory for one reader at a time (why one: Direct.opendir). Once Python has said so
 * of a directory, nothing is left to decide about the OPENDIRs and RELEASEDIRs to come, which are all that the kernel asks
 * for a listing that it keeps. So they are answered here, as long as no other reader uses what is kept. Python gets to know
 * such a handle when something is asked through it, and closes only those.
 */
#include "native.h"

#include <stdlib.h>

struct lister {
	struct lister *next; /* in its bucket */
	fuse_ino_t node;
	uint64_t fh; /* of the reader who uses what is kept; 0: nobody does */
	bool known; /* to Python */
	bool reopens; /* whether it is opened here from now on */
};

enum { LISTER_BUCKETS = 4096 };

#define OURS (UINT64_C(1) << 62) /* in the numbers of handles that are given here; Python has numbers without it */

static struct lister *listers[LISTER_BUCKETS];

/* Where the directory's lister is, or would be. */
static struct lister **find_lister(fuse_ino_t node)
{
	struct lister **at = &listers[(node ^ node >> 12) % LISTER_BUCKETS];

	while (*at && (*at)->node != node)
		at = &(*at)->next;
	return at;
}

static bool open_again(struct fuse_session *se, const struct fuse_in_header *in)
{
	static uint64_t serial;
	struct lister *lister = *find_lister(in->nodeid);
	struct open_reply reply = {.open_flags = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR};

	if (!lister || !lister->reopens || lister->fh)
		return false;
	lister->fh = reply.fh = OURS | ++serial;
	lister->known = false;
	reply_raw(se, in->unique, 0, (const char *)&reply, sizeof(reply));
	return true;
}

/* The reader has closed it; returns false where Python has to do so too. */
static bool close_lister(struct fuse_session *se, const struct fuse_in_header *in, uint64_t fh)
{
	struct lister *lister = *find_lister(in->nodeid);

	if (!lister || lister->fh != fh)
		return false;
	lister->fh = 0;
	if (lister->known)
		return false;
	reply_raw(se, in->unique, 0, NULL, 0);
	return true;
}

static void forget_lister(fuse_ino_t node)
{
	struct lister **at = find_lister(node), *lister = *at;

	if (lister && !lister->fh) {
		*at = lister->next;
		free(lister);
	}
}

/* Answer an OPENDIR or RELEASEDIR about which nothing is to be decided; returns whether. */
bool serve_lister(struct fuse_session *se, const struct fuse_buf *buf)
{
	const struct fuse_in_header *in = buf->mem;
	const void *body = in + 1;
	bool served = false;

	if (!is_whole(buf, sizeof(struct fuse_open_in)))
		return false;
	switch (in->opcode) {
	case FUSE_OPENDIR:
		served = open_again(se, in);
		break;
	case FUSE_RELEASEDIR:
		served = close_lister(se, in, ((const struct fuse_release_in *)body)->fh);
		break;
	case FUSE_FORGET:
		forget_lister(in->nodeid);
		break;
	case FUSE_BATCH_FORGET:
		each_forgotten(in, forget_lister);
		break;
	default:
		break;
	}
	counters[REOPENED] += served;
	return served;
}

static PyObject *py_keep_listing(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node, fh;
	struct lister **at;
	int reopens;

	if (!PyArg_ParseTuple(args, "KKp", &node, &fh, &reopens))
		return NULL;
	at = find_lister(node);
	if (*at && (*at)->fh)
		Py_RETURN_FALSE;
	if (!*at) {
		*at = calloc(1, sizeof(**at));
		if (!*at)
			return PyErr_NoMemory();
		(*at)->node = node;
	}
	(*at)->fh = fh;
	(*at)->known = true;
	(*at)->reopens = reopens;
	Py_RETURN_TRUE;
}

static PyObject *py_ask_again(PyObject *self UNUSED, PyObject *node)
{
	struct lister *lister = *find_lister(PyLong_AsUnsignedLongLong(node));

	if (lister)
		lister->reopens = false;
	return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *py_opened_again(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node, fh;
	struct lister *lister;

	if (!PyArg_ParseTuple(args, "KK", &node, &fh))
		return NULL;
	lister = *find_lister(node);
	if (!lister || !fh || lister->fh != fh || lister->known)
		Py_RETURN_FALSE;
	lister->known = true;
	Py_RETURN_TRUE;
}

PyMethodDef lister_methods[] = {
	{"keep_listing", py_keep_listing, METH_VARARGS,
	 "(node, fh, reopens): have the kernel keep a directory's listing for this handle, and for those that are given here "
	 "afterwards, if any are to be; False where another handle uses it."},
	{"ask_again", py_ask_again, METH_O, "The next OPENDIR of the node is for Python."},
	{"opened_again", py_opened_again, METH_VARARGS,
	 "(node, fh): whether this is a handle that was opened here. Its RELEASEDIR comes to Python from now on."},
	{NULL, NULL, 0, NULL},
};
