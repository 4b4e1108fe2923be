"""What the kernel and the native layer may do with an open file by themselves.

A handle is the number of a descriptor of the file's data. Opening it decides two things, which last until its RELEASE:

- its *I/O mode* (`native.IoModes`): whether the kernel moves the bytes itself (passthrough), or through its page cache
  and the daemon. Only a file that can never be copied up any more may pass: one in upper, or any in a union without
  upper. A lower file stays cached, also after its copy-up, for as long as a handle from before is open: that one's
  descriptor is exchanged behind its number, which the kernel would not notice.
- whose its *attributes* are (`native.own_attributes`): those of a file in upper about which the union has nothing to
  say are read and set on the descriptor.

While a file is open for reading and writing in passthrough mode the kernel does not hear of what a shared mapping
writes. So it may not keep the attributes (`attributes_stay`), and asks each time.

Passing a file takes some 10 to 25 µs more than not passing it. Two writes earn them back; reading does from
`WORTH_BYTES` on. And the kernel drops what it has cached of a file that it passes, 0.2 ms per MiB, and reads it anew
from the copy. So a large file that was read before it came up stays cached for those who read it or append to it, as
long as nobody writes elsewhere.
"""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable
from typing import Final

from unionfs.core import sysio
from unionfs.core.dirfds import Watcher
from unionfs.core.inodes import APPEND_ONLY, CACHED, IMMUTABLE, INDEXED, META, UPPER, Dir, Node
from unionfs.fuse import native

WORTH_BYTES: Final = 128 << 10
_LARGE_BYTES: Final = 64 << 20

_MOST_IDLE: Final = 16384
"""How many handles of lower files are kept at most for whoever reads them next (see csrc/readers.c).

They have up to a quarter of the descriptors, and are given up when there is no other one left.
"""

_SUIDGID: Final = stat.S_ISUID | stat.S_ISGID
_DECIDED: Final = UPPER | META | INDEXED | IMMUTABLE | APPEND_ONLY


def check_direct_io(fd: int) -> None:
    """Raise OSError, EINVAL, where the file system of an open file has no direct I/O."""
    os.close(os.open(sysio.fd_path(fd), os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))


class NativeDirectories(Watcher):
    """Has the native layer answer for directories that upper alone makes up: attributes, names that aren't there."""

    def __init__(self, timeout: float) -> None:
        """Take how long the kernel may keep either, in seconds."""
        self._timeout = timeout

    def opened(self, node: Dir, fd: int) -> None:
        native.own_attributes(node.id, fd, node.ino, self._timeout, upper_dir=True)

    def closing(self, node: Dir, fd: int) -> None:
        native.disown_attributes(node.id, fd)


