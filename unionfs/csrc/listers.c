/*
 * Directories that are opened again.
 *
 * The kernel keeps the listing of a directory, for all of its readers. Once Python has said so of a directory, nothing is
 * left to decide about the OPENDIRs and RELEASEDIRs to come, which are all that the kernel asks for a listing that it
 * keeps. So they are answered here.
 *
 * What several readers have filled in, some of whom began before a change, may be older in parts than the kernel takes it
 * for: it notes the time of what it keeps when it begins with it, and adds what any reader gets at the place where it has
 * come to (fuse_add_dirent_to_cache). So it is found out here, when one of them has come to the end and the kernel is about
 * to call that listing complete, whether the directory is still as it was when the first of those who may have had a part
 * in it opened it. If not, what was filled in is dropped (UnionOperations._ended).
 *
 * Python gets to know a handle that was given here when something else is asked through it. While it knows any of a
 * directory, it is told of all that are closed.
 */
#include "native.h"

#include <stdlib.h>

struct lister {
	struct lister *next; /* in its bucket */
	fuse_ino_t node;
	PyObject *directory; /* an unionfs.core.inodes.Dir */
	PyObject *since; /* its version when the first of these readers opened it; NULL: not known */
	unsigned int readers; /* how many have it open */
	unsigned int known; /* to Python, of the handles that were given here */
	bool reopens; /* whether it is opened here from now on */
	bool shared; /* whether several readers may have filled in what the kernel keeps */
};

enum { LISTER_BUCKETS = 4096 };

/* In the numbers of handles that are given here; Python has numbers without it. */
#define OURS (UINT64_C(1) << 62)

static struct lister *listers[LISTER_BUCKETS];
static uint64_t serial; /* of handles given here */
static PyObject *version_name;

/* Where the directory's lister is, or would be. */
static struct lister **find_lister(fuse_ino_t node)
{
	struct lister **at = &listers[(node ^ node >> 12) % LISTER_BUCKETS];

	while (*at && (*at)->node != node)
		at = &(*at)->next;
	return at;
}

/* The directory's version now, a new reference; NULL where it can't be had, which counts as another one. */
static PyObject *version_of(const struct lister *lister)
{
	PyObject *version = PyObject_GetAttr(lister->directory, version_name);

	if (!version)
		PyErr_Clear();
	return version;
}

static bool is_unchanged(const struct lister *lister)
{
	PyObject *version = version_of(lister);
	bool same = version && lister->since && PyObject_RichCompareBool(version, lister->since, Py_EQ) == 1;

	PyErr_Clear();
	Py_XDECREF(version);
	return same;
}

static void opened(struct lister *lister)
{
	if (lister->readers++)
		lister->shared = true;
	else if (!lister->shared)
		Py_XSETREF(lister->since, version_of(lister));
}

static void closed(struct lister *lister)
{
	/* What is half filled in by now stays as it is for the next reader, who goes on with it. */
	if (!--lister->readers && lister->shared && is_unchanged(lister))
		lister->shared = false;
}

static bool open_again(struct fuse_session *se, const struct fuse_in_header *in)
{
	struct lister *lister = *find_lister(in->nodeid);
	struct open_reply reply = {.open_flags = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR};

	if (!lister || !lister->reopens)
		return false;
	opened(lister);
	reply.fh = OURS | ++serial;
	reply_raw(se, in->unique, 0, (const char *)&reply, sizeof(reply));
	return true;
}

/* The reader has closed it; returns false where Python has to do so, or knows whether it has. */
static bool close_lister(struct fuse_session *se, const struct fuse_in_header *in, uint64_t fh)
{
	struct lister *lister = *find_lister(in->nodeid);

	if (!(fh & OURS) || !lister || !lister->readers || lister->known)
		return false;
	closed(lister);
	reply_raw(se, in->unique, 0, NULL, 0);
	return true;
}

static void forget_lister(fuse_ino_t node)
{
	struct lister **at = find_lister(node), *lister = *at;

	if (!lister || lister->readers)
		return;
	if (lister->shared) /* nothing is known of it any more; if the kernel still has it, it is to ask again */
		fuse_lowlevel_notify_inval_inode(session, node, 0, 0);
	*at = lister->next;
	Py_DECREF(lister->directory);
	Py_XDECREF(lister->since);
	free(lister);
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

static struct lister *make_lister(fuse_ino_t node, PyObject *directory)
{
	struct lister *lister = calloc(1, sizeof(*lister));

	if (!lister)
		return NULL;
	lister->node = node;
	lister->directory = Py_NewRef(directory);
	return lister;
}

static PyObject *py_keep_listing(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node;
	PyObject *directory;
	struct lister **at;
	int reopens, taken_over;

	if (!PyArg_ParseTuple(args, "KOpp", &node, &directory, &reopens, &taken_over))
		return NULL;
	if (!version_name && !(version_name = PyUnicode_InternFromString("version")))
		return NULL;
	at = find_lister(node);
	if (!*at && !(*at = make_lister(node, directory)))
		return PyErr_NoMemory();
	(*at)->reopens = reopens;
	(*at)->shared |= taken_over;
	opened(*at);
	Py_RETURN_NONE;
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
	if (!(fh & OURS) || !lister)
		Py_RETURN_FALSE;
	lister->known++;
	Py_RETURN_TRUE;
}

static PyObject *py_close_listing(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node, fh;
	struct lister *lister;
	int known;

	if (!PyArg_ParseTuple(args, "KKp", &node, &fh, &known))
		return NULL;
	lister = *find_lister(node);
	if (!lister || !lister->readers || !(known || fh & OURS))
		Py_RETURN_FALSE;
	if (known && fh & OURS)
		lister->known--;
	closed(lister);
	Py_RETURN_TRUE;
}

static PyObject *py_shares_listing(PyObject *self UNUSED, PyObject *node)
{
	struct lister *lister = *find_lister(PyLong_AsUnsignedLongLong(node));

	return PyErr_Occurred() ? NULL : PyBool_FromLong(lister && lister->shared);
}

static PyObject *py_end_listing(PyObject *self UNUSED, PyObject *node)
{
	struct lister *lister = *find_lister(PyLong_AsUnsignedLongLong(node));

	if (PyErr_Occurred())
		return NULL;
	if (!lister || !lister->shared || is_unchanged(lister))
		Py_RETURN_FALSE;
	if (lister->readers == 1) {
		lister->shared = false;
		Py_XSETREF(lister->since, version_of(lister));
	}
	Py_RETURN_TRUE;
}

PyMethodDef lister_methods[] = {
	{"keep_listing", py_keep_listing, METH_VARARGS,
	 "(node, directory, reopens, taken_over): the kernel keeps what it reads through a handle of Python's, and through those "
	 "that are given here afterwards, if any are to be."},
	{"ask_again", py_ask_again, METH_O, "The next OPENDIR of the node is for Python."},
	{"opened_again", py_opened_again, METH_VARARGS,
	 "(node, fh): whether this is a handle that was given here. RELEASEDIRs come to Python until it has closed it."},
	{"close_listing", py_close_listing, METH_VARARGS,
	 "(node, fh, known): a handle that the kernel kept a listing through is closed; `known`: Python had it. False: there is "
	 "no such handle."},
	{"shares_listing", py_shares_listing, METH_O, "Whether what the kernel keeps of a directory is several readers' work."},
	{"end_listing", py_end_listing, METH_O,
	 "A reader is about to be told that this is the end. Whether what the kernel keeps may be of different times: then the "
	 "caller drops it first."},
	{NULL, NULL, 0, NULL},
};
