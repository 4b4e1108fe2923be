/*
 * Names in bind paths (unionfs/core/bind.py).
 *
 * The host may change a bind path at any time, so the kernel keeps no name of it: most requests there are LOOKUPs of
 * names that lead where they led before. Python says which node it saw last at a name (a hint), and each node's O_PATH
 * descriptor. If the host has that very object at the name now, the answer is made here; if it has nothing there and
 * none was known, too. All else is Python's: it finds out who is who. A wrong hint is harmless, for the descriptor keeps
 * the object's number from being given to another one.
 *
 * Lookups that are answered here are counted here, until Python asks for the number (take_lookups), at the latest
 * before the descriptor goes.
 */
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

struct known {
	struct known *next;
	fuse_ino_t parent, child;
	char name[];
};

/* A name of which only Python may touch what is there: points, and what may be our own mount, which waits for us. */
struct reserved {
	struct reserved *next;
	char name[];
};

enum { KNOWN_BUCKETS = 16384 };

static struct known *known_names[KNOWN_BUCKETS];
static struct reserved *reserved_names;

struct owned *find_bound(fuse_ino_t node)
{
	struct owned *owned = *bucket(node);

	while (owned && (owned->node != node || !owned->bind))
		owned = owned->next;
	return owned;
}

/* Where the name is in the table, or would be. */
static struct known **find_known(fuse_ino_t parent, const char *name)
{
	uint32_t hash = (uint32_t)(parent ^ parent >> 32);
	struct known **at;

	for (const char *c = name; *c; c++)
		hash = (hash ^ (unsigned char)*c) * 16777619;
	at = &known_names[(hash ^ hash >> 16) % KNOWN_BUCKETS];
	while (*at && ((*at)->parent != parent || strcmp((*at)->name, name)))
		at = &(*at)->next;
	return at;
}

bool is_reserved(const char *name)
{
	const struct reserved *reserved = reserved_names;

	while (reserved && strcmp(reserved->name, name))
		reserved = reserved->next;
	return reserved;
}

bool know_name(fuse_ino_t parent, const char *name, fuse_ino_t child)
{
	struct known **at = find_known(parent, name);

	if (!*at) {
		size_t size = strlen(name) + 1;
		struct known *known = malloc(sizeof(*known) + size);

		if (!known)
			return false;
		*known = (struct known){.parent = parent};
		memcpy(known->name, name, size);
		*at = known;
	}
	(*at)->child = child;
	return true;
}

static void reply_entry_raw(struct fuse_session *se, uint64_t unique, const struct fuse_entry_param *entry)
{
	struct fuse_entry_out out = raw_entry(entry);

	reply_raw(se, unique, 0, (const char *)&out, sizeof(out));
}

/* A directory of the union: if upper alone makes it up, and has nothing there, the kernel may remember that. */
static bool look_for_absent(struct fuse_session *se, const struct fuse_in_header *in, const char *name)
{
	const struct owned *parent = find_owned(in->nodeid);
	struct fuse_entry_param absent = {0};
	struct stat st;

	if (!parent || !parent->upper_dir || !fstatat(parent->fd, name, &st, AT_SYMLINK_NOFOLLOW) || errno != ENOENT)
		return false;
	counters[LOOKUP]++;
	absent.entry_timeout = parent->timeout;
	reply_entry_raw(se, in->unique, &absent);
	return true;
}

/* Answer a LOOKUP if it can be done here; returns whether. */
bool look_here(struct fuse_session *se, const struct fuse_buf *buf)
{
	const struct fuse_in_header *in = buf->mem;
	const char *name = (const char *)(in + 1);
	const struct owned *parent;
	const struct known *known;
	struct fuse_entry_param entry = {0};
	struct owned *child;

	if (buf->flags & FUSE_BUF_IS_FD || buf->size <= sizeof(*in) || in->opcode != FUSE_LOOKUP ||
	    ((const char *)buf->mem)[buf->size - 1])
		return false;
	parent = find_bound(in->nodeid);
	if (!parent)
		return look_for_absent(se, in, name);
	if (is_reserved(name))
		return false;
	known = *find_known(in->nodeid, name);
	child = known ? find_bound(known->child) : NULL;
	if (known && (!child || child->bind != parent->bind))
		return false;
	if (fstatat(parent->fd, name, &entry.attr, AT_SYMLINK_NOFOLLOW)) {
		if (errno != ENOENT || known)
			return false;
		counters[LOOKUP]++;
		reply_raw(se, in->unique, ENOENT, NULL, 0);
		return true;
	}
	if (!child || entry.attr.st_dev != child->host_dev || entry.attr.st_ino != child->host_ino)
		return false;
	counters[LOOKUP]++;
	child->lookups++;
	entry.ino = child->node;
	entry.attr.st_ino = child->ino;
	entry.entry_timeout = child->timeout;
	entry.attr_timeout = attributes_last(child);
	reply_entry_raw(se, in->unique, &entry);
	return true;
}

