"""A place in a tree, as descriptors: how code goes down and up in trees of any depth.

A path would be too long (``PATH_MAX``) or could lead elsewhere (a symbolic link put in its middle), and one open
descriptor for each directory above would be too many. A :class:`DirStack` keeps the descriptors of the root and of the
lowest `KEPT` directories; on the way up, the others are opened again through ``..``, and only a directory that is the
very one that was left (device and inode number) is accepted.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from unionfs.core import sysio

KEPT: Final = 32
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Level:
    __slots__ = ("dev", "fd", "ino", "name")

    def __init__(self, name: bytes, fd: int) -> None:
        st = os.fstat(fd)
        self.name = name
        self.fd = fd
        self.dev = st.st_dev
        self.ino = st.st_ino


class DirStack:
    """The way from a root directory to the directory one is in.

    *root_fd* stays the caller's. With *readable* the directories can be listed, which needs the permission to read
    them; else they are opened as mere places (``O_PATH``). All methods raise OSError.
    """

    def __init__(self, root_fd: int, *, readable: bool = True) -> None:
        self._flags = _FLAGS if readable else sysio.O_PATH_DIR
        self._levels = [_Level(b"", os.open(b".", self._flags, dir_fd=root_fd))]

    @property
    def fd(self) -> int:
        """The directory one is in; it is this object's, and closed when that directory is left."""
        return self._levels[-1].fd

    @property
    def root_fd(self) -> int:
        """The root directory."""
        return self._levels[0].fd

    @property
    def depth(self) -> int:
        """How many directories below the root one is."""
        return len(self._levels) - 1

    def parts(self) -> list[bytes]:
        """The names from the root to here."""
        return [level.name for level in self._levels[1:]]

    def path(self, name: bytes = b"") -> bytes:
        """The path from the root to here, or to *name* in here."""
        return b"/".join([*self.parts(), name] if name else self.parts())

    def down(self, name: bytes) -> None:
        """Enter the directory *name*; ENOTDIR or ELOOP where it is something else, a symbolic link too."""
        self._levels.append(_Level(name, os.open(name, self._flags, dir_fd=self.fd)))
        far = len(self._levels) - 1 - KEPT
        if far > 0 and self._levels[far].fd >= 0:
            os.close(self._levels[far].fd)
            self._levels[far].fd = -1

    def up(self) -> None:
        """Leave the directory one is in. ESTALE where one above it was moved to another parent meanwhile."""
        os.close(self._levels.pop().fd)
        # The next way up is opened now, while this directory can surely still be searched.
        if len(self._levels) > 1 and self._levels[-2].fd < 0:
            self._reopen(self._levels[-2])

    def _reopen(self, above: _Level) -> None:
        fd = os.open(b"..", self._flags, dir_fd=self.fd)
        st = os.fstat(fd)
        if (st.st_dev, st.st_ino) != (above.dev, above.ino):
            os.close(fd)
            raise OSError(errno.ESTALE, "moved by somebody else meanwhile", self.path())
        above.fd = fd

    def go(self, parts: list[bytes]) -> None:
        """Go to the directory with these names from the root, by the shortest way; all must exist."""
        for name in parts[self.go_towards(parts) :]:
            self.down(name)

    def go_towards(self, parts: list[bytes]) -> int:
        """Go up until one is at or above the directory with these names; how many of them are behind then."""
        common = 0
        for level, name in zip(self._levels[1:], parts, strict=False):
            if level.name != name:
                break
            common += 1
        while self.depth > common:
            self.up()
        return common

    def close(self) -> None:
        """Close all descriptors."""
        for level in self._levels:
            if level.fd >= 0:
                os.close(level.fd)
        self._levels.clear()