class Handles:
    """The open files of one mount, as the native layer sees them."""

    def __init__(
        self,
        *,
        timeout: float,
        read_only: bool,
        owning: bool = True,
        sharing: bool = True,
        fstat: Callable[[int], os.stat_result] = os.fstat,
    ) -> None:
        """Start without any.

        Args:
            timeout: how long the kernel may keep attributes, in seconds.
            read_only: whether the union has no upper, so that nothing is ever copied up.
            owning: whether attributes are shown as a descriptor tells them.
            sharing: whether those who only read may share a handle.
            fstat: how to get the attributes of a handle.
        """
        self._fstat = fstat
        self._timeout = timeout
        self._read_only = read_only
        self._owning = owning
        self._sharing = sharing
        self._own_flags = ~native.shared_flags()  # with any of these a handle is nobody else's
        self._granted: bool | None = None
        self._modes = native.IoModes()
        self._mappers: dict[int, set[int]] = {}  # node id → its passed handles that may have written mappings
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        native.keep_idle(min(soft // 4, _MOST_IDLE))

    def opened(self, node: Node, fd: int, flags: int) -> bool:
        """Decide how a handle is opened, just before the answer to OPEN.

        Args:
            node: the file.
            fd: the handle, a descriptor of its data.
            flags: those of open(2).

        Returns:
            Whether what the kernel knows of the node's attributes must be invalidated.

        Raises:
            OSError: EINVAL for O_DIRECT where the file system below has none; the handle is not counted then.
        """
        return self._decide(node, fd, flags, passing=self._passing and self._may_pass(node, fd, flags))

    def share(self, node: Node, fd: int, flags: int) -> None:
        """Give a handle to others who read the file as well, if it is one for that; just before the answer to OPEN."""
        alone = flags & self._own_flags or node.flags & (UPPER | META) or node.job or not self._sharing
        if not alone and not self._modes.passed(node.id):
            native.share(node.id, fd)

    def created(self, node: Node, fd: int, flags: int, st: os.stat_result) -> None:
        """Decide how the handle of a new file is opened, just before the answer to CREATE.

        Args:
            node: the file.
            fd: the handle.
            flags: those of open(2).
            st: its attributes.

        Raises:
            OSError: as `opened`.
        """
        self._decide(node, fd, flags, passing=self._passing and not st.st_mode & _SUIDGID)

    def _decide(self, node: Node, fd: int, flags: int, *, passing: bool) -> bool:
        stale = False
        if self._passing:
            if flags & os.O_DIRECT:
                check_direct_io(fd)
            if self._modes.opened(node.id, fd, allowed=passing) and flags & os.O_ACCMODE == os.O_RDWR:
                self._mappers.setdefault(node.id, set()).add(fd)
                stale = True
        if self._owning and node.flags & _DECIDED == UPPER:
            native.own_attributes(node.id, fd, node.ino, 0 if node.id in self._mappers else self._timeout)
        return stale

    @property
    def _passing(self) -> bool:
        """Whether the kernel passes files; it is not known before the first open."""
        if self._granted is None:
            self._granted = native.passthrough()
        return self._granted

    def _may_pass(self, node: Node, fd: int, flags: int) -> bool:
        reads = flags & os.O_ACCMODE == os.O_RDONLY
        if node.flags & META or not (node.flags & UPPER or self._read_only):
            if reads and not node.flags & CACHED:  # to set it again would be noticed as a change (fuse/kept.py)
                node.flags |= CACHED
            return False
        st = self._fstat(fd)
        if node.flags & CACHED:
            if st.st_size >= _LARGE_BYTES and (reads or flags & os.O_APPEND):
                return False
            node.flags &= ~CACHED
        return not st.st_mode & _SUIDGID and (not reads or st.st_size >= WORTH_BYTES)

    def closed(self, node: Node, fd: int) -> None:
        """Count a handle as gone: on its RELEASE, before the descriptor is closed."""
        native.disown_attributes(node.id, fd)
        if not self._passing:
            return
        self._modes.released(node.id)
        mappers = self._mappers.get(node.id)
        if mappers is not None:
            mappers.discard(fd)
            if not mappers:
                del self._mappers[node.id]

    def kept(self, node: Node, fd: int) -> tuple[int, bool]:
        """Return what `take_over` needs to know of an open handle: its backing id, and whether it may map writably."""
        return self._modes.backing_id(node.id), fd in self._mappers.get(node.id, ())

    def take_over(self, node: Node, fd: int, backing_id: int, *, maps: bool) -> None:
        """Count a handle that the kernel got from another daemon."""
        if self._passing:
            self._modes.take_over(node.id, backing_id)
            if maps:
                self._mappers.setdefault(node.id, set()).add(fd)
        if self._owning and node.flags & _DECIDED == UPPER:
            native.own_attributes(node.id, fd, node.ino, 0 if node.id in self._mappers else self._timeout)

    def attributes_stay(self, node: Node, mode: int) -> bool:
        """Whether the kernel hears of all that changes the node's attributes, *mode* among them, while it is open."""
        if node.id in self._mappers:
            return False
        return not (mode & _SUIDGID and self._modes.passed(node.id))
