/*
 * The copy-up of a plain file (unionfs/core/copyup.py) in one step: a regular lower file with one name, without extended
 * attributes and inode flags that a copy keeps. Of its data nothing is copied: there is a mark that it is below
 * (metacopy), or the copy shares it (reflink). That is what chmod -R and chown -R do to most of all files.
 *
 * Nothing is published before all is right, and whatever can't be done here is left to Python, errors included: it does
 * it all again, and knows what they mean.
 */
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

enum {
	ORIGIN_LENGTH = 2, /* struct ovl_fb: where the length of all and the type of the handle are */
	ORIGIN_TYPE = 4,
	ORIGIN_HEAD = 21,
	HANDLE_MOST = MAX_HANDLE_SZ,
};

/* What is asked for. */
struct copy {
	int from, to, work; /* descriptors of the directories; from and to may be O_PATH */
	const char *name;
	unsigned long long ino; /* the lower file's */
	const char *head; /* of the origin; NULL: nobody could decode one */
	const char *origin, *metacopy; /* the attributes' names; without the latter data is shared */
	/* What becomes of it. */
	struct stat lower, upper;
	bool unshareable; /* the two file systems, or this one, can't share data */
	char value[ORIGIN_HEAD + HANDLE_MOST];
	size_t size; /* of the value */
};

/* The flags that a copy keeps in one way or another (ovl_copy_fileattr). */
static bool has_kept_flags(int fd)
{
	long flags = 0;

	if (ioctl(fd, FS_IOC_GETFLAGS, &flags))
		return errno != ENOTTY && errno != EOPNOTSUPP && errno != EINVAL;
	return flags & (FS_SYNC_FL | FS_NOATIME_FL | FS_IMMUTABLE_FL | FS_APPEND_FL);
}

static bool has_no_xattrs(int fd)
{
	ssize_t size = flistxattr(fd, NULL, 0);

	return size == 0 || (size < 0 && errno == EOPNOTSUPP);
}

/* The value of the origin (struct ovl_fb). */
static bool find_origin(struct copy *copy, int fd)
{
	union {
		struct file_handle handle;
		char room[sizeof(struct file_handle) + HANDLE_MOST];
	} found = {.handle = {.handle_bytes = HANDLE_MOST}};
	int mount;

	if (!copy->head)
		return true;
	if (name_to_handle_at(fd, "", &found.handle, &mount, AT_EMPTY_PATH))
		return false;
	copy->size = ORIGIN_HEAD + found.handle.handle_bytes;
	memcpy(copy->value, copy->head, ORIGIN_HEAD);
	copy->value[ORIGIN_LENGTH] = (char)copy->size;
	copy->value[ORIGIN_TYPE] = (char)found.handle.handle_type;
	memcpy(copy->value + ORIGIN_HEAD, found.handle.f_handle, found.handle.handle_bytes);
	return true;
}

/* Find out all about the lower file; false where it isn't plain. */
static bool examine(struct copy *copy, int source)
{
	struct stat *st = &copy->lower;

	return !fstat(source, st) && S_ISREG(st->st_mode) && st->st_nlink == 1 && st->st_ino == copy->ino &&
	       has_no_xattrs(source) && !has_kept_flags(source) && find_origin(copy, source);
}

/* Give the copy its size, and with it the data where no mark says that it is below. */
static bool take_data(struct copy *copy, int source, int fd)
{
	if (!copy->lower.st_size)
		return true;
	if (copy->metacopy)
		return !ftruncate(fd, copy->lower.st_size);
	if (!ioctl(fd, FICLONE, source))
		return true;
	copy->unshareable = errno == EOPNOTSUPP || errno == EXDEV || errno == ENOTTY || errno == EINVAL;
	return false;
}

/* The same order as in CopyUp.publish_regular, for the same reasons. */
static bool build(struct copy *copy, int source, int fd)
{
	const struct stat *st = &copy->lower;
	struct timespec times[] = {st->st_atim, st->st_mtim};

	return take_data(copy, source, fd) && !fstat(fd, &copy->upper) && copy->upper.st_size == st->st_size &&
	       ((st->st_uid == copy->upper.st_uid && st->st_gid == copy->upper.st_gid) || !fchown(fd, st->st_uid, st->st_gid)) &&
	       !fsetxattr(fd, copy->origin, copy->value, copy->size, 0) &&
	       (!copy->metacopy || !fsetxattr(fd, copy->metacopy, "", 0, 0)) && !fchmod(fd, st->st_mode & 07777) &&
	       !futimens(fd, times);
}

/* Give the copy its name; what the directory holds doesn't change, so its times stay. */
static bool publish(const struct copy *copy, int fd)
{
	struct stat st;
	struct timespec times[2];

	if (fstat(copy->to, &st) || linkat(AT_FDCWD, path_of(fd).text, copy->to, copy->name, AT_SYMLINK_FOLLOW))
		return false;
	times[0] = st.st_atim;
	times[1] = st.st_mtim;
	utimensat(AT_FDCWD, path_of(copy->to).text, times, 0); /* best effort, as everywhere */
	return true;
}

/* The descriptor of the published copy, negative where there is none. */
static int copy_from(struct copy *copy, int source)
{
	int fd;

	if (!examine(copy, source))
		return -1;
	fd = openat(copy->work, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (fd < 0)
		return -1;
	if (build(copy, source, fd) && publish(copy, fd))
		return fd;
	close(fd);
	return -1;
}

static int copy_up(struct copy *copy)
{
	int source = openat(copy->from, copy->name, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
	int fd;

	if (source < 0)
		return -1;
	fd = copy_from(copy, source);
	close(source);
	return fd;
}

static PyObject *py_copy_plain(PyObject *self UNUSED, PyObject *args)
{
	struct copy copy = {0};
	Py_ssize_t head;
	int fd = -1;

	if (!PyArg_ParseTuple(args, "iyKiiz#sz", &copy.from, &copy.name, &copy.ino, &copy.to, &copy.work, &copy.head, &head,
			      &copy.origin, &copy.metacopy))
		return NULL;
	if (!copy.head || head == ORIGIN_HEAD)
		fd = copy_up(&copy);
	if (copy.unshareable)
		Py_RETURN_FALSE;
	if (fd < 0)
		Py_RETURN_NONE;
	return Py_BuildValue("iKL", fd, (unsigned long long)copy.upper.st_ino, (long long)copy.lower.st_blocks);
}

PyMethodDef copied_methods[] = {
	{"copy_plain", py_copy_plain, METH_VARARGS,
	 "(dirfd, name, st_ino, directory in upper, work, head of the origin, its attribute's name, that of the metacopy or None): "
	 "copy a file up. Returns (descriptor and st_ino of the copy, blocks of the lower file); None where nothing was done, "
	 "False where data can't be shared."},
	{NULL, NULL, 0, NULL},
};
