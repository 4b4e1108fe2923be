"""Fixtures for real programs: a union, and beside it a bare directory on the file system of its upper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.filesystems import FsKind
from tests.support.mounts import Stack
from tests.support.snapshot import assert_same, snapshot


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
    make_stack: Callable[..., Stack],
    on_file_system: Callable[[FsKind], Path],
    check_by_overlay: Callable[[Stack], Path],
) -> Iterator[PlacesMaker]:
    """Make places with upper on the file system asked for, and `fill` called on the lower and on the bare directory.

    After the test, kernel overlayfs over the layers must show the tree that the union showed.
    """

    def make(upper_on: FsKind, fill: Callable[[Path], object] = lambda _: None) -> Places:
        room = on_file_system(upper_on)
        room.chmod(0o755)
        stack = make_stack("union")
        stack.upper, stack.work = room / "upper", room / "work"
        for directory in (stack.upper, stack.work, room / "bare"):
            directory.mkdir()
        fill(stack.lower)
        fill(room / "bare")
        made.append(stack)
        return Places(stack.mount(), room / "bare", stack)

    made: list[Stack] = []
    yield make
    for stack in made:
        view = snapshot(stack.mnt)
        stack.umount()
        assert_same(view, snapshot(check_by_overlay(stack)))
