/*
 * The short way into Python (unionfs/fuse/direct.py).
 */
#include "native.h"

#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPCODES = 64 };

static PyObject *direct[OPCODES]; /* who answers requests with this opcode, if anyone */
static PyObject *direct_failed; /* is told of errors that are no OSError */

void reply_raw(struct fuse_session *se, uint64_t unique, int error, const char *data, size_t size)
{
	struct fuse_out_header out = {
		.len = (uint32_t)(sizeof(out) + size),
		.error = -error,
		.unique = unique,
	};
	struct iovec iov[2] = {
		{.iov_base = &out, .iov_len = sizeof(out)},
		{.iov_base = (void *)(uintptr_t)data, .iov_len = size},
	};

	/* It can only fail because nobody waits for the answer any more. */
	if (writev(fuse_session_fd(se), iov, size ? 2 : 1) < 0)
		errno = 0;
}

static void run_sync_and_close(const struct job *job)
{
	int error = fsync(job->fd) ? errno : 0;

	close(job->fd);
	reply_raw(session, job->unique, error, NULL, 0);
}

/* The answer comes from a thread; the handler that called this says so by returning True. */
static PyObject *py_sync_later(PyObject *self UNUSED, PyObject *fd)
{
	struct job job = {.run = run_sync_and_close, .unique = request.unique, .fd = (int)PyLong_AsLong(fd)};

	if (PyErr_Occurred())
		return NULL;
	submit(&job);
	Py_RETURN_TRUE;
}

/* The errno of the exception that is set, which is cleared. */
static int errno_of_exception(void)
{
	PyObject *type, *value, *traceback;
	int error = EIO;

	PyErr_Fetch(&type, &value, &traceback);
	PyErr_NormalizeException(&type, &value, &traceback);
	if (traceback)
		PyException_SetTraceback(value, traceback);
	if (PyErr_GivenExceptionMatches(value, PyExc_OSError)) {
		PyObject *number = PyObject_GetAttrString(value, "errno");

		if (number && PyLong_Check(number))
			error = (int)PyLong_AsLong(number);
		Py_XDECREF(number);
	} else if (direct_failed) {
		if (PyErr_GivenExceptionMatches(value, PyExc_MemoryError))
			error = ENOMEM;
		Py_XDECREF(PyObject_CallOneArg(direct_failed, value));
	}
	PyErr_Clear();
	Py_XDECREF(type);
	Py_XDECREF(value);
	Py_XDECREF(traceback);
	return error > 0 ? error : EIO;
}

static PyObject *call_direct(PyObject *handler, const struct fuse_in_header *in)
{
	PyObject *args[5] = {
		PyLong_FromUnsignedLongLong(in->nodeid),
		PyLong_FromUnsignedLong(in->uid),
		PyLong_FromUnsignedLong(in->gid),
		PyLong_FromUnsignedLong(in->pid),
		PyBytes_FromStringAndSize((const char *)(in + 1), (Py_ssize_t)(in->len - sizeof(*in))),
	};
	PyObject *result = NULL;

	if (args[0] && args[1] && args[2] && args[3] && args[4])
		result = PyObject_Vectorcall(handler, args, 5, NULL);
	for (int i = 0; i < 5; i++)
		Py_XDECREF(args[i]);
	return result;
}

/*
 * Call a handler; where it returns NULL, *error is set. An operation that failed for want of a descriptor has done
 * nothing, so it is tried again if there are some to spare.
 */
static PyObject *attempt_direct(PyObject *handler, const struct fuse_in_header *in, int *error)
{
	PyObject *result = call_direct(handler, in);

	*error = result ? 0 : errno_of_exception();
	if (*error == EMFILE && free_idle_readers()) {
		result = call_direct(handler, in);
		*error = result ? 0 : errno_of_exception();
	}
	return result;
}

/*
 * Have Python answer the request at once: with the body of the answer, with an errno, with True if the answer comes
 * later, or with None, which leaves the request to pyfuse3. Returns whether it is done with.
 */
bool answer_directly(struct fuse_session *se, const struct fuse_buf *buf)
{
	const struct fuse_in_header *in = buf->mem;
	PyObject *result;
	bool answered = true, silent;
	int error;

	if (!is_whole(buf, 0) || in->opcode >= OPCODES || !direct[in->opcode])
		return false;
	silent = in->opcode == FUSE_FORGET || in->opcode == FUSE_BATCH_FORGET;
	note_request(buf);
	result = attempt_direct(direct[in->opcode], in, &error);
	if (!result) {
		if (!silent)
			reply_raw(se, in->unique, error, NULL, 0);
	} else if (result == Py_None) {
		answered = false;
	} else if (result == Py_True) {
		PyErr_Clear(); /* the answer comes later */
	} else if (!silent && PyBytes_Check(result)) {
		reply_raw(se, in->unique, 0, PyBytes_AS_STRING(result), (size_t)PyBytes_GET_SIZE(result));
	} else if (!silent) {
		reply_raw(se, in->unique, (int)PyLong_AsLong(result), NULL, 0);
	}
	PyErr_Clear();
	Py_XDECREF(result);
	counters[DIRECT] += answered;
	return answered;
}

void tell_directly(const struct fuse_in_header *in)
{
	PyObject *result;

	if (!direct[in->opcode])
		return;
	result = call_direct(direct[in->opcode], in);
	if (!result)
		errno_of_exception();
	Py_XDECREF(result);
}

void call_and_log(PyObject *handler, PyObject *args)
{
	PyObject *result = args ? PyObject_CallObject(handler, args) : NULL;

	if (!result)
		errno_of_exception();
	Py_XDECREF(result);
	Py_XDECREF(args);
}

static PyObject *py_set_direct(PyObject *self UNUSED, PyObject *args)
{
	unsigned int opcode;
	PyObject *handler;

	if (!PyArg_ParseTuple(args, "IO", &opcode, &handler))
		return NULL;
	if (opcode >= OPCODES) {
		PyErr_SetString(PyExc_ValueError, "no such opcode");
		return NULL;
	}
	Py_XSETREF(direct[opcode], handler == Py_None ? NULL : Py_NewRef(handler));
	Py_RETURN_NONE;
}

static PyObject *py_set_direct_failed(PyObject *self UNUSED, PyObject *handler)
{
	Py_XSETREF(direct_failed, handler == Py_None ? NULL : Py_NewRef(handler));
	Py_RETURN_NONE;
}

PyMethodDef direct_methods[] = {
	{"set_direct", py_set_direct, METH_VARARGS, "(opcode, handler): who answers such requests at once."},
	{"set_direct_failed", py_set_direct_failed, METH_O, "Who is told of exceptions that are no OSError."},
	{"sync_later", py_sync_later, METH_O, "Sync and close the descriptor in a thread, and answer the request with that."},
	{NULL, NULL, 0, NULL},
};
