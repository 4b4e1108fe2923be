/*
 * Raw requests: what libfuse drops of them, and the INIT exchange.
 */
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Protocol 7.40, which older headers lack. */
#define INIT_EXT (UINT32_C(1) << 30) /* in flags: flags2 holds the bits from 32 on */
#define INIT2_PASSTHROUGH (UINT32_C(1) << (37 - 32))
#define INIT2_RESEND (UINT32_C(1) << (39 - 32)) /* the kernel knows FUSE_NOTIFY_RESEND */

struct request request;
static bool ask_passthrough; /* before INIT: whether to ask for it */
static bool old_kernel; /* before INIT: take the kernel for one that lacks all that libfuse doesn't know */
bool passthrough;
static char init_message[512]; /* as the kernel sent it: it sends none to a daemon that takes the mount over */
static size_t init_size;
static bool killpriv_v2; /* the kernel leaves the clearing of suid and sgid to us, and says when */

/* Whether the message asks for suid and sgid to be cleared: flags that libfuse does not pass on. */
static bool asks_to_kill(uint32_t opcode, const void *body, size_t size)
{
	switch (opcode) {
	case FUSE_WRITE: {
		const struct fuse_write_in *in = body;
		return size >= sizeof(*in) && in->write_flags & FUSE_WRITE_KILL_SUIDGID;
	}
	case FUSE_OPEN: {
		const struct fuse_open_in *in = body;
		return size >= sizeof(*in) && in->open_flags & FUSE_OPEN_KILL_SUIDGID;
	}
	case FUSE_CREATE: {
		const struct fuse_create_in *in = body;
		return size >= sizeof(*in) && in->open_flags & FUSE_OPEN_KILL_SUIDGID;
	}
	case FUSE_SETATTR: {
		const struct fuse_setattr_in *in = body;
		return size >= sizeof(*in) && in->valid & FATTR_KILL_SUIDGID;
	}
	default:
		return false;
	}
}

bool is_whole(const struct fuse_buf *buf, size_t body)
{
	const struct fuse_in_header *in = buf->mem;

	return !(buf->flags & FUSE_BUF_IS_FD) && buf->size >= sizeof(*in) + body && in->len >= sizeof(*in) + body &&
	       in->len <= buf->size;
}

void each_forgotten(const struct fuse_in_header *in, void (*act)(fuse_ino_t node))
{
	const struct fuse_batch_forget_in *batch = (const void *)(in + 1);
	const struct fuse_forget_one *each = (const void *)(batch + 1);

	for (uint32_t i = 0; i < batch->count && (const char *)(each + i + 1) <= (const char *)in + in->len; i++)
		act(each[i].nodeid);
}

void note_request(const struct fuse_buf *buf)
{
	const struct fuse_in_header *in = buf->mem;

	memset(&request, 0, sizeof(request));
	if (buf->flags & FUSE_BUF_IS_FD || buf->size < sizeof(*in))
		return;
	request.opcode = in->opcode;
	request.uid = in->uid;
	request.nodeid = in->nodeid;
	request.unique = in->unique;
	request.kill_suidgid = asks_to_kill(in->opcode, in + 1, buf->size - sizeof(*in));
}

/* Amend libfuse's answer to INIT by what this libfuse can't ask for. Returns the size to send. */
static size_t amend_init(char *reply, size_t size, const struct fuse_init_in *in)
{
	struct fuse_init_out *out = (struct fuse_init_out *)(reply + sizeof(struct fuse_out_header));
	const uint32_t stack_depth = 1; /* layers on stacked file systems go without; an overlay may be put over us */

	if (old_kernel || size < sizeof(struct fuse_out_header) + sizeof(*out))
		return size; /* or an error, or a protocol from before these flags */
	if (ask_passthrough && in->flags & INIT_EXT && in->flags2 & INIT2_PASSTHROUGH) {
		out->flags |= INIT_EXT;
		out->flags2 |= INIT2_PASSTHROUGH;
		memcpy(&out->flags2 + 1, &stack_depth, sizeof(stack_depth)); /* max_stack_depth */
		passthrough = true;
	}
	out->flags |= in->flags & FUSE_PARALLEL_DIROPS; /* libfuse 3.14 takes the wish and forgets it */
	if (in->flags & FUSE_HANDLE_KILLPRIV_V2) {
		out->flags |= FUSE_HANDLE_KILLPRIV_V2;
		out->flags &= ~(uint32_t)FUSE_HANDLE_KILLPRIV;
		killpriv_v2 = true;
	}
	return size;
}

/*
 * Let libfuse answer INIT into a socket in place of the device, and amend the answer. libfuse writes to the descriptor
 * that it knows by number; nothing else uses it yet. Returns the size of the answer, -1 if there can be no socket.
 */
static ssize_t answer_init(struct fuse_session *se, const struct fuse_buf *buf, char *reply, size_t room)
{
	const struct fuse_init_in *in = (const void *)((const struct fuse_in_header *)buf->mem + 1);
	int device = fuse_session_fd(se);
	int saved, pair[2];
	ssize_t size;

	saved = fcntl(device, F_DUPFD_CLOEXEC, 0);
	if (saved < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
		if (saved >= 0)
			close(saved);
		return -1;
	}
	dup3(pair[1], device, O_CLOEXEC);
	REAL(fuse_session_process_buf)(se, buf);
	dup3(saved, device, O_CLOEXEC);
	size = recv(pair[0], reply, room, MSG_DONTWAIT);
	close(pair[0]);
	close(pair[1]);
	close(saved);
	return size <= 0 ? 0 : (ssize_t)amend_init(reply, (size_t)size, in);
}

