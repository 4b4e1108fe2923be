/*
 * The session: pyfuse3's table of operations is wrapped on its way to libfuse.
 */
#include "native.h"

#include <dlfcn.h>
#include <string.h>

struct fuse_session *session;
struct fuse_lowlevel_ops python_ops;
static bool adopted; /* pyfuse3 has gone through our fuse_session_new */
static bool cache_directories; /* whether the kernel may keep listings until it changes the directory itself */
static bool auto_invalidate; /* before INIT: files change behind the mount, the kernel must look at mtime and size */

/*
 * pyfuse3 copies the fuse_file_info of a request and hands the copy to fuse_reply_open or fuse_reply_create. These
 * fields mean nothing there: lock_owner carries the node of an OPEN, poll_events whether it must clear suid and sgid.
 */
static void wrap_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	fi->lock_owner = ino;
	fi->poll_events = request.kill_suidgid;
	python_ops.open(req, ino, fi);
}

static void wrap_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *fi)
{
	python_ops.create(req, parent, name, mode, fi);
}

static void wrap_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags)
{
	request.xattr_flags = flags;
	python_ops.setxattr(req, ino, name, value, size, 0);
}

static void wrap_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	fi->lock_owner = 0; /* no file */
	fi->cache_readdir = fi->keep_cache = cache_directories;
	python_ops.opendir(req, ino, fi);
}

static void want(struct fuse_conn_info *conn, unsigned capability)
{
	conn->want |= conn->capable & capability;
}

/* Ask the kernel for what suits a file system whose every change goes through this mount. */
static void wrap_init(void *userdata, struct fuse_conn_info *conn)
{
	python_ops.init(userdata, conn);
	want(conn, FUSE_CAP_ATOMIC_O_TRUNC | FUSE_CAP_ASYNC_READ | FUSE_CAP_ASYNC_DIO | FUSE_CAP_PARALLEL_DIROPS);
	want(conn, FUSE_CAP_DONT_MASK); /* default ACLs override the umask, so ops applies it */
	want(conn, FUSE_CAP_CACHE_SYMLINKS);
	/* Names first and attributes one by one is how find goes through a big directory: they come along always. */
	conn->want &= ~(unsigned)FUSE_CAP_READDIRPLUS_AUTO;
	conn->want &= ~(unsigned)(FUSE_CAP_AUTO_INVAL_DATA | FUSE_CAP_WRITEBACK_CACHE);
	want(conn, auto_invalidate ? FUSE_CAP_AUTO_INVAL_DATA : FUSE_CAP_EXPLICIT_INVAL_DATA);
	conn->want &= ~(unsigned)FUSE_CAP_HANDLE_KILLPRIV; /* version 2 instead, see process_init */
	conn->want &= ~(unsigned)FUSE_CAP_SPLICE_READ; /* costs a second system call for every small request */
	conn->max_write = 1 << 20;
	conn->max_readahead = 1 << 20;
	conn->max_background = 64;
	conn->congestion_threshold = 48;
}

static void wrap_ops(struct fuse_lowlevel_ops *ops)
{
	ops->init = wrap_init;
	ops->getattr = wrap_getattr;
	ops->setattr = wrap_setattr;
	ops->getxattr = wrap_getxattr;
	ops->fsync = wrap_fsync;
	ops->release = wrap_release;
	ops->open = wrap_open;
	ops->create = wrap_create;
	ops->opendir = wrap_opendir;
	ops->setxattr = wrap_setxattr;
	ops->read = serve_read;
	ops->write = serve_write;
	ops->write_buf = NULL; /* libfuse would prefer it */
	ops->lseek = serve_lseek;
	ops->fallocate = serve_fallocate;
	ops->copy_file_range = serve_copy_file_range;
	ops->ioctl = serve_ioctl;
	ops->flush = serve_flush;
}

static struct fuse_session *adopt(struct fuse_session *new_session)
{
	adopted = new_session != NULL;
	session = new_session;
	return session;
}

static const struct fuse_lowlevel_ops *adopt_ops(const struct fuse_lowlevel_ops *ops, size_t size)
{
	static struct fuse_lowlevel_ops ours;

	memset(&python_ops, 0, sizeof(python_ops));
	memcpy(&python_ops, ops, size < sizeof(python_ops) ? size : sizeof(python_ops));
	ours = python_ops;
	wrap_ops(&ours);
	return &ours;
}

/* Up to libfuse 3.16 this is the function that programs call; from 3.17 on it is a macro for the one that follows. */
#undef fuse_session_new
struct libfuse_version;
HOOK struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size,
					   void *userdata)
{
	return adopt(REAL(fuse_session_new)(args, adopt_ops(ops, size), sizeof(*ops), userdata));
}

HOOK struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *ops,
						     size_t size, struct libfuse_version *version, void *userdata)
{
	return adopt(REAL(fuse_session_new_versioned)(args, adopt_ops(ops, size), sizeof(*ops), version, userdata));
}

HOOK void fuse_session_destroy(struct fuse_session *se)
{
	wait_for_jobs();
	if (se == session)
		session = NULL;
	REAL(fuse_session_destroy)(se);
}

/* ------------------------------------------------------------------ what Python calls */

/* Whether a library loaded from now on finds our definitions first. */
static PyObject *py_in_scope(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyBool_FromLong(dlsym(RTLD_DEFAULT, "fuse_session_new") == (void *)fuse_session_new);
}

static PyObject *py_active(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyBool_FromLong(adopted);
}

static PyObject *py_cache_directories(PyObject *self UNUSED, PyObject *on)
{
	cache_directories = PyObject_IsTrue(on) == 1;
	Py_RETURN_NONE;
}

static PyObject *py_auto_invalidate(PyObject *self UNUSED, PyObject *args UNUSED)
{
	auto_invalidate = true;
	Py_RETURN_NONE;
}

PyMethodDef session_methods[] = {
	{"in_scope", py_in_scope, METH_NOARGS, "Whether libraries loaded from now on find this module's functions."},
	{"active", py_active, METH_NOARGS, "Whether pyfuse3's session was made through this module."},
	{"cache_directories", py_cache_directories, METH_O, "Whether the kernel may keep listings."},
	{"auto_invalidate", py_auto_invalidate, METH_NOARGS, "Ask the kernel to look at mtime and size when mounting."},
	{NULL, NULL, 0, NULL},
};
