"""Every raw system call, and the only ctypes of the package.

The rest of the core speaks in *(dirfd, name)*: a descriptor of a directory and one path component, never a
joined path, so that nothing can be swapped for a symbolic link between two steps and no path is ever too long.
What the `os` module offers on that form is used directly; this room adds what it lacks: ``renameat2``,
``openat2``, ``open_tree``, file handles, ``getdents64``, extended attributes of an entry that is not open,
``utimensat`` with ``UTIME_OMIT``, inode flags, cloning and hole-preserving copies, and another user's identity.

All functions raise plain :class:`OSError` with the errno of the call.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

__all__ = [
    "MS_DIRSYNC",
    "MS_NOATIME",
    "MS_NODEV",
    "MS_NODIRATIME",
    "MS_NOEXEC",
    "MS_NOSUID",
    "MS_RDONLY",
    "MS_RELATIME",
    "MS_STRICTATIME",
    "MS_SYNCHRONOUS",
    "RENAME_EXCHANGE",
    "RENAME_NOREPLACE",
    "RENAME_WHITEOUT",
    "UTIME_NOW",
    "UTIME_OMIT",
    "acting_as",
    "chmod_at",
    "clone_file",
    "clone_mount",
    "clone_tree",
    "copy_data",
    "die_with_parent",
    "end_with_parent",
    "enter_mount_namespace",
    "entry_path",
    "fd_path",
    "file_handle",
    "file_system_type",
    "file_system_uuid",
    "get_fsxattr",
    "get_inode_flags",
    "getdents",
    "inotify",
    "inotify_add",
    "inotify_remove",
    "linkat_fd",
    "make_mount_readonly",
    "move_mount",
    "open_beneath",
    "open_by_handle",
    "open_in_root",
    "protected",
    "remount",
    "rename",
    "seconds_to_stat",
    "set_fsxattr",
    "set_inode_flags",
    "set_mount",
    "sync_file_system",
    "unmount",
    "utimens_at",
    "utimens_fd",
]

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4
UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2

NOW: Final = 1 << 80
"""In place of a time in nanoseconds: what the clock of the file system says when it is set."""

AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_EMPTY_PATH: Final = 0x1000

O_PATH_NOFOLLOW: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
O_PATH_DIR: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_NO_SYMLINKS: Final = 0x04
_RESOLVE_BENEATH: Final = 0x08
_RESOLVE_IN_ROOT: Final = 0x10

# System call numbers that are the same on every architecture (all were added after the tables were unified).
_SYS_OPEN_TREE: Final = 428
_SYS_OPENAT2: Final = 437
_SYS_FCHMODAT2: Final = 452


def _fail(name: bytes | None = None) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), name)


def error(code: int, name: bytes | None = None) -> OSError:
    """Return the exception of an errno, about a name if it is given."""
    return OSError(code, os.strerror(code), name)


def fd_path(fd: int) -> bytes:
    """Return the ``/proc`` name of the object behind *fd*; it works for ``O_PATH`` descriptors too."""
    return b"/proc/self/fd/%d" % fd


def may_write(fd: int) -> bool:
    """Tell whether a descriptor is open for writing. Raises OSError."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def entry_path(dirfd: int, name: bytes) -> bytes:
    """Return a path for calls that have no ``*at`` form; only its last component can be a symbolic link."""
    return b"/proc/self/fd/%d/%b" % (dirfd, name)


# -- names --

_renameat2 = _libc.renameat2
_renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_renameat2.restype = ctypes.c_int


def rename(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int = 0) -> None:
    """Rename with the flags of ``renameat2(2)``."""
    if _renameat2(old_fd, old, new_fd, new, flags) != 0:
        raise _fail(old)


def linkat_fd(fd: int, new_fd: int, new: bytes) -> None:
    """Give the inode behind *fd* (also ``O_TMPFILE`` or ``O_PATH``) the name *new* in *new_fd*."""
    os.link(fd_path(fd), new, dst_dir_fd=new_fd, follow_symlinks=True)


def open_beneath(root_fd: int, path: bytes, flags: int) -> int:
    """Open *path* below *root_fd*: no symbolic link, no ``..`` above it, no magic link is followed.

    Mirrors the safety of the kernel's own path walk inside one layer. Paths longer than ``PATH_MAX`` are walked
    component by component.
    """
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS)
    if len(path) < 4000:
        fd = _syscall(_SYS_OPENAT2, root_fd, path, how, ctypes.c_size_t(len(how)))
        if fd >= 0:
            return int(fd)
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM, errno.ENAMETOOLONG):
            raise _fail(path)
    return _walk_beneath(root_fd, path, flags)


