"""Fixtures for real programs: a union, and beside it a bare directory on the file system of its upper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.filesystems import FsKind
from tests.support.mounts import Stack


@dataclass(frozen=True)
class Places:
    """Where a program runs: `union`, with `lower` below it, and `bare`, a plain directory on upper's file system."""

    union: Path
    bare: Path
    stack: Stack

    def both(self) -> Iterator[tuple[str, Path]]:
        """The two places by name."""
        yield "bare", self.bare
        yield "union", self.union


PlacesMaker = Callable[..., Places]


@pytest.fixture
def places(
    make_stack: Callable[..., Stack], on_file_system: Callable[[FsKind], Path], ground: Path
) -> Iterator[PlacesMaker]:
    """Make places with upper on the file system asked for, and `fill` called on the lower and on the bare directory."""

    def make(upper_on: FsKind, fill: Callable[[Path], object] = lambda _: None) -> Places:
        room = on_file_system(upper_on)
        room.chmod(0o755)
        stack = make_stack("union")
        stack.upper, stack.work = room / "upper", room / "work"
        for directory in (stack.upper, stack.work, room / "bare"):
            directory.mkdir()
        fill(stack.lower)
        fill(room / "bare")
        return Places(stack.mount(), room / "bare", stack)

    yield make
