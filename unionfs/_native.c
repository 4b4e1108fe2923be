/*
 * The native layer between libfuse and pyfuse3.
 *
 * Concept.  pyfuse3 calls libfuse by name.  This module is loaded with RTLD_GLOBAL before pyfuse3, so the dynamic
 * linker finds the functions defined here first; each does its own part and calls on to libfuse's (RTLD_NEXT):
 *
 *   fuse_session_new            wraps pyfuse3's table of operations: `init` asks for more capabilities, and what needs
 *                               no union decision (data of open files) is served here, on the host descriptor in fi->fh
 *   fuse_session_receive_buf    reads the device without blocking, and answers on the spot what is served here, or by
 *                               handlers that are called past pyfuse3 (direct.py)
 *   fuse_session_process_buf    sees every raw request first: protocol flags that libfuse drops, and the INIT exchange
 *   fuse_reply_open/_create/... add to the answers what pyfuse3 can't express
 *
 * Everything here runs on the thread of pyfuse3's loop and with the GIL held, unless a comment says otherwise; static
 * state is therefore unlocked.  One process serves one mount.
 *
 * If the functions are not found first (another loader, a statically linked libfuse), none of them is called, active()
 * stays False, and pyfuse3 works as if this module did not exist.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define FUSE_USE_VERSION 35
#include <fuse_lowlevel.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/fs.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#include "_lazy.h"

/* Protocol 7.40, which older headers lack. */
#define INIT_EXT (UINT32_C(1) << 30) /* in flags: flags2 holds the bits from 32 on */
#define INIT2_PASSTHROUGH (UINT32_C(1) << (37 - 32))
#define OPEN_NOFLUSH (UINT32_C(1) << 5)
#define OPEN_PASSTHROUGH (UINT32_C(1) << 7)

struct backing_map {
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};
#define BACKING_OPEN _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)

struct open_reply {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};

#define HOOK __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))
#define PAGE 4096

