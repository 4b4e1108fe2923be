/*
 * Copies whose data follows: the ranges of one file on their way up (unionfs/fuse/following.py says when and why).
 *
 * Concept.  A copy is known by its node. While it is under way all handles of the node are descriptors of the copy's
 * *target*, a file that nothing leads to yet. The file is cut into chunks, each of which is
 *
 *   ABSENT   the target holds nothing of it (a reserved range or a hole);
 *   BUSY     some thread copies it, the others that want it wait;
 *   PRESENT  it is there, and belongs to the readers and writers: never touched by a copy again.
 *
 * A thread in the background needs all of them in turn; whoever reads or writes a range needs its chunks first, and
 * copies them itself if they are absent. So nobody sees a byte that has not been copied, and no copy overwrites what was
 * written. What lies behind the end that the source has is no chunk's: appending needs nothing.
 *
 * A chunk that can't be copied becomes ABSENT again: who needed it gets the error, and the next to need it tries anew.
 *
 * The table of copies is guarded by the GIL, the states of the chunks by a mutex in each copy. Those who work on a copy
 * hold a reference; it has descriptors of its own.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "lazy.h"

#define UNUSED __attribute__((unused))

enum { CHUNK = 1 << 20 };
enum { MOST_CHUNKS = 1 << 20 }; /* of bigger files the chunks are bigger */
enum { MOST_EXTENTS = 1024 };
enum { BEHIND = 16 }; /* how many chunks the disk may lag behind the copy */

enum state { ABSENT, BUSY, PRESENT };

struct lazy {
	struct lazy *next;
	uint64_t node;
	atomic_int references;
	int source, target;
	off_t size;  /* of the source */
	off_t chunk; /* bytes */
	size_t chunks;
	atomic_size_t missing; /* chunks that are not PRESENT */
	atomic_int lost;       /* the error with which the disk has refused data; no later sync would tell it again */
	int64_t written_ns;    /* when the last change was asked for, 0: never */
	pthread_mutex_t lock;  /* guards state */
	pthread_cond_t changed;
	unsigned char state[];
};

static struct lazy *first_lazy;

static struct lazy *find(uint64_t node)
{
	struct lazy *lazy = first_lazy;

	while (lazy && lazy->node != node)
		lazy = lazy->next;
	return lazy;
}

static struct lazy *get(struct lazy *lazy)
{
	atomic_fetch_add(&lazy->references, 1);
	return lazy;
}

void lazy_put(struct lazy *lazy)
{
	if (atomic_fetch_sub(&lazy->references, 1) > 1)
		return;
	close(lazy->source);
	close(lazy->target);
	pthread_mutex_destroy(&lazy->lock);
	pthread_cond_destroy(&lazy->changed);
	free(lazy);
}

/* ------------------------------------------------------------------ copying a range */

static int copy_by_hand(const struct lazy *lazy, off_t at, size_t size, ssize_t *copied)
{
	char *buffer = malloc(size);
	ssize_t n, done = 0;
	int error = 0;

	if (!buffer)
		return ENOMEM;
	do
		n = pread(lazy->source, buffer, size, at);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		error = errno;
	while (!error && done < n) {
		ssize_t written = pwrite(lazy->target, buffer + done, (size_t)(n - done), at + done);

		if (written > 0)
			done += written;
		else if (written == 0 || errno != EINTR)
			error = written ? errno : EIO;
	}
	free(buffer);
	*copied = done;
	return error;
}

/* Whether it is copy_file_range() that can't do it, not the files. EIO may be either. */
static bool unable(int error)
{
	return error == EXDEV || error == EINVAL || error == EOPNOTSUPP || error == ENOSYS || error == EBADF ||
	       error == EIO;
}

static int copy_data(const struct lazy *lazy, off_t at, off_t end)
{
	while (at < end) {
		off_t from = at, to = at;
		size_t size = end - at < CHUNK ? (size_t)(end - at) : CHUNK;
		ssize_t n = copy_file_range(lazy->source, &from, lazy->target, &to, size, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && !unable(errno))
			return errno;
		if (n <= 0) {
			int error = copy_by_hand(lazy, at, size, &n);

			if (error)
				return error;
			if (n == 0)
				return EIO; /* the source has shrunk */
		}
		at += n;
	}
	return 0;
}

/* The next stretch of data in [*at, end): moves *at to its begin and returns its end; -1: there is none. */
static off_t next_data(int source, off_t *at, off_t end)
{
	off_t data = lseek(source, *at, SEEK_DATA);
	off_t hole;

	if ((data < 0 && errno == ENXIO) || data >= end)
		return -1;
	if (data >= 0)
		*at = data; /* else the file system knows of no holes */
	hole = lseek(source, *at, SEEK_HOLE);
	return hole <= *at || hole > end ? end : hole;
}