def open_in_root(root_fd: int, path: bytes, flags: int) -> int:
    """Open *path* as if *root_fd* were the root directory: symbolic links and ``..`` are followed, but never out of it.

    ``RESOLVE_IN_ROOT`` of ``openat2(2)``, what ``chroot(2)`` does to a path walk. Needs Linux 5.6.
    """
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    while True:
        fd = _syscall(_SYS_OPENAT2, root_fd, path, how, ctypes.c_size_t(len(how)))
        if fd >= 0:
            return int(fd)
        # EAGAIN: a rename somewhere raced with a step through `..`.
        if ctypes.get_errno() != errno.EAGAIN:
            raise _fail(path)


def _walk_beneath(root_fd: int, path: bytes, flags: int) -> int:
    parts = [part for part in path.split(b"/") if part]
    if not parts or b".." in parts:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    here = os.dup(root_fd)
    try:
        for part in parts[:-1]:
            below = os.open(part, O_PATH_DIR, dir_fd=here)
            os.close(here)
            here = below
        return os.open(parts[-1], flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
    finally:
        os.close(here)


def clone_mount(path: bytes) -> int:
    """Return a descriptor of *path* in a private copy of its mount, without the mounts below it.

    Mirrors ``clone_private_mount`` that overlayfs uses for its layers: a file system mounted later below or over
    the layer, our own mount point included, is not seen through it. Needs CAP_SYS_ADMIN in the mount's user
    namespace; raises :class:`OSError` where that is missing or the kernel is older than 5.2.
    """
    fd = _syscall(_SYS_OPEN_TREE, AT_FDCWD, path, 1 | os.O_CLOEXEC)
    if fd < 0:
        raise _fail(path)
    return int(fd)


_SYS_MOUNT_SETATTR: Final = 442
_MOUNT_ATTR_RDONLY: Final = 0x01
_MOUNT_ATTR_NODEV: Final = 0x04
_MOUNT_ATTR_NOATIME: Final = 0x10
_MOUNT_ATTR__ATIME: Final = 0x70


def make_mount_readonly(fd: int) -> bool:
    """Make a private mount from :func:`clone_mount` read-only and noatime, as overlayfs does with its lowers.

    And nodev: the kernel opens the device files that the union shows by itself. One that somebody puts in the place of
    a regular file while it is looked up can't be opened, which may have effects of its own, by us.
    """
    wanted = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOATIME
    attr = struct.pack("QQQQ", wanted, _MOUNT_ATTR__ATIME, 0, 0)
    return bool(_syscall(_SYS_MOUNT_SETATTR, fd, b"", AT_EMPTY_PATH, attr, ctypes.c_size_t(len(attr))) == 0)


_AT_RECURSIVE: Final = 0x8000
_OPEN_TREE_CLONE: Final = 1
_SYS_MOVE_MOUNT: Final = 429
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_PROPAGATION: Final = {"shared": 1 << 20, "slave": 1 << 19, "private": 1 << 18}


def clone_tree(fd: int, *, recursive: bool) -> int:
    """Return a descriptor of a detached bind mount of what *fd* names, with the mounts below it if *recursive*."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    tree = _syscall(_SYS_OPEN_TREE, fd, b"", flags)
    if tree < 0:
        raise _fail()
    return int(tree)


def set_mount(fd: int, *, read_only: bool, propagation: str, recursive: bool) -> None:
    """Set attributes of a mount (``mount_setattr(2)``, Linux 5.12); *propagation* is shared, slave or private."""
    attr = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY if read_only else 0, 0, _PROPAGATION[propagation], 0)
    flags = AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    if _syscall(_SYS_MOUNT_SETATTR, fd, b"", flags, attr, ctypes.c_size_t(len(attr))) != 0:
        raise _fail()


def move_mount(fd: int, target_fd: int) -> None:
    """Put a detached mount on what *target_fd* names (``move_mount(2)``)."""
    if _syscall(_SYS_MOVE_MOUNT, fd, b"", target_fd, b"", _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH) != 0:
        raise _fail()


_UMOUNT_NOFOLLOW: Final = 8
_MNT_DETACH: Final = 2


def unmount(path: bytes, *, detach: bool = False) -> None:
    """Unmount what is mounted on *path*, which is not followed if it is a symbolic link (``umount2(2)``)."""
    if _libc.umount2(path, _UMOUNT_NOFOLLOW | (_MNT_DETACH if detach else 0)) != 0:
        raise _fail(path)


MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_SYNCHRONOUS: Final = 16
MS_DIRSYNC: Final = 128
MS_NOATIME: Final = 1024
MS_NODIRATIME: Final = 2048
MS_RELATIME: Final = 1 << 21
MS_STRICTATIME: Final = 1 << 24
_MS_REMOUNT: Final = 32


def remount(path: str, flags: int) -> None:
    """Give the mount on *path* these flags of ``mount(2)``, its file system too; EBUSY if it is being written to."""
    if _libc.mount(b"none", os.fsencode(path), None, ctypes.c_ulong(_MS_REMOUNT | flags), None) != 0:
        raise _fail()


# -- processes --

_CLONE_NEWNS: Final = 0x20000


def enter_mount_namespace(path: str) -> None:
    """Move this process, which must have one thread, to the mount namespace that a file of ``/proc`` names."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, _CLONE_NEWNS) != 0:
            raise _fail()
    finally:
        os.close(fd)


def in_initial_user_namespace() -> bool:
    """Whether this process's users are the machine's own, as far as can be told."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as lines:
            return lines.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return True


_PR_SET_PDEATHSIG: Final = 1


def die_with_parent() -> None:
    """Have this process killed when its parent ends (``prctl(2)``)."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise _fail()


def end_with_parent() -> None:
    """Have this process sent SIGTERM when its parent ends (``prctl(2)``)."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise _fail()


# -- metadata --

_fchmodat2_works = True


def chmod_at(dirfd: int, name: bytes, mode: int) -> None:
    """Set the permission bits of an entry that is not a symbolic link, without following one."""
    global _fchmodat2_works
    if _fchmodat2_works:
        if _syscall(_SYS_FCHMODAT2, dirfd, name, mode, AT_SYMLINK_NOFOLLOW) == 0:
            return
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM):
            raise _fail(name)
        _fchmodat2_works = ctypes.get_errno() != errno.ENOSYS
    fd = os.open(name, O_PATH_NOFOLLOW, dir_fd=dirfd)
    try:
        os.chmod(fd_path(fd), mode)
    finally:
        os.close(fd)


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


_TimespecPair = _Timespec * 2
_utimensat = _libc.utimensat
_utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)


def _timespec(ns: int | None) -> _Timespec:
    if ns is None:
        return _Timespec(0, UTIME_OMIT)
    if ns == NOW:
        return _Timespec(0, UTIME_NOW)
    return _Timespec(ns // 1_000_000_000, ns % 1_000_000_000)


def utimens_at(dirfd: int, name: bytes, atime_ns: int | None, mtime_ns: int | None, *, follow: bool = False) -> None:
    """Set times in nanoseconds or `NOW`; None leaves one as it is. A symbolic link itself changes unless *follow*."""
    if atime_ns is not None and mtime_ns is not None and NOW not in (atime_ns, mtime_ns):
        where = None if dirfd == AT_FDCWD else dirfd
        os.utime(name, ns=(atime_ns, mtime_ns), dir_fd=where, follow_symlinks=follow)
        return
    times = _TimespecPair(_timespec(atime_ns), _timespec(mtime_ns))
    if _utimensat(dirfd, name, ctypes.byref(times), 0 if follow else AT_SYMLINK_NOFOLLOW) != 0:
        raise _fail(name)


def utimens_fd(fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Like :func:`utimens_at` for an object behind a descriptor, ``O_PATH`` ones included."""
    utimens_at(AT_FDCWD, fd_path(fd), atime_ns, mtime_ns, follow=True)


# -- inode flags --

FS_IOC_GETFLAGS: Final = 0x80086601
FS_IOC_SETFLAGS: Final = 0x40086602
FS_IOC_FSGETXATTR: Final = 0x801C581F
FS_IOC_FSSETXATTR: Final = 0x401C5820

FS_SYNC: Final = 0x08
FS_IMMUTABLE: Final = 0x10
FS_APPEND: Final = 0x20
FS_NOATIME: Final = 0x80


def get_inode_flags(fd: int) -> int:
    """Return the ``FS_*_FL`` flags of an open file. Raises ENOTTY or EOPNOTSUPP where the file system has none."""
    buffer = bytearray(8)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, buffer)
    return int(struct.unpack_from("I", buffer)[0])


