"""The layers of one mount, opened once and reached by descriptor ever after.

Index 0 is upper (also in a read-only union, where it is absent), 1 and up are the lowers from top to bottom, then
the data-only ones. Each layer is opened through a private copy of its mount, as overlayfs does
(``clone_private_mount``): what is mounted below or over a layer later, the union itself included, is not seen
through it, and lowers are read-only and noatime in that copy. Without the privilege for that the plain directory
is used.

Upper and work must lie in *one* mount, or nothing could be renamed between them: the copy is made of the directory
that both have in common.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Sequence
from typing import Final

from unionfs.config import MountConfig
from unionfs.core import sysio
from unionfs.core.slow import Door, PlainDoor, SlowDoor, SlowFd
from unionfs.errors import BusyError, LayerError

log = logging.getLogger(__name__)

UPPER_INDEX: Final = 0

# A lower layer whose root's attributes take longer than this to get, in seconds, is slow; and how often to try.
_SLOW_SECONDS: Final = 0.001
_TRIES: Final = 3

# As are those on a network, which may be fast now, and FUSE, of which nobody knows (linux/magic.h and the drivers).
_SLOW_TYPES: Final = frozenset(
    (
        *(0x6969, 0x517B, 0xFE534D42, 0xFF534D42, 0x00C36400, 0x01021997),  # nfs, smb, smb2, cifs, ceph, 9p
        *(0x65735546, 0x5346414F, 0x6B414653, 0x73757245, 0x0BD00BD0),  # fuse, two kinds of afs, coda, lustre
        *(0x01161970, 0x7461636F, 0x20030528, 0x47504653, 0x786F4256),  # gfs2, ocfs2, orangefs, gpfs, vboxsf
        *(0xBACBACBC, 0x564C, 0x19830326),  # vmhgfs, ncp, beegfs
    )
)


class Layer:
    """One layer: its root directory and what matters of its file system."""

    __slots__ = (
        "device",
        "fd",
        "index",
        "path",
        "read_fd",
        "read_noatime",
        "root_stat",
        "uuid",
        "wh_files",
    )

    def __init__(self, index: int, path: str, fd: int) -> None:
        self.index = index
        self.path = path
        self.fd = fd  # O_PATH
        self.root_stat = os.fstat(fd)
        self.device = self.root_stat.st_dev
        # File handles can only be opened relative to a readable descriptor.
        self.read_fd = _open_readable(fd)
        self.uuid = sysio.file_system_uuid(fd)
        self.wh_files = index != UPPER_INDEX  # `.wh.NAME` files hide NAME in the layers below
        self.read_noatime = 0  # added to the flags of files opened for reading

    def ask_aside(self) -> None:
        """Mark the layer as slow."""
        self.fd = SlowFd(self.fd)
        if self.read_fd >= 0:
            self.read_fd = SlowFd(self.read_fd)

    @property
    def is_slow(self) -> bool:
        """Tell whether who waits for the layer must not keep others waiting."""
        return isinstance(self.fd, SlowFd)

    def close(self) -> None:
        """Close the layer's descriptors."""
        os.close(self.fd)
        if self.read_fd >= 0:
            os.close(self.read_fd)