static int copy_range(const struct lazy *lazy, off_t at, off_t end)
{
	struct stat st;
	off_t stop;

	while (at < end && (stop = next_data(lazy->source, &at, end)) >= 0) {
		int error = copy_data(lazy, at, stop);

		if (error)
			return error;
		at = stop;
	}
	if (fstat(lazy->source, &st))
		return errno;
	return st.st_size < end ? EIO : 0; /* the rest is no hole, the source has shrunk */
}

/* ------------------------------------------------------------------ chunks */

static int need_chunk(struct lazy *lazy, size_t index)
{
	off_t at = (off_t)index * lazy->chunk;
	off_t end = at + lazy->chunk < lazy->size ? at + lazy->chunk : lazy->size;
	int error = 0;

	pthread_mutex_lock(&lazy->lock);
	while (lazy->state[index] == BUSY)
		pthread_cond_wait(&lazy->changed, &lazy->lock);
	if (lazy->state[index] == ABSENT) {
		lazy->state[index] = BUSY;
		pthread_mutex_unlock(&lazy->lock);
		error = copy_range(lazy, at, end);
		pthread_mutex_lock(&lazy->lock);
		lazy->state[index] = error ? ABSENT : PRESENT;
		if (!error)
			atomic_fetch_sub(&lazy->missing, 1);
		pthread_cond_broadcast(&lazy->changed);
	}
	pthread_mutex_unlock(&lazy->lock);
	return error;
}

/* The chunks of a range: false if it has none. */
static bool chunks_of(const struct lazy *lazy, off_t off, size_t size, size_t *first, size_t *last)
{
	if (off < 0 || off >= lazy->size || !size)
		return false;
	*first = (size_t)(off / lazy->chunk);
	*last = size > (size_t)(lazy->size - off) ? lazy->chunks - 1 : (size_t)((off + (off_t)size - 1) / lazy->chunk);
	return true;
}

int lazy_need(struct lazy *lazy, off_t off, size_t size)
{
	size_t first, last;
	int error = 0;

	if (!chunks_of(lazy, off, size, &first, &last))
		return 0;
	for (size_t index = first; index <= last && !error; index++)
		error = need_chunk(lazy, index);
	return error;
}

struct lazy *lazy_missing(uint64_t node, off_t off, size_t size)
{
	struct lazy *lazy = find(node);
	size_t first, last;
	bool missing = false;

	if (!lazy || !atomic_load(&lazy->missing) || !chunks_of(lazy, off, size, &first, &last))
		return NULL;
	pthread_mutex_lock(&lazy->lock);
	for (size_t index = first; index <= last && !missing; index++)
		missing = lazy->state[index] != PRESENT;
	pthread_mutex_unlock(&lazy->lock);
	return missing ? get(lazy) : NULL;
}