def set_inode_flags(fd: int, flags: int) -> None:
    """Set the ``FS_*_FL`` flags of an open file."""
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("L", flags))


def get_fsxattr(fd: int) -> bytes:
    """Return the ``struct fsxattr`` of an open file: flags in another form, and its project."""
    buffer = bytearray(28)
    fcntl.ioctl(fd, FS_IOC_FSGETXATTR, buffer)
    return bytes(buffer)


def set_fsxattr(fd: int, value: bytes) -> None:
    """Set what ``get_fsxattr`` returns."""
    fcntl.ioctl(fd, FS_IOC_FSSETXATTR, value)


_statx = getattr(_libc, "statx", None)
_statx_attributes = struct.Struct("Q").unpack_from
if _statx is not None:
    _statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)


def protected(path: bytes, *, follow: bool) -> int:
    """Return which of FS_IMMUTABLE and FS_APPEND an object has, without opening it; 0 where that can't be told."""
    buffer = ctypes.create_string_buffer(256)
    if _statx is None or _statx(AT_FDCWD, path, 0 if follow else AT_SYMLINK_NOFOLLOW, 0, buffer) != 0:
        return 0
    return int(_statx_attributes(buffer, 8)[0]) & (FS_IMMUTABLE | FS_APPEND)  # STATX_ATTR_* are the same bits


