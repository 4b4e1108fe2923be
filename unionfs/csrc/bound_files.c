/*
 * Files of bind paths: OPEN and CREATE (unionfs/core/bind.py).
 *
 * What is plain is answered here, and Python told after the answer is out: it keeps the books while the caller goes on.
 * Plain is a new file of the daemon's own user, or the first handle of a file; without suid and sgid, in a bind path
 * that may be written, with no flag that asks for more than reading and writing. All else is Python's, and so is every
 * error: it tries again, and says what is wrong.
 */
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

/* Flags with which a file is opened here. The daemon's own descriptor needn't have O_APPEND, see data.c. */
#define PLAIN (O_ACCMODE | O_APPEND | NO_MATTER)

static PyObject *show_number; /* (st_dev, st_ino): the st_ino to show */
static PyObject *tell_created, *tell_opened;
static fuse_ino_t next_node; /* the node id of the next new file */
static bool no_backing; /* there are files that can't be passed through: Python finds out which */

struct opened {
	struct fuse_entry_out entry; /* of CREATE */
	struct open_reply open;
};

/* Finish the answer about a handle of the node, and send it with what comes before from *start* on. */
static int32_t reply_opened(struct fuse_session *se, uint64_t unique, struct opened *reply, size_t start, int fd)
{
	int id = passthrough && !no_backing ? backing_open(fd) : 0;

	if (id < 0) {
		no_backing = true;
		id = 0;
	}
	reply->open = id ? passthrough_reply((uint64_t)fd, id) : (struct open_reply){.fh = (uint64_t)fd};
	counters[PASSTHROUGH] += id != 0;
	reply_raw(se, unique, 0, (const char *)reply + start, sizeof(*reply) - start);
	return id;
}

/* Have attributes served from a handle, too. */
static bool own_handle(const struct owned *node, int fd)
{
	return keep_owned(&(struct owned){.node = node->node, .ino = node->ino, .fd = fd, .timeout = node->timeout});
}

/* ------------------------------------------------------------------ CREATE */

static bool is_plain_create(const struct fuse_in_header *in, const struct fuse_create_in *body)
{
	return !(body->flags & ~(uint32_t)(PLAIN | O_CREAT | O_EXCL | O_TRUNC)) &&
	       !(body->mode & (S_ISUID | S_ISGID)) && in->uid == geteuid() && in->gid == getegid();
}

/* The host itself applies the umask, or the directory's default ACL. */
static int make_file(int dirfd, const char *name, const struct fuse_create_in *body)
{
	mode_t before = umask(body->umask);
	int fd = openat(dirfd, name, (int)(body->flags & O_ACCMODE) | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
			body->mode & 07777);

	umask(before);
	return fd;
}

/* The st_ino to show for the file; 0, with errno set, if that fails. */
static uint64_t number_to_show(const struct stat *st)
{
	PyObject *number = PyObject_CallFunction(show_number, "KK", (unsigned long long)st->st_dev,
						 (unsigned long long)st->st_ino);
	uint64_t shown = number ? PyLong_AsUnsignedLongLong(number) : 0;

	Py_XDECREF(number);
	PyErr_Clear();
	errno = ENOMEM;
	return shown;
}

/* Have names that lead to a new file, and its attributes, served here. Without all that it is Python that serves them. */
static void note_file(const char *name, const struct owned *parent, struct owned *node, int fd)
{
	node->fd = open(path_of(fd).text, O_PATH | O_CLOEXEC);
	if (node->fd < 0)
		return;
	if (!keep_owned(node) || !own_handle(node, fd) || !know_name(parent->node, name, node->node)) {
		disown(node->node, -1);
		close(node->fd);
		node->fd = -1;
	}
}

/* The node of a file that was made in a directory. */
static struct owned new_node(const struct owned *parent, const struct stat *st, uint64_t number)
{
	return (struct owned){
		.node = next_node++,
		.ino = number,
		.path_only = true,
		.settable = true,
		.timeout = parent->timeout,
		.bind = parent->bind,
		.handles = 1,
		.host_dev = st->st_dev,
		.host_ino = st->st_ino,
	};
}

