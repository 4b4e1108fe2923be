"""Unions over unions, read-only unions, statfs, volatile, and layers passed between ours and the kernel."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.posix.table import fails
from tests.support.filesystems import file_system, run
from tests.support.layers import FIFO, File, HardLink, Symlink, Tree, build, is_whiteout
from tests.support.mounts import Kind, MountRefused, Stack
from tests.support.snapshot import Snapshot, assert_same, snapshot

Oracle = Callable[[Stack], Path]
StackMaker = Callable[..., Stack]
TREE: Tree = {
    "f": File(b"data" * 2000, 0o640, 5, 6, {"user.x": b"1"}),
    "d": {"g": b"1", "e": {"h": b"2"}, "s": Symlink("g")},
    "moved": {"m": b"3", "n": {"o": b"4"}},
    "gone": {"x": b""},
    "p": FIFO,
    "l1": b"links",
    "l2": HardLink("l1"),
}


def work_hard(root: Path) -> None:
    """A bit of everything."""
    with open(root / "f", "ab") as stream:
        stream.write(b"more")
    os.chmod(root / "d" / "g", 0o600)
    os.rename(root / "moved", root / "d" / "moved2")
    os.unlink(root / "d" / "moved2" / "m")
    shutil.rmtree(root / "gone")
    (root / "gone").mkdir()
    (root / "gone" / "y").write_bytes(b"new")
    os.unlink(root / "d" / "s")
    (root / "d" / "s").mkdir()
    with open(root / "l2", "ab") as stream:
        stream.write(b"+")
    os.rename(root / "p", root / "q")
    os.setxattr(root / "d" / "e", "user.dir", b"2")


@pytest.mark.parametrize("first", ["overlay", "union"])
@pytest.mark.parametrize("second", ["overlay", "union"])
def test_layers_go_from_hand_to_hand(make_stack: StackMaker, first: Kind, second: Kind) -> None:
    """What one leaves, the other shows alike, works on, and hands back."""
    stack = make_stack(first)
    build(stack.lower, TREE)
    root = stack.mount()
    work_hard(root)
    view = snapshot(root)
    stack.umount()
    other = Stack(second, stack.base / "log2", stack.lowers, stack.upper, stack.work, stack.mnt)
    other.base.mkdir()
    other.mount()
    try:
        assert_same(view, snapshot(root))
        os.rename(root / "d" / "moved2", root / "moved3")
        os.rename(root / "gone", root / "came")
        with open(root / "l1", "ab") as stream:
            stream.write(b"-")
        (root / "moved3" / "m").write_bytes(b"again")
        view = snapshot(root)
    finally:
        other.umount()
    assert other.bad_log_lines() == []
    stack.mount()
    assert_same(view, snapshot(root))


def test_kernel_overlay_with_our_mount_as_lower(make_stack: StackMaker, ground: Path) -> None:
    inner = make_stack("union", name="inner")
    build(inner.lower, TREE)
    inner_root = inner.mount()
    work_hard(inner_root)
    view = snapshot(inner_root)
    outer = make_stack("overlay", name="outer", options="index=off")
    outer.lowers = [inner_root]
    root = outer.mount()
    assert_same(view, snapshot(root))
    with open(root / "f", "ab") as stream:
        stream.write(b"outer")
    os.unlink(root / "d" / "g")
    os.rename(root / "d", root / "d9")
    assert not (root / "d9" / "g").exists()
    assert (root / "f").read_bytes().endswith(b"moreouter")
    assert_same(view, snapshot(inner_root))
    outer.umount()


def test_kernel_overlay_with_our_mount_as_upper(make_stack: StackMaker) -> None:
    """overlayfs wants RENAME_WHITEOUT, trusted xattrs, d_type and whiteout devices from its upper; it warns and goes on, or
    refuses with a clear errno, but what it does must be right."""
    inner = make_stack("union", name="inner")
    inner_root = inner.mount()
    (inner_root / "u").mkdir()
    (inner_root / "w").mkdir()
    outer = make_stack("overlay", name="outer", options="index=off,metacopy=off,redirect_dir=off")
    build(outer.lower, TREE)
    outer.upper, outer.work = inner_root / "u", inner_root / "w"
    try:
        root = outer.mount()
    except MountRefused as refused:
        assert "wrong fs type" in refused.message or "not supported" in refused.message
        return
    with open(root / "f", "ab") as stream:
        stream.write(b"more")
    assert (root / "f").read_bytes() == b"data" * 2000 + b"more"
    outer.umount()


def over_a_used_one(make_stack: StackMaker, kind: Kind) -> tuple[Path, Snapshot, Stack]:
    """Mount ours over the mount of a kind in which things were done; return that mount's root, what it shows, and ours."""
    inner = make_stack(kind, name="inner")
    build(inner.lower, TREE)
    inner_root = inner.mount()
    work_hard(inner_root)
    view = snapshot(inner_root)
    outer = make_stack("union", name="outer")
    outer.lowers = [inner_root]
    assert_same(view, snapshot(outer.mount()))
    return inner_root, view, outer