# -- file handles and file system identity --

_name_to_handle_at = getattr(_libc, "name_to_handle_at", None)
_open_by_handle_at = getattr(_libc, "open_by_handle_at", None)
_MAX_HANDLE: Final = 128


def file_handle(dirfd: int, name: bytes) -> tuple[int, bytes]:
    """Return (type, bytes) of the file handle of an entry, or of *dirfd* itself when *name* is empty.

    Raises EOPNOTSUPP where the file system exports no handles.
    """
    if _name_to_handle_at is None:
        raise OSError(errno.ENOSYS, "name_to_handle_at is missing")
    buffer = ctypes.create_string_buffer(struct.pack("Ii", _MAX_HANDLE, 0), 8 + _MAX_HANDLE)
    mount_id = ctypes.c_int()
    flags = 0 if name else AT_EMPTY_PATH
    if _name_to_handle_at(dirfd, name, buffer, ctypes.byref(mount_id), flags) != 0:
        raise _fail(name)
    size, kind = struct.unpack_from("Ii", buffer)
    return kind, buffer.raw[8 : 8 + size]


def open_by_handle(mount_fd: int, kind: int, handle: bytes, flags: int = os.O_PATH) -> int:
    """Open the inode of a file handle on the file system of *mount_fd*; ESTALE when it is gone."""
    if _open_by_handle_at is None:
        raise OSError(errno.ENOSYS, "open_by_handle_at is missing")
    buffer = struct.pack("Ii", len(handle), kind) + handle
    fd = _open_by_handle_at(mount_fd, buffer, flags | os.O_CLOEXEC)
    if fd < 0:
        raise _fail()
    return int(fd)


_FS_IOC_GETFSUUID: Final = 0x80111500
_EXT4_IOC_GETFSUUID: Final = 0x8008662C
_XFS_IOC_FSGEOMETRY: Final = 0x8100587E
_BTRFS_IOC_FS_INFO: Final = 0x8400941F


def file_system_uuid(dirfd: int) -> bytes:
    """Return the 16 bytes of the super block's UUID as the kernel keeps them; zeros when there is none, or nobody says.

    FS_IOC_GETFSUUID exists since Linux 6.9; before, xfs, btrfs and (since 6.0) ext4 have calls of their own, and the
    random UUID of a tmpfs is known to the kernel alone.
    """
    try:
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dirfd)
    except PermissionError:
        return bytes(16)
    try:
        for probe in _uuid_probes:
            try:
                found = probe(fd)
            except OSError:
                continue
            if found is not None:
                return found
        return bytes(16)
    finally:
        os.close(fd)


