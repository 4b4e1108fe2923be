"""A whole tree as plain data, and what differs between two of them.

A snapshot is taken with directory descriptors, so its depth is not bounded by PATH_MAX; names are bytes.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """All that a test compares of one file; directories have no size, digest, links or group."""

    mode: int
    uid: int
    gid: int
    size: int = 0
    digest: str = ""
    target: bytes = b""
    device: int = 0
    mtime: int = 0
    nlink: int = 0
    group: tuple[bytes, ...] = ()
    xattrs: tuple[tuple[str, bytes], ...] = ()


Snapshot = dict[bytes, Entry]


def snapshot(
    root: Path, *, times: bool = True, links: bool = True, xattrs: bool = True, hide: Iterable[str] = ()
) -> Snapshot:
    """Describe everything below `root`, and `root` itself as b"".

    times: modification times of all but directories, in ns; links: nlink and which paths are one file;
    hide: prefixes of xattr names to leave out.
    """
    found: Snapshot = {}
    inodes: dict[tuple[int, int], list[bytes]] = {}
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _walk(descriptor, b"", found, inodes, tuple(hide), times, xattrs)
    finally:
        os.close(descriptor)
    if not links:
        return {path: replace(entry, nlink=0) for path, entry in found.items()}
    for paths in inodes.values():
        for path in paths:
            found[path] = replace(found[path], group=tuple(sorted(paths)))
    return found


def _walk(
    descriptor: int,
    prefix: bytes,
    found: Snapshot,
    inodes: dict[tuple[int, int], list[bytes]],
    hide: tuple[str, ...],
    times: bool,
    xattrs: bool,
) -> None:
    found[prefix] = _entry(descriptor, b".", os.fstat(descriptor), hide, times, xattrs)
    for name in sorted(os.fsencode(entry) for entry in os.listdir(descriptor)):
        path = prefix + b"/" + name
        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            child = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            try:
                _walk(child, path, found, inodes, hide, times, xattrs)
            finally:
                os.close(child)
            continue
        found[path] = _entry(descriptor, name, status, hide, times, xattrs)
        inodes.setdefault((status.st_dev, status.st_ino), []).append(path)


def _entry(
    directory: int, name: bytes, status: os.stat_result, hide: tuple[str, ...], times: bool, xattrs: bool
) -> Entry:
    by_descriptor = f"/proc/self/fd/{directory}/".encode() + name
    attributes = _xattrs(by_descriptor, hide) if xattrs else ()
    entry = Entry(status.st_mode, status.st_uid, status.st_gid, xattrs=attributes)
    if stat.S_ISDIR(status.st_mode):
        return entry
    entry = replace(entry, size=status.st_size, nlink=status.st_nlink, mtime=status.st_mtime_ns if times else 0)
    if stat.S_ISREG(status.st_mode):
        return replace(entry, digest=_digest(directory, name))
    if stat.S_ISLNK(status.st_mode):
        return replace(entry, target=os.readlink(name, dir_fd=directory))
    return replace(entry, device=status.st_rdev)


def _xattrs(path: bytes, hide: tuple[str, ...]) -> tuple[tuple[str, bytes], ...]:
    pairs: list[tuple[str, bytes]] = []
    with suppress(OSError):
        for name in sorted(os.listxattr(path, follow_symlinks=False)):
            if not name.startswith(hide or ("\0",)):
                pairs.append((name, os.getxattr(path, name, follow_symlinks=False)))
    return tuple(pairs)


def _digest(directory: int, name: bytes) -> str:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    with open(descriptor, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def differences(left: Snapshot, right: Snapshot) -> list[str]:
    """One line for each path and attribute in which two snapshots differ."""
    lines: list[str] = []
    for path in sorted(left.keys() | right.keys()):
        one, other = left.get(path), right.get(path)
        if one is None or other is None:
            lines.append(f"{path!r}: only {'right' if one is None else 'left'}")
            continue
        for item in fields(Entry):
            a, b = getattr(one, item.name), getattr(other, item.name)
            if a != b:
                lines.append(f"{path!r}: {item.name} {a!r} / {b!r}")
    return lines


def assert_same(left: Snapshot, right: Snapshot) -> None:
    """Fail with the list of differences, the first thirty of them, where two snapshots differ."""
    found = differences(left, right)
    assert not found, f"{len(found)} differences (left / right):\n" + "\n".join(found[:30])