/* Answer for a new file that is open, then do the books and have Python do its own. */
static void reply_created(struct fuse_session *se, const struct fuse_in_header *in, const char *name,
			  const struct owned *parent, const struct stat *st, uint64_t number, int fd)
{
	struct owned node = new_node(parent, st, number);
	struct fuse_entry_param entry = {
		.ino = node.node,
		.attr = *st,
		.entry_timeout = node.timeout,
		.attr_timeout = attributes_last(&node),
	};
	struct opened reply;
	int id;

	entry.attr.st_ino = node.ino;
	reply.entry = raw_entry(&entry);
	id = reply_opened(se, in->unique, &reply, 0, fd);
	note_file(name, parent, &node, fd);
	call_and_log(tell_created, Py_BuildValue("KyKK(KK)i", in->nodeid, name, node.node, node.ino, node.host_dev,
						 node.host_ino, node.fd));
	call_and_log(tell_opened, Py_BuildValue("Kii", node.node, fd, id));
}

static bool create_here(struct fuse_session *se, const struct fuse_in_header *in, const struct fuse_create_in *body)
{
	const char *name = (const char *)(body + 1);
	const struct owned *parent = find_bound(in->nodeid);
	struct stat st;
	uint64_t number;
	int fd;

	if (!parent || !parent->settable || !is_plain_create(in, body) || is_reserved(name))
		return false;
	fd = make_file(parent->fd, name, body);
	if (fd < 0)
		return false;
	counters[CREATE]++;
	number = fstat(fd, &st) ? 0 : number_to_show(&st);
	if (number) {
		reply_created(se, in, name, parent, &st, number, fd);
	} else {
		reply_raw(se, in->unique, errno, NULL, 0);
		close(fd);
	}
	return true;
}

/* ------------------------------------------------------------------ OPEN */

static bool is_plain_open(const struct owned *node, const struct fuse_open_in *body)
{
	return node && node->settable && !node->handles && !(body->flags & ~(uint32_t)PLAIN);
}

static bool open_known(struct fuse_session *se, const struct fuse_in_header *in, const struct fuse_open_in *body)
{
	struct owned *node = find_bound(in->nodeid);
	struct opened reply;
	struct stat st;
	int fd, id;

	if (!is_plain_open(node, body))
		return false;
	fd = open(path_of(node->fd).text, (int)(body->flags & O_ACCMODE) | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		return false;
	if (fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_mode & (S_ISUID | S_ISGID) || !own_handle(node, fd)) {
		close(fd);
		return false;
	}
	counters[OPEN]++;
	note_handles(node, 1);
	id = reply_opened(se, in->unique, &reply, offsetof(struct opened, open), fd);
	call_and_log(tell_opened, Py_BuildValue("Kii", in->nodeid, fd, id));
	return true;
}

/* Answer an OPEN or CREATE if it can be done here; returns whether. */
bool open_here(struct fuse_session *se, const struct fuse_buf *buf)
{
	const struct fuse_in_header *in = buf->mem;
	const void *body = in + 1;

	if (!tell_created || buf->flags & FUSE_BUF_IS_FD || buf->size < sizeof(*in) || in->len > buf->size)
		return false;
	if (in->opcode == FUSE_OPEN && in->len >= sizeof(*in) + sizeof(struct fuse_open_in))
		return open_known(se, in, body);
	if (in->opcode == FUSE_CREATE && in->len > sizeof(*in) + sizeof(struct fuse_create_in) &&
	    !((const char *)in)[in->len - 1])
		return create_here(se, in, body);
	return false;
}

static PyObject *py_open_bound(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long first;
	PyObject *number, *created, *opened;

	if (!PyArg_ParseTuple(args, "KOOO", &first, &number, &created, &opened))
		return NULL;
	next_node = first;
	Py_XSETREF(show_number, Py_NewRef(number));
	Py_XSETREF(tell_created, Py_NewRef(created));
	Py_XSETREF(tell_opened, Py_NewRef(opened));
	Py_RETURN_NONE;
}

PyMethodDef bound_file_methods[] = {
	{"open_bound", py_open_bound, METH_VARARGS, "(first node id, number to show, created, opened): open files here."},
	{NULL, NULL, 0, NULL},
};
