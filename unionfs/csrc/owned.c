/*
 * Attributes of what is open in upper.
 *
 * Python says of a node that its attributes are those of an open descriptor's file, apart from st_ino: something in
 * upper about which the union has nothing to decide. GETATTR, SETATTR, FSYNC and the xattrs that the kernel itself asks
 * for (ACL, capability) are then served here; of a directory also the LOOKUP of a name that isn't there, which comes
 * before each creation. A node may have several such descriptors.
 */
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { OWNED_BUCKETS = 4096 };

static struct owned *owned_by_node[OWNED_BUCKETS];

static bool ignore_sync; /* a volatile union: what is written need not last */

struct owned **bucket(fuse_ino_t node)
{
	return &owned_by_node[(node ^ node >> 12) % OWNED_BUCKETS];
}

struct owned *find_owned(fuse_ino_t node)
{
	struct owned *owned = *bucket(node);

	while (owned && owned->node != node)
		owned = owned->next;
	return owned;
}

/* Names that mean the same in the union and on disk. */
bool can_get(const struct owned *owned, const char *name)
{
	if (!owned || (owned->path_only && !owned->bind && !owned->upper_dir))
		return false;
	return !strcmp(name, "security.capability") || !strcmp(name, "system.posix_acl_access");
}

/* A size comes here from ftruncate(2), through its handle; truncate(2) treats times otherwise, and is Python's. */
#define SETTABLE \
	(FUSE_SET_ATTR_MODE | FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID | FUSE_SET_ATTR_SIZE | FUSE_SET_ATTR_ATIME | \
	 FUSE_SET_ATTR_MTIME | FUSE_SET_ATTR_ATIME_NOW | FUSE_SET_ATTR_MTIME_NOW)

/* Nothing to change is what chown(path, -1, -1) sends: it clears suid, and Python knows who may do that. */
bool can_set(const struct owned *owned, int to_set, bool by_handle)
{
	if (!owned || !(to_set & SETTABLE))
		return false;
	if (to_set & FUSE_SET_ATTR_SIZE && !by_handle)
		return false;
	return !owned->path_only || (owned->settable && !(to_set & FUSE_SET_ATTR_SIZE));
}

struct fd_path path_of(int fd)
{
	struct fd_path path;

	snprintf(path.text, sizeof(path.text), "/proc/self/fd/%d", fd);
	return path;
}

static int set_mode(const struct owned *owned, mode_t mode)
{
	return owned->path_only ? chmod(path_of(owned->fd).text, mode) : fchmod(owned->fd, mode);
}

static int set_times(const struct owned *owned, const struct timespec times[2])
{
	return owned->path_only ? utimensat(AT_FDCWD, path_of(owned->fd).text, times, 0) : futimens(owned->fd, times);
}

/*
 * How long the kernel may keep attributes. Of a bind path's object that is not open: until the clock's next tick but one,
 * the shortest time that there is. Every use of a path asks for its names, so what the same use needs of attributes is
 * as fresh as that (unionfs/core/bind.py has the rest).
 */
double attributes_last(const struct owned *owned)
{
	const double a_tick = 1e-6;

	return owned->bind && !owned->timeout && !owned->handles && !owned->root ? a_tick : owned->timeout;
}

/* A write through a backing file may clear suid and sgid without a request: while one is set, the kernel must ask. */
static void reply_attributes(fuse_req_t req, const struct owned *owned)
{
	struct stat st;

	if (fstat(owned->fd, &st)) {
		fuse_reply_err(req, errno);
		return;
	}
	st.st_ino = owned->ino;
	fuse_reply_attr(req, &st, S_ISREG(st.st_mode) && st.st_mode & (S_ISUID | S_ISGID) ? 0 : attributes_last(owned));
}

void wrap_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	const struct owned *owned = find_owned(ino);

	if (!owned) {
		python_ops.getattr(req, ino, fi);
		return;
	}
	counters[GETATTR]++;
	reply_attributes(req, owned);
}

static struct timespec time_to_set(int to_set, int set, int set_now, struct timespec value)
{
	if (to_set & set_now)
		return (struct timespec){.tv_nsec = UTIME_NOW};
	return to_set & set ? value : (struct timespec){.tv_nsec = UTIME_OMIT};
}

