/*
 * Directories that are opened again.
 *
 * The kernel keeps the listing of a directory for one reader at a time (why one: Direct.opendir). Once Python has said so
 * of a directory, nothing is left to decide about the OPENDIRs and RELEASEDIRs to come, which are all that the kernel asks
 * for a listing that it keeps. So they are answered here, as long as no other reader uses what is kept.
 *
 * Those who come meanwhile read beside that one (*aside*), with a READDIRPLUS for all of a listing and one for its end. What
 * Python answered to the first of them is given to the others, as long as it holds: it is the whole listing, all of it names
 * whose attributes the kernel has, and the directory's version is still the one that was listed.
 *
 * Python gets to know such a handle when something else is asked through it, and closes only those.
 */
#include "native.h"

#include <stdlib.h>

/* What is read aside. */
struct listing {
	PyObject *directory; /* an unionfs.core.inodes.Dir; NULL: nothing is */
	PyObject *version; /* of the directory then */
	PyObject *text; /* the answer */
	uint64_t end; /* the position behind the last entry */
};

struct lister {
	struct lister *next; /* in its bucket */
	fuse_ino_t node;
	uint64_t fh; /* of the reader who uses what is kept; 0: nobody does */
	bool known; /* to Python */
	bool reopens; /* whether it is opened here from now on */
	bool aside_known; /* whether Python knows a handle of those who read aside */
	struct listing aside;
};

enum { LISTER_BUCKETS = 4096, MOST_ASIDE = 4 << 20 };

/* In the numbers of handles that are given here; Python has numbers without them. */
#define OURS (UINT64_C(1) << 62)
#define ASIDE (UINT64_C(1) << 61)

static struct lister *listers[LISTER_BUCKETS];
static uint64_t serial; /* of handles given here */
static Py_ssize_t aside_bytes; /* of all answers that are kept */
static PyObject *version_name;

/* Where the directory's lister is, or would be. */
static struct lister **find_lister(fuse_ino_t node)
{
	struct lister **at = &listers[(node ^ node >> 12) % LISTER_BUCKETS];

	while (*at && (*at)->node != node)
		at = &(*at)->next;
	return at;
}

static void drop_aside(struct lister *lister)
{
	struct listing listing = lister->aside;

	if (!listing.directory)
		return;
	lister->aside = (struct listing){0};
	aside_bytes -= PyBytes_GET_SIZE(listing.text);
	Py_DECREF(listing.directory);
	Py_DECREF(listing.version);
	Py_DECREF(listing.text);
}

/* Whether there is an answer for those who read aside, and it still holds. */
static bool has_aside(struct lister *lister)
{
	PyObject *version;
	bool holds;

	if (!lister || !lister->reopens || !lister->aside.directory)
		return false;
	version = PyObject_GetAttr(lister->aside.directory, version_name);
	holds = version && PyObject_RichCompareBool(version, lister->aside.version, Py_EQ) == 1;
	PyErr_Clear();
	Py_XDECREF(version);
	if (!holds)
		drop_aside(lister);
	return holds;
}

static bool open_again(struct fuse_session *se, const struct fuse_in_header *in)
{
	struct lister *lister = *find_lister(in->nodeid);
	struct open_reply reply = {.open_flags = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR};

	if (!lister || !lister->reopens)
		return false;
	if (!lister->fh) {
		lister->fh = reply.fh = OURS | ++serial;
		lister->known = false;
	} else if (has_aside(lister)) {
		reply = (struct open_reply){.fh = OURS | ASIDE | ++serial};
	} else {
		return false;
	}
	reply_raw(se, in->unique, 0, (const char *)&reply, sizeof(reply));
	return true;
}

