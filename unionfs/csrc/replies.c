/*
 * Replies: what pyfuse3 can't express is added to them.
 */
#include "native.h"

#include <errno.h>
#include <linux/capability.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Protocol 7.40, which older headers lack. */
#define OPEN_NOFLUSH (UINT32_C(1) << 5)
#define OPEN_PASSTHROUGH (UINT32_C(1) << 7)

struct backing_map {
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};
#define BACKING_OPEN _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)

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
struct open_reply passthrough_reply(uint64_t fh, int32_t backing_id)
{
	return (struct open_reply){
		.fh = fh,
		.open_flags = OPEN_PASSTHROUGH | OPEN_NOFLUSH,
		.backing_id = backing_id,
	};
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

/*
 * Writes through a backing file run with the credentials of who registered it. Without CAP_FSETID the host clears
 * suid and sgid on such a write; with it, nobody would.
 */
int backing_open(int fd)
{
	struct backing_map map = {.fd = fd};
	bool had_fsetid;
	int id;

	if (!session)
		return -ENODEV;
	had_fsetid = set_fsetid(false);
	id = ioctl(fuse_session_fd(session), BACKING_OPEN, &map);
	if (id < 0)
		id = -errno;
	if (had_fsetid)
		set_fsetid(true);
	return id ? id : -EINVAL;
}

static PyObject *py_backing_open(PyObject *self UNUSED, PyObject *arg)
{
	int fd = (int)PyLong_AsLong(arg), id;

	if (PyErr_Occurred())
		return NULL;
	id = backing_open(fd);
	if (id < 0) {
		errno = -id;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return PyLong_FromLong(id);
}

static PyObject *py_backing_close(PyObject *self UNUSED, PyObject *arg)
{
	uint32_t id = (uint32_t)PyLong_AsUnsignedLong(arg);

	if (PyErr_Occurred())
		return NULL;
	errno = ENODEV;
	if (!session || ioctl(fuse_session_fd(session), BACKING_CLOSE, &id))
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

PyMethodDef reply_methods[] = {
	{"backing_open", py_backing_open, METH_O, "Register a descriptor's file for passthrough; its backing id."},
	{"backing_close", py_backing_close, METH_O, "Give a backing id up."},
	{"announce_backing", py_announce_backing, METH_VARARGS, "(fh, id): the reply handing out fh carries id."},
	{"take_backing", py_take_backing, METH_O, "The id announced for fh, which no reply of pyfuse3 will carry."},
	{NULL, NULL, 0, NULL},
};
