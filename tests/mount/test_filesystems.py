"""The same work on every kind of file system below: ext4, xfs with reflink, btrfs, tmpfs; one for all layers, or mixed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.posix import BEHAVIOURS
from tests.mount.posix.table import Behaviour, close_below, plant, touch_all
from tests.mount.test_stacking import TREE, work_hard
from tests.support.filesystems import FS_KINDS, FsKind
from tests.support.layers import File, build
from tests.support.mounts import Kind, Stack
from tests.support.snapshot import assert_same, snapshot

StackMaker = Callable[..., Stack]
FileSystemMaker = Callable[[FsKind], Path]


def attempt(line: Behaviour, directory: Path) -> str:
    """One behaviour's outcome: "" or what went wrong."""
    try:
        line.check(directory)
    except Exception as error:
        close_below(directory)
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("file_system", FS_KINDS)
@pytest.mark.fault_seconds(180)
def test_behaviours_on(make_stack: StackMaker, on_file_system: FileSystemMaker, file_system: FsKind) -> None:
    """All lines that hold in a plain directory of that file system hold in a union of it."""
    base = on_file_system(file_system)
    lines = [line for line in BEHAVIOURS.values() if "union-touched" not in line.unlike]
    plain = base / "plain"
    plain.mkdir()
    plain.chmod(0o755)
    base.chmod(0o755)
    stack = make_stack("union", base=base)
    plant(plain, lines)
    plant(stack.lower, lines)
    root = stack.mount()
    wrong: list[str] = []
    for line in lines:
        if attempt(line, plain / line.name):
            continue
        touch_all(root / line.name)
        if said := attempt(line, root / line.name):
            wrong.append(f"{line.name}: {said}")
    assert wrong == []
    before = snapshot(root)
    stack.remount()
    assert_same(before, snapshot(root))


@pytest.mark.parametrize("upper_on", FS_KINDS)
@pytest.mark.parametrize("lower_on", FS_KINDS)
def test_work_across(
    make_stack: StackMaker, on_file_system: FileSystemMaker, lower_on: FsKind, upper_on: FsKind
) -> None:
    """Lower on one, upper on another, seen alike after remounting and by kernel overlayfs over the same layers."""
    stack = make_stack("union")
    stack.lowers = [on_file_system(lower_on) / "lower"]
    room = on_file_system(upper_on)
    stack.upper, stack.work = room / "upper", room / "work"
    for directory in (stack.lower, stack.upper, stack.work):
        directory.mkdir()
    build(stack.lower, TREE)
    before = snapshot(stack.lower)
    root = stack.mount()
    work_hard(root)
    view = snapshot(root)
    stack.remount()
    assert_same(view, snapshot(root))
    stack.umount()
    assert_same(before, snapshot(stack.lower))
    oracle = make_stack("overlay", name="oracle")
    oracle.lowers, oracle.upper, oracle.work = stack.lowers, stack.upper, stack.work
    assert_same(view, snapshot(oracle.mount()))
    oracle.umount()


@pytest.mark.parametrize("upper_on", FS_KINDS)
@pytest.mark.parametrize("metacopied", [False, True])
def test_truncation_changes_the_time(
    kind: Kind, make_stack: StackMaker, on_file_system: FileSystemMaker, upper_on: FsKind, metacopied: bool
) -> None:
    """The copy is made with the new size, so truncating it again is no change to xfs, btrfs and tmpfs."""
    stack = make_stack(kind, base=on_file_system(upper_on))
    build(stack.lower, {name: File(b"x" * 5000, mtime=10**18) for name in ("some", "all", "opened")})
    root = stack.mount()
    if metacopied:
        for path in root.iterdir():
            path.chmod(0o600)
    os.truncate(root / "some", 100)
    os.truncate(root / "all", 0)
    os.close(os.open(root / "opened", os.O_WRONLY | os.O_TRUNC))
    stack.remount()
    assert [path.stat().st_size for path in sorted(root.iterdir())] == [0, 0, 100]
    assert all(path.stat().st_mtime > 1.1e9 for path in root.iterdir())


@pytest.mark.parametrize("upper_on", FS_KINDS)
def test_random_writes_after_copy_up(make_stack: StackMaker, on_file_system: FileSystemMaker, upper_on: FsKind) -> None:
    """Bytes of big files against a copy in memory: random writes, appends and truncates through two descriptors."""
    base = on_file_system(upper_on)
    stack = make_stack("union", base=base)
    chance = random.Random(7)
    expected = bytearray(chance.randbytes(3_000_017))
    (stack.lower / "f").write_bytes(expected)
    root = stack.mount()
    reader = os.open(root / "f", os.O_RDONLY)
    writer = os.open(root / "f", os.O_RDWR)
    for turn in range(300):
        offset = chance.randrange(len(expected) + 1)
        if turn % 50 == 49:
            size = chance.randrange(1_000_000, 4_000_000)
            os.ftruncate(writer, size)
            expected = expected[:size] + bytearray(max(0, size - len(expected)))
            continue
        data = chance.randbytes(chance.choice([1, 100, 4096, 70_000]))
        os.pwrite(writer, data, offset)
        if offset + len(data) > len(expected):
            expected += bytes(offset + len(data) - len(expected))
        expected[offset : offset + len(data)] = data
        where = chance.randrange(len(expected))
        assert os.pread(reader, 5000, where) == expected[where : where + 5000]
    os.fsync(writer)
    os.close(reader)
    os.close(writer)
    assert (root / "f").read_bytes() == expected
    stack.remount()
    assert (root / "f").read_bytes() == expected
    stack.umount()
    assert (stack.up / "f").read_bytes() == expected
