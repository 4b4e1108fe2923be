"""What a daemon leaves to the one that takes its mount over: in memory that a supervisor shares with both.

Some things, each of which a process that is killed in the midst of it leaves whole:

- the *state*: where the mount is between its start and its end, and its device number;
- the *journal*, a file in memory: batches of records, each with the number of the request that they belong to. A batch
  that was not written to its end is none. When there is much in it that is no longer true it is written anew, and the
  new file takes the place of the old one behind the number of its descriptor, in one system call;
- the *slot*: the one request that may have been carried out without having been answered, and what its handler knew
  before. Requests are handled one at a time, and answered before the next one, so one slot is enough.

What the records say is for the module above.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

_STATE: Final = 0
_SLOT: Final = 8
_SLOT_LENGTH: Final = 16
_SLOT_DATA: Final = 20
_DEV: Final = 16320
_SHARED_BYTES: Final = 16384

_WORD: Final = struct.Struct("=Q")
_LENGTH: Final = struct.Struct("=I")
_BATCH: Final = struct.Struct("=IQ")  # bytes that follow, number of the request

# The journal is written anew when it has this many times the bytes that it had when that was done last.
_GROWTH: Final = 4
_LEAST_BYTES: Final = 1 << 20


class State(IntEnum):
    """Where a mount is."""

    STARTING = 0  # there is no mount yet: who fails now has failed for good
    SERVING = 1
    ENDING = 2  # on a signal: a daemon that dies now is not followed by another
    ENDED = 3


class Slot(NamedTuple):
    """A request that may have been carried out: its number, and what was noted before."""

    unique: int
    noted: bytes


class Ledger:
    """Made by the supervisor, written by one daemon after the other."""

    def __init__(self) -> None:
        """Start empty. Raises OSError where there is no memory for it."""
        self.supervisor = os.getpid()
        self.base = set(open_descriptors())  # what was there before
        self._shared = mmap.mmap(-1, _SHARED_BYTES)
        self.fd = _new_file()
        self._size = 0
        self._fresh_size = 0

    @property
    def state(self) -> State:
        """Where the mount is."""
        return State(_WORD.unpack_from(self._shared, _STATE)[0])

    @state.setter
    def state(self, value: State) -> None:
        _WORD.pack_into(self._shared, _STATE, value)

    @property
    def dev(self) -> str:
        """The mount's device number, `major:minor`; empty before it is known."""
        return self._shared[_DEV:].rstrip(b"\0").decode("ascii")

    @dev.setter
    def dev(self, value: str) -> None:
        self._shared[_DEV:] = value.encode("ascii").ljust(_SHARED_BYTES - _DEV, b"\0")

    # -- the slot --

    def note(self, unique: int, noted: bytes) -> None:
        """Say that a request is about to be carried out; the one before was answered.

        Raises ValueError for more than any request has to say.
        """
        if len(noted) > _DEV - _SLOT_DATA:
            raise ValueError("too much for the slot")
        _WORD.pack_into(self._shared, _SLOT, 0)
        _LENGTH.pack_into(self._shared, _SLOT_LENGTH, len(noted))
        self._shared[_SLOT_DATA : _SLOT_DATA + len(noted)] = noted
        _WORD.pack_into(self._shared, _SLOT, unique)

    def noted(self) -> Slot | None:
        """Return what is in the slot."""
        unique = _WORD.unpack_from(self._shared, _SLOT)[0]
        length = _LENGTH.unpack_from(self._shared, _SLOT_LENGTH)[0]
        return Slot(unique, self._shared[_SLOT_DATA : _SLOT_DATA + length]) if unique else None

    # -- the journal --

    @property
    def outgrown(self) -> bool:
        """Whether it is time for `write_anew`."""
        return self._size > max(_LEAST_BYTES, _GROWTH * self._fresh_size)

    def append(self, unique: int, records: bytes) -> None:
        """Add a batch, wholly or not at all. Raises OSError: ENOSPC, ENOMEM."""
        written = self._size
        try:
            _write(self.fd, _BATCH.pack(len(records), unique) + records, written)
        except OSError:
            os.ftruncate(self.fd, written)
            raise
        self._size += _BATCH.size + len(records)

    def write_anew(self, records: bytes) -> None:
        """Replace all that was written by one batch. Raises OSError: ENOSPC, ENOMEM, EMFILE; all stays as it was."""
        fresh = _new_file()
        try:
            _write(fresh, _BATCH.pack(len(records), 0) + records, 0)
            os.dup2(fresh, self.fd, inheritable=False)
        finally:
            os.close(fresh)
        self._size = self._fresh_size = _BATCH.size + len(records)

    def batches(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number of the request, records) of each batch that is whole."""
        text = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
        at = 0
        while at + _BATCH.size <= len(text):
            length, unique = _BATCH.unpack_from(text, at)
            at += _BATCH.size
            if at + length > len(text):
                break
            yield unique, text[at : at + length]
            at += length
        self._size = at


def open_descriptors() -> list[int]:
    """Return the descriptors that this process has open."""
    return [int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]


def _new_file() -> int:
    return os.memfd_create("unionfs-ledger", os.MFD_CLOEXEC)


def _write(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done
