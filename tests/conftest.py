"""Fixtures for all tests: a ground on a real disk, stacks of layers, and gates that every test must pass.

Markers: `slow` (left out by `-m "not slow"`), `expected_log(pattern)` (lines of a daemon's log that may be there),
`fault_seconds(n)` (how long the test may hang before its mount is aborted; 90 where nothing is said).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.filesystems import FsKind, disk_ground, file_system, remove_tree
from tests.support.gates import SHARED_SUFFIX, UMASK, Gate, fault_timeout
from tests.support.mounts import Kind, Stack

FAULT_SECONDS = 90.0
FileSystemMaker = Callable[[FsKind], Path]
StackMaker = Callable[..., Stack]


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers that this file gives a meaning."""
    for line in (
        "slow: takes long; left out by -m 'not slow'",
        "expected_log(pattern): log lines at WARNING or above that match are expected",
        "fault_seconds(seconds): time after which the test's mounts are aborted",
    ):
        config.addinivalue_line("markers", line)


@pytest.fixture(scope="session")
def session_ground() -> Iterator[Path]:
    """A directory on a real disk file system that takes trusted xattrs."""
    os.umask(UMASK)
    with disk_ground() as base:
        yield base


@pytest.fixture(scope="session")
def _stacks() -> list[Stack]:
    """Every stack made and not yet read for log lines."""
    return []


@pytest.fixture(autouse=True)
def _gate(
    request: pytest.FixtureRequest,
    session_ground: Path,
    session_file_systems: FileSystemMaker,
    caplog: pytest.LogCaptureFixture,
    _stacks: list[Stack],
) -> Iterator[None]:
    """Fail the test that leaks or logs what it did not announce."""
    marker = request.node.get_closest_marker("fault_seconds")
    expected = [str(mark.args[0]) for mark in request.node.iter_markers("expected_log")]
    gate = Gate(session_ground)
    with fault_timeout(marker.args[0] if marker else FAULT_SECONDS, session_ground):
        yield
    leaks = gate.leaks()
    gate.clear()
    for stack in _stacks:
        stack.expected_log += [pattern for pattern in expected if pattern not in stack.expected_log]
        leaks += [f"log: {line}" for line in stack.bad_log_lines()]
    leaks += [
        f"log: {record.getMessage()}"
        for record in caplog.get_records("call")
        if record.name.startswith("unionfs") and record.levelno >= logging.WARNING and not expected
    ]
    _stacks[:] = [stack for stack in _stacks if stack.mounted]
    for stack_base in _discarded(request):
        remove_tree(stack_base)
    assert not leaks, "\n".join(leaks)


_DISCARDS = pytest.StashKey[list[Path]]()


def _discarded(request: pytest.FixtureRequest) -> list[Path]:
    """Directories to remove once the gate has read their logs."""
    stash: pytest.Stash = request.node.stash
    return stash.get(_DISCARDS, [])


@pytest.fixture
def ground(
    _gate: None, session_ground: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A fresh directory of this test's on the disk; every user may enter it. Removed after the test."""
    path = Path(os.fspath(session_ground), f"t{next(_numbers)}")
    path.mkdir()
    request.node.stash.setdefault(_DISCARDS, []).append(path)
    return path


def _count() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


_numbers = _count()


@pytest.fixture(scope="session")
def session_file_systems(session_ground: Path) -> Iterator[FileSystemMaker]:
    """Make (once) and return the session's file system of a kind, in a loop image or a tmpfs."""
    made: dict[FsKind, Path] = {}
    with ExitStack() as stack:

        def make(kind: FsKind) -> Path:
            if kind not in made:
                made[kind] = stack.enter_context(file_system(kind, session_ground, size="2G", name=SHARED_SUFFIX))
            return made[kind]

        yield make


@pytest.fixture
def on_file_system(session_file_systems: FileSystemMaker, request: pytest.FixtureRequest) -> Iterator[FileSystemMaker]:
    """A fresh directory of this test's on the session's file system of the kind asked for."""

    def make(kind: FsKind) -> Path:
        path = session_file_systems(kind) / f"t{next(_numbers)}"
        path.mkdir()
        request.node.stash.setdefault(_DISCARDS, []).append(path)
        return path

    yield make


@pytest.fixture
def make_stack(ground: Path, _stacks: list[Stack]) -> Iterator[StackMaker]:
    """Make stacks of layers, `make(kind, lowers=, options=, base=)`; all are unmounted at the end."""
    made: list[Stack] = []

    def make(kind: Kind, *, lowers: int = 1, options: str = "", base: Path | None = None, name: str = "s") -> Stack:
        stack = Stack.make(kind, (base or ground) / name, lowers=lowers, options=options)
        made.append(stack)
        _stacks.append(stack)
        return stack

    yield make
    for stack in reversed(made):
        stack.umount()


@pytest.fixture(params=["overlay", "union"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """What is mounted: kernel overlayfs (the oracle) and ours, one after the other."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def stack(kind: Kind, make_stack: StackMaker) -> Stack:
    """A stack of one lower, not yet mounted, of either kind."""
    return make_stack(kind)


@pytest.fixture
def stack2(kind: Kind, make_stack: StackMaker) -> Stack:
    """A stack of two lowers, not yet mounted, of either kind."""
    return make_stack(kind, lowers=2)


@pytest.fixture
def ours(make_stack: StackMaker) -> Stack:
    """A stack of one lower for what only ours does or shows."""
    return make_stack("union")


@pytest.fixture
def check_by_overlay(make_stack: StackMaker) -> Iterator[Callable[[Stack], Path]]:
    """Mount kernel overlayfs over the layers of an unmounted stack, and return where."""

    def check(stack: Stack, options: str = "") -> Path:
        oracle = stack.by("overlay")
        oracle.mount(options)
        opened.append(oracle)
        return oracle.mnt

    opened: list[Stack] = []
    yield check
    for oracle in opened:
        oracle.umount()