/* In the order that chown, which clears suid, and then chmod and the times need. Returns an errno. */
static int set_attributes(fuse_req_t req, const struct owned *owned, const struct stat *attr, int to_set,
			  const struct fuse_file_info *fi)
{
	struct timespec times[2] = {
		time_to_set(to_set, FUSE_SET_ATTR_ATIME, FUSE_SET_ATTR_ATIME_NOW, attr->st_atim),
		time_to_set(to_set, FUSE_SET_ATTR_MTIME, FUSE_SET_ATTR_MTIME_NOW, attr->st_mtim),
	};
	uid_t uid = to_set & FUSE_SET_ATTR_UID ? attr->st_uid : (uid_t)-1;
	gid_t gid = to_set & FUSE_SET_ATTR_GID ? attr->st_gid : (gid_t)-1;

	if (to_set & FUSE_SET_ATTR_SIZE) {
		if (ftruncate((int)fi->fh, attr->st_size))
			return errno;
		if (request.kill_suidgid)
			remove_suidgid(req, owned->node, owned->fd);
	}
	if (to_set & (FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID) && fchownat(owned->fd, "", uid, gid, AT_EMPTY_PATH))
		return errno;
	if (to_set & FUSE_SET_ATTR_MODE && set_mode(owned, attr->st_mode & 07777))
		return errno;
	if ((times[0].tv_nsec != UTIME_OMIT || times[1].tv_nsec != UTIME_OMIT) && set_times(owned, times))
		return errno;
	return 0;
}

void wrap_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set, struct fuse_file_info *fi)
{
	const struct owned *owned = find_owned(ino);
	int error;

	if (!can_set(owned, to_set, fi)) {
		python_ops.setattr(req, ino, attr, to_set, fi);
		return;
	}
	counters[SETATTR]++;
	error = set_attributes(req, owned, attr, to_set, fi);
	if (error)
		fuse_reply_err(req, error);
	else
		reply_attributes(req, owned);
}

void wrap_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size)
{
	const struct owned *owned = find_owned(ino);
	char value[65536]; /* XATTR_SIZE_MAX */
	ssize_t n;

	if (!can_get(owned, name)) {
		python_ops.getxattr(req, ino, name, size);
		return;
	}
	counters[GETXATTR]++;
	if (size > sizeof(value))
		size = sizeof(value);
	n = owned->path_only ? getxattr(path_of(owned->fd).text, name, value, size) : fgetxattr(owned->fd, name, value, size);
	if (n < 0)
		fuse_reply_err(req, errno);
	else if (size == 0)
		fuse_reply_xattr(req, (size_t)n);
	else
		fuse_reply_buf(req, value, (size_t)n);
}

static void run_fsync(const struct job *job)
{
	int error = job->mode ? fdatasync(job->fd) : fsync(job->fd);

	fuse_reply_err(job->req, error ? errno : 0);
}

void wrap_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
	if (!find_owned(ino)) {
		python_ops.fsync(req, ino, datasync, fi);
		return;
	}
	counters[FSYNC]++;
	if (ignore_sync)
		fuse_reply_err(req, 0);
	else
		submit(&(struct job){.run = run_fsync, .req = req, .fd = (int)fi->fh, .mode = datasync});
}

bool keep_owned(const struct owned *given)
{
	struct owned *owned = malloc(sizeof(*owned));

	if (!owned)
		return false;
	*owned = *given;
	owned->next = *bucket(given->node);
	*bucket(given->node) = owned;
	return true;
}

PyObject *add_owned(const struct owned *given)
{
	return keep_owned(given) ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

static PyObject *py_own(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node, ino;
	double timeout;
	int fd, flags, upper_dir;

	if (!PyArg_ParseTuple(args, "KiKdp", &node, &fd, &ino, &timeout, &upper_dir))
		return NULL;
	flags = fcntl(fd, F_GETFL);
	if (flags < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	return add_owned(&(struct owned){
		.node = node,
		.ino = ino,
		.fd = fd,
		.path_only = flags & O_PATH,
		.upper_dir = upper_dir,
		.timeout = timeout,
	});
}

void disown(fuse_ino_t node, int fd)
{
	struct owned **at = bucket(node);

	while (*at) {
		struct owned *owned = *at;

		if (owned->node == node && (fd < 0 || owned->fd == fd)) {
			*at = owned->next;
			free(owned);
		} else {
			at = &owned->next;
		}
	}
}

/* Python is about to close the descriptor. */
void wrap_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	disown(ino, (int)fi->fh);
	python_ops.release(req, ino, fi);
}

static PyObject *py_disown(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node;
	int fd;

	if (!PyArg_ParseTuple(args, "Ki", &node, &fd))
		return NULL;
	disown(node, fd);
	Py_RETURN_NONE;
}

static PyObject *py_ignore_sync(PyObject *self UNUSED, PyObject *on)
{
	ignore_sync = PyObject_IsTrue(on) == 1;
	Py_RETURN_NONE;
}

PyMethodDef owned_methods[] = {
	{"own", py_own, METH_VARARGS, "(node, fd, st_ino, timeout, upper_dir): serve the node's attributes from fd."},
	{"disown", py_disown, METH_VARARGS, "(node, fd): stop that; fd -1: for all descriptors of the node."},
	{"ignore_sync", py_ignore_sync, METH_O, "Whether syncing owned files does nothing."},
	{NULL, NULL, 0, NULL},
};
