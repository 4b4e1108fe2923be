"""System calls that Python's `os` lacks, kept apart from those of the code under test."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16
CLONE_FS = 0x200
CLONE_NEWNS = 0x20000
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
MNT_FORCE = 1
MNT_DETACH = 2
AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000
FICLONE = 0x40049409
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_APPEND_FL = 0x20
FS_IMMUTABLE_FL = 0x10
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_IDMAP = 0x100000
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_MOUNT_SETATTR = 442
SYS_GETDENTS64 = 217 if os.uname().machine == "x86_64" else 61
SYS_SETGROUPS = 116 if os.uname().machine == "x86_64" else 159
SYS_SETRESGID = 119 if os.uname().machine == "x86_64" else 149
SYS_SETRESUID = 117 if os.uname().machine == "x86_64" else 147

_libc = ctypes.CDLL(None, use_errno=True)

PathArg = str | bytes | Path


def _check(result: int, *names: PathArg) -> int:
    """Return a system call's result, or raise its errno as `OSError`."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), *[os.fspath(name) for name in names[:1]])
    return result


def renameat2(source: PathArg, target: PathArg, flags: int) -> None:
    """renameat2(2) with `flags` (RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT)."""
    _check(
        _libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)),
        source,
    )


def syncfs(fd: int) -> None:
    """syncfs(2): flush the whole file system that `fd` lies on."""
    _check(_libc.syncfs(fd))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its `mode` bits, which os.posix_fallocate can't pass."""
    _check(_libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def inotify(directory: PathArg, events: int) -> int:
    """Watch a directory for inotify(7) events; a descriptor that doesn't block."""
    fd = _check(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
    _check(_libc.inotify_add_watch(fd, os.fsencode(directory), ctypes.c_uint(events)), directory)
    return fd


def unshare(flags: int) -> None:
    """unshare(2) for the calling thread."""
    _check(_libc.unshare(flags))


def mount(source: str, target: PathArg, kind: str) -> None:
    """mount(2) without flags or data."""
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), os.fsencode(kind), 0, None), target)


def idmapped_bind(source: PathArg, target: PathArg, mapping: str) -> None:
    """Bind a directory with other owners; `mapping` is what uid_map and gid_map of a user namespace get."""
    holder = subprocess.Popen(["unshare", "-U", "sh", "-c", "echo; read -r line"], stdin=-1, stdout=-1)
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdout.readline()
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{holder.pid}/{name}").write_text(mapping)
    namespace = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY)
    tree = _check(_libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(source), OPEN_TREE_CLONE))
    attributes = struct.pack("QQQQ", MOUNT_ATTR_IDMAP, 0, 0, namespace)
    _check(_libc.syscall(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, ctypes.c_size_t(len(attributes))))
    _check(_libc.syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH))
    os.close(tree)
    os.close(namespace)
    holder.communicate(b"\n")


def umount2(target: PathArg, flags: int) -> None:
    """umount2(2) with `flags` (MNT_FORCE, MNT_DETACH)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def link_fd(fd: int, target: PathArg) -> None:
    """Give the (perhaps nameless, O_TMPFILE) file behind `fd` the name `target`."""
    source = f"/proc/self/fd/{fd}".encode()  # os.link() does not follow it, whatever its arguments say
    _check(_libc.linkat(AT_FDCWD, source, AT_FDCWD, os.fsencode(target), AT_SYMLINK_FOLLOW), target)


def become(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    """Change the credentials of the calling thread alone (glibc's wrappers change every thread's)."""
    array = (ctypes.c_uint32 * max(1, len(groups)))(*groups)
    _check(_libc.syscall(SYS_SETGROUPS, len(groups), array))
    _check(_libc.syscall(SYS_SETRESGID, gid, gid, gid))
    _check(_libc.syscall(SYS_SETRESUID, uid, uid, uid))


class _Dirent(ctypes.Structure):
    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


_libc.opendir.restype = ctypes.c_void_p
_libc.readdir.restype = ctypes.POINTER(_Dirent)
_libc.readdir.argtypes = (ctypes.c_void_p,)
_libc.closedir.argtypes = (ctypes.c_void_p,)
_libc.telldir.argtypes = (ctypes.c_void_p,)
_libc.telldir.restype = ctypes.c_long
_libc.seekdir.argtypes = (ctypes.c_void_p, ctypes.c_long)
_libc.rewinddir.argtypes = (ctypes.c_void_p,)


class DirStream:
    """A directory stream of libc: readdir, telldir, seekdir, rewinddir."""

    def __init__(self, path: PathArg) -> None:
        stream = _libc.opendir(os.fsencode(path))
        if not stream:
            raise OSError(ctypes.get_errno(), "opendir", os.fspath(path))
        self._stream: int = stream

    def __enter__(self) -> DirStream:
        return self

    def __exit__(self, *_: object) -> None:
        _libc.closedir(self._stream)

    def read(self) -> tuple[bytes, int, int] | None:
        """The next entry as (name, d_ino, d_type), or None at the end."""
        ctypes.set_errno(0)
        entry = _libc.readdir(self._stream)
        if not entry:
            if code := ctypes.get_errno():
                raise OSError(code, os.strerror(code))
            return None
        return bytes(entry.contents.d_name), int(entry.contents.d_ino), int(entry.contents.d_type)

    def __iter__(self) -> Iterator[tuple[bytes, int, int]]:
        while entry := self.read():
            yield entry

    def tell(self) -> int:
        """The stream's position, good for `seek` as long as the stream is open."""
        return int(_libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        """Go back to a position that `tell` gave."""
        _libc.seekdir(self._stream, position)

    def rewind(self) -> None:
        """Start over, and see what has changed since."""
        _libc.rewinddir(self._stream)


def getdents(fd: int, size: int = 32768) -> bytes:
    """One raw getdents64(2) of at most `size` bytes."""
    buffer = ctypes.create_string_buffer(size)
    return buffer.raw[: _check(_libc.syscall(SYS_GETDENTS64, fd, buffer, size))]


def mount_fuse(target: PathArg, uid: int) -> int:
    """Mount a `fuse.unionfs` as `uid` would; the device that is returned is its server, which answers nothing."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={device},rootmode=40000,user_id={uid},group_id={uid}".encode()
    try:
        _check(_libc.mount(b"unionfs", os.fsencode(target), b"fuse.unionfs", 0, data), target)
    except OSError:
        os.close(device)
        raise
    return device
