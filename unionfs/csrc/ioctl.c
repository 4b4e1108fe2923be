/*
 * Inode flags and project attributes. They are the union's to say (immutable is kept in an attribute, a metacopy's are
 * not those of its data), to set them takes a copy-up, and a directory's handle is no descriptor: Python's handler gets
 * the request as a capsule and answers it now or later. Without a handler reading is served on the descriptor.
 */
#include "native.h"

#include <errno.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>

static PyObject *ioctl_handler;
static const char REQUEST[] = "unionfs request";
static const char ANSWERED[] = "unionfs answered request";

static void forget_request(PyObject *capsule)
{
	fuse_req_t req = PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule));

	if (PyCapsule_IsValid(capsule, REQUEST) && session)
		fuse_reply_err(req, EIO);
}

static void ask_python(fuse_req_t req, fuse_ino_t ino, unsigned int cmd, const struct fuse_file_info *fi,
		       const void *in, size_t in_size)
{
	PyObject *capsule = PyCapsule_New(req, REQUEST, forget_request);
	PyObject *result;

	if (!capsule) {
		PyErr_Clear();
		fuse_reply_err(req, ENOMEM);
		return;
	}
	result = PyObject_CallFunction(ioctl_handler, "OKKIy#", capsule, (unsigned long long)ino,
				       (unsigned long long)fi->fh, cmd, in_size ? in : "", (Py_ssize_t)in_size);
	if (!result)
		PyErr_WriteUnraisable(ioctl_handler);
	Py_XDECREF(result);
	Py_DECREF(capsule);
}

static PyObject *py_answer_ioctl(PyObject *self UNUSED, PyObject *args)
{
	PyObject *capsule;
	const char *data;
	Py_ssize_t size;
	int error;
	fuse_req_t req;

	if (!PyArg_ParseTuple(args, "Oiy#", &capsule, &error, &data, &size))
		return NULL;
	req = PyCapsule_GetPointer(capsule, REQUEST);
	if (!req || PyCapsule_SetName(capsule, ANSWERED))
		return NULL;
	if (!session)
		Py_RETURN_NONE;
	if (error)
		fuse_reply_err(req, error);
	else
		fuse_reply_ioctl(req, 0, data, (size_t)size);
	Py_RETURN_NONE;
}

static PyObject *py_set_ioctl_handler(PyObject *self UNUSED, PyObject *handler)
{
	Py_XSETREF(ioctl_handler, handler == Py_None ? NULL : Py_NewRef(handler));
	Py_RETURN_NONE;
}

static void get_inode_flags(fuse_req_t req, unsigned int cmd, int fd, size_t out_size)
{
	union {
		unsigned int flags;
		struct fsxattr xattr;
	} value;
	size_t size = cmd == FS_IOC_GETFLAGS ? sizeof(value.flags) : sizeof(value.xattr);

	memset(&value, 0, sizeof(value));
	if (out_size < size)
		fuse_reply_err(req, EINVAL);
	else if (ioctl(fd, cmd, &value))
		fuse_reply_err(req, errno);
	else
		fuse_reply_ioctl(req, 0, &value, size);
}

void serve_ioctl(fuse_req_t req, fuse_ino_t ino, unsigned int cmd, void *arg UNUSED, struct fuse_file_info *fi,
			unsigned flags, const void *in, size_t in_size, size_t out_size)
{
	bool get = cmd == FS_IOC_GETFLAGS || cmd == FS_IOC_FSGETXATTR;
	bool set = cmd == FS_IOC_SETFLAGS || cmd == FS_IOC_FSSETXATTR;

	counters[IOCTL]++;
	if ((get || set) && ioctl_handler)
		ask_python(req, ino, cmd, fi, in, in_size);
	else if (get && !(flags & FUSE_IOCTL_DIR))
		get_inode_flags(req, cmd, lazy_source(ino, (int)fi->fh), out_size);
	else
		fuse_reply_err(req, ENOTTY);
}

PyMethodDef ioctl_methods[] = {
	{"set_ioctl_handler", py_set_ioctl_handler, METH_O, "Who answers (request, node, fh, cmd, data)."},
	{"answer_ioctl", py_answer_ioctl, METH_VARARGS, "(request, errno, data)"},
	{NULL, NULL, 0, NULL},
};
