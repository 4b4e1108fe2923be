"""Hard links of lower files: with `index` they stay one file over copy-up and remounting."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import StackMaker
from tests.support.filesystems import FsKind
from tests.support.layers import FIFO, HardLink, Symlink, Tree, build, is_whiteout, mark
from tests.support.mounts import Stack
from tests.support.snapshot import assert_same, snapshot

Oracle = Callable[[Stack], Path]
LINKED: Tree = {"a": b"data" * 1000, "b": HardLink("a"), "d": {"c": HardLink("a")}}


def numbers(root: Path, *names: str) -> set[tuple[int, int]]:
    """The different (inode, nlink) among the names."""
    return {(os.lstat(root / name).st_ino, os.lstat(root / name).st_nlink) for name in names}


def test_one_file_after_a_write_through_any_name(stack: Stack) -> None:
    build(stack.lower, LINKED)
    root = stack.mount()
    before = numbers(root, "a", "b", "d/c")
    assert len(before) == 1
    assert next(iter(before))[1] == 3
    with open(root / "b", "ab") as stream:
        stream.write(b"+")
    for _ in range(2):
        assert numbers(root, "a", "b", "d/c") == before
        for name in ("a", "b", "d/c"):
            assert (root / name).read_bytes() == b"data" * 1000 + b"+"
        stack.remount()


def test_each_name_written_in_turn_with_remounts_between(stack: Stack) -> None:
    build(stack.lower, LINKED)
    root = stack.mount()
    before = numbers(root, "a", "b", "d/c")
    for name in ("a", "b", "d/c"):
        with open(root / name, "ab") as stream:
            stream.write(name.encode())
        stack.remount()
        assert numbers(root, "a", "b", "d/c") == before
    for name in ("a", "b", "d/c"):
        assert (root / name).read_bytes() == b"data" * 1000 + b"abd/c"
    stack.umount()
    assert os.stat(stack.up / "a").st_ino == os.stat(stack.up / "b").st_ino == os.stat(stack.up / "d/c").st_ino
    assert (stack.lower / "a").read_bytes() == b"data" * 1000


def test_link_counts_over_unlink_link_and_remount(stack: Stack) -> None:
    build(stack.lower, LINKED)
    root = stack.mount()
    os.chmod(root / "a", 0o600)
    os.unlink(root / "b")
    assert {nlink for _, nlink in numbers(root, "a", "d/c")} == {2}
    os.link(root / "d" / "c", root / "new")
    assert {nlink for _, nlink in numbers(root, "a", "d/c", "new")} == {3}
    assert len(numbers(root, "a", "d/c", "new")) == 1
    stack.remount()
    assert {nlink for _, nlink in numbers(root, "a", "d/c", "new")} == {3}
    assert len(numbers(root, "a", "d/c", "new")) == 1
    os.rename(root / "new", root / "newer")
    os.unlink(root / "a")
    os.unlink(root / "d" / "c")
    assert {nlink for _, nlink in numbers(root, "newer")} == {1}
    assert (root / "newer").read_bytes() == b"data" * 1000
    stack.remount()
    assert {nlink for _, nlink in numbers(root, "newer")} == {1}


def test_unlinking_a_lower_name_without_copy_up(stack: Stack) -> None:
    build(stack.lower, LINKED)
    root = stack.mount()
    descriptor = os.open(root / "a", os.O_RDONLY)
    os.unlink(root / "a")
    assert os.fstat(descriptor).st_nlink == 2
    assert {nlink for _, nlink in numbers(root, "b", "d/c")} == {2}
    os.unlink(root / "b")
    os.unlink(root / "d" / "c")
    assert os.fstat(descriptor).st_nlink == 0
    assert os.pread(descriptor, 4, 0) == b"data"
    os.close(descriptor)
    stack.umount()
    assert all(is_whiteout(stack.up / name) for name in ("a", "b", "d/c"))


def test_index_on_disk(stack: Stack) -> None:
    """While names remain, one index entry per inode; when all are gone, none (or a whiteout)."""
    build(stack.lower, LINKED)
    root = stack.mount()
    with open(root / "a", "ab") as stream:
        stream.write(b"+")
    stack.umount()
    index = stack.work / "index"
    entries = [name for name in os.listdir(index) if not is_whiteout(index / name)]
    assert len(entries) == 1
    assert os.stat(index / entries[0]).st_ino == os.stat(stack.up / "a").st_ino
    assert mark(stack.up / "a", "origin") is not None
    origin = mark(stack.up / "a", "origin") or b""
    assert entries[0] == origin.hex(), "an index entry is named by the origin handle in hexadecimal"
    assert mark(index / entries[0], "nlink") is not None
    root = stack.mount()
    for name in ("a", "b", "d/c"):
        os.unlink(root / name)
    stack.umount()
    left = [name for name in os.listdir(index) if not is_whiteout(index / name)]
    assert left == []


def test_index_written_by_ours_is_read_by_the_kernel_and_back(ours: Stack, check_by_overlay: Oracle) -> None:
    build(ours.lower, LINKED)
    root = ours.mount()
    with open(root / "b", "ab") as stream:
        stream.write(b"ours")
    view = snapshot(root)
    ours.umount()
    kernel = check_by_overlay(ours)
    assert_same(view, snapshot(kernel))
    assert len(numbers(kernel, "a", "b", "d/c")) == 1
    with open(kernel / "d/c", "ab") as stream:
        stream.write(b"kernel")
    os.unlink(kernel / "a")
    os.link(kernel / "b", kernel / "e")
    view = snapshot(kernel)


def test_the_kernels_index_is_read_by_ours(make_stack: Callable[..., Stack]) -> None:
    kernel = make_stack("overlay")
    build(kernel.lower, LINKED)
    root = kernel.mount()
    with open(root / "d/c", "ab") as stream:
        stream.write(b"kernel")
    os.unlink(root / "a")
    os.link(root / "b", root / "e")
    view = snapshot(root)
    kernel.umount()
    ours = kernel.by("union")
    ours.mount()
    try:
        assert_same(view, snapshot(root))
        with open(root / "e", "ab") as stream:
            stream.write(b"ours")
        assert (root / "b").read_bytes() == (root / "d/c").read_bytes() == b"data" * 1000 + b"kernelours"
        assert {nlink for _, nlink in numbers(root, "b", "d/c", "e")} == {3}
        view = snapshot(root)
    finally:
        ours.umount()
    root = kernel.mount()
    assert_same(view, snapshot(root))


def test_linked_special_files(stack: Stack) -> None:
    build(
        stack.lower,
        {"s1": Symlink("x"), "s2": HardLink("s1"), "p1": FIFO, "p2": HardLink("p1")},
    )
    root = stack.mount()
    os.lchown(root / "s1", 5, 6)
    os.chmod(root / "p2", 0o600)
    for one, two in (("s1", "s2"), ("p1", "p2")):
        assert len(numbers(root, one, two)) == 1
        assert os.lstat(root / one).st_uid == os.lstat(root / two).st_uid
        assert os.lstat(root / one).st_nlink == 2
    before = snapshot(root)
    stack.remount()
    assert_same(before, snapshot(root))


def test_without_index_listings_show_the_new_number(stack: Stack) -> None:
    """The name that is written becomes a file of its own, also where the directory was listed before."""
    build(stack.lower, {"d": {"a": b"x"}})
    os.link(stack.lower / "d" / "a", stack.lower / "d" / "b")
    d = stack.mount("index=off") / "d"
    for name in ("a", "b"):
        for _ in range(2):
            assert {entry.name: entry.inode() for entry in os.scandir(d)} == {n: (d / n).stat().st_ino for n in "ab"}
        os.chmod(d / name, 0o600)
    assert {entry.name: entry.inode() for entry in os.scandir(d)} == {n: (d / n).stat().st_ino for n in "ab"}


def test_without_index_links_part(stack: Stack) -> None:
    build(stack.lower, LINKED)
    root = stack.mount("index=off")
    with open(root / "a", "ab") as stream:
        stream.write(b"+")
    assert (root / "a").read_bytes() == b"data" * 1000 + b"+"
    assert (root / "b").read_bytes() == b"data" * 1000
    assert (root / "a").stat().st_ino != (root / "b").stat().st_ino


def test_link_of_a_lower_file_copies_it_up_once(stack: Stack) -> None:
    build(stack.lower, {"f": b"single"})
    root = stack.mount()
    inode = (root / "f").stat().st_ino
    os.link(root / "f", root / "g")
    assert numbers(root, "f", "g") == {(inode, 2)}
    stack.remount()
    assert numbers(root, "f", "g") == {(inode, 2)}
    stack.umount()
    assert os.stat(stack.up / "f").st_ino == os.stat(stack.up / "g").st_ino


def test_open_descriptors_of_other_names_see_the_copy(stack: Stack) -> None:
    build(stack.lower, LINKED)
    root = stack.mount()
    reader = os.open(root / "a", os.O_RDONLY)
    with open(root / "b", "r+b") as stream:
        stream.write(b"NEW!")
    assert os.pread(reader, 4, 0) == b"NEW!"
    os.close(reader)


def test_renaming_names_of_one_lower_file(stack: Stack) -> None:
    build(stack.lower, LINKED)
    root = stack.mount()
    before = numbers(root, "a")
    os.rename(root / "a", root / "a2")
    os.rename(root / "b", root / "d" / "b2")
    assert numbers(root, "a2", "d/b2", "d/c") == before
    os.rename(root / "a2", root / "d" / "b2")
    assert sorted(os.listdir(root)) == ["a2", "d"], "renaming one link over another does nothing"
    (root / "x").write_bytes(b"x")
    os.rename(root / "x", root / "a2")
    assert {nlink for _, nlink in numbers(root, "d/b2", "d/c")} == {2}
    stack.remount()
    assert {nlink for _, nlink in numbers(root, "d/b2", "d/c")} == {2}
    assert (root / "a2").read_bytes() == b"x"


@pytest.mark.parametrize("room", ["tmpfs", "ext4"])
def test_an_old_kernel_that_does_not_tell_the_uuid(
    room: FsKind, on_file_system: Callable[[FsKind], Path], make_stack: StackMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No wrong UUID is left for overlayfs to stumble over; what it notes itself is learned, and then both know the links."""
    monkeypatch.setenv("UNIONFS_OLD_KERNEL", "1")
    base = on_file_system(room)
    base.chmod(0o755)
    stack = make_stack("union", base=base)
    build(stack.lower, {**LINKED, "later": b"later", "linked": HardLink("later")})
    root = stack.mount()
    before = numbers(root, "a", "b", "d/c")
    assert len(before) == 1
    os.chmod(root / "b", 0o600)
    assert numbers(root, "a", "b", "d/c") == before
    stack.remount()
    assert numbers(root, "a", "b", "d/c") == before, "without overlayfs the index works as ever"
    stack.umount()
    assert mark(stack.up, "origin") is None

    oracle = stack.by("overlay")
    oracle.mount()
    assert (oracle.mnt / "b").stat().st_mode & 0o777 == 0o600
    oracle.umount()
    noted = mark(stack.up, "origin")
    assert noted is not None
    root = stack.mount("index=on")
    os.chmod(root / "later", 0o600)
    seen = numbers(root, "later", "linked")
    assert len(seen) == 1
    stack.umount()
    assert mark(stack.up, "origin") == noted
    oracle.mount()
    try:
        assert numbers(oracle.mnt, "later", "linked") == seen
    finally:
        oracle.umount()
