"""Memory that is kept back for when there is no more to be had.

A daemon may be given little address space (RLIMIT_AS), and what it holds for each inode that the kernel knows is given
back only when the kernel forgets it. When an allocation fails, the reserve is given up: from it all goes on that is
under way and all that concerns known files, while new ones are refused with ENOMEM, until there is room for the reserve
again.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
from typing import Final

_BYTES: Final = 12 << 20
"""Of address space: nothing writes to it, so it takes no memory."""

_SECONDS: Final = 0.1
"""How long to wait before trying to have it back."""


class Reserve:
    """The reserve of one mount."""

    def __init__(self) -> None:
        """Raises OSError (ENOMEM) where there is no room for it from the begin."""
        self._kept: mmap.mmap | None = _address_space()
        self._again = 0.0

    def spend(self) -> bool:
        """Give it up, after a MemoryError; tell whether it was there."""
        kept, self._kept = self._kept, None
        self._again = time.monotonic() + _SECONDS
        if kept is None:
            return False
        kept.close()
        return True

    def check(self) -> None:
        """Raise OSError (ENOMEM) while it is spent: before anything is made that stays."""
        if self._kept is None:
            self._take_back()

    def _take_back(self) -> None:
        now = time.monotonic()
        if now >= self._again:
            self._again = now + _SECONDS
            with contextlib.suppress(OSError):
                self._kept = _address_space()
                return
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def _address_space() -> mmap.mmap:
    return mmap.mmap(-1, _BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
