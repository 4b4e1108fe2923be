/*
 * Listings: what a layer's directory holds, and entries about which there is nothing to find out. Those are most of all, so
 * they are packed here, many in one call: with attributes (Resolver.plain_file in unionfs/core/resolve.py) regular files of
 * a lower layer with one name and no extended attribute, names alone where their numbers need not be asked for.
 */
#include "native.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#define LISTXATTRAT 465 /* Linux 6.13, which older headers lack */

static unsigned int ino_bits; /* of a number shown; above them is its file system's (unionfs/core/inodes.py) */

/* The directory of one layer. */
struct place {
	int fd;
	unsigned long long base; /* what the numbers shown have above ino_bits */
	unsigned long long device;
};

/* Whether the entry is known to have no attribute: an error is Python's to judge. */
static bool has_no_xattrs(int dirfd, const char *name)
{
	static bool by_path;
	char path[32 + NAME_MAX];
	long size = -1;

	if (!by_path) {
		size = syscall(LISTXATTRAT, dirfd, name, AT_SYMLINK_NOFOLLOW, NULL, (size_t)0);
		by_path = size < 0 && errno == ENOSYS;
	}
	if (by_path) {
		if (snprintf(path, sizeof(path), "/proc/self/fd/%d/%s", dirfd, name) >= (int)sizeof(path))
			return false;
		size = llistxattr(path, NULL, 0);
	}
	return size == 0 || (size < 0 && errno == EOPNOTSUPP);
}

static bool look_at_plain(const struct place *place, const char *name, struct stat *st)
{
	return !fstatat(place->fd, name, st, AT_SYMLINK_NOFOLLOW) && S_ISREG(st->st_mode) && st->st_nlink == 1 &&
	       st->st_dev == place->device && st->st_ino > FUSE_ROOT_ID && !(st->st_ino >> ino_bits) &&
	       has_no_xattrs(place->fd, name);
}

/* struct fuse_direntplus, with as many bytes of zeros after the name as alignment takes. */
static PyObject *pack_record(const struct fuse_entry_param *entry, uint64_t position, const char *name, size_t length)
{
	struct fuse_entry_out out = raw_entry(entry);
	struct fuse_dirent dirent = {
		.ino = entry->attr.st_ino,
		.off = position,
		.namelen = (uint32_t)length,
		.type = DT_REG,
	};
	size_t size = sizeof(out) + FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + length);
	PyObject *record = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
	char *at;

	if (!record)
		return NULL;
	at = PyBytes_AS_STRING(record);
	memset(at, 0, size);
	memcpy(at, &out, sizeof(out));
	memcpy(at + sizeof(out), &dirent, FUSE_NAME_OFFSET);
	memcpy(at + sizeof(out) + FUSE_NAME_OFFSET, name, length);
	return record;
}

/* (st_ino to show, st_ino, record); None for what isn't plain. */
static PyObject *pack_plain(const struct place *place, PyObject *name, uint64_t position, double timeout)
{
	struct fuse_entry_param entry = {.entry_timeout = timeout, .attr_timeout = timeout};
	unsigned long long real;
	PyObject *record;

	if (!look_at_plain(place, PyBytes_AS_STRING(name), &entry.attr))
		Py_RETURN_NONE;
	real = entry.attr.st_ino;
	entry.ino = entry.attr.st_ino = place->base | real;
	record = pack_record(&entry, position, PyBytes_AS_STRING(name), (size_t)PyBytes_GET_SIZE(name));
	return record ? Py_BuildValue("KKN", (unsigned long long)entry.ino, real, record) : NULL;
}

/* What is said of the layer that an entry comes from; false where its entries are not for us, or with an error set. */
static bool find_place(PyObject *places, PyObject *layer, struct place *place)
{
	PyObject *found = PyDict_GetItemWithError(places, layer);

	return found && PyArg_ParseTuple(found, "iKK", &place->fd, &place->base, &place->device);
}

/* An unionfs.core.merge.Entry: (name, layer, st_ino, DT_*). */
static PyObject *record_of(PyObject *places, PyObject *children, PyObject *position, PyObject *entry, double timeout)
{
	PyObject *name = PyTuple_GET_ITEM(entry, 0);
	struct place place;

	if (PyLong_AsLong(PyTuple_GET_ITEM(entry, 3)) != DT_REG || !strncmp(PyBytes_AS_STRING(name), ".wh.", 4) ||
	    PyDict_Contains(children, name) || !find_place(places, PyTuple_GET_ITEM(entry, 1), &place))
		return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
	return pack_plain(&place, name, PyLong_AsUnsignedLongLong(position), timeout);
}

static PyObject *py_pack_listed(PyObject *self UNUSED, PyObject *args)
{
	PyObject *places, *children, *positions, *entries, *result;
	Py_ssize_t first, room;
	double timeout;

	if (!PyArg_ParseTuple(args, "O!O!O!O!nnd", &PyDict_Type, &places, &PyDict_Type, &children, &PyList_Type, &positions,
			      &PyList_Type, &entries, &first, &room, &timeout))
		return NULL;
	result = PyList_New(0);
	for (Py_ssize_t at = first; result && room > 0 && at < PyList_GET_SIZE(entries); at++) {
		PyObject *record = record_of(places, children, PyList_GET_ITEM(positions, at), PyList_GET_ITEM(entries, at), timeout);

		if (!record || PyList_Append(result, record))
			Py_CLEAR(result);
		else
			room -= record == Py_None ? 0 : PyBytes_GET_SIZE(PyTuple_GET_ITEM(record, 2));
		Py_XDECREF(record);
	}
	return result;
}