/* The next definition of a libfuse function, looked up once. */
#define REAL(name) \
	({ \
		static __typeof__(name) *real_; \
		if (!real_) \
			real_ = (__typeof__(real_))next_symbol(#name); \
		real_; \
	})

static void *next_symbol(const char *name)
{
	void *symbol = dlsym(RTLD_NEXT, name);

	if (!symbol)
		Py_FatalError("unionfs._native: libfuse lacks a function that pyfuse3 uses");
	return symbol;
}

/* ------------------------------------------------------------------ state */

enum counter { LOOKUP, READ, WRITE, LSEEK, FALLOCATE, COPY_FILE_RANGE, IOCTL, FLUSH, KILL_SUIDGID, PASSTHROUGH, GETATTR, SETATTR, GETXATTR, FSYNC,
	       DIRECT, SHARED, COUNTERS };

static const char *const counter_names[COUNTERS] = {
	"lookup", "read", "write", "lseek", "fallocate", "copy_file_range", "ioctl", "flush", "kill_suidgid", "passthrough",
	"getattr", "setattr", "getxattr", "fsync", "direct", "shared",
};

static uint64_t counters[COUNTERS];
static struct fuse_session *session; /* pyfuse3's, from our fuse_session_new to our fuse_session_destroy */
static bool adopted; /* pyfuse3 has gone through our fuse_session_new */
static struct fuse_lowlevel_ops python_ops; /* pyfuse3's own handlers */
static bool ask_passthrough; /* before INIT: whether to ask for it */
static bool old_kernel; /* before INIT: take the kernel for one that lacks all that libfuse doesn't know */
static bool ignore_sync; /* a volatile union: what is written need not last */
static bool plain_listings; /* before INIT: whether READDIR is answered as well as READDIRPLUS */
static bool cache_directories; /* whether the kernel may keep listings until it changes the directory itself */
static bool auto_invalidate; /* before INIT: files change behind the mount, the kernel must look at mtime and size */
static bool passthrough; /* after INIT: whether the kernel has it */
static bool killpriv_v2; /* the kernel leaves the clearing of suid and sgid to us, and says when */

/* What the raw message says about the request now in the hands of fuse_session_process_buf. */
static struct {
	uint32_t opcode;
	uint32_t uid;
	uint64_t nodeid;
	uint64_t unique;
	bool kill_suidgid;
	int xattr_flags; /* of SETXATTR; pyfuse3 doesn't hand them on but asks for the attribute first */
} request;

/* ------------------------------------------------------------------ suid, sgid */

/* Whether the caller's groups include one; his supplementary groups are in /proc only. */
static bool caller_in_group(fuse_req_t req, gid_t group)
{
	gid_t few[64], *groups = few;
	int count;
	bool found = fuse_req_ctx(req)->gid == group;

	if (found)
		return true;
	count = fuse_req_getgroups(req, 64, few);
	if (count > 64) {
		groups = malloc((size_t)count * sizeof(*groups));
		count = groups ? fuse_req_getgroups(req, count, groups) : 0;
	}
	for (int i = 0; i < count && !found; i++)
		found = groups[i] == group;
	if (groups != few)
		free(groups);
	return found;
}

/*
 * Clear suid, and sgid unless it means nothing (no group execution) and the caller is of the group: what
 * setattr_should_drop_suidgid() says of a caller without CAP_FSETID. The host kernel spares us because the daemon has
 * that capability; security.capability it removes itself. The kernel's copy of the mode is stale then, and exec trusts
 * it: drop it. (Only attributes: takes no lock that a request holds.)
 */
static void remove_suidgid(fuse_req_t req, fuse_ino_t ino, int fd)
{
	struct stat st;
	mode_t drop;

	if (fstat(fd, &st) || !S_ISREG(st.st_mode) || !(st.st_mode & (S_ISUID | S_ISGID)))
		return;
	drop = st.st_mode & S_ISUID;
	if (st.st_mode & S_ISGID && (st.st_mode & S_IXGRP || !caller_in_group(req, st.st_gid)))
		drop |= S_ISGID;
	if (!drop || fchmod(fd, st.st_mode & 07777 & ~drop))
		return;
	counters[KILL_SUIDGID]++;
	fuse_lowlevel_notify_inval_inode(session, ino, -1, 0);
}

/* Requests that carry no flag of their own: spare only the user who has CAP_FSETID for certain. */
static void remove_suidgid_unless_root(fuse_req_t req, fuse_ino_t ino, int fd)
{
	if (fuse_req_ctx(req)->uid != 0)
		remove_suidgid(req, ino, fd);
}

/* ------------------------------------------------------------------ what may take long */

/* A system call that may take long, and its answer: made by one of a few threads that know nothing of Python. */
struct job {
	void (*run)(const struct job *job);
	struct job *next;
	fuse_req_t req;
	uint64_t unique; /* in place of req, of a request that libfuse has not seen */
	int fd, fd_out;
	off_t off, off_out;
	size_t size;
	int mode;
	void *data; /* owned by the job */
	struct lazy *lazy, *lazy_out; /* what must be there first of fd and fd_out, if anything is missing (_lazy.h) */
};

enum { MOST_WORKERS = 8 };

static pthread_mutex_t jobs_lock = PTHREAD_MUTEX_INITIALIZER; /* guards the rest */
static pthread_cond_t job_added = PTHREAD_COND_INITIALIZER;
static pthread_cond_t jobs_done = PTHREAD_COND_INITIALIZER;
static struct job *first_job, **last_job = &first_job;
static int workers, idle_workers;
static int unfinished; /* jobs waiting or running */

static struct job *next_job_locked(void)
{
	struct job *job;

	while (!first_job) {
		idle_workers++;
		pthread_cond_wait(&job_added, &jobs_lock);
		idle_workers--;
	}
	job = first_job;
	first_job = job->next;
	if (!first_job)
		last_job = &first_job;
	return job;
}

static void *work(void *unused UNUSED)
{
	pthread_mutex_lock(&jobs_lock);
	for (;;) {
		struct job *job = next_job_locked();

		pthread_mutex_unlock(&jobs_lock);
		job->run(job);
		free(job);
		pthread_mutex_lock(&jobs_lock);
		if (--unfinished == 0)
			pthread_cond_broadcast(&jobs_done);
	}
	return NULL;
}

/* Signals are Python's: the workers block all of them. */
static void add_worker_locked(void)
{
	sigset_t all, before;
	pthread_t thread;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	if (!pthread_create(&thread, NULL, work, NULL)) {
		pthread_detach(thread);
		workers++;
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Have a copy of the job done; here and now if there can't be a thread. */
static void submit(const struct job *job)
{
	struct job *copy = malloc(sizeof(*copy));
	bool queued = false;

	pthread_mutex_lock(&jobs_lock);
	if (copy && !idle_workers && workers < MOST_WORKERS)
		add_worker_locked();
	if (copy && workers) {
		*copy = *job;
		copy->next = NULL;
		*last_job = copy;
		last_job = &copy->next;
		unfinished++;
		pthread_cond_signal(&job_added);
		queued = true;
	}
	pthread_mutex_unlock(&jobs_lock);
	if (!queued) {
		free(copy);
		job->run(job);
	}
}

/* A job answers through the session: it must not go away before. */
HOOK void fuse_session_destroy(struct fuse_session *se)
{
	Py_BEGIN_ALLOW_THREADS
	pthread_mutex_lock(&jobs_lock);
	while (unfinished)
		pthread_cond_wait(&jobs_done, &jobs_lock);
	pthread_mutex_unlock(&jobs_lock);
	Py_END_ALLOW_THREADS
	if (se == session)
		session = NULL;
	REAL(fuse_session_destroy)(se);
}

/* ------------------------------------------------------------------ data of open files, on the descriptor fi->fh */

static void reply_length(fuse_req_t req, ssize_t length, int error)
{
	if (length < 0)
		fuse_reply_err(req, error);
	else
		fuse_reply_write(req, (size_t)length);
}

/* A second descriptor of a file: what is behind the number of a handle may be exchanged while a job waits. */
static int second_descriptor(int fd)
{
	return fcntl(fd, F_DUPFD_CLOEXEC, 0);
}

/* See to it that a range of a file whose data follows is there; gives the reference back. Returns an errno. */
static int complete(struct lazy *lazy, off_t off, size_t size)
{
	int error = lazy ? lazy_need(lazy, off, size) : 0;

	if (lazy)
		lazy_put(lazy);
	return error;
}

static void run_read(const struct job *job)
{
	int error = complete(job->lazy, job->off, job->size);
	void *buffer = NULL;
	ssize_t n;

	if (!error && job->fd < 0)
		error = EMFILE;
	if (!error)
		error = posix_memalign(&buffer, PAGE, job->size);
	if (error) {
		fuse_reply_err(job->req, error);
		close(job->fd);
		return;
	}
	do
		n = pread(job->fd, buffer, job->size, job->off);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		fuse_reply_err(job->req, errno);
	else
		fuse_reply_buf(job->req, buffer, (size_t)n);
	free(buffer);
	close(job->fd);
}

/*
 * What the host has in its cache, if that is all that there is to read; else -1. Less than asked for may also mean
 * that the rest is not cached, but the kernel would take it for the end of the file.
 */
static ssize_t read_cached(int fd, char *buffer, size_t size, off_t off)
{
	struct iovec iov = {.iov_base = buffer, .iov_len = size};
	ssize_t n = preadv2(fd, &iov, 1, off, RWF_NOWAIT);
	struct stat st;

	if (n < 0 || (size_t)n == size)
		return n;
	return !fstat(fd, &st) && off + n >= st.st_size ? n : -1;
}

static void serve_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	static char buffer[1 << 20] __attribute__((aligned(PAGE))); /* aligned: the descriptor may be O_DIRECT */
	struct lazy *lazy = lazy_missing(ino, off, size);
	ssize_t n = size <= sizeof(buffer) && !lazy ? read_cached((int)fi->fh, buffer, size, off) : -1;

	counters[READ]++;
	if (n >= 0)
		fuse_reply_buf(req, buffer, (size_t)n);
	else
		submit(&(struct job){
			.run = run_read,
			.req = req,
			.fd = second_descriptor((int)fi->fh),
			.off = off,
			.size = size,
			.lazy = lazy,
		});
}

static void write_all(fuse_req_t req, int fd, const char *buf, size_t size, off_t off, int flags)
{
	size_t done = 0;

	while (done < size) {
		struct iovec iov = {.iov_base = (char *)buf + done, .iov_len = size - done};
		ssize_t n = pwritev2(fd, &iov, 1, off + (off_t)done, flags);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && done == 0) {
			fuse_reply_err(req, errno);
			return;
		}
		if (n <= 0)
			break; /* what has been written counts, the next write gets the error */
		done += (size_t)n;
	}
	fuse_reply_write(req, done);
}

static void run_write(const struct job *job)
{
	int error = complete(job->lazy, job->off, job->size);

	if (error)
		fuse_reply_err(job->req, error);
	else
		write_all(job->req, job->fd, job->data, job->size, job->off, job->mode);
	free(job->data);
}

/* What the write touches must be there before. */
static void write_later(struct job job, const char *buf)
{
	job.run = run_write;
	job.data = malloc(job.size);
	if (!job.data) {
		lazy_put(job.lazy);
		fuse_reply_err(job.req, ENOMEM);
		return;
	}
	memcpy(job.data, buf, job.size);
	submit(&job);
}

/*
 * An appending writer's offset is the end of the file as the kernel knows it, but others may append behind the mount:
 * the host finds the end. Pages of a shared mapping have their offset, whatever handle they are written through.
 */
static void serve_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off,
			struct fuse_file_info *fi)
{
	int flags = fi->flags & O_APPEND && !fi->writepage ? RWF_APPEND : 0;
	struct lazy *lazy = lazy_missing(ino, off, size);