/* A READDIRPLUS; returns false where it isn't for the whole of what is read aside, or for its end. */
static bool read_aside(struct fuse_session *se, const struct fuse_in_header *in, const struct fuse_read_in *read)
{
	struct lister *lister;
	PyObject *text;

	if (!(read->fh & ASIDE))
		return false;
	lister = *find_lister(in->nodeid);
	if (!has_aside(lister))
		return false;
	text = lister->aside.text;
	if (read->offset == lister->aside.end)
		reply_raw(se, in->unique, 0, NULL, 0);
	else if (!read->offset && PyBytes_GET_SIZE(text) <= (Py_ssize_t)read->size)
		reply_raw(se, in->unique, 0, PyBytes_AS_STRING(text), (size_t)PyBytes_GET_SIZE(text));
	else
		return false;
	return true;
}

/* The reader has closed it; returns false where Python has to do so too. */
static bool close_lister(struct fuse_session *se, const struct fuse_in_header *in, uint64_t fh)
{
	struct lister *lister = *find_lister(in->nodeid);
	bool known;

	if (!lister)
		return false;
	if (fh & ASIDE) {
		known = lister->aside_known;
	} else {
		if (lister->fh != fh)
			return false;
		lister->fh = 0;
		known = lister->known;
	}
	if (known)
		return false;
	reply_raw(se, in->unique, 0, NULL, 0);
	return true;
}

static void forget_lister(fuse_ino_t node)
{
	struct lister **at = find_lister(node), *lister = *at;

	if (lister)
		drop_aside(lister);
	if (lister && !lister->fh) {
		*at = lister->next;
		free(lister);
	}
}

/* Answer an OPENDIR, READDIRPLUS or RELEASEDIR about which nothing is to be decided; returns whether. */
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
	case FUSE_READDIRPLUS:
		served = is_whole(buf, sizeof(struct fuse_read_in)) && read_aside(se, in, body);
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
	if (fh & ASIDE) {
		if (lister)
			lister->aside_known = true;
		Py_RETURN_FALSE;
	}
	if (!lister || !fh || lister->fh != fh || lister->known)
		Py_RETURN_NONE;
	lister->known = true;
	Py_RETURN_TRUE;
}

static void drop_all_aside(void)
{
	for (int i = 0; i < LISTER_BUCKETS; i++)
		for (struct lister *lister = listers[i]; lister; lister = lister->next)
			drop_aside(lister);
}

static PyObject *py_read_aside(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node, end;
	struct listing listing;
	struct lister *lister;

	if (!PyArg_ParseTuple(args, "KOOSK", &node, &listing.directory, &listing.version, &listing.text, &end))
		return NULL;
	if (!version_name && !(version_name = PyUnicode_InternFromString("version")))
		return NULL;
	lister = *find_lister(node);
	if (!lister || !lister->reopens)
		Py_RETURN_NONE;
	drop_aside(lister);
	if (aside_bytes + PyBytes_GET_SIZE(listing.text) > MOST_ASIDE)
		drop_all_aside();
	aside_bytes += PyBytes_GET_SIZE(listing.text);
	listing.end = end;
	Py_INCREF(listing.directory);
	Py_INCREF(listing.version);
	Py_INCREF(listing.text);
	lister->aside = listing;
	Py_RETURN_NONE;
}

PyMethodDef lister_methods[] = {
	{"keep_listing", py_keep_listing, METH_VARARGS,
	 "(node, fh, reopens): have the kernel keep a directory's listing for this handle, and for those that are given here "
	 "afterwards, if any are to be; False where another handle uses it."},
	{"ask_again", py_ask_again, METH_O, "The next OPENDIR of the node is for Python."},
	{"opened_again", py_opened_again, METH_VARARGS,
	 "(node, fh): None if no handle was opened here by this number, else whether the kernel keeps what it reads through it. "
	 "Its RELEASEDIR comes to Python from now on."},
	{"read_aside", py_read_aside, METH_VARARGS,
	 "(node, directory, version, text, end): what to answer to the first READDIRPLUS of those who can't have their listing "
	 "kept, and to the one for the end, as long as the directory has this `version`."},
	{NULL, NULL, 0, NULL},
};
