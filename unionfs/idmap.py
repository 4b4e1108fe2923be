"""Owners that a mount shows in another way than the layers hold them.

A container's user namespace gives its users numbers that the layers of an image don't have. So that nobody has to make
a copy of these layers with other owners, the mount translates: *stored* is the number in the layers, *shown* the one
that the kernel is told. What is asked to be stored goes the other way. A mapping is a list of ranges, as in
/proc/PID/uid_map (user_namespaces(7)): the first stored number, the first shown one, and how many there are.

What no range holds is shown as the overflow id (nobody), and so is stored what somebody makes whose own number none
holds. To give a file to such a number is refused (EOVERFLOW), as the kernel does on id-mapped mounts.

*Squashing* shows one owner for everything. It changes nothing of what is stored.

The native layer knows nothing of this: attributes go through here one by one, and are never served on a descriptor.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from unionfs.errors import UsageError

# The kernel's id for "none": no user has it.
_MOST = 2**32 - 1

_OVERFLOW = 65534


class Range(NamedTuple):
    """`length` ids from `stored` on are shown as those from `shown` on."""

    stored: int
    shown: int
    length: int


_STORED, _SHOWN = 0, 1  # the fields of a range that hold ids


def parse_ranges(name: str, text: str) -> tuple[Range, ...]:
    """Read `STORED:SHOWN:LENGTH[:STORED:SHOWN:LENGTH...]`; the value of the option `name`.

    Raises UsageError for what is no such list, and for ranges that overlap.
    """
    words = [word for word in text.replace(",", ":").split(":") if word]  # podman begins with a colon
    if not words or len(words) % 3 or not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(f"option {name}={text}: give STORED:SHOWN:LENGTH, and more such after a colon")
    numbers = [int(word) for word in words]
    ranges = tuple(Range(*numbers[at : at + 3]) for at in range(0, len(numbers), 3))
    for side in (0, 1):
        end = 0
        for entry in sorted(ranges, key=lambda entry: entry[side]):
            if entry.length < 1 or entry[side] < end:
                raise UsageError(f"option {name}={text}: ranges must not be empty nor overlap")
            end = entry[side] + entry.length
        if end > _MOST:
            raise UsageError(f"option {name}={text}: the greatest id is {_MOST - 1}")
    return ranges


def parse_id(name: str, text: str | None) -> int:
    """Read one id, the value of the option `name`. Raises UsageError."""
    if text is None or not (text.isascii() and text.isdigit()) or int(text) >= _MOST:
        raise UsageError(f"option {name}={text or ''}: give an id")
    return int(text)


@dataclass(frozen=True, slots=True)
class IdMap:
    """How one mount translates. Without ranges ids of that kind stay as they are; `squash` is None where none is."""

    uids: tuple[Range, ...] = ()
    gids: tuple[Range, ...] = ()
    squash_uid: int | None = None
    squash_gid: int | None = None

    @property
    def needed(self) -> bool:
        """Whether there is anything to translate."""
        return self != AS_STORED

    def shown_uid(self, stored: int) -> int:
        """Return the user that the mount shows."""
        return _in_ranges(self.uids, stored, _STORED, _SHOWN, _OVERFLOW) if self.squash_uid is None else self.squash_uid

    def shown_gid(self, stored: int) -> int:
        """Return the group that the mount shows."""
        return _in_ranges(self.gids, stored, _STORED, _SHOWN, _OVERFLOW) if self.squash_gid is None else self.squash_gid

    def shown(self, st: os.stat_result) -> os.stat_result:
        """Return attributes with the owner that the mount shows."""
        visible, rest = cast(tuple[tuple[int, ...], dict[str, Any]], st.__reduce__()[1])
        owner = (self.shown_uid(st.st_uid), self.shown_gid(st.st_gid))
        return os.stat_result((*visible[:4], *owner, *visible[6:]), rest)

    def creator(self, uid: int, gid: int) -> tuple[int, int]:
        """Return the owner to store for what somebody makes."""
        return (
            _in_ranges(self.uids, uid, _SHOWN, _STORED, _OVERFLOW),
            _in_ranges(self.gids, gid, _SHOWN, _STORED, _OVERFLOW),
        )

    def stored_uid(self, shown: int) -> int:
        """Return the user to store for one that was asked for. Raises OSError, EOVERFLOW."""
        return _must(_in_ranges(self.uids, shown, _SHOWN, _STORED, -1))

    def stored_gid(self, shown: int) -> int:
        """Return the group to store for one that was asked for. Raises OSError, EOVERFLOW."""
        return _must(_in_ranges(self.gids, shown, _SHOWN, _STORED, -1))


AS_STORED = IdMap()
"""Shows everything as it is stored."""


def _in_ranges(ranges: tuple[Range, ...], number: int, given: int, wanted: int, other: int) -> int:
    """Translate an id from one field of the ranges to another; *other* is for what none of them holds."""
    if not ranges:
        return number
    for entry in ranges:
        if 0 <= number - entry[given] < entry.length:
            return entry[wanted] + number - entry[given]
    return other


def _must(stored: int) -> int:
    if stored < 0:
        raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
    return stored