	counters[WRITE]++;
	lazy_wrote(ino);
	if (request.kill_suidgid)
		remove_suidgid(req, ino, (int)fi->fh);
	if (lazy)
		write_later((struct job){.req = req, .fd = (int)fi->fh, .off = off, .size = size, .mode = flags, .lazy = lazy},
			    buf);
	else
		write_all(req, (int)fi->fh, buf, size, off, flags);
}

/* Holes and sizes are those of the whole file: where its data follows, all of it must be there. */
static const size_t ALL = SIZE_MAX;

static void reply_lseek(fuse_req_t req, int fd, off_t off, int whence)
{
	off_t found = lseek(fd, off, whence); /* moves an offset that nobody uses */

	if (found < 0)
		fuse_reply_err(req, errno);
	else
		fuse_reply_lseek(req, found);
}

static void run_lseek(const struct job *job)
{
	int error = complete(job->lazy, 0, ALL);

	if (error)
		fuse_reply_err(job->req, error);
	else
		reply_lseek(job->req, job->fd, job->off, job->mode);
}

static void serve_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi)
{
	struct lazy *lazy = lazy_missing(ino, 0, ALL);
	int fd = (int)fi->fh;

	counters[LSEEK]++;
	if (lazy)
		submit(&(struct job){.run = run_lseek, .req = req, .fd = fd, .off = off, .mode = whence, .lazy = lazy});
	else
		reply_lseek(req, fd, off, whence);
}

static void run_fallocate(const struct job *job)
{
	int error = complete(job->lazy, 0, ALL);

	while (!error || error == EINTR) {
		error = fallocate(job->fd, job->mode, job->off, (off_t)job->size) ? errno : 0;
		if (!error)
			break;
	}
	fuse_reply_err(job->req, error);
}

static void serve_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t length,
			    struct fuse_file_info *fi)
{
	counters[FALLOCATE]++;
	lazy_wrote(ino);
	remove_suidgid_unless_root(req, ino, (int)fi->fh);
	submit(&(struct job){
		.run = run_fallocate,
		.req = req,
		.fd = (int)fi->fh,
		.off = off,
		.size = (size_t)length,
		.mode = mode,
		.lazy = lazy_missing(ino, 0, ALL),
	});
}

static void run_copy_file_range(const struct job *job)
{
	off_t off = job->off, off_out = job->off_out;
	int error = complete(job->lazy, off, job->size);
	int error_out = complete(job->lazy_out, off_out, job->size);
	ssize_t n = -1;

	error = error ? error : error_out;
	if (!error && job->fd < 0)
		error = EMFILE;
	while (n < 0 && (!error || error == EINTR)) {
		n = copy_file_range(job->fd, &off, job->fd_out, &off_out, job->size, (unsigned)job->mode);
		error = n < 0 ? errno : 0;
	}
	reply_length(job->req, n, error);
	close(job->fd);
}

/* Errors such as EXDEV go back as they are: the kernel then copies through the page cache. */
static void serve_copy_file_range(fuse_req_t req, fuse_ino_t ino_in, off_t off_in,
				  struct fuse_file_info *fi_in, fuse_ino_t ino_out, off_t off_out,
				  struct fuse_file_info *fi_out, size_t length, int flags)
{
	counters[COPY_FILE_RANGE]++;
	lazy_wrote(ino_out);
	remove_suidgid_unless_root(req, ino_out, (int)fi_out->fh);
	submit(&(struct job){
		.run = run_copy_file_range,
		.req = req,
		.fd = second_descriptor((int)fi_in->fh),
		.off = off_in,
		.fd_out = (int)fi_out->fh,
		.off_out = off_out,
		.size = length,
		.mode = flags,
		.lazy = lazy_missing(ino_in, off_in, length),
		.lazy_out = lazy_missing(ino_out, off_out, length),
	});
}

/*
 * Inode flags and project attributes. The kernel opens the file read-only for these, so the descriptor may belong to a
 * lower layer: only reading is served on it. To set them takes a copy-up, and a directory's handle is no descriptor:
 * that is asked of Python's handler, which gets the request as a capsule and answers it now or later.
 */
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

static void serve_ioctl(fuse_req_t req, fuse_ino_t ino, unsigned int cmd, void *arg UNUSED, struct fuse_file_info *fi,
			unsigned flags, const void *in, size_t in_size, size_t out_size)
{
	bool get = cmd == FS_IOC_GETFLAGS || cmd == FS_IOC_FSGETXATTR;
	bool set = cmd == FS_IOC_SETFLAGS || cmd == FS_IOC_FSSETXATTR;

	counters[IOCTL]++;
	if (get && !(flags & FUSE_IOCTL_DIR))
		get_inode_flags(req, cmd, lazy_source(ino, (int)fi->fh), out_size);
	else if ((get || set) && ioctl_handler)
		ask_python(req, ino, cmd, fi, in, in_size);
	else
		fuse_reply_err(req, ENOTTY);
}

/* close(2) on an overlay has nothing to do and no error to report; after ENOSYS the kernel never asks again. */
static void serve_flush(fuse_req_t req, fuse_ino_t ino UNUSED, struct fuse_file_info *fi UNUSED)
{
	counters[FLUSH]++;
	fuse_reply_err(req, ENOSYS);
}