static PyObject *py_own_bound(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node, ino, dev, host_ino;
	unsigned int bind, handles;
	int fd, settable, root;
	double timeout;

	if (!PyArg_ParseTuple(args, "KiKKKIdIpp", &node, &fd, &ino, &dev, &host_ino, &bind, &timeout, &handles, &settable,
			      &root))
		return NULL;
	return add_owned(&(struct owned){
		.node = node,
		.ino = ino,
		.fd = fd,
		.path_only = true,
		.settable = settable,
		.timeout = timeout,
		.bind = bind,
		.handles = handles,
		.root = root,
		.host_dev = dev,
		.host_ino = host_ino,
	});
}

/*
 * A handle shows what the host changes at once, and asks for no name: its file's attributes must not be kept. What was
 * said of them before is taken back. (Only attributes: takes no lock that a request holds.)
 */
void note_handles(struct owned *owned, unsigned int handles)
{
	if (!owned->handles && handles && !owned->timeout && session)
		fuse_lowlevel_notify_inval_inode(session, owned->node, -1, 0);
	owned->handles = handles;
}

static PyObject *py_count_handles(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node;
	unsigned int handles;
	struct owned *owned;

	if (!PyArg_ParseTuple(args, "KI", &node, &handles))
		return NULL;
	owned = find_bound(node);
	if (owned)
		note_handles(owned, handles);
	Py_RETURN_NONE;
}

static PyObject *py_take_lookups(PyObject *self UNUSED, PyObject *node)
{
	struct owned *owned = find_bound(PyLong_AsUnsignedLongLong(node));
	uint64_t lookups = owned ? owned->lookups : 0;

	if (PyErr_Occurred())
		return NULL;
	if (owned)
		owned->lookups = 0;
	return PyLong_FromUnsignedLongLong(lookups);
}

static PyObject *py_know_name(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long parent, child;
	const char *name;

	if (!PyArg_ParseTuple(args, "KyK", &parent, &name, &child))
		return NULL;
	return know_name(parent, name, child) ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

static PyObject *py_forget_name(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long parent;
	struct known **at, *known;
	const char *name;

	if (!PyArg_ParseTuple(args, "Ky", &parent, &name))
		return NULL;
	at = find_known(parent, name);
	known = *at;
	if (known) {
		*at = known->next;
		free(known);
	}
	Py_RETURN_NONE;
}

static PyObject *py_reserve_name(PyObject *self UNUSED, PyObject *arg)
{
	const char *name = PyBytes_AsString(arg);
	struct reserved *reserved;

	if (!name)
		return NULL;
	reserved = malloc(sizeof(*reserved) + strlen(name) + 1);
	if (!reserved)
		return PyErr_NoMemory();
	reserved->next = reserved_names;
	strcpy(reserved->name, name);
	reserved_names = reserved;
	Py_RETURN_NONE;
}

PyMethodDef bound_methods[] = {
	{"own_bound", py_own_bound, METH_VARARGS,
	 "(node, fd, st_ino, st_dev, st_ino on the host, bind path, timeout, handles, settable, root): "
	 "the descriptor of a node of a bind path."},
	{"count_handles", py_count_handles, METH_VARARGS, "(node, number): how many files of a bind path's node are open."},
	{"take_lookups", py_take_lookups, METH_O, "How many lookups of the node were answered since the last call."},
	{"know_name", py_know_name, METH_VARARGS, "(parent, name, node): what was seen there."},
	{"forget_name", py_forget_name, METH_VARARGS, "(parent, name)"},
	{"reserve_name", py_reserve_name, METH_O, "Leave lookups of the name to Python, wherever it is."},
	{NULL, NULL, 0, NULL},
};
