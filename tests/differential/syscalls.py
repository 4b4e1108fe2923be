"""System calls that Python's ``os`` lacks, and users for the calling thread only.

Credentials belong to a thread in Linux; glibc spreads them to all threads, the raw system calls don't. A test process can
therefore do one operation as another user and return to root, without a helper process.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)
_NUMBERS = {"x86_64": (117, 119, 116, 217), "aarch64": (147, 149, 159, 61)}
_SETRESUID, _SETRESGID, _SETGROUPS, _GETDENTS64 = _NUMBERS[platform.machine()]

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EACCESS = 0x200
AT_SYMLINK_FOLLOW = 0x400
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_ZERO_RANGE = 16


@dataclass(frozen=True)
class User:
    """Who does an operation: user id, group id and supplementary groups."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


USERS = {
    "root": User(0, 0),
    "u1": User(1001, 1001, (1001, 2000)),
    "u2": User(1002, 1002, (1002,)),
}


def _check(result: int) -> int:
    """``result`` of a libc call, or the OSError it stands for."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _set_user(user: User, saved: int) -> None:
    array = (ctypes.c_uint32 * max(1, len(user.groups)))(*user.groups)
    _check(_libc.syscall(_SETGROUPS, len(user.groups), array))
    _check(_libc.syscall(_SETRESGID, user.gid, user.gid, 0))
    _check(_libc.syscall(_SETRESUID, user.uid, user.uid, saved))


@contextmanager
def identity(name: str) -> Iterator[None]:
    """Let the calling thread act as the user ``name`` of USERS; saved uid 0 is the way back to root."""
    if name == "root":
        yield
        return
    _set_user(USERS[name], 0)
    try:
        yield
    finally:
        _check(_libc.syscall(_SETRESUID, 0, 0, 0))
        _set_user(USERS["root"], 0)


def renameat2(old: bytes, new: bytes, flags: int) -> None:
    """renameat2(2) relative to the current directory."""
    _check(_libc.renameat2(AT_FDCWD, old, AT_FDCWD, new, flags))


def link(old: bytes, new: bytes, follow: bool) -> None:
    """linkat(2); ``os.link`` doesn't follow a symlink even when told to."""
    _check(_libc.linkat(AT_FDCWD, old, AT_FDCWD, new, AT_SYMLINK_FOLLOW if follow else 0))


def faccessat(path: bytes, mode: int, flags: int) -> None:
    """faccessat(2); unlike ``os.access`` it keeps the errno."""
    _check(_libc.faccessat(AT_FDCWD, path, mode, flags))


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


def _timespec(value: int | str) -> _Timespec:
    if value == "now":
        return _Timespec(0, UTIME_NOW)
    if value == "omit":
        return _Timespec(0, UTIME_OMIT)
    assert isinstance(value, int)
    return _Timespec(*divmod(value, 1_000_000_000))


def utimens(target: bytes | int, atime: int | str, mtime: int | str, follow: bool = True) -> None:
    """utimensat(2) or futimens(3); times in nanoseconds since the epoch, or "now", or "omit"."""
    times = (_Timespec * 2)(_timespec(atime), _timespec(mtime))
    if isinstance(target, int):
        _check(_libc.futimens(target, times))
    else:
        _check(_libc.utimensat(AT_FDCWD, target, times, 0 if follow else AT_SYMLINK_NOFOLLOW))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    _check(_libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


@dataclass(frozen=True)
class DirEntry:
    """One record of getdents64(2); ``cookie`` is the position after it, for lseek(2)."""

    name: bytes
    ino: int
    kind: int
    cookie: int


def getdents(fd: int, size: int = 65536) -> list[DirEntry]:
    """One getdents64(2) call with a buffer of ``size`` bytes; empty at the end of the directory."""
    buffer = ctypes.create_string_buffer(size)
    filled = _check(_libc.syscall(_GETDENTS64, fd, buffer, size))
    raw, entries, start = buffer.raw, [], 0
    while start < filled:
        ino, cookie, length, kind = struct.unpack_from("=QqHB", raw, start)
        name = raw[start + 19 : start + length].split(b"\0", 1)[0]
        entries.append(DirEntry(name, ino, kind, cookie))
        start += length
    return entries


def all_dents(fd: int) -> list[DirEntry]:
    """Every record from the directory's current position to its end, "." and ".." included."""
    entries: list[DirEntry] = []
    while more := getdents(fd):
        entries += more
    return entries


class _FileHandle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_ubyte * 128))


def file_handle(path: bytes) -> tuple[int, bytes]:
    """(type, bytes) of name_to_handle_at(2), symlinks not followed."""
    handle, mount = _FileHandle(bytes=128), ctypes.c_int()
    _check(_libc.name_to_handle_at(AT_FDCWD, path, ctypes.byref(handle), ctypes.byref(mount), 0))
    return handle.type, bytes(handle.data[: handle.bytes])
