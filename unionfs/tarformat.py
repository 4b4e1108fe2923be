"""tar as bytes."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Warn = Callable[[str], None]


class Progress(Protocol):
    """Told how far a backup or a restore is."""

    def __call__(self, done: int, total: int | None, /) -> None:
        """*done* of *total* bytes; None: how many there are isn't known."""


@dataclass(frozen=True, slots=True)
class Root:
    """A directory that is one part of an archive.

    `prefix` is its path in the archive, without slashes at its ends; "" for an archive of one directory, whose members
    are named ``./...`` as ``tar -C DIR .`` writes them. `directory` is a path or a descriptor.
    """

    prefix: str
    directory: str | bytes | int


@dataclass(slots=True)
class Totals:
    """What went into an archive or came out of it: entries, content bytes (holes not counted), and warnings given."""

    entries: int = 0
    content: int = 0
    warnings: int = 0