def test_our_union_over_ours(make_stack: StackMaker) -> None:
    inner_root, view, outer = over_a_used_one(make_stack, "union")
    root = outer.mnt
    work = [path for path in ("f", "l1") if (root / path).exists()]
    for name in work:
        with open(root / name, "ab") as stream:
            stream.write(b"outer")
    os.rename(root / "d", root / "d9")
    shutil.rmtree(root / "d9")
    assert_same(view, snapshot(inner_root))
    before = snapshot(root)
    outer.remount()
    assert_same(before, snapshot(root))
    outer.umount()


def test_our_union_over_kernel_overlay(make_stack: StackMaker) -> None:
    inner_root, view, outer = over_a_used_one(make_stack, "overlay")
    root = outer.mnt
    with open(root / "f", "ab") as stream:
        stream.write(b"outer")
    outer.remount()
    assert (root / "f").read_bytes().endswith(b"moreouter")
    assert_same(view, snapshot(inner_root))
    outer.umount()


CHANGES: dict[str, Callable[[Path], object]] = {
    "write": lambda root: os.open(root / "f", os.O_WRONLY),
    "trunc": lambda root: os.open(root / "f", os.O_RDONLY | os.O_TRUNC),
    "create": lambda root: os.open(root / "new", os.O_CREAT | os.O_WRONLY),
    "truncate": lambda root: os.truncate(root / "f", 0),
    "mkdir": lambda root: os.mkdir(root / "new"),
    "mknod": lambda root: os.mkfifo(root / "new"),
    "symlink": lambda root: os.symlink("x", root / "new"),
    "link": lambda root: os.link(root / "f", root / "new"),
    "unlink": lambda root: os.unlink(root / "f"),
    "rmdir": lambda root: os.rmdir(root / "empty"),
    "rename": lambda root: os.rename(root / "f", root / "new"),
    "chmod": lambda root: os.chmod(root / "f", 0o600),
    "chown": lambda root: os.chown(root / "f", 1, 1),
    "utime": lambda root: os.utime(root / "f", (1, 1)),
    "setxattr": lambda root: os.setxattr(root / "f", "user.y", b""),
    "removexattr": lambda root: os.removexattr(root / "f", "user.x"),
}


@pytest.mark.parametrize("how", ["no upper", "-o ro"])
def test_read_only_unions(stack2: Stack, how: str) -> None:
    build(stack2.lowers[0], {**TREE, "empty": {}})
    build(stack2.lowers[1], {"d": {"low": b""}, "second": b"2"})
    before = [snapshot(lower) for lower in stack2.lowers]
    if how == "no upper":
        stack2.upper = None
        root = stack2.mount()
    elif stack2.kind == "overlay":
        root = stack2.mount()
        run("mount", "-o", "remount,ro", str(root))
    else:
        root = stack2.mount("ro")
    assert (root / "second").read_bytes() == b"2"
    assert sorted(os.listdir(root / "d")) == ["e", "g", "low", "s"]
    for name, change in CHANGES.items():
        with fails(errno.EROFS):
            change(root)
            raise AssertionError(f"{name} was let through")
    assert not os.access(root / "f", os.W_OK)
    stack2.umount()
    assert [snapshot(lower) for lower in stack2.lowers] == before
    if stack2.upper is not None:
        assert os.listdir(stack2.upper) == []


def test_read_only_union_of_one_lower(ours: Stack) -> None:
    build(ours.lower, TREE)
    ours.upper = None
    root = ours.mount()
    assert_same(snapshot(ours.lower), snapshot(root))


def test_whiteouts_between_lowers_of_a_read_only_union(stack2: Stack) -> None:
    build(stack2.lowers[1], {"x": b"", "d": {"y": b""}})
    build(stack2.lowers[0], {"d": {"z": b""}})
    os.mknod(stack2.lowers[0] / "x", 0o020600, os.makedev(0, 0))
    stack2.upper = None
    root = stack2.mount()
    assert os.listdir(root) == ["d"]
    assert sorted(os.listdir(root / "d")) == ["y", "z"]


