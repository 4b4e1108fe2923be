"""Layers written by hand: trees from a description, and the on-disk marks of overlayfs."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

TRUSTED = "trusted.overlay."
USER = "user.overlay."


@dataclass(frozen=True)
class Symlink:
    """A symbolic link to `target`."""

    target: str


@dataclass(frozen=True)
class Node:
    """A special file: `mode` is type and permissions (S_IFIFO | 0o600, ...), `device` for devices."""

    mode: int
    device: int = 0


@dataclass(frozen=True)
class File:
    """A file with more than content."""

    content: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    mtime: int | None = None


@dataclass(frozen=True)
class HardLink:
    """Another name of a file described earlier, by its path from the root of the description."""

    to: str


@dataclass(frozen=True)
class Whiteout:
    """A whiteout in the 0:0 character device form."""


Thing = Union[bytes, Symlink, Node, File, HardLink, Whiteout, "Tree"]
Tree = Mapping[str, "Thing"]
WHITEOUT = Whiteout()
FIFO = Node(stat.S_IFIFO | 0o644)


def build(directory: Path, tree: Tree, *, root: Path | None = None) -> Path:
    """Write `tree` into `directory` (made where missing), in the description's order; returns `directory`."""
    root = root or directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, thing in tree.items():
        path = directory / name
        match thing:
            case bytes():
                path.write_bytes(thing)
            case Symlink():
                path.symlink_to(thing.target)
            case Node():
                os.mknod(path, thing.mode, thing.device)
                os.chmod(path, stat.S_IMODE(thing.mode))
            case File():
                _build_file(path, thing)
            case HardLink():
                os.link(root / thing.to, path, follow_symlinks=False)
            case Whiteout():
                whiteout(path)
            case _:
                build(path, thing, root=root)
    return directory


def _build_file(path: Path, file: File) -> None:
    path.write_bytes(file.content)
    os.chown(path, file.uid, file.gid)
    os.chmod(path, file.mode)
    for name, value in file.xattrs.items():
        os.setxattr(path, name, value)
    if file.mtime is not None:
        os.utime(path, ns=(file.mtime, file.mtime))


def whiteout(path: Path) -> None:
    """Make a whiteout: a character device 0:0."""
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(0, 0))


def xattr_whiteout(path: Path, prefix: str = TRUSTED) -> None:
    """Make a whiteout in the xattr form: an empty file with overlay.whiteout, in a directory marked opaque=x."""
    path.touch()
    os.setxattr(path, prefix + "whiteout", b"y")
    os.setxattr(path.parent, prefix + "opaque", b"x")


def opaque(path: Path, prefix: str = TRUSTED) -> None:
    """Mark a directory opaque: nothing below it shows."""
    os.setxattr(path, prefix + "opaque", b"y")


def is_whiteout(path: Path) -> bool:
    """Whether `path` is a whiteout in the form that kernel overlayfs makes."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def mark(path: Path, name: str, prefix: str = TRUSTED) -> bytes | None:
    """The value of the overlay xattr `name` on `path` itself, None where it has none."""
    try:
        return os.getxattr(path, prefix + name, follow_symlinks=False)
    except OSError:
        return None


def marks(path: Path, prefix: str = TRUSTED) -> set[str]:
    """The names (without prefix) of all overlay xattrs on `path`."""
    names = os.listxattr(path, follow_symlinks=False)
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


ACL_USER_OBJ, ACL_USER, ACL_GROUP_OBJ, ACL_GROUP, ACL_MASK, ACL_OTHER = 1, 2, 4, 8, 16, 32
ACL_ACCESS = "system.posix_acl_access"
ACL_DEFAULT = "system.posix_acl_default"


def acl(*entries: tuple[int, int] | tuple[int, int, int]) -> bytes:
    """The xattr form of a POSIX ACL from (tag, permissions[, id]) entries."""
    packed = [struct.pack("<HHI", entry[0], entry[1], entry[2] if len(entry) > 2 else 0xFFFFFFFF) for entry in entries]
    return struct.pack("<I", 2) + b"".join(packed)


def capability(permitted: int = 1 << 10) -> bytes:
    """A security.capability value (revision 2, effective) that permits the given capability bits."""
    return struct.pack("<IIIII", 0x02000001, permitted, 0, 0, 0)