class LayerStack:
    """All layers of a mount, the work directory, and the locks that keep other mounts away from them."""

    def __init__(self) -> None:
        self.upper: Layer | None = None
        self.lowers: list[Layer] = []
        self.data: list[Layer] = []
        self.by_index: list[Layer | None] = [None]
        self.work_fd = -1
        self.door: Door = PlainDoor()
        self._keep: list[int] = []

    @classmethod
    def open(cls, config: MountConfig) -> LayerStack:
        """Open every layer of *config* and lock upper and work.

        Raises LayerError for a layer that is missing or no directory, BusyError for one in use.
        """
        stack = cls()
        try:
            if config.upper is not None:
                stack._open_upper(config.upper, config.work, read_only=config.read_only)
            for path in config.lowers:
                stack.lowers.append(stack._open_lower(path))
            for path in config.data_lowers:
                stack.data.append(stack._open_lower(path))
            stack._find_slow(config)
        except BaseException:
            stack.close()
            raise
        return stack

    def held(self) -> list[int]:
        """Return what `take_over` needs."""
        upper = [self.work_fd] if self.upper is None else [self.work_fd, self.upper.fd]
        roots = [number for layer in (*self.lowers, *self.data) for number in (layer.fd, layer.read_noatime)]
        return [len(self._keep), *self._keep, *upper, *roots]

    @classmethod
    def take_over(cls, config: MountConfig, held: Sequence[int]) -> LayerStack:
        """Go on with layers that a process has left open that is no more; their paths may lead elsewhere by now.

        *held* is what the stack of that process returned; its descriptors are this process's. No layer is slow.
        """
        stack = cls()
        numbers = iter(held)
        stack._keep = [next(numbers) for _ in range(next(numbers))]
        stack.work_fd = next(numbers)
        if config.upper is not None:
            stack.upper = stack.by_index[UPPER_INDEX] = Layer(UPPER_INDEX, config.upper, next(numbers))
        for paths, layers in ((config.lowers, stack.lowers), (config.data_lowers, stack.data)):
            for path in paths:
                layer = Layer(len(stack.by_index), path, next(numbers))
                layer.read_noatime = next(numbers)
                stack.by_index.append(layer)
                layers.append(layer)
        return stack

    def _open_upper(self, upper: str, work: str | None, *, read_only: bool) -> None:
        common = os.path.commonpath([upper, work]) if work is not None else upper
        root = self._clone(common)
        fd = _open_inside(root, common, upper)
        self.upper = Layer(UPPER_INDEX, upper, fd)
        self.by_index[UPPER_INDEX] = self.upper
        self._lock(fd, upper, shared=read_only)
        if work is not None:
            self.work_fd = _open_inside(root, common, work)
            if os.fstat(self.work_fd).st_dev != self.upper.device:
                raise LayerError(
                    f"work {work} is on another file system than upper {upper}: pass --work DIR beside upper"
                )
            self._lock(self.work_fd, work, shared=read_only)

    def _open_lower(self, path: str) -> Layer:
        fd, readonly = self._open_lower_root(path)
        layer = Layer(len(self.by_index), path, fd)
        if not readonly:
            layer.read_noatime = os.O_NOATIME
        self.by_index.append(layer)
        return layer

    def reopen(self, layer: Layer) -> bool:
        """Open a lower anew if another directory of the same file system is at its path; tell whether it is so.

        The new one takes the place of the old one behind the numbers of its descriptors.
        """
        try:
            fresh = self._open_lower_root(layer.path)[0]
        except (LayerError, OSError):
            return False
        try:
            st = os.fstat(fresh)
            if st.st_dev != layer.device or os.path.samestat(st, os.fstat(layer.fd)):
                return False
            os.dup2(fresh, layer.fd, inheritable=False)
            if layer.read_fd >= 0:
                readable = _open_readable(fresh)
                os.dup2(readable, layer.read_fd, inheritable=False)
                os.close(readable)
            layer.root_stat = st
        finally:
            os.close(fresh)
        return True

    def _open_lower_root(self, path: str) -> tuple[int, bool]:
        """Open the root of a lower; tell too whether it is read-only and noatime."""
        root = self._clone(path)
        readonly = root >= 0 and sysio.make_mount_readonly(root)
        return _open_inside(root, path, path), readonly

    def _find_slow(self, config: MountConfig) -> None:
        """Mark the lowers that are slow, or that the user calls so."""
        wanted = config.slow_lower
        slow = [
            layer
            for layer in (*self.lowers, *self.data)
            if wanted == "on" or (wanted == "auto" and _seems_slow(layer.fd))
        ]
        for layer in slow:
            layer.ask_aside()
        if slow:
            log.info("slow lower layers: %s", ", ".join(layer.path for layer in slow))
            self.door = SlowDoor(remember=config.timeout != 0 and config.lower != "watch")

    def _clone(self, path: str) -> int:
        """Return a private copy of the mount at *path*, -1 where there is none to be had."""
        try:
            fd = sysio.clone_mount(os.fsencode(path))
        except OSError:
            return -1
        self._keep.append(fd)
        return fd

    def _lock(self, fd: int, path: str, *, shared: bool) -> None:
        """Take an advisory lock that lives as long as the daemon (overlayfs: ``ovl_inuse_trylock``)."""
        lock = _open_readable(fd)
        if lock < 0:
            return
        self._keep.append(lock)
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno != errno.EWOULDBLOCK:
                raise
            raise BusyError(
                f"{path} is in use by another union mount: unmount that first ('unionfs ls' shows it)"
            ) from None

    def layer(self, index: int) -> Layer:
        """Return the layer with this index."""
        layer = self.by_index[index]
        if layer is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return layer

    def close(self) -> None:
        """Close everything; the locks go with it."""
        for layer in self.by_index:
            if layer is not None:
                layer.close()
        for fd in (self.work_fd, *self._keep):
            if fd >= 0:
                os.close(fd)
        self.by_index, self.upper, self.lowers, self.data = [None], None, [], []
        self.work_fd, self._keep = -1, []


def _seems_slow(fd: int) -> bool:
    try:
        return sysio.file_system_type(fd) in _SLOW_TYPES or all(
            sysio.seconds_to_stat(fd) > _SLOW_SECONDS for _ in range(_TRIES)
        )
    except OSError:
        return False


def _open_readable(fd: int) -> int:
    try:
        return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    except PermissionError:
        return -1


def _open_inside(root: int, root_path: str, path: str) -> int:
    """Open *path* by way of the private mount *root* of *root_path*, if that shows the same directory."""
    try:
        plain = os.open(os.fsencode(path), sysio.O_PATH_DIR)
    except OSError as exc:
        reason = "is not a directory" if exc.errno in (errno.ENOTDIR, errno.ELOOP) else os.strerror(exc.errno or 0)
        raise LayerError(f"layer {path}: {reason}") from None
    if root < 0:
        return plain
    relative = os.path.relpath(path, root_path)
    try:
        fd = sysio.open_beneath(root, os.fsencode(relative), sysio.O_PATH_DIR)
    except OSError:
        return plain
    if os.path.samestat(os.fstat(fd), os.fstat(plain)):
        os.close(plain)
        return fd
    os.close(fd)  # a mount lies between the two: the private copy shows what is below it
    return plain
