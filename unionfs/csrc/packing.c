/*
 * Entries and attributes as they go over the wire, made from what Python or the host says of a file.
 */
#include "native.h"

#include <string.h>
#include <sys/stat.h>

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

struct fuse_entry_out raw_entry(const struct fuse_entry_param *entry)
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

PyMethodDef packing_methods[] = {
	{"pack_entry", (PyCFunction)(void (*)(void))py_pack_entry, METH_FASTCALL,
	 "(node, st_ino, entry timeout, attribute timeout, nlink, blocks, stat result): struct fuse_entry_out."},
	{"pack_attributes", (PyCFunction)(void (*)(void))py_pack_attributes, METH_FASTCALL,
	 "(st_ino, timeout, nlink, blocks, stat result): struct fuse_attr_out."},
	{NULL, NULL, 0, NULL},
};