/* struct fuse_direntplus without an entry, the size of which is returned; 0: there is no room. */
static size_t pack_name(char *at, size_t room, uint64_t ino, uint64_t position, uint32_t kind, PyObject *name)
{
	size_t length = (size_t)PyBytes_GET_SIZE(name);
	size_t size = sizeof(struct fuse_entry_out) + FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + length);
	struct fuse_dirent dirent = {.ino = ino, .off = position, .namelen = (uint32_t)length, .type = kind};

	if (size > room)
		return 0;
	memset(at, 0, size);
	at += sizeof(struct fuse_entry_out);
	memcpy(at, &dirent, FUSE_NAME_OFFSET);
	memcpy(at + FUSE_NAME_OFFSET, PyBytes_AS_STRING(name), length);
	return size;
}

/* Pack an entry's name where nothing is to be asked for; 0 where something is, or there is no room, or with an error set. */
static size_t name_of(char *at, size_t room, PyObject *bases, PyObject *children, PyObject *position, PyObject *entry)
{
	PyObject *name = PyTuple_GET_ITEM(entry, 0), *base = PyDict_GetItemWithError(bases, PyTuple_GET_ITEM(entry, 1));
	uint64_t ino = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(entry, 2));

	if (!base || ino >> ino_bits || PyDict_Contains(children, name) || PyErr_Occurred())
		return 0;
	ino |= PyLong_AsUnsignedLongLong(base);
	return pack_name(at, room, ino, PyLong_AsUnsignedLongLong(position),
			 (uint32_t)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(entry, 3)), name);
}

static PyObject *py_pack_names(PyObject *self UNUSED, PyObject *args)
{
	PyObject *bases, *children, *positions, *entries, *text;
	Py_ssize_t first, room, filled = 0, at;

	if (!PyArg_ParseTuple(args, "O!O!O!O!nn", &PyDict_Type, &bases, &PyDict_Type, &children, &PyList_Type, &positions,
			      &PyList_Type, &entries, &first, &room))
		return NULL;
	room = room > 0 ? room : 0;
	text = PyBytes_FromStringAndSize(NULL, room);
	for (at = first; text && at < PyList_GET_SIZE(entries) && at < PyList_GET_SIZE(positions); at++) {
		size_t size = name_of(PyBytes_AS_STRING(text) + filled, (size_t)(room - filled), bases, children,
				      PyList_GET_ITEM(positions, at), PyList_GET_ITEM(entries, at));

		if (PyErr_Occurred())
			Py_CLEAR(text);
		if (!size)
			break;
		filled += (Py_ssize_t)size;
	}
	if (text && _PyBytes_Resize(&text, filled))
		return NULL;
	return text ? Py_BuildValue("Nn", text, at) : NULL;
}

/* One record of getdents64(2). */
struct record {
	uint64_t ino;
	int64_t position;
	unsigned short length;
	unsigned char kind;
	char name[];
};

static bool append_records(PyObject *list, const char *buffer, long size)
{
	for (long at = 0; at < size; at += ((const struct record *)(buffer + at))->length) {
		const struct record *record = (const void *)(buffer + at);
		PyObject *entry;
		bool failed;

		if (!strcmp(record->name, ".") || !strcmp(record->name, ".."))
			continue;
		entry = Py_BuildValue("(yKB)", record->name, (unsigned long long)record->ino, record->kind);
		failed = !entry || PyList_Append(list, entry);
		Py_XDECREF(entry);
		if (failed)
			return false;
	}
	return true;
}

static PyObject *py_getdents(PyObject *self UNUSED, PyObject *number)
{
	enum { BUFFER = 256 << 10 };
	int fd = (int)PyLong_AsLong(number);
	char *buffer = malloc(BUFFER);
	PyObject *list = buffer ? PyList_New(0) : PyErr_NoMemory();
	long size = lseek(fd, 0, SEEK_SET) ? -1 : 1;

	while (list && size > 0) {
		Py_BEGIN_ALLOW_THREADS
		size = syscall(SYS_getdents64, fd, buffer, (size_t)BUFFER);
		Py_END_ALLOW_THREADS
		if (size > 0 && !append_records(list, buffer, size))
			Py_CLEAR(list);
	}
	if (list && size < 0) {
		PyErr_SetFromErrno(PyExc_OSError);
		Py_CLEAR(list);
	}
	free(buffer);
	return list;
}

static PyObject *py_number_bits(PyObject *self UNUSED, PyObject *bits)
{
	ino_bits = (unsigned int)PyLong_AsUnsignedLong(bits);
	return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

PyMethodDef listed_methods[] = {
	{"number_bits", py_number_bits, METH_O, "How many bits of a number shown are the file's; before `pack_listed`."},
	{"pack_listed", py_pack_listed, METH_VARARGS,
	 "(places by layer, children, positions, entries, first, room, timeout): for each entry from the first on, as many as "
	 "there is room for, (st_ino to show, st_ino, struct fuse_direntplus); None for one that isn't plain, or is known."},
	{"pack_names", py_pack_names, METH_VARARGS,
	 "(bases of numbers by layer, children, positions, entries, first, room): the entries from the first on as struct "
	 "fuse_direntplus with names alone, and the index of the one at which that ended, for want of room or of its number."},
	{"getdents", py_getdents, METH_O, "(name, st_ino, DT_*) of every entry of an open directory but the dots."},
	{NULL, NULL, 0, NULL},
};