static void process_init(struct fuse_session *se, const struct fuse_buf *buf)
{
	char reply[4096] __attribute__((aligned(8)));
	ssize_t size;

	if (buf->size <= sizeof(init_message)) {
		memcpy(init_message, buf->mem, buf->size);
		init_size = buf->size;
	}
	size = answer_init(se, buf, reply, sizeof(reply));
	if (size < 0)
		REAL(fuse_session_process_buf)(se, buf); /* plain INIT: fewer features, still right */
	else if (size > 0 && write(fuse_session_fd(se), reply, (size_t)size) != size)
		fuse_session_exit(se);
}

HOOK void fuse_session_process_buf(struct fuse_session *se, const struct fuse_buf *buf)
{
	note_request(buf);
	if (se == session && request.opcode == FUSE_INIT &&
	    buf->size >= sizeof(struct fuse_in_header) + 4 * sizeof(uint32_t))
		process_init(se, buf);
	else
		REAL(fuse_session_process_buf)(se, buf);
}

/* ------------------------------------------------------------------ what Python calls */

static PyObject *py_killpriv_v2(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyBool_FromLong(killpriv_v2);
}

static PyObject *py_ask_passthrough(PyObject *self UNUSED, PyObject *args UNUSED)
{
	ask_passthrough = true;
	Py_RETURN_NONE;
}

static PyObject *py_pretend_old_kernel(PyObject *self UNUSED, PyObject *args UNUSED)
{
	old_kernel = true;
	Py_RETURN_NONE;
}

static PyObject *py_passthrough(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyBool_FromLong(passthrough);
}

static PyObject *py_xattr_flags(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyLong_FromLong(request.xattr_flags);
}

static PyObject *py_kill_suidgid(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyBool_FromLong(request.kill_suidgid);
}

static PyObject *py_unique(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyLong_FromUnsignedLongLong(request.unique);
}

static PyObject *py_device(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyLong_FromLong(session ? fuse_session_fd(session) : -1);
}

static PyObject *py_init_message(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyBytes_FromStringAndSize(init_message, (Py_ssize_t)init_size);
}

static PyObject *py_resends(PyObject *self UNUSED, PyObject *args UNUSED)
{
	const struct fuse_init_in *in = (const void *)(init_message + sizeof(struct fuse_in_header));

	return PyBool_FromLong(!old_kernel && init_size >= sizeof(struct fuse_in_header) + sizeof(*in) &&
			       in->flags & INIT_EXT && in->flags2 & INIT2_RESEND);
}

/* Agree with libfuse on what was agreed on with the kernel when another daemon had the mount. */
static PyObject *py_resume(PyObject *self UNUSED, PyObject *args)
{
	char reply[4096] __attribute__((aligned(8)));
	const char *message;
	Py_ssize_t size;
	struct fuse_buf buf = {.mem = init_message};

	if (!PyArg_ParseTuple(args, "y#", &message, &size))
		return NULL;
	if (!session || size < (Py_ssize_t)(sizeof(struct fuse_in_header) + sizeof(struct fuse_init_in)) ||
	    size > (Py_ssize_t)sizeof(init_message)) {
		PyErr_SetString(PyExc_ValueError, "no such INIT");
		return NULL;
	}
	memcpy(init_message, message, (size_t)size);
	buf.size = init_size = (size_t)size;
	note_request(&buf);
	if (answer_init(session, &buf, reply, sizeof(reply)) <= 0) {
		PyErr_SetString(PyExc_OSError, "libfuse does not answer INIT");
		return NULL;
	}
	Py_RETURN_NONE;
}

PyMethodDef request_methods[] = {
	{"unique", py_unique, METH_NOARGS, "The number of the request being dispatched."},
	{"device", py_device, METH_NOARGS, "The session's descriptor, -1 without a session."},
	{"init_message", py_init_message, METH_NOARGS, "The kernel's INIT."},
	{"resends", py_resends, METH_NOARGS, "Whether the kernel sends again what was not answered, if asked to."},
	{"resume", py_resume, METH_VARARGS, "(message): take the kernel's INIT as answered."},
	{"killpriv_v2", py_killpriv_v2, METH_NOARGS, "Whether the kernel leaves suid and sgid to us."},
	{"xattr_flags", py_xattr_flags, METH_NOARGS, "The flags of the SETXATTR being dispatched."},
	{"kill_suidgid", py_kill_suidgid, METH_NOARGS, "Whether the request being dispatched must clear suid and sgid."},
	{"ask_passthrough", py_ask_passthrough, METH_NOARGS, "Ask the kernel for passthrough when mounting."},
	{"pretend_old_kernel", py_pretend_old_kernel, METH_NOARGS, "Use nothing of the kernel that libfuse doesn't know."},
	{"passthrough", py_passthrough, METH_NOARGS, "Whether the kernel has granted passthrough."},
	{NULL, NULL, 0, NULL},
};
