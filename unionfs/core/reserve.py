"""Memory that is kept back for when there is no more to be had.

A daemon may be given little address space (RLIMIT_AS), and what it holds for each inode that the kernel knows is given
back only when the kernel forgets it. When an allocation fails, the reserve is given up: from it all goes on that is
under way and all that concerns known files, while new ones are refused with ENOMEM, until there is room for the reserve
again.

An allocation can fail anywhere, also where nobody can do anything about it (in the event loop, or in the midst of a
change). So it is not waited for: now and then, when inodes are added, it is tried whether there still is room for some
(`Reserve.check`), and the reserve given up if there isn't. Once it is given up, whoever is about to change something
tries that each time (`Reserve.before_change`), since what is left comes to an end, too.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
from collections.abc import Callable
from typing import Final

_BYTES: Final = 12 << 20
"""Of address space: nothing writes to it, so it takes no memory."""

_ROOM: Final = 2 << 20
"""What must be left for an operation, and for as many new inodes as are added until it is tried again."""

_INODES: Final = 256
"""So many, which take some 300 KiB."""

_SECONDS: Final = 0.1
"""How long to wait before trying to have it back."""


class Reserve:
    """The reserve of one mount.

    Attributes:
        on_spent: called when it is given up.
    """

    def __init__(self) -> None:
        """Raises OSError (ENOMEM) where there is no room for it from the begin."""
        self._kept: mmap.mmap | None = _address_space(_BYTES)
        self._again = 0.0
        self._added = 0
        self.on_spent: Callable[[], None] = lambda: None

    def spend(self) -> None:
        """Give it up, after a MemoryError, if it is there."""
        kept, self._kept = self._kept, None
        self._again = time.monotonic() + _SECONDS
        if kept is not None:
            kept.close()
            self.on_spent()

    def check(self) -> None:
        """Raise OSError (ENOMEM) while it is spent: before an inode is added."""
        if self._kept is None:
            self._take_back()
        self._added += 1
        if self._added % _INODES == 0:
            self._try_room()

    def before_change(self) -> None:
        """Raise OSError (ENOMEM) where a change could be left half done because there is no memory for the rest."""
        if self._kept is None:
            self._try_room()

    def _try_room(self) -> None:
        try:
            _address_space(_ROOM).close()
        except OSError:
            self.spend()
            raise

    def _take_back(self) -> None:
        now = time.monotonic()
        if now >= self._again:
            self._again = now + _SECONDS
            with contextlib.suppress(OSError):
                self._kept = _address_space(_BYTES)
                return
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def _address_space(size: int) -> mmap.mmap:
    """Raises OSError: ENOMEM."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
