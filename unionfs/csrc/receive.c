/*
 * Receiving (unionfs/fuse/dispatch.py says why).
 */
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/resource.h>
#include <time.h>

static bool driving; /* dispatch.py decides when to wait: the device must never block */
static bool drained; /* the device had nothing at the last look */
static int64_t spin_ns; /* how long at most to look for the next request before sleeping */
static int64_t linger_ns; /* how long to sleep then, before the loop is asked to wait */
static int loop_fd = -1; /* becomes readable when other tasks of the loop have something to do */
static int64_t slice_ns; /* how long to go on without letting other tasks run */
static int64_t slice_end;

static int64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Whether our own handlers answer the request without entering Python: what they will decide again, on the same facts. */
static bool served_here(const struct fuse_buf *buf)
{
	const struct fuse_in_header *in = buf->mem;
	const void *body = in + 1;

	if (buf->flags & FUSE_BUF_IS_FD || buf->size < sizeof(*in) + 16)
		return false;
	switch (in->opcode) {
	case FUSE_READ:
	case FUSE_WRITE:
	case FUSE_LSEEK:
	case FUSE_FALLOCATE:
	case FUSE_COPY_FILE_RANGE:
	case FUSE_IOCTL:
	case FUSE_FLUSH:
		return true;
	case FUSE_GETATTR:
	case FUSE_FSYNC:
		return find_owned(in->nodeid);
	case FUSE_SETATTR:
		return can_set(find_owned(in->nodeid), (int)((const struct fuse_setattr_in *)body)->valid,
			       ((const struct fuse_setattr_in *)body)->valid & FATTR_FH);
	case FUSE_GETXATTR: /* a terminated name follows the struct */
		return can_get(find_owned(in->nodeid), (const char *)body + sizeof(struct fuse_getxattr_in));
	default:
		return false;
	}
}

/* Whether the device has a request within the time, which ends early if the loop's other tasks have something to do. */
static bool readable_within(int device, int64_t timeout_ns)
{
	struct pollfd fds[2] = {{.fd = device, .events = POLLIN}, {.fd = loop_fd, .events = POLLIN}};
	struct timespec timeout = {.tv_nsec = timeout_ns};

	return ppoll(fds, loop_fd >= 0 ? 2 : 1, &timeout, NULL) > 0 && fds[0].revents;
}

/*
 * Wait a moment for the next request, other threads running meanwhile: first awake, since waking up on another
 * processor takes longer than a caller needs to come back, then asleep.
 *
 * How long awake is learnt, as the kernel's haltpoll governor does it: longer where the next request comes within
 * `spin_ns`, shorter where it doesn't. Where others want the processor, yielding it costs a whole turn of theirs: then
 * only asleep. (A host may take the processor away for as long, which is no reason: only the kernel's count of switches
 * tells these two apart.)
 */
enum { SHORTEST_NS = 20000, CONTENDED_NS = 1000000, LEAVE_ALONE_NS = 200000000 };

static long switches(void)
{
	struct rusage usage;

	return getrusage(RUSAGE_THREAD, &usage) ? 0 : usage.ru_nivcsw;
}

static int receive(struct fuse_session *se, struct fuse_buf *buf)
{
	return REAL(fuse_session_receive_buf)(se, buf);
}

/* Try to receive until the time; sets *contended if another thread had the processor for a turn of its own. */
static int spin_until(struct fuse_session *se, struct fuse_buf *buf, int64_t end, bool *contended)
{
	long before = switches();
	int64_t now = now_ns();
	int result = -EAGAIN;

	while (result == -EAGAIN && now < end) {
		int64_t yielded = now;

		sched_yield();
		result = receive(se, buf);
		now = now_ns();
		*contended = *contended || (now - yielded > CONTENDED_NS && switches() != before);
	}
	return result;
}

/* Receive what comes within a moment; -EAGAIN if nothing does. */
static int linger(struct fuse_session *se, struct fuse_buf *buf)
{
	static int64_t contended_until, spin = SHORTEST_NS;
	int64_t start = now_ns();
	bool contended = false;
	int result = -EAGAIN;

	Py_BEGIN_ALLOW_THREADS
	if (start >= contended_until)
		result = spin_until(se, buf, start + spin, &contended);
	if (result == -EAGAIN && linger_ns && readable_within(fuse_session_fd(se), linger_ns))
		result = receive(se, buf);
	Py_END_ALLOW_THREADS
	if (contended)
		contended_until = now_ns() + LEAVE_ALONE_NS;
	if (result != -EAGAIN && now_ns() - start < spin_ns)
		spin = spin < spin_ns / 2 ? spin * 2 : spin_ns;
	else
		spin = spin > SHORTEST_NS * 2 ? spin / 2 : SHORTEST_NS;
	return result;
}

static int receive_now(struct fuse_session *se, struct fuse_buf *buf)
{
	for (;;) {
		int result = receive(se, buf);

		if (result == -EAGAIN)
			result = linger(se, buf);
		if (result == -EAGAIN) {
			drained = true;
			return -EINTR; /* pyfuse3 then goes back to wait_readable */
		}
		if (result <= 0)
			return result;
		if (serve_reader(se, buf) || serve_lister(se, buf)) {
			/* answered */
		} else if (served_here(buf))
			fuse_session_process_buf(se, buf);
		else if (!look_here(se, buf) && !open_here(se, buf) && !lack_here(se, buf) && !answer_directly(se, buf))
			return result;
		if (now_ns() >= slice_end)
			return -EINTR;
	}
}

HOOK int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
	static bool nonblocking;

	if (se != session || !driving)
		return REAL(fuse_session_receive_buf)(se, buf);
	if (!nonblocking) {
		int device = fuse_session_fd(se);

		fcntl(device, F_SETFL, fcntl(device, F_GETFL) | O_NONBLOCK);
		nonblocking = true;
	}
	return receive_now(se, buf);
}

/* ------------------------------------------------------------------ what Python calls */

static PyObject *py_drive(PyObject *self UNUSED, PyObject *args)
{
	double spin_seconds, linger_seconds, slice_seconds;

	if (!PyArg_ParseTuple(args, "dddi", &spin_seconds, &linger_seconds, &slice_seconds, &loop_fd))
		return NULL;
	spin_ns = (int64_t)(spin_seconds * 1e9);
	linger_ns = (int64_t)(linger_seconds * 1e9);
	slice_ns = (int64_t)(slice_seconds * 1e9);
	driving = true;
	Py_RETURN_NONE;
}

static PyObject *py_drained(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyBool_FromLong(drained);
}

static PyObject *py_may_receive(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyBool_FromLong(!drained && now_ns() < slice_end);
}

static PyObject *py_new_slice(PyObject *self UNUSED, PyObject *args UNUSED)
{
	drained = false;
	slice_end = now_ns() + slice_ns;
	Py_RETURN_NONE;
}

PyMethodDef receive_methods[] = {
	{"drive", py_drive, METH_VARARGS, "(spin, linger, slice, fd of the loop): never block in receiving."},
	{"drained", py_drained, METH_NOARGS, "Whether the device had no request at the last look."},
	{"may_receive", py_may_receive, METH_NOARGS, "Whether to go on receiving without waiting or yielding."},
	{"new_slice", py_new_slice, METH_NOARGS, "Start the next stretch of receiving."},
	{NULL, NULL, 0, NULL},
};
