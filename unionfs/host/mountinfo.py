"""The kernel's own list of mounts, /proc/self/mountinfo (see proc(5)), and where a directory lies in it.

A path says little about whether two directories overlap: bind mounts give one directory many paths, and a
mount hides what lies below it. `Place` therefore names a directory as the kernel's overlap checks see it:
by its file system and its path from that file system's root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

FUSE_TYPE = "fuse.unionfs"

_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: `dev` is `major:minor`, `root` the mounted directory in its file system."""

    mount_id: int
    parent_id: int
    dev: str
    root: str
    mountpoint: str
    options: str
    fstype: str
    source: str
    super_options: str

    @property
    def is_idmapped(self) -> bool:
        """Whether the kernel shows other owners there than the file system has (mount_setattr(2), Linux 5.12)."""
        return "idmapped" in self.options.split(",")

    @property
    def user_id(self) -> int | None:
        """The user who made a FUSE mount; None for any other mount."""
        found = re.search(r"\buser_id=(\d+)", self.super_options)
        return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Place:
    """A directory: on which file system and mount it lies, and its path from that file system's root."""

    mount_id: int
    dev: str
    path: str

    def is_within(self, other: Place) -> bool:
        """Whether this directory lies in `other` or is `other`, on whatever mounts the two are seen."""
        if self.dev != other.dev:
            return False
        return self.path == other.path or self.path.startswith(other.path.rstrip("/") + "/")


def read_mounts(pid: int | str = "self") -> list[Mount]:
    """Return the mounts that process `pid` sees, in the order they were made."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return [_parse_line(line) for line in file]


def mounted_at(mountpoint: str, mounts: list[Mount] | None = None) -> Mount | None:
    """Return the topmost mount whose mount point is exactly `mountpoint`, or None."""
    found = [mount for mount in mounts or read_mounts() if mount.mountpoint == mountpoint]
    return found[-1] if found else None


def place_of(path: str, mounts: Sequence[Mount]) -> Place:
    """Return where directory `path` lies.

    Raises OSError where it can't be reached.
    """
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _place_of_fd(fd, mounts)
    finally:
        os.close(fd)


def mount_id_of(fd: int) -> int:
    """Return the number of the mount that a descriptor lies on."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    return int(fields["mnt_id"])


def _place_of_fd(fd: int, mounts: Sequence[Mount]) -> Place:
    mount_id = mount_id_of(fd)
    real = os.readlink(f"/proc/self/fd/{fd}")
    for mount in mounts:
        if mount.mount_id == mount_id:
            inner = os.path.relpath(real, mount.mountpoint)
            return Place(mount_id, mount.dev, os.path.normpath(os.path.join(mount.root, inner)))
    # A mount outside this process's root directory (chroot): its device number still tells file systems
    # apart.
    status = os.fstat(fd)
    return Place(mount_id, f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}", real)


def _parse_line(line: bytes) -> Mount:
    left, _, right = line.rstrip(b"\n").partition(b" - ")
    mount_id, parent_id, dev, root, mountpoint, options = left.split(b" ")[:6]
    fstype, source, super_options = (right.split(b" ") + [b"", b""])[:3]
    return Mount(
        int(mount_id),
        int(parent_id),
        dev.decode("ascii"),
        _decode(root),
        _decode(mountpoint),
        _decode(options),
        _decode(fstype),
        _decode(source),
        _decode(super_options),
    )


def _decode(field: bytes) -> str:
    r"""Undo the kernel's octal escapes (`\040` for a space)."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))
