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
 *
 * Each file of this directory owns what it defines, and says at its head what that is; this header declares what the
 * others use of it. All but the hooks is invisible outside of the module.
 */
#ifndef UNIONFS_NATIVE_H
#define UNIONFS_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define FUSE_USE_VERSION 35
#include <fuse_lowlevel.h>

#include <linux/fuse.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "lazy.h"

#define HOOK __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))

/* The next definition of a libfuse function, looked up once. */
#define REAL(name) \
	({ \
		static __typeof__(name) *real_; \
		if (!real_) \
			real_ = (__typeof__(real_))next_symbol(#name); \
		real_; \
	})

#pragma GCC visibility push(hidden) /* the module is loaded with RTLD_GLOBAL: only hooks are for others to find */

/* ------------------------------------------------------------------ module.c */

/* For REAL(). */
void *next_symbol(const char *name);

/* What was served natively. */
enum counter {
	LOOKUP, READ, WRITE, LSEEK, FALLOCATE, COPY_FILE_RANGE, IOCTL, FLUSH, KILL_SUIDGID, PASSTHROUGH,
	GETATTR, SETATTR, GETXATTR, FSYNC, DIRECT, SHARED, REOPENED, OPEN, CREATE, COUNTERS
};

extern uint64_t counters[COUNTERS];

/* ------------------------------------------------------------------ session.c */

extern struct fuse_session *session; /* pyfuse3's, from our fuse_session_new to our fuse_session_destroy */
extern struct fuse_lowlevel_ops python_ops; /* pyfuse3's own handlers */

/* ------------------------------------------------------------------ requests.c */

/* What the raw message says about the request now in the hands of fuse_session_process_buf. */
struct request {
	uint32_t opcode;
	uint32_t uid;
	uint64_t nodeid;
	uint64_t unique;
	bool kill_suidgid;
	int xattr_flags; /* of SETXATTR; pyfuse3 doesn't hand them on but asks for the attribute first */
};

extern struct request request;

/* Protocol 7.40: set in the number of a request that the kernel sends again. */
#define UNIQUE_RESEND (UINT64_C(1) << 63)

/* The kernel's: the C library has 0 where files are large anyway. */
#if defined(__aarch64__) || defined(__arm__)
#define KERNEL_O_LARGEFILE 0400000
#elif defined(__powerpc__)
#define KERNEL_O_LARGEFILE 0200000
#else
#define KERNEL_O_LARGEFILE 0100000
#endif
/* Flags of an OPEN that ask nothing of the descriptor behind the handle. 040 is the kernel's FMODE_EXEC. */
#define NO_MATTER (O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | KERNEL_O_LARGEFILE | 040)

extern bool passthrough; /* after INIT: whether the kernel has it */

/* Whether a message is in memory as a whole, with as many bytes of a body at least. */
bool is_whole(const struct fuse_buf *buf, size_t body);

/* Do something with each node of a BATCH_FORGET. */
void each_forgotten(const struct fuse_in_header *in, void (*act)(fuse_ino_t node));

/* A message is about to be handled: set `request`. */
void note_request(const struct fuse_buf *buf);

/* ------------------------------------------------------------------ suidgid.c */

/* Clear what a change by the caller clears; or only if the caller is not root. */
void remove_suidgid(fuse_req_t req, fuse_ino_t ino, int fd);
void remove_suidgid_unless_root(fuse_req_t req, fuse_ino_t ino, int fd);

/* ------------------------------------------------------------------ replies.c */

/* Register a descriptor's file for passthrough. Returns its backing id, or a negative errno. */
int backing_open(int fd);

/* ------------------------------------------------------------------ jobs.c */

/* A system call that may take long, and its answer: made by one of a few threads that know nothing of Python. */
struct job {
	void (*run)(const struct job *job);
	struct job *next;
	fuse_req_t req;
	uint64_t unique; /* in place of req, of a request that libfuse has not seen */
	int fd, fd_out;
	bool own_fd; /* fd is the job's to close */
	off_t off, off_out;
	size_t size;
	int mode;
	void *data; /* owned by the job */
	struct lazy *lazy, *lazy_out; /* what must be there first of fd and fd_out, if anything is missing (lazy.h) */
};

/* Have a copy of the job done; here and now if there can't be a thread. */
void submit(const struct job *job);

/* Until there is no job left. */
void wait_for_jobs(void);

/* ------------------------------------------------------------------ data.c, ioctl.c: operations served here */

void serve_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi);
void serve_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off, struct fuse_file_info *fi);
void serve_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi);
void serve_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t length, struct fuse_file_info *fi);
void serve_copy_file_range(fuse_req_t req, fuse_ino_t ino_in, off_t off_in, struct fuse_file_info *fi_in,
			   fuse_ino_t ino_out, off_t off_out, struct fuse_file_info *fi_out, size_t length, int flags);