def _uuid_generic(fd: int) -> bytes | None:
    buffer = bytearray(17)
    fcntl.ioctl(fd, _FS_IOC_GETFSUUID, buffer)
    return bytes(buffer[1:17]) if buffer[0] == 16 else None


def _uuid_ext4(fd: int) -> bytes | None:
    buffer = bytearray(struct.pack("II", 16, 0) + bytes(16))
    fcntl.ioctl(fd, _EXT4_IOC_GETFSUUID, buffer)
    return bytes(buffer[8:24])


def _uuid_xfs(fd: int) -> bytes | None:
    buffer = bytearray(256)
    fcntl.ioctl(fd, _XFS_IOC_FSGEOMETRY, buffer)
    return bytes(buffer[64:80])


def _uuid_btrfs(fd: int) -> bytes | None:
    buffer = bytearray(1024)
    fcntl.ioctl(fd, _BTRFS_IOC_FS_INFO, buffer)
    return bytes(buffer[16:32])


_uuid_probes: tuple[Callable[[int], bytes | None], ...] = (_uuid_generic, _uuid_ext4, _uuid_xfs, _uuid_btrfs)


def pretend_old_kernel() -> None:
    """Use nothing that came after Linux 5.15 or so, to try how that works."""
    global _uuid_probes
    _uuid_probes = (_uuid_xfs, _uuid_btrfs)


_fstatfs = _libc.fstatfs64
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)
_statx = getattr(_libc, "statx", None)
_AT_STATX_FORCE_SYNC: Final = 0x2000
_STATX_BASIC: Final = 0x7FF


def file_system_type(fd: int) -> int:
    """Return the magic number of a file system, ``f_type`` of ``statfs(2)``."""
    buffer = ctypes.create_string_buffer(512)
    if _fstatfs(fd, buffer) != 0:
        raise _fail()
    # A long on all common architectures; the numbers themselves have 32 bits.
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) & 0xFFFFFFFF


def seconds_to_stat(fd: int) -> float:
    """Return how long it takes to get the attributes of *fd* from where they are kept, not from a cache."""
    if _statx is None:
        return 0.0
    buffer = ctypes.create_string_buffer(256)
    began = time.monotonic()
    if _statx(fd, b"", AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC, _STATX_BASIC, buffer) != 0:
        raise _fail()
    return time.monotonic() - began


# -- listing --

_getdents64 = _libc.getdents64
_getdents64.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_getdents64.restype = ctypes.c_ssize_t
_DIRENT = struct.Struct("<QqHB") if sys.byteorder == "little" else struct.Struct(">QqHB")
_GETDENTS_BUFFER: Final = 256 * 1024


def getdents(fd: int) -> list[tuple[bytes, int, int]]:
    """Return (name, inode number, ``DT_*`` type) of every entry of an open directory but ``.`` and ``..``."""
    buffer = ctypes.create_string_buffer(_GETDENTS_BUFFER)
    unpack = _DIRENT.unpack_from
    entries: list[tuple[bytes, int, int]] = []
    os.lseek(fd, 0, os.SEEK_SET)
    while (size := _getdents64(fd, buffer, _GETDENTS_BUFFER)) > 0:
        data = ctypes.string_at(buffer, size)
        at = 0
        while at < size:
            ino, _, length, kind = unpack(data, at)
            name = data[at + 19 : data.index(b"\0", at + 19)]
            if name not in (b".", b".."):
                entries.append((name, ino, kind))
            at += length
    if size < 0:
        raise _fail()
    return entries


# -- watching --

_inotify_add_watch = _libc.inotify_add_watch
_inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


def inotify() -> int:
    """Return a new descriptor for events of ``inotify(7)``, which doesn't wait."""
    fd = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise _fail()
    return int(fd)


def inotify_add(fd: int, path: bytes, mask: int) -> int:
    """Watch what *path* leads to; return the watch's number, the same for the same object."""
    watch = _inotify_add_watch(fd, path, mask)
    if watch < 0:
        raise _fail(path)
    return int(watch)


def inotify_remove(fd: int, watch: int) -> None:
    """End a watch; one that has ended by itself is no error."""
    _libc.inotify_rm_watch(fd, watch)


# -- data --

_syncfs = _libc.syncfs
_syncfs.argtypes = (ctypes.c_int,)
_syncfs.restype = ctypes.c_int