def test_statfs_is_that_of_upper(make_stack: StackMaker, kind: Kind, ground: Path) -> None:
    with file_system("tmpfs", ground, size="64M") as small:
        stack = make_stack(kind)
        stack.upper, stack.work = small / "upper", small / "work"
        stack.up.mkdir()
        stack.work.mkdir()
        root = stack.mount()
        (root / "f").write_bytes(b"x" * (10 << 20))
        ours, below = os.statvfs(root), os.statvfs(small)
        assert (ours.f_blocks, ours.f_bsize, ours.f_frsize) == (below.f_blocks, below.f_bsize, below.f_frsize)
        assert (ours.f_files, ours.f_namemax) == (below.f_files, below.f_namemax)
        assert abs(ours.f_bfree - below.f_bfree) <= 16
        stack.umount()


def test_statfs_of_a_read_only_union_is_that_of_the_top_lower(stack2: Stack) -> None:
    stack2.upper = None
    root = stack2.mount()
    assert os.statvfs(root).f_blocks == os.statvfs(stack2.lower).f_blocks


def test_no_space_on_upper(make_stack: StackMaker, kind: Kind, ground: Path) -> None:
    with file_system("tmpfs", ground, size="2M") as small:
        stack = make_stack(kind)
        stack.upper, stack.work = small / "upper", small / "work"
        stack.up.mkdir()
        stack.work.mkdir()
        root = stack.mount()
        descriptor = os.open(root / "f", os.O_CREAT | os.O_WRONLY)
        with fails(errno.ENOSPC):
            for _ in range(100):
                os.write(descriptor, bytes(65536))
            os.fsync(descriptor)
        os.close(descriptor)
        os.unlink(root / "f")
        write_as_soon_as_there_is_room(root / "g", b"room again")
        stack.umount()


def write_as_soon_as_there_is_room(path: Path, data: bytes) -> None:
    """The kernel tells a FUSE daemon of a close in the background, so space may become free a moment later."""
    for attempt in range(100):
        try:
            path.write_bytes(data)
            return
        except OSError as error:
            if error.errno != errno.ENOSPC or attempt == 99:
                raise
            time.sleep(0.05)


@pytest.mark.expected_log("was last used by a volatile mount")
def test_volatile_refuses_a_dirty_remount(stack: Stack) -> None:
    build(stack.lower, {"f": b"x"})
    root = stack.mount("volatile")
    with open(root / "f", "ab") as stream:
        stream.write(b"y")
        os.fsync(stream.fileno())
    stack.umount()
    assert (stack.work / "work" / "incompat" / "volatile").is_dir()
    for options in ("volatile", ""):
        with pytest.raises(MountRefused):
            stack.mount(options)
    shutil.rmtree(stack.work / "work" / "incompat")
    root = stack.mount("volatile")
    assert (root / "f").read_bytes() == b"xy"


@pytest.mark.expected_log("was last used by a volatile mount")
def test_a_volatile_mark_of_the_kernels_is_respected(make_stack: StackMaker) -> None:
    stack = make_stack("overlay")
    stack.mount("volatile")
    stack.umount()
    ours = make_stack("union", name="ours")
    ours.lowers, ours.upper, ours.work = stack.lowers, stack.upper, stack.work
    with pytest.raises(MountRefused) as refused:
        ours.mount()
    assert len(refused.value.message.splitlines()) == 1
    assert "volatile" in refused.value.message


def test_five_hundred_layers(make_stack: StackMaker) -> None:
    """overlayfs takes 500 lowers; its mount(2) page limit is ours neither. A daemon has descriptors enough."""
    stack = make_stack("union", lowers=120)
    for number, lower in enumerate(stack.lowers):
        build(lower, {f"only-{number}": b"", "d": {f"{number}": b"%d" % number}, "f": b"%d" % number})
    root = stack.mount()
    assert (root / "f").read_bytes() == b"0"
    assert len(os.listdir(root / "d")) == 120
    assert (root / "d" / "119").read_bytes() == b"119"
    os.rename(root / "d", root / "d2")
    (root / "d2" / "50").write_bytes(b"changed")
    stack.remount()
    assert len(os.listdir(root / "d2")) == 120


def test_layer_paths_with_odd_characters(make_stack: StackMaker, ground: Path) -> None:
    base = ground / "odd: name, with=signs 'and' \\back ü"
    base.mkdir()
    stack = make_stack("union", base=base, lowers=2)
    build(stack.lowers[0], {"a": b"1"})
    build(stack.lowers[1], {"b": b"2"})
    root = stack.mount()
    assert sorted(os.listdir(root)) == ["a", "b"]
    os.unlink(root / "b")
    stack.umount()
    assert is_whiteout(stack.up / "b")
