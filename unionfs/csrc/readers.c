/*
 * Readers that share a handle.
 *
 * Most opens are for reading files that were read before. Such a file's handle is given to all who open it in the same
 * way at the same time, and kept a while when the last of them has closed it (*idle*). To Python it is one open handle,
 * whose RELEASE comes when it is taken back: because others are idle too, because there is no other descriptor left, or
 * because a request comes for the file that its open handles have a say in (another kind of open, SETATTR, FORGET).
 * Handles in use are shared no more then (*retired*).
 */
#include "native.h"

#include <fcntl.h>
#include <stdlib.h>

struct reader {
	struct reader *next; /* in its bucket */
	struct reader *older, *newer; /* idle ones, in the order in which they became so */
	fuse_ino_t node;
	uint64_t fh;
	unsigned int users;
	bool retired;
};

enum {
	READER_BUCKETS = 4096,
	AHEAD = 128 << 10, /* as much as the kernel reads ahead by default */
};

static struct reader *readers[READER_BUCKETS];
static struct reader *oldest_idle, *newest_idle;
static unsigned int idle_readers, most_idle;

/* Where the node's reader is, or would be. */
static struct reader **find_reader(fuse_ino_t node)
{
	struct reader **at = &readers[(node ^ node >> 12) % READER_BUCKETS];

	while (*at && (*at)->node != node)
		at = &(*at)->next;
	return at;
}

static void make_idle(struct reader *reader)
{
	reader->older = newest_idle;
	reader->newer = NULL;
	*(newest_idle ? &newest_idle->newer : &oldest_idle) = reader;
	newest_idle = reader;
	idle_readers++;
}

static void take_from_idle(struct reader *reader)
{
	*(reader->older ? &reader->older->newer : &oldest_idle) = reader->newer;
	*(reader->newer ? &reader->newer->older : &newest_idle) = reader->older;
	idle_readers--;
}

/* Have Python close an idle reader's handle. */
static void take_back(struct reader *reader)
{
	struct {
		struct fuse_in_header in;
		struct fuse_release_in body;
	} message = {
		.in = {.len = sizeof(message), .opcode = FUSE_RELEASE, .nodeid = reader->node},
		.body = {.fh = reader->fh},
	};

	take_from_idle(reader);
	*find_reader(reader->node) = reader->next;
	free(reader);
	tell_directly(&message.in);
}

/* A request is about to be handled in which the node's open handles have a say. */
static void retire_reader(fuse_ino_t node)
{
	struct reader *reader = *find_reader(node);

	if (reader && !reader->users)
		take_back(reader);
	else if (reader)
		reader->retired = true;
}

bool free_idle_readers(void)
{
	if (!oldest_idle)
		return false;
	while (oldest_idle)
		take_back(oldest_idle);
	return true;
}

static bool opens_to_share(const struct fuse_open_in *in)
{
	return !(in->flags & ~(uint32_t)NO_MATTER) && !in->open_flags;
}

static bool share_reader(struct fuse_session *se, const struct fuse_in_header *in)
{
	struct reader *reader = *find_reader(in->nodeid);
	struct open_reply reply = {.open_flags = FOPEN_KEEP_CACHE};

	if (!reader || reader->retired)
		return false;
	if (!reader->users++)
		take_from_idle(reader);
	reply.fh = reader->fh;
	reply_raw(se, in->unique, 0, (const char *)&reply, sizeof(reply));
	return true;
}

/* One user has closed it; returns false where it is Python's to close. */
static bool leave_reader(struct fuse_session *se, const struct fuse_in_header *in, uint64_t fh)
{
	struct reader **at = find_reader(in->nodeid), *reader = *at;

	if (!reader || reader->fh != fh)
		return false;
	if (--reader->users) {
		reply_raw(se, in->unique, 0, NULL, 0);
		return true;
	}
	if (reader->retired) {
		*at = reader->next;
		free(reader);
		return false;
	}
	make_idle(reader);
	reply_raw(se, in->unique, 0, NULL, 0);
	while (idle_readers > most_idle)
		take_back(oldest_idle);
	return true;
}

/* Answer an OPEN or RELEASE of what is shared; returns whether. See to it that other requests find no idle handle. */
bool serve_reader(struct fuse_session *se, const struct fuse_buf *buf)
{
	const struct fuse_in_header *in = buf->mem;
	const void *body = in + 1;
	bool served = false;

	if (!is_whole(buf, sizeof(struct fuse_open_in)))
		return false;
	switch (in->opcode) {
	case FUSE_OPEN:
		if (opens_to_share(body))
			served = share_reader(se, in);
		else
			retire_reader(in->nodeid);
		break;
	case FUSE_RELEASE:
		served = leave_reader(se, in, ((const struct fuse_release_in *)body)->fh);
		break;
	case FUSE_SETATTR:
	case FUSE_FORGET:
		retire_reader(in->nodeid);
		break;
	case FUSE_BATCH_FORGET:
		each_forgotten(in, retire_reader);
		break;
	default:
		break;
	}
	counters[SHARED] += served;
	return served;
}

static PyObject *py_keep_idle(PyObject *self UNUSED, PyObject *count)
{
	most_idle = (unsigned int)PyLong_AsUnsignedLong(count);
	return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *py_shared_flags(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyLong_FromLong(NO_MATTER);
}

static PyObject *py_share(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node, fh;
	struct reader **at, *reader;

	if (!PyArg_ParseTuple(args, "KK", &node, &fh))
		return NULL;
	at = find_reader(node);
	if (!*at) {
		reader = malloc(sizeof(*reader));
		if (!reader)
			return PyErr_NoMemory();
		*reader = (struct reader){.node = node, .fh = fh, .users = 1};
		*at = reader;
		/* Whoever opens a file reads it: what must come from a disk can come while the answer is on its way. */
		posix_fadvise((int)fh, 0, AHEAD, POSIX_FADV_WILLNEED);
	}
	Py_RETURN_NONE;
}

PyMethodDef reader_methods[] = {
	{"keep_idle", py_keep_idle, METH_O, "How many shared handles to keep that nobody uses."},
	{"shared_flags", py_shared_flags, METH_NOARGS, "Flags that the OPEN of a handle may have that others get, too."},
	{"share", py_share, METH_VARARGS, "(node, fh): the handle may be given to others who read the file."},
	{NULL, NULL, 0, NULL},
};