/* ------------------------------------------------------------------ attributes of what is open in upper */

/*
 * Python says of a node that its attributes are those of an open descriptor's file, apart from st_ino: something in
 * upper about which the union has nothing to decide. GETATTR, SETATTR, FSYNC and the xattrs that the kernel itself asks
 * for (ACL, capability) are then served here; of a directory also the LOOKUP of a name that isn't there, which comes
 * before each creation. A node may have several such descriptors.
 */
struct owned {
	struct owned *next;
	fuse_ino_t node;
	ino_t ino; /* the st_ino to show */
	int fd;
	bool path_only; /* O_PATH */
	bool settable; /* path_only: whether SETATTR is served all the same */
	bool upper_dir; /* a directory that upper alone makes up: what is absent there is absent in the union */
	double timeout;
	/* Of the one descriptor that a node of a bind path keeps, see "names in bind paths"; zeros elsewhere. */
	unsigned int bind; /* which bind path's it is, counted from 1 */
	unsigned int handles; /* how many files are open */
	bool root;
	dev_t host_dev;
	ino_t host_ino;
	uint64_t lookups; /* answered here, not yet told to Python */
};

enum { OWNED_BUCKETS = 4096 };

static struct owned *owned_by_node[OWNED_BUCKETS];

static struct owned **bucket(fuse_ino_t node)
{
	return &owned_by_node[(node ^ node >> 12) % OWNED_BUCKETS];
}

static struct owned *find_owned(fuse_ino_t node)
{
	struct owned *owned = *bucket(node);

	while (owned && owned->node != node)
		owned = owned->next;
	return owned;
}

/* Names that mean the same in the union and on disk. */
static bool can_get(const struct owned *owned, const char *name)
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
static bool can_set(const struct owned *owned, int to_set, bool by_handle)
{
	if (!owned || !(to_set & SETTABLE))
		return false;
	if (to_set & FUSE_SET_ATTR_SIZE && !by_handle)
		return false;
	return !owned->path_only || (owned->settable && !(to_set & FUSE_SET_ATTR_SIZE));
}

/* What leads to the descriptor's file, for calls that refuse O_PATH. */
struct fd_path {
	char text[32];
};

static struct fd_path path_of(int fd)
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
 * as fresh as that (unionfs/bind.py has the rest).
 */
static double attributes_last(const struct owned *owned)
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

static void wrap_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
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

static void wrap_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set, struct fuse_file_info *fi)
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

static void wrap_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size)
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

static void wrap_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
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

