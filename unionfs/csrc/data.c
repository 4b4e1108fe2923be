/*
 * Data of open files, on the descriptor fi->fh.
 *
 * Where a file's data follows its copy-up (lazy.c), what a request touches must be there first.
 */
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096

static void reply_length(fuse_req_t req, ssize_t length, int error)
{
	if (length < 0)
		fuse_reply_err(req, error);
	else
		fuse_reply_write(req, (size_t)length);
}

/*
 * Give a job a second descriptor of the file that it reads, and let it wait: what is behind the number of a handle may be
 * exchanged meanwhile. Where there is no descriptor left it is done at once, and everybody else waits.
 */
static void submit_with_descriptor(struct job job, int fd)
{
	job.fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	job.own_fd = job.fd >= 0;
	if (job.own_fd) {
		submit(&job);
	} else {
		job.fd = fd;
		job.run(&job);
	}
}

static void close_own(const struct job *job)
{
	if (job->own_fd)
		close(job->fd);
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

	if (!error)
		error = posix_memalign(&buffer, PAGE, job->size);
	if (error) {
		fuse_reply_err(job->req, error);
		close_own(job);
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
	close_own(job);
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

void serve_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	static char buffer[1 << 20] __attribute__((aligned(PAGE))); /* aligned: the descriptor may be O_DIRECT */
	struct lazy *lazy = lazy_missing(ino, off, size);
	ssize_t n = size <= sizeof(buffer) && !lazy ? read_cached((int)fi->fh, buffer, size, off) : -1;

	counters[READ]++;
	if (n >= 0)
		fuse_reply_buf(req, buffer, (size_t)n);
	else
		submit_with_descriptor((struct job){.run = run_read, .req = req, .off = off, .size = size, .lazy = lazy},
				       (int)fi->fh);
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
 * the host finds the end. Pages of a shared mapping have their offset, whatever handle they are written through. So has
 * what is sent again, since a daemon that is no more may have written it.
 */
void serve_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off,
			struct fuse_file_info *fi)
{
	bool append = fi->flags & O_APPEND && !fi->writepage && !(request.unique & UNIQUE_RESEND);
	int flags = append ? RWF_APPEND : 0;
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

void serve_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi)
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

void serve_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t length,
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
	while (n < 0 && (!error || error == EINTR)) {
		n = copy_file_range(job->fd, &off, job->fd_out, &off_out, job->size, (unsigned)job->mode);
		error = n < 0 ? errno : 0;
	}
	reply_length(job->req, n, error);
	close_own(job);
}

/* Errors such as EXDEV go back as they are: the kernel then copies through the page cache. */
void serve_copy_file_range(fuse_req_t req, fuse_ino_t ino_in, off_t off_in,
				  struct fuse_file_info *fi_in, fuse_ino_t ino_out, off_t off_out,
				  struct fuse_file_info *fi_out, size_t length, int flags)
{
	counters[COPY_FILE_RANGE]++;
	lazy_wrote(ino_out);
	remove_suidgid_unless_root(req, ino_out, (int)fi_out->fh);
	submit_with_descriptor(
		(struct job){
			.run = run_copy_file_range,
			.req = req,
			.off = off_in,
			.fd_out = (int)fi_out->fh,
			.off_out = off_out,
			.size = length,
			.mode = flags,
			.lazy = lazy_missing(ino_in, off_in, length),
			.lazy_out = lazy_missing(ino_out, off_out, length),
		},
		(int)fi_in->fh);
}

/* close(2) on an overlay has nothing to do and no error to report; after ENOSYS the kernel never asks again. */
void serve_flush(fuse_req_t req, fuse_ino_t ino UNUSED, struct fuse_file_info *fi UNUSED)
{
	counters[FLUSH]++;
	fuse_reply_err(req, ENOSYS);
}