void lazy_wrote(uint64_t node)
{
	struct lazy *lazy = find(node);
	struct timespec now;

	if (!lazy)
		return;
	clock_gettime(CLOCK_REALTIME_COARSE, &now); /* the clock of file systems */
	lazy->written_ns = now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

int lazy_source(uint64_t node, int fd)
{
	struct lazy *lazy = find(node);

	return lazy ? lazy->source : fd;
}

/* ------------------------------------------------------------------ what Python calls */

/*
 * Take the room that the data will need. Holes get none. Returns an errno; ENOTSUP: the file system can't, or it takes
 * as long as the copy (tmpfs fills what is reserved), or there are too many stretches.
 */
static int reserve(int source, int target, off_t size)
{
	struct statfs fs;
	off_t at = 0, stop;

	if (fstatfs(target, &fs))
		return errno;
	if (fs.f_type == TMPFS_MAGIC)
		return ENOTSUP;
	if (ftruncate(target, size))
		return errno;
	for (int extents = 0; at < size && (stop = next_data(source, &at, size)) >= 0; extents++) {
		int error;

		if (extents == MOST_EXTENTS)
			return ENOTSUP;
		do
			error = fallocate(target, FALLOC_FL_KEEP_SIZE, at, stop - at) ? errno : 0;
		while (error == EINTR);
		if (error)
			return error == ENOSYS ? ENOTSUP : error;
		at = stop;
	}
	return 0;
}

static PyObject *fail(int error)
{
	errno = error;
	return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *py_lazy_reserve(PyObject *self UNUSED, PyObject *args)
{
	long long size;
	int source, target, error;

	if (!PyArg_ParseTuple(args, "iiL", &source, &target, &size))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	error = ioctl(target, FICLONE, source) ? reserve(source, target, size) : ENOTSUP; /* a clone needs no copy */
	Py_END_ALLOW_THREADS
	if (error && error != ENOTSUP)
		return fail(error);
	return PyBool_FromLong(!error);
}

static struct lazy *make(uint64_t node, int source, int target, off_t size)
{
	off_t chunk = CHUNK;
	size_t chunks;
	struct lazy *lazy;

	while (size / chunk >= MOST_CHUNKS)
		chunk *= 2;
	chunks = (size_t)((size + chunk - 1) / chunk);
	lazy = calloc(1, sizeof(*lazy) + chunks); /* all ABSENT */
	if (!lazy)
		return NULL;
	lazy->node = node;
	lazy->references = 1;
	lazy->source = source;
	lazy->target = target;
	lazy->size = size;
	lazy->chunk = chunk;
	lazy->chunks = lazy->missing = chunks;
	pthread_mutex_init(&lazy->lock, NULL);
	pthread_cond_init(&lazy->changed, NULL);
	return lazy;
}

static PyObject *py_lazy_begin(PyObject *self UNUSED, PyObject *args)
{
	unsigned long long node;
	long long size;
	int source, target, own_source, own_target;
	struct lazy *lazy;

	if (!PyArg_ParseTuple(args, "KiiL", &node, &source, &target, &size))
		return NULL;
	own_source = fcntl(source, F_DUPFD_CLOEXEC, 0);
	own_target = own_source < 0 ? -1 : fcntl(target, F_DUPFD_CLOEXEC, 0);
	if (own_target < 0) {
		PyErr_SetFromErrno(PyExc_OSError);
		if (own_source >= 0)
			close(own_source);
		return NULL;
	}
	lazy = make(node, own_source, own_target, size);
	if (!lazy) {
		close(own_source);
		close(own_target);
		return PyErr_NoMemory();
	}
	lazy->next = first_lazy;
	first_lazy = lazy;
	Py_RETURN_NONE;
}

/*
 * Needs all chunks. The disk is kept at work meanwhile: what piles up in memory would hold up everybody who writes, and
 * the fsync that follows.
 */
static int copy_all(struct lazy *lazy)
{
	/* Who waits gets the error of the disk, and a later fsync() of this descriptor does not: so it is kept. */
	const unsigned wait = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
	int error = 0;

	for (size_t index = 0; index < lazy->chunks && !error; index++) {
		off_t at = (off_t)index * lazy->chunk;

		error = need_chunk(lazy, index);
		if (error)
			break;
		sync_file_range(lazy->target, at, lazy->chunk, SYNC_FILE_RANGE_WRITE);
		if (index >= BEHIND && sync_file_range(lazy->target, at - BEHIND * lazy->chunk, lazy->chunk, wait) &&
		    (errno == EIO || errno == ENOSPC || errno == EDQUOT))
			lazy->lost = errno;
	}
	return error ? error : lazy->lost;
}

static struct lazy *known(unsigned long long node)
{
	struct lazy *lazy = find(node);

	if (!lazy)
		fail(ENOENT);
	return lazy;
}

static PyObject *py_lazy_copy(PyObject *self UNUSED, PyObject *arg)
{
	unsigned long long node = PyLong_AsUnsignedLongLong(arg);
	struct lazy *lazy = PyErr_Occurred() ? NULL : known(node);
	int error;

	if (!lazy)
		return NULL;
	get(lazy);
	Py_BEGIN_ALLOW_THREADS
	error = copy_all(lazy);
	Py_END_ALLOW_THREADS
	lazy_put(lazy);
	if (error)
		return fail(error);
	Py_RETURN_NONE;
}

static PyObject *py_lazy_written(PyObject *self UNUSED, PyObject *arg)
{
	unsigned long long node = PyLong_AsUnsignedLongLong(arg);
	struct lazy *lazy = PyErr_Occurred() ? NULL : known(node);

	return lazy ? PyLong_FromLongLong(lazy->written_ns) : NULL;
}

static PyObject *py_lazy_end(PyObject *self UNUSED, PyObject *arg)
{
	unsigned long long node = PyLong_AsUnsignedLongLong(arg);
	struct lazy **at = &first_lazy;

	if (PyErr_Occurred())
		return NULL;
	while (*at && (*at)->node != node)
		at = &(*at)->next;
	if (*at) {
		struct lazy *lazy = *at;

		*at = lazy->next;
		lazy_put(lazy);
	}
	Py_RETURN_NONE;
}

PyMethodDef lazy_methods[] = {
	{"lazy_reserve", py_lazy_reserve, METH_VARARGS, "(source, target, size): whether the data shall follow."},
	{"lazy_begin", py_lazy_begin, METH_VARARGS, "(node, source, target, size): the node's data follows."},
	{"lazy_copy", py_lazy_copy, METH_O, "Copy all that is missing of a node's data."},
	{"lazy_written", py_lazy_written, METH_O, "When a node's data was last written, in nanoseconds; 0: never."},
	{"lazy_end", py_lazy_end, METH_O, "Forget the copy of a node."},
	{NULL, NULL, 0, NULL},
};