static PyObject *py_own(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node, ino;
	struct owned *owned;
	double timeout;
	int fd, flags, upper_dir;

	if (!PyArg_ParseTuple(args, "KiKdp", &node, &fd, &ino, &timeout, &upper_dir))
		return NULL;
	flags = fcntl(fd, F_GETFL);
	if (flags < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	owned = malloc(sizeof(*owned));
	if (!owned)
		return PyErr_NoMemory();
	*owned = (struct owned){
		.next = *bucket(node),
		.node = node,
		.ino = ino,
		.fd = fd,
		.path_only = flags & O_PATH,
		.upper_dir = upper_dir,
		.timeout = timeout,
	};
	*bucket(node) = owned;
	Py_RETURN_NONE;
}

/* Any descriptor of the node if fd is negative. */
static void disown(fuse_ino_t node, int fd)
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
static void wrap_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
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

/* ------------------------------------------------------------------ the session */

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
	if (plain_listings)
		want(conn, FUSE_CAP_READDIRPLUS_AUTO);
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

/* ------------------------------------------------------------------ raw requests */

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

static void note_request(const struct fuse_buf *buf)
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
 * Let libfuse answer INIT into a socket in place of the device, amend the answer, and send it. libfuse writes to the
 * descriptor that it knows by number; nothing else uses it yet.
 */
static void process_init(struct fuse_session *se, const struct fuse_buf *buf)
{
	const struct fuse_init_in *in = (const void *)((const struct fuse_in_header *)buf->mem + 1);
	int device = fuse_session_fd(se);
	int saved, pair[2];
	char reply[4096] __attribute__((aligned(8)));
	ssize_t size;

	saved = fcntl(device, F_DUPFD_CLOEXEC, 0);
	if (saved < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
		if (saved >= 0)
			close(saved);
		REAL(fuse_session_process_buf)(se, buf); /* plain INIT: fewer features, still right */
		return;
	}
	dup3(pair[1], device, O_CLOEXEC);
	REAL(fuse_session_process_buf)(se, buf);
	dup3(saved, device, O_CLOEXEC);
	size = recv(pair[0], reply, sizeof(reply), MSG_DONTWAIT);
	close(pair[0]);
	close(pair[1]);
	close(saved);
	if (size <= 0)
		return;
	size = (ssize_t)amend_init(reply, (size_t)size, in);
	if (write(device, reply, (size_t)size) != size)
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

/* ------------------------------------------------------------------ the short way into Python (unionfs/direct.py) */

enum { OPCODES = 64 };

static PyObject *direct[OPCODES]; /* who answers requests with this opcode, if anyone */
static PyObject *direct_failed; /* is told of errors that are no OSError */

static void reply_raw(struct fuse_session *se, uint64_t unique, int error, const char *data, size_t size)
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
 * Have Python answer the request at once: with the body of the answer, with an errno, with True if the answer comes
 * later, or with None, which leaves the request to pyfuse3. Returns whether it is done with.
 */
static bool answer_directly(struct fuse_session *se, const struct fuse_buf *buf)
{
	const struct fuse_in_header *in = buf->mem;
	PyObject *result;
	bool answered = true, silent;

	if (buf->flags & FUSE_BUF_IS_FD || buf->size < sizeof(*in) || in->opcode >= OPCODES || !direct[in->opcode] ||
	    in->len < sizeof(*in) || in->len > buf->size)
		return false;
	silent = in->opcode == FUSE_FORGET || in->opcode == FUSE_BATCH_FORGET;
	note_request(buf);
	result = call_direct(direct[in->opcode], in);
	if (!result) {
		int error = errno_of_exception();

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

/* Where os.stat_result has its fields. */
enum { ST_MODE, ST_INO, ST_DEV, ST_NLINK, ST_UID, ST_GID, ST_SIZE, ST_ATIME, ST_MTIME, ST_CTIME,
       ST_ATIME_NS = 13, ST_MTIME_NS, ST_CTIME_NS, ST_BLKSIZE, ST_BLOCKS, ST_RDEV };

static long long field(PyObject *st, int index)
{
	return PyLong_AsLongLong(PyStructSequence_GetItem(st, index));
}

/* The nanoseconds since 1970 may take more than 64 bits, what is left of them after the whole seconds doesn't. */
static struct timespec time_field(PyObject *st, int seconds_at, int ns_at)
{
	long long seconds = field(st, seconds_at);
	uint64_t ns = PyLong_AsUnsignedLongLongMask(PyStructSequence_GetItem(st, ns_at));

	return (struct timespec){.tv_sec = seconds, .tv_nsec = (long)(ns - (uint64_t)seconds * 1000000000)};
}

static struct fuse_attr attributes_of(PyObject *st, uint64_t ino, long long nlink, long long blocks)
{
	struct timespec atime = time_field(st, ST_ATIME, ST_ATIME_NS);
	struct timespec mtime = time_field(st, ST_MTIME, ST_MTIME_NS);
	struct timespec ctime = time_field(st, ST_CTIME, ST_CTIME_NS);

	return (struct fuse_attr){
		.ino = ino,
		.size = (uint64_t)field(st, ST_SIZE),
		.blocks = (uint64_t)(blocks < 0 ? field(st, ST_BLOCKS) : blocks),
		.atime = (uint64_t)atime.tv_sec,
		.mtime = (uint64_t)mtime.tv_sec,
		.ctime = (uint64_t)ctime.tv_sec,
		.atimensec = (uint32_t)atime.tv_nsec,
		.mtimensec = (uint32_t)mtime.tv_nsec,
		.ctimensec = (uint32_t)ctime.tv_nsec,
		.mode = (uint32_t)field(st, ST_MODE),
		.nlink = (uint32_t)(nlink < 0 ? field(st, ST_NLINK) : nlink),
		.uid = (uint32_t)field(st, ST_UID),
		.gid = (uint32_t)field(st, ST_GID),
		.rdev = (uint32_t)field(st, ST_RDEV),
		.blksize = (uint32_t)field(st, ST_BLKSIZE),
	};
}

static void split_seconds(double seconds, uint64_t *whole, uint32_t *nanoseconds)
{
	bool endless = seconds >= 1e18;

	*whole = endless ? UINT64_C(1000000000000000000) : seconds > 0 ? (uint64_t)seconds : 0;
	*nanoseconds = endless || seconds <= 0 ? 0 : (uint32_t)((seconds - (double)*whole) * 1e9);
}

static bool is_stat(PyObject *st)
{
	if (!strcmp(Py_TYPE(st)->tp_name, "os.stat_result"))
		return true;
	PyErr_SetString(PyExc_TypeError, "not an os.stat_result");
	return false;
}

static PyObject *py_pack_entry(PyObject *self UNUSED, PyObject *const *args, Py_ssize_t count)
{
	struct fuse_entry_out out = {0};

	if (count != 7) {
		PyErr_SetString(PyExc_TypeError, "7 arguments");
		return NULL;
	}
	if (!is_stat(args[6]))
		return NULL;
	out.nodeid = PyLong_AsUnsignedLongLong(args[0]);
	split_seconds(PyFloat_AsDouble(args[2]), &out.entry_valid, &out.entry_valid_nsec);
	split_seconds(PyFloat_AsDouble(args[3]), &out.attr_valid, &out.attr_valid_nsec);
	out.attr = attributes_of(args[6], PyLong_AsUnsignedLongLong(args[1]), PyLong_AsLongLong(args[4]),
				 PyLong_AsLongLong(args[5]));
	return PyErr_Occurred() ? NULL : PyBytes_FromStringAndSize((const char *)&out, sizeof(out));
}

static PyObject *py_pack_attributes(PyObject *self UNUSED, PyObject *const *args, Py_ssize_t count)
{
	struct fuse_attr_out out = {0};

	if (count != 5) {
		PyErr_SetString(PyExc_TypeError, "5 arguments");
		return NULL;
	}
	if (!is_stat(args[4]))
		return NULL;
	split_seconds(PyFloat_AsDouble(args[1]), &out.attr_valid, &out.attr_valid_nsec);
	out.attr = attributes_of(args[4], PyLong_AsUnsignedLongLong(args[0]), PyLong_AsLongLong(args[2]),
				 PyLong_AsLongLong(args[3]));
	return PyErr_Occurred() ? NULL : PyBytes_FromStringAndSize((const char *)&out, sizeof(out));
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

/* ------------------------------------------------------------------ readers that share a handle */

/*
 * Most opens are for reading files that were read before. Such a file's handle is given to all who open it in the same
 * way at the same time, and kept a while when the last of them has closed it (*idle*). To Python it is one open handle,
 * whose RELEASE comes when it is taken back: because others are idle too, or because a request comes for the file
 * that its open handles have a say in (another kind of open, SETATTR, FORGET). Handles in use are shared no more then
 * (*retired*).
 */
struct reader {
	struct reader *next; /* in its bucket */
	struct reader *older, *newer; /* idle ones, in the order in which they became so */
	fuse_ino_t node;
	uint64_t fh;
	unsigned int users;
	bool retired;
};

enum { READER_BUCKETS = 4096 };

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
	if (direct[FUSE_RELEASE]) {
		PyObject *result = call_direct(direct[FUSE_RELEASE], &message.in);

		if (!result)
			errno_of_exception();
		Py_XDECREF(result);
	}
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

static bool opens_to_share(const struct fuse_open_in *in)
{
	const uint32_t harmless = 0100000 /* O_LARGEFILE */ | 040 /* FMODE_EXEC */ | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK;

	return !(in->flags & ~harmless) && !in->open_flags;
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

static void retire_forgotten(const struct fuse_in_header *in)
{
	const struct fuse_batch_forget_in *batch = (const void *)(in + 1);
	const struct fuse_forget_one *each = (const void *)(batch + 1);

	for (uint32_t i = 0; i < batch->count && (const char *)(each + i + 1) <= (const char *)in + in->len; i++)
		retire_reader(each[i].nodeid);
}

/* Answer an OPEN or RELEASE of what is shared; returns whether. See to it that other requests find no idle handle. */
static bool serve_reader(struct fuse_session *se, const struct fuse_buf *buf)
{
	const struct fuse_in_header *in = buf->mem;
	const void *body = in + 1;
	bool served = false;

	if (buf->flags & FUSE_BUF_IS_FD || buf->size < sizeof(*in) + sizeof(struct fuse_open_in) || in->len > buf->size)
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
		retire_forgotten(in);
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
	}
	Py_RETURN_NONE;
}

/* ------------------------------------------------------------------ names in bind paths (unionfs/bind.py) */

/*
 * The host may change a bind path at any time, so the kernel keeps no name of it: most requests there are LOOKUPs of
 * names that lead where they led before. Python says which node it saw last at a name (a hint), and each node's O_PATH
 * descriptor. If the host has that very object at the name now, the answer is made here; if it has nothing there and
 * none was known, too. All else is Python's: it finds out who is who. A wrong hint is harmless, for the descriptor keeps
 * the object's number from being given to another one.
 *
 * Lookups that are answered here are counted here, until Python asks for the number (take_lookups), at the latest
 * before the descriptor goes.
 */
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

static struct fuse_entry_out raw_entry(const struct fuse_entry_param *entry);

static struct owned *find_bound(fuse_ino_t node)
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

static bool is_reserved(const char *name)
{
	const struct reserved *reserved = reserved_names;

	while (reserved && strcmp(reserved->name, name))
		reserved = reserved->next;
	return reserved;
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
static bool look_here(struct fuse_session *se, const struct fuse_buf *buf)
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
	struct owned *owned;
	unsigned int bind, handles;
	int fd, settable, root;
	double timeout;

	if (!PyArg_ParseTuple(args, "KiKKKIdIpp", &node, &fd, &ino, &dev, &host_ino, &bind, &timeout, &handles, &settable,
			      &root))
		return NULL;
	owned = malloc(sizeof(*owned));
	if (!owned)
		return PyErr_NoMemory();
	*owned = (struct owned){
		.next = *bucket(node),
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
	};
	*bucket(node) = owned;
	Py_RETURN_NONE;
}

/*
 * A handle shows what the host changes at once, and asks for no name: its file's attributes must not be kept. What was
 * said of them before is taken back. (Only attributes: takes no lock that a request holds.)
 */
static PyObject *py_count_handles(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node;
	unsigned int handles;
	struct owned *owned;

	if (!PyArg_ParseTuple(args, "KI", &node, &handles))
		return NULL;
	owned = find_bound(node);
	if (owned) {
		if (!owned->handles && handles && !owned->timeout && session)
			fuse_lowlevel_notify_inval_inode(session, node, -1, 0);
		owned->handles = handles;
	}
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
	struct known **at;
	const char *name;

	if (!PyArg_ParseTuple(args, "KyK", &parent, &name, &child))
		return NULL;
	at = find_known(parent, name);
	if (!*at) {
		size_t size = strlen(name) + 1;
		struct known *known = malloc(sizeof(*known) + size);

		if (!known)
			return PyErr_NoMemory();
		*known = (struct known){.parent = parent};
		memcpy(known->name, name, size);
		*at = known;
	}
	(*at)->child = child;
	Py_RETURN_NONE;
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

/* ------------------------------------------------------------------ receiving (unionfs/dispatch.py says why) */

static bool driving; /* dispatch.py decides when to wait: the device must never block */
static bool drained; /* the device had nothing at the last look */
static int64_t spin_ns; /* how long to look for the next request before sleeping */
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

	return ppoll(fds, timeout_ns && loop_fd >= 0 ? 2 : 1, &timeout, NULL) > 0 && fds[0].revents;
}

/*
 * Wait a moment for the next request, other threads running meanwhile: first awake, since waking up on another
 * processor takes longer than a caller needs to come back, then asleep. Where others want the processor, yielding it
 * costs a whole turn of theirs: then only asleep.
 */
enum { CONTENDED_NS = 50000, LEAVE_ALONE_NS = 200000000 };

static bool linger(int device)
{
	static int64_t contended_until;
	int64_t now = now_ns();
	int64_t spin_end = now < contended_until ? 0 : now + spin_ns;
	bool found = false;

	Py_BEGIN_ALLOW_THREADS
	while (!found && now < spin_end) {
		int64_t before = now;

		sched_yield();
		found = readable_within(device, 0);
		now = now_ns();
		if (now - before > CONTENDED_NS)
			contended_until = now + LEAVE_ALONE_NS;
	}
	found = found || (linger_ns && readable_within(device, linger_ns));
	Py_END_ALLOW_THREADS
	return found;
}

static int receive_now(struct fuse_session *se, struct fuse_buf *buf)
{
	for (;;) {
		int result = REAL(fuse_session_receive_buf)(se, buf);

		if (result == -EAGAIN) {
			if (linger(fuse_session_fd(se)))
				continue;
			drained = true;
			return -EINTR; /* pyfuse3 then goes back to wait_readable */
		}
		if (result <= 0)
			return result;
		if (serve_reader(se, buf)) {
			/* answered */
		} else if (served_here(buf))
			fuse_session_process_buf(se, buf);
		else if (!look_here(se, buf) && !answer_directly(se, buf))
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

/* ------------------------------------------------------------------ replies */

/*
 * pyfuse3's st_ino sets both the node id and attr.st_ino. A generation that is not 0 is the wanted st_ino; the kernel
 * gets generation 0 (node ids are never reused).
 */
static struct fuse_entry_param separate_ino(const struct fuse_entry_param *entry)
{
	struct fuse_entry_param result = *entry;

	if (result.generation) {
		result.attr.st_ino = result.generation;
		result.generation = 0;
	}
	return result;
}

HOOK int fuse_reply_entry(fuse_req_t req, const struct fuse_entry_param *entry)
{
	struct fuse_entry_param out = separate_ino(entry);

	return REAL(fuse_reply_entry)(req, &out);
}

HOOK size_t fuse_add_direntry_plus(fuse_req_t req, char *buf, size_t size, const char *name,
				   const struct fuse_entry_param *entry, off_t off)
{
	struct fuse_entry_param out = separate_ino(entry);

	return REAL(fuse_add_direntry_plus)(req, buf, size, name, &out, off);
}

/*
 * Passthrough.  By descriptor: the backing id that the reply which hands out this descriptor shall carry; 0: none.
 * Set by Python just before it returns from open or create, consumed by the reply.
 */
static int32_t *announced;
static size_t announced_size;

static int32_t take_backing_id(uint64_t fh)
{
	int32_t id = 0;

	if (fh < announced_size) {
		id = announced[fh];
		announced[fh] = 0;
	}
	return id;
}

/* The kernel refuses passthrough together with flags about a page cache that there is not. */
static struct open_reply passthrough_reply(uint64_t fh, int32_t backing_id)
{
	return (struct open_reply){
		.fh = fh,
		.open_flags = OPEN_PASSTHROUGH | OPEN_NOFLUSH,
		.backing_id = backing_id,
	};
}

static struct fuse_entry_out raw_entry(const struct fuse_entry_param *entry)
{
	const struct stat *st = &entry->attr;
	struct fuse_entry_out out = {
		.nodeid = entry->ino,
		.generation = entry->generation,
		.attr = {
			.ino = st->st_ino,
			.size = (uint64_t)st->st_size,
			.blocks = (uint64_t)st->st_blocks,
			.atime = (uint64_t)st->st_atim.tv_sec,
			.mtime = (uint64_t)st->st_mtim.tv_sec,
			.ctime = (uint64_t)st->st_ctim.tv_sec,
			.atimensec = (uint32_t)st->st_atim.tv_nsec,
			.mtimensec = (uint32_t)st->st_mtim.tv_nsec,
			.ctimensec = (uint32_t)st->st_ctim.tv_nsec,
			.mode = st->st_mode,
			.nlink = (uint32_t)st->st_nlink,
			.uid = st->st_uid,
			.gid = st->st_gid,
			.rdev = (uint32_t)st->st_rdev,
			.blksize = (uint32_t)st->st_blksize,
		},
	};

	split_seconds(entry->entry_timeout, &out.entry_valid, &out.entry_valid_nsec);
	split_seconds(entry->attr_timeout, &out.attr_valid, &out.attr_valid_nsec);
	return out;
}

HOOK int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
	int32_t backing_id = take_backing_id(fi->fh);
	fuse_ino_t node = fi->lock_owner;

	if (node && fi->poll_events)
		remove_suidgid(req, node, (int)fi->fh);
	if (backing_id) {
		struct open_reply reply = passthrough_reply(fi->fh, backing_id);

		counters[PASSTHROUGH]++;
		return fuse_reply_buf(req, (const char *)&reply, sizeof(reply));
	}
	return REAL(fuse_reply_open)(req, fi);
}

HOOK int fuse_reply_create(fuse_req_t req, const struct fuse_entry_param *entry, const struct fuse_file_info *fi)
{
	struct fuse_entry_param out = separate_ino(entry);
	int32_t backing_id = take_backing_id(fi->fh);

	if (backing_id) {
		struct {
			struct fuse_entry_out entry;
			struct open_reply open;
		} reply = {raw_entry(&out), passthrough_reply(fi->fh, backing_id)};

		counters[PASSTHROUGH]++;
		return fuse_reply_buf(req, (const char *)&reply, sizeof(reply));
	}
	return REAL(fuse_reply_create)(req, &out, fi);
}

/* Take CAP_FSETID from this thread, or give it back. */
static bool set_fsetid(bool on)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	static struct __user_cap_data_struct data[2];
	static bool known, had;

	if (!known) {
		known = !syscall(SYS_capget, &header, data);
		had = data[0].effective & (1U << CAP_FSETID);
	}
	if (!known || !had)
		return false;
	if (on)
		data[0].effective |= 1U << CAP_FSETID;
	else
		data[0].effective &= ~(1U << CAP_FSETID);
	return !syscall(SYS_capset, &header, data);
}

static PyObject *no_session(void)
{
	errno = ENODEV;
	return PyErr_SetFromErrno(PyExc_OSError);
}

/*
 * Writes through a backing file run with the credentials of who registered it. Without CAP_FSETID the host clears
 * suid and sgid on such a write; with it, nobody would.
 */
static PyObject *py_backing_open(PyObject *self UNUSED, PyObject *arg)
{
	struct backing_map map = {.fd = (int32_t)PyLong_AsLong(arg)};
	bool had_fsetid;
	int id, error;

	if (PyErr_Occurred())
		return NULL;
	if (!session)
		return no_session();
	had_fsetid = set_fsetid(false);
	id = ioctl(fuse_session_fd(session), BACKING_OPEN, &map);
	error = errno;
	if (had_fsetid)
		set_fsetid(true);
	if (id <= 0) {
		errno = id ? error : EINVAL;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return PyLong_FromLong(id);
}

static PyObject *py_backing_close(PyObject *self UNUSED, PyObject *arg)
{
	uint32_t id = (uint32_t)PyLong_AsUnsignedLong(arg);

	if (PyErr_Occurred())
		return NULL;
	if (!session)
		return no_session();
	if (ioctl(fuse_session_fd(session), BACKING_CLOSE, &id))
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}

static PyObject *py_take_backing(PyObject *self UNUSED, PyObject *fh)
{
	int32_t id = take_backing_id(PyLong_AsUnsignedLongLong(fh));

	if (PyErr_Occurred())
		return NULL;
	counters[PASSTHROUGH] += id != 0;
	return PyLong_FromLong(id);
}

static PyObject *py_announce_backing(PyObject *self UNUSED, PyObject *args)
{
	unsigned int fh;
	int id;

	if (!PyArg_ParseTuple(args, "Ii", &fh, &id))
		return NULL;
	if (fh >= announced_size) {
		size_t size = (size_t)fh * 2 + 64;
		int32_t *grown = realloc(announced, size * sizeof(*announced));

		if (!grown)
			return PyErr_NoMemory();
		memset(grown + announced_size, 0, (size - announced_size) * sizeof(*grown));
		announced = grown;
		announced_size = size;
	}
	announced[fh] = id;
	Py_RETURN_NONE;
}

/* ------------------------------------------------------------------ the Python module */

/* Whether a library loaded from now on finds our definitions first. */
static PyObject *py_in_scope(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyBool_FromLong(dlsym(RTLD_DEFAULT, "fuse_session_new") == (void *)fuse_session_new);
}

static PyObject *py_active(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyBool_FromLong(adopted);
}

static PyObject *py_killpriv_v2(PyObject *self UNUSED, PyObject *args UNUSED)
{
	return PyBool_FromLong(killpriv_v2);
}

static PyObject *py_cache_directories(PyObject *self UNUSED, PyObject *on)
{
	cache_directories = PyObject_IsTrue(on) == 1;
	Py_RETURN_NONE;
}

static PyObject *py_ask_passthrough(PyObject *self UNUSED, PyObject *args UNUSED)
{
	ask_passthrough = true;
	Py_RETURN_NONE;
}

static PyObject *py_auto_invalidate(PyObject *self UNUSED, PyObject *args UNUSED)
{
	auto_invalidate = true;
	Py_RETURN_NONE;
}

static PyObject *py_plain_listings(PyObject *self UNUSED, PyObject *args UNUSED)
{
	plain_listings = true;
	Py_RETURN_NONE;
}

static PyObject *py_pretend_old_kernel(PyObject *self UNUSED, PyObject *args UNUSED)
{
	old_kernel = true;
	Py_RETURN_NONE;
}

static PyObject *py_ignore_sync(PyObject *self UNUSED, PyObject *on)
{
	ignore_sync = PyObject_IsTrue(on) == 1;
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

static PyObject *py_counters(PyObject *self UNUSED, PyObject *args UNUSED)
{
	PyObject *result = PyDict_New();

	for (int i = 0; result && i < COUNTERS; i++) {
		PyObject *value = PyLong_FromUnsignedLongLong(counters[i]);

		if (!value || PyDict_SetItemString(result, counter_names[i], value))
			Py_CLEAR(result);
		Py_XDECREF(value);
	}
	return result;
}

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

static PyMethodDef methods[] = {
	{"in_scope", py_in_scope, METH_NOARGS, "Whether libraries loaded from now on find this module's functions."},
	{"active", py_active, METH_NOARGS, "Whether pyfuse3's session was made through this module."},
	{"killpriv_v2", py_killpriv_v2, METH_NOARGS, "Whether the kernel leaves suid and sgid to us."},
	{"xattr_flags", py_xattr_flags, METH_NOARGS, "The flags of the SETXATTR being dispatched."},
	{"kill_suidgid", py_kill_suidgid, METH_NOARGS, "Whether the request being dispatched must clear suid and sgid."},
	{"set_ioctl_handler", py_set_ioctl_handler, METH_O, "Who answers (request, node, fh, cmd, data)."},
	{"answer_ioctl", py_answer_ioctl, METH_VARARGS, "(request, errno, data)"},
	{"own", py_own, METH_VARARGS, "(node, fd, st_ino, timeout, upper_dir): serve the node's attributes from fd."},
	{"disown", py_disown, METH_VARARGS, "(node, fd): stop that; fd -1: for all descriptors of the node."},
	{"own_bound", py_own_bound, METH_VARARGS,
	 "(node, fd, st_ino, st_dev, st_ino on the host, bind path, timeout, handles, settable, root): "
	 "the descriptor of a node of a bind path."},
	{"count_handles", py_count_handles, METH_VARARGS, "(node, number): how many files of a bind path's node are open."},
	{"take_lookups", py_take_lookups, METH_O, "How many lookups of the node were answered since the last call."},
	{"know_name", py_know_name, METH_VARARGS, "(parent, name, node): what was seen there."},
	{"forget_name", py_forget_name, METH_VARARGS, "(parent, name)"},
	{"reserve_name", py_reserve_name, METH_O, "Leave lookups of the name to Python, wherever it is."},
	{"cache_directories", py_cache_directories, METH_O, "Whether the kernel may keep listings."},
	{"ask_passthrough", py_ask_passthrough, METH_NOARGS, "Ask the kernel for passthrough when mounting."},
	{"auto_invalidate", py_auto_invalidate, METH_NOARGS, "Ask the kernel to look at mtime and size when mounting."},
	{"pretend_old_kernel", py_pretend_old_kernel, METH_NOARGS, "Use nothing of the kernel that libfuse doesn't know."},
	{"ignore_sync", py_ignore_sync, METH_O, "Whether syncing owned files does nothing."},
	{"passthrough", py_passthrough, METH_NOARGS, "Whether the kernel has granted passthrough."},
	{"backing_open", py_backing_open, METH_O, "Register a descriptor's file for passthrough; its backing id."},
	{"backing_close", py_backing_close, METH_O, "Give a backing id up."},
	{"announce_backing", py_announce_backing, METH_VARARGS, "(fh, id): the reply handing out fh carries id."},
	{"plain_listings", py_plain_listings, METH_NOARGS, "READDIR is answered, too."},
	{"sync_later", py_sync_later, METH_O, "Sync and close the descriptor in a thread, and answer the request with that."},
	{"take_backing", py_take_backing, METH_O, "The id announced for fh, which no reply of pyfuse3 will carry."},
	{"keep_idle", py_keep_idle, METH_O, "How many shared handles to keep that nobody uses."},
	{"share", py_share, METH_VARARGS, "(node, fh): the handle may be given to others who read the file."},
	{"set_direct", py_set_direct, METH_VARARGS, "(opcode, handler): who answers such requests at once."},
	{"set_direct_failed", py_set_direct_failed, METH_O, "Who is told of exceptions that are no OSError."},
	{"pack_entry", (PyCFunction)(void (*)(void))py_pack_entry, METH_FASTCALL,
	 "(node, st_ino, entry timeout, attribute timeout, nlink, blocks, stat result): struct fuse_entry_out."},
	{"pack_attributes", (PyCFunction)(void (*)(void))py_pack_attributes, METH_FASTCALL,
	 "(st_ino, timeout, nlink, blocks, stat result): struct fuse_attr_out."},
	{"drive", py_drive, METH_VARARGS, "(spin, linger, slice, fd of the loop): never block in receiving."},
	{"drained", py_drained, METH_NOARGS, "Whether the device had no request at the last look."},
	{"may_receive", py_may_receive, METH_NOARGS, "Whether to go on receiving without waiting or yielding."},
	{"new_slice", py_new_slice, METH_NOARGS, "Start the next stretch of receiving."},
	{"counters", py_counters, METH_NOARGS, "Requests served natively, by kind."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_native",
	.m_doc = "Interposes libfuse functions between pyfuse3 and libfuse.",
	.m_size = -1, /* static state: one per process */
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit__native(void)
{
	PyObject *result = PyModule_Create(&module);

	if (result && PyModule_AddFunctions(result, lazy_methods))
		Py_CLEAR(result);
	return result;
}