void serve_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void serve_ioctl(fuse_req_t req, fuse_ino_t ino, unsigned int cmd, void *arg, struct fuse_file_info *fi, unsigned flags,
		 const void *in, size_t in_size, size_t out_size);

/* ------------------------------------------------------------------ owned.c */

/* A descriptor from which a node's attributes are served. */
struct owned {
	struct owned *next;
	fuse_ino_t node;
	ino_t ino; /* the st_ino to show */
	int fd;
	bool path_only; /* O_PATH */
	bool settable; /* path_only: whether SETATTR is served all the same */
	bool upper_dir; /* a directory that upper alone makes up: what is absent there is absent in the union */
	double timeout;
	/* Of the one descriptor that a node of a bind path keeps, see bound.c; zeros elsewhere. */
	unsigned int bind; /* which bind path's it is, counted from 1 */
	unsigned int handles; /* how many files are open */
	bool root;
	dev_t host_dev;
	ino_t host_ino;
	uint64_t lookups; /* answered here, not yet told to Python */
};

/* Where the list begins that has the node's descriptors. */
struct owned **bucket(fuse_ino_t node);
struct owned *find_owned(fuse_ino_t node);

/* Keep a copy of it, before the node's others. Returns None, or NULL with Python's error set. */
PyObject *add_owned(const struct owned *given);

/* The same for C: returns whether there was memory for it. */
bool keep_owned(const struct owned *given);

/* Forget the node's descriptor, all that it has if fd is negative. */
void disown(fuse_ino_t node, int fd);

/* What leads to the descriptor's file, for calls that refuse O_PATH. */
struct fd_path {
	char text[32];
};

struct fd_path path_of(int fd);

/* Whether such a request is served from the descriptor, which may be NULL. */
bool can_get(const struct owned *owned, const char *name);
bool can_set(const struct owned *owned, int to_set, bool by_handle);

/* For how many seconds the kernel may keep them. */
double attributes_last(const struct owned *owned);

/* Operations served here where there is such a descriptor, else by Python. */
void wrap_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void wrap_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set, struct fuse_file_info *fi);
void wrap_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size);
void wrap_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi);
void wrap_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);

/* ------------------------------------------------------------------ bound.c */

/* The one descriptor that a node of a bind path keeps, NULL if there is none now. */
struct owned *find_bound(fuse_ino_t node);

/* How many files of the node are open now. */
void note_handles(struct owned *owned, unsigned int handles);

/* Whether only Python may touch what is at the name. */
bool is_reserved(const char *name);

/* Note which node was seen at a name. Returns whether there was memory for it. */
bool know_name(fuse_ino_t parent, const char *name, fuse_ino_t child);

/* ------------------------------------------------------------------ bound*.c, readers.c, listers.c, lacking.c, direct.c: answers at once */

/* Each says whether it has answered the message. */
bool look_here(struct fuse_session *se, const struct fuse_buf *buf);
bool open_here(struct fuse_session *se, const struct fuse_buf *buf);
bool serve_reader(struct fuse_session *se, const struct fuse_buf *buf);
bool serve_lister(struct fuse_session *se, const struct fuse_buf *buf);
bool lack_here(struct fuse_session *se, const struct fuse_buf *buf);
bool answer_directly(struct fuse_session *se, const struct fuse_buf *buf);

/* Close the handles that nobody uses; returns whether there were any. */
bool free_idle_readers(void);

/* Have Python handle a message of our own making, to which nobody waits for an answer. */
void tell_directly(const struct fuse_in_header *in);

/* Call a handler and have its failure logged. Steals the reference to the arguments, which may be NULL. */
void call_and_log(PyObject *handler, PyObject *args);

/* Answer a message that libfuse has not seen. In any thread. */
void reply_raw(struct fuse_session *se, uint64_t unique, int error, const char *data, size_t size);

/* ------------------------------------------------------------------ packing.c */

struct open_reply { /* fuse_open_out of protocol 7.40, which older headers lack */
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};

/* Of a handle that the kernel passes through. */
struct open_reply passthrough_reply(uint64_t fh, int32_t backing_id);

/* What libfuse makes of an entry. */
struct fuse_entry_out raw_entry(const struct fuse_entry_param *entry);

/* ------------------------------------------------------------------ what Python calls */

extern PyMethodDef module_methods[], session_methods[], request_methods[], ioctl_methods[], owned_methods[];
extern PyMethodDef bound_methods[], bound_file_methods[], reader_methods[], direct_methods[], packing_methods[], receive_methods[];
extern PyMethodDef reply_methods[], listed_methods[], copied_methods[], forking_methods[], lister_methods[], lacking_methods[];

#pragma GCC visibility pop

#endif