def sync_file_system(fd: int) -> None:
    """Write all of the file system of *fd* to disk, as ``syncfs(2)``; *fd* is no ``O_PATH`` descriptor."""
    if _syncfs(fd) != 0:
        raise _fail()


_fallocate = _libc.fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


def punch_hole(fd: int, size: int) -> None:
    """Take the first *size* bytes out of a file, which keeps its size (``fallocate(2)``, FALLOC_FL_PUNCH_HOLE)."""
    if _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, 0, size) != 0:
        raise _fail()


def allocate_again(fd: int, at: int) -> None:
    """Allocate the block at an offset, in bytes, without a change of size (``fallocate(2)``, FALLOC_FL_KEEP_SIZE)."""
    if _fallocate(fd, _KEEP_SIZE, at, 1) != 0:
        raise _fail()


_FICLONE: Final = 0x40049409
_COPY_CHUNK: Final = 1 << 20
_NO_CLONE: Final = frozenset((errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ETXTBSY))


def clone_file(source: int, target: int) -> bool:
    """Reflink all of *source* into *target*; False where the file systems can't."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as exc:
        if exc.errno in _NO_CLONE:
            return False
        raise
    return True


def copy_data(source: int, target: int, size: int, progress: Callable[[int], bool] | None = None) -> bool:
    """Copy the first *size* bytes: as a reflink, else with ``copy_file_range``, else by reading and writing.

    Holes stay holes (mirrors ``ovl_copy_up_file``). *target* must be empty or hold nothing of value; it ends with
    exactly *size* bytes. *progress*, called with the offset reached, may return False to stop early.

    Returns whether it is a reflink of all of the source. That needs no sync before the target gets a name: the source's
    data is on disk by then, and the reflink stands in the file system's journal before the name.
    """
    if size and clone_file(source, target):
        if os.fstat(target).st_size == size:
            return True
        os.ftruncate(target, size)
        return False
    _copy_stretches(source, target, size, progress)
    return False


def _copy_stretches(source: int, target: int, size: int, progress: Callable[[int], bool] | None) -> None:
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return
            raise
        end = min(os.lseek(source, at, os.SEEK_HOLE), size)
        while at < end:
            done = _copy_range(source, target, at, min(end - at, _COPY_CHUNK))
            if not done:
                return
            at += done
            if progress is not None and not progress(at):
                return


def _copy_range(source: int, target: int, offset: int, count: int) -> int:
    try:
        done = os.copy_file_range(source, target, count, offset, offset)
        if done:
            return done
    except OSError as exc:
        if exc.errno not in (
            errno.EXDEV,
            errno.EINVAL,
            errno.EOPNOTSUPP,
            errno.ENOSYS,
            errno.EBADF,
            errno.EIO,
        ):
            raise
    data = os.pread(source, count, offset)
    at = 0
    while at < len(data):
        at += os.pwrite(target, data[at:], offset + at)
    return len(data)


# -- identity --

_CAP_VERSION_3: Final = 0x20080522
_Capabilities = ctypes.c_uint32 * 6
_NO_ID: Final = 0xFFFFFFFF
_setfsuid, _setfsgid = _libc.setfsuid, _libc.setfsgid
_setfsuid.argtypes = _setfsgid.argtypes = (ctypes.c_uint32,)
_setfsuid.restype = _setfsgid.restype = ctypes.c_uint32


@contextlib.contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """Have what this thread creates in the block belong to a user and group from the start; its powers stay.

    Mirrors how the kernel takes the owner of a new inode from the creator's fsuid and fsgid (``inode_init_owner``).
    Raises EPERM where this process may not take that identity.
    """
    header = struct.pack("Ii", _CAP_VERSION_3, 0)
    powers = _Capabilities()
    if _libc.capget(header, ctypes.byref(powers)) != 0:
        raise _fail()
    user, group = _setfsuid(_NO_ID), _setfsgid(_NO_ID)
    try:
        _setfsgid(gid)
        _setfsuid(uid)
        # They report no error; asked for what is no identity, they only return the present one.
        if _setfsuid(_NO_ID) != uid or _setfsgid(_NO_ID) != gid:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        # Another user than root loses the capabilities that concern files; the path to the new name may need them.
        if _libc.capset(header, ctypes.byref(powers)) != 0:
            raise _fail()
        yield
    finally:
        _setfsuid(user)
        _setfsgid(group)
        _libc.capset(header, ctypes.byref(powers))
