"""Unions with their upper on ext4, xfs, btrfs and tmpfs, held against kernel overlayfs on the same file system.

One scripted workload touches every way a file gets into upper. Both unions must show one tree, and each must show the
same tree over the layers that the other has written.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import FileSystemMaker, StackMaker
from tests.support import raw
from tests.support.filesystems import FS_KINDS, FsKind, run
from tests.support.layers import (
    ACL_ACCESS,
    ACL_DEFAULT,
    ACL_GROUP_OBJ,
    ACL_MASK,
    ACL_OTHER,
    ACL_USER,
    ACL_USER_OBJ,
    FIFO,
    File,
    HardLink,
    Symlink,
    Tree,
    acl,
    build,
    mark,
)
from tests.support.mounts import Kind, Stack
from tests.support.people import ALICE
from tests.support.snapshot import assert_same, snapshot

BIG_BYTES = 20 << 20
BIG = random.Random(1).randbytes(BIG_BYTES)
MTIME = 1_500_000_000_123_456_789
ACL = acl((ACL_USER_OBJ, 7), (ACL_USER, 5, ALICE), (ACL_GROUP_OBJ, 5), (ACL_MASK, 5), (ACL_OTHER, 0))


def lower_files(count: int, text: str) -> Tree:
    """`count` small files."""
    return {f"f{number}": f"{text} {number}\n".encode() for number in range(count)}


BOTTOM: Tree = {
    "d": {**lower_files(40, "bottom"), "sub": lower_files(10, "bottom sub"), "gone": lower_files(10, "gone")},
    "tree": {"a": {"b": {"c": lower_files(5, "deep")}}, **lower_files(20, "tree")},
    "moved": {"x": lower_files(10, "moved"), "link": Symlink("x/f1")},
    "fifo": FIFO,
    "links": {"one": b"one file", "two": HardLink("links/one"), "three": HardLink("links/one")},
}
TOP: Tree = {
    "d": {"f0": b"top\n", "top": b"top\n"},
    "attrs": File(b"attrs", mode=0o640, uid=ALICE, xattrs={"user.one": b"1", "user.two": b"2"}, mtime=MTIME),
    "acl": File(b"acl", xattrs={ACL_ACCESS: ACL}, mtime=MTIME),
    "defaults": {},
    "big": File(BIG, mtime=MTIME),
    "big-chmod": File(BIG[: 1 << 20], mtime=MTIME),
    "big-head": File(BIG[: 3 << 20]),
}


def fill(bottom: Path, top: Path) -> None:
    """Write both lowers, and into the top one a file of 8 MiB of holes with data in three places."""
    build(bottom, BOTTOM)
    build(top, TOP)
    os.setxattr(top / "defaults", ACL_DEFAULT, ACL)
    with open(top / "sparse", "wb") as stream:
        for offset in (0, 3 << 20, (8 << 20) - 4096):
            stream.seek(offset)
            stream.write(b"data" * 1024)


def create_and_replace(root: Path) -> None:
    """New files and directories, writes, renames over upper and lower files, links, special files."""
    build(root / "new", {"dir": lower_files(30, "new"), "s": Symlink("../d/f1"), "p": FIFO})
    os.link(root / "new/dir/f1", root / "new/hard")
    os.link(root / "d/f2", root / "new/hard-of-lower")
    for number in range(5, 10):
        (root / "temporary").write_bytes(b"replaced" * number)
        os.rename(root / "temporary", root / f"d/f{number}")
    os.rename(root / "d/f10", root / "d/f11")
    os.rename(root / "d/f12", root / "d/renamed")
    raw.renameat2(root / "d/f13", root / "new/dir/f2", raw.RENAME_EXCHANGE)
    os.unlink(root / "moved/link")
    os.symlink("elsewhere", root / "moved/link")
    (root / "attrs").rename(root / "d/attrs")


def change_attributes(root: Path) -> None:
    """Modes, owners, times, xattrs and ACLs of lower files, directories, fifos and symlinks."""
    os.chmod(root / "big-chmod", 0o4750)
    os.chmod(root / "d/f14", 0)
    os.chown(root / "d/f15", ALICE, ALICE)
    os.lchown(root / "new/s", ALICE, ALICE)
    os.utime(root / "d/f16", ns=(MTIME, MTIME + 1))
    os.chmod(root / "fifo", 0o600)
    os.chmod(root / "d/sub", 0o2775)
    os.setxattr(root / "d/attrs", "user.two", b"changed")
    os.removexattr(root / "d/attrs", "user.one")
    os.setxattr(root / "d/sub", "trusted.mark", b"dir")
    os.chmod(root / "acl", 0o700)
    os.setxattr(root / "d/f17", ACL_ACCESS, ACL)
    (root / "defaults/inherits").write_bytes(b"")
    (root / "defaults/dir").mkdir()


def change_data(root: Path) -> None:
    """Appends, truncations, holes and overwritten parts of big and small lower files and hard links."""
    with open(root / "big", "ab") as stream:
        stream.write(b"appended")
    with open(root / "big-head", "r+b") as stream:
        stream.write(b"head")
    os.truncate(root / "d/f18", 3)
    os.truncate(root / "d/f19", 100_000)
    (root / "d/f20").write_bytes(b"written anew")
    with open(root / "sparse", "r+b") as stream:
        stream.seek(5 << 20)
        stream.write(b"more")
    with open(root / "new/sparse", "wb") as stream:
        stream.seek(1 << 20)
        stream.write(b"end")
        stream.truncate(2 << 20)
    with open(root / "links/two", "ab") as stream:
        stream.write(b", three names")
    os.unlink(root / "links/three")


def remove_and_move(root: Path) -> None:
    """Whole trees removed and made again, lower and merged directories moved, and changes inside them."""
    shutil.rmtree(root / "d/gone")
    shutil.rmtree(root / "tree/a")
    build(root / "tree/a", {"b": {"new": b"new"}})
    os.rename(root / "moved", root / "new/moved")
    (root / "new/moved/x/f3").write_bytes(b"inside a moved directory")
    os.unlink(root / "new/moved/x/f4")
    os.rename(root / "d", root / "d2")
    os.rename(root / "d2/sub", root / "sub")
    for number in range(30, 40):
        os.unlink(root / f"d2/f{number}")
    os.rename(root / "tree", root / "d")


WORKLOAD: list[Callable[[Path], None]] = [create_and_replace, change_attributes, change_data, remove_and_move]


def worked_on(stack: Stack) -> Stack:
    """Fill the lowers, mount, and run the workload."""
    fill(stack.lowers[1], stack.lowers[0])
    root = stack.mount()
    for step in WORKLOAD:
        step(root)
    return stack


@pytest.mark.fault_seconds(150)
@pytest.mark.parametrize("lowers", ["same", "other"])
@pytest.mark.parametrize("fs", FS_KINDS)
def test_workload(
    make_stack: StackMaker, on_file_system: FileSystemMaker, ground: Path, fs: FsKind, lowers: str
) -> None:
    """Our tree is that of overlayfs, each over the other's layers too; lowers on upper's file system or another."""
    base = on_file_system(fs)
    kinds: list[Kind] = ["union", "overlay"]
    ours, kernel = stacks = [make_stack(kind, lowers=2, base=base, name=kind) for kind in kinds]
    for stack in stacks:
        if lowers == "other":
            stack.lowers = [ground / f"{stack.kind}-{number}" for number in range(2)]
            for directory in stack.lowers:
                directory.mkdir()
        worked_on(stack)
    assert_same(snapshot(ours.mnt, times=False), snapshot(kernel.mnt, times=False))
    views = [snapshot(stack.mnt) for stack in stacks]
    ours.remount()
    for stack, view in zip(stacks, views, strict=True):
        assert_same(view, snapshot(stack.mnt))
        stack.umount()
    ours.kind, kernel.kind = "overlay", "union"
    for stack, view in zip(stacks, views, strict=True):
        assert_same(view, snapshot(stack.mount()))
        stack.umount()


Extent = tuple[int, int]


def extents(path: Path) -> list[Extent]:
    """Where the data of a file lies on its device: (first, last) physical block of each extent, by filefrag(8)."""
    lines = run("filefrag", "-v", "-s", str(path)).splitlines()
    found = [re.match(r"\s*\d+:\s*\d+\.\.\s*\d+:\s*(\d+)\.\.\s*(\d+):", line) for line in lines]
    return [(int(match[1]), int(match[2])) for match in found if match]


def common_blocks(one: list[Extent], other: list[Extent]) -> int:
    """How many physical blocks two files share."""
    pairs = [(max(a, c), min(b, d)) for a, b in one for c, d in other]
    return sum(max(0, last - first + 1) for first, last in pairs)


@pytest.mark.parametrize("fs", ["xfs", "btrfs"])
@pytest.mark.parametrize("name", ["big", "big-head"])
def test_copy_up_shares_extents(make_stack: StackMaker, on_file_system: FileSystemMaker, fs: FsKind, name: str) -> None:
    """Where the file system can, a copy-up is a reflink: upper's copy lies in the very blocks of the lower file."""
    base = on_file_system(fs)
    stack = make_stack("union", lowers=2, base=base)
    fill(stack.lowers[1], stack.lowers[0])
    root = stack.mount()
    with open(root / name, "r+b") as stream:
        stream.seek(-100 if name == "big" else 0, os.SEEK_END if name == "big" else os.SEEK_SET)
        stream.write(b"changed")
    stack.umount()
    copy, original = stack.up / name, stack.lower / name
    blocks = original.stat().st_size // os.statvfs(base).f_bsize
    assert common_blocks(extents(copy), extents(original)) >= blocks - 64
    assert copy.read_bytes().replace(b"changed", b"", 1) != original.read_bytes()
    assert mark(copy, "metacopy") is None
