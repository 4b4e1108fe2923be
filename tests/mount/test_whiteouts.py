"""Whiteouts and opaque directories: what hides what, and what lies on disk afterwards."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.posix.table import fails
from tests.support import layers
from tests.support.layers import WHITEOUT, Symlink, Tree, build, is_whiteout, mark, opaque, xattr_whiteout
from tests.support.mounts import Stack
from tests.support.snapshot import assert_same, snapshot

Oracle = Callable[[Stack], Path]


def names(directory: Path) -> list[str]:
    """The sorted names in a directory."""
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("tree", [{"x": b"file"}, {"x": {"in": b""}}, {"x": Symlink("y")}], ids=["file", "dir", "link"])
def test_whiteout_in_upper_hides_a_lower(stack: Stack, tree: Tree) -> None:
    build(stack.lower, tree)
    build(stack.up, {"x": WHITEOUT, "y": b""})
    root = stack.mount()
    assert names(root) == ["y"]
    with fails(errno.ENOENT):
        os.lstat(root / "x")
    with fails(errno.ENOENT):
        os.unlink(root / "x")
    with fails(errno.ENOENT):
        os.rename(root / "x", root / "z")


def test_whiteout_in_a_middle_layer(stack2: Stack) -> None:
    build(stack2.lowers[1], {"x": b"below", "d": {"y": b"below"}, "e": {"z": b"below"}})
    build(stack2.lowers[0], {"x": WHITEOUT, "d": WHITEOUT, "e": {"z": WHITEOUT, "q": b"top"}})
    root = stack2.mount()
    assert names(root) == ["e"]
    assert names(root / "e") == ["q"]
    (root / "x").write_bytes(b"new")
    (root / "d").mkdir()
    assert names(root / "d") == []


def test_xattr_whiteouts_are_read(stack2: Stack) -> None:
    build(stack2.lowers[1], {"d": {"gone": b"x", "stays": b"y"}})
    build(stack2.lowers[0], {"d": {"added": b"z"}})
    xattr_whiteout(stack2.lowers[0] / "d" / "gone")
    root = stack2.mount()
    assert names(root / "d") == ["added", "stays"]
    with fails(errno.ENOENT):
        (root / "d" / "gone").stat()
    (root / "d" / "gone").write_bytes(b"back")
    assert (root / "d" / "gone").read_bytes() == b"back"
    os.unlink(root / "d" / "gone")
    assert names(root / "d") == ["added", "stays"]


def test_an_empty_file_with_the_xattr_outside_such_a_directory(stack2: Stack) -> None:
    """The kernel looks for xattr whiteouts at lookup anywhere, at listing only in a directory marked `x`."""
    build(stack2.lowers[1], {"d": {"f": b"x"}})
    build(stack2.lowers[0], {"d": {"f": b""}})
    os.setxattr(stack2.lowers[0] / "d" / "f", "trusted.overlay.whiteout", b"y")
    os.setxattr(stack2.lowers[0] / "d", "trusted.overlay.opaque", b"x")
    root = stack2.mount()
    assert names(root / "d") == []


def test_dot_wh_files_are_read(make_stack: Callable[..., Stack]) -> None:
    """`.wh.NAME` and `.wh..wh..opq`, as OCI layers and fuse-overlayfs write them; the kernel shows them as files."""
    stack = make_stack("union", lowers=2)
    build(stack.lowers[1], {"d": {"gone": b"x", "stays": b"y"}, "o": {"old": b""}, "f": b""})
    build(stack.lowers[0], {"d": {".wh.gone": b""}, "o": {".wh..wh..opq": b"", "new": b""}, ".wh.f": b""})
    root = stack.mount()
    assert names(root) == ["d", "o"]
    assert names(root / "d") == ["stays"]
    assert names(root / "o") == ["new"]
    with fails(errno.ENOENT):
        (root / "d" / "gone").stat()
    with fails(errno.ENOENT):
        (root / "o" / "old").stat()
    (root / "f").write_bytes(b"again")
    assert names(root) == ["d", "f", "o"]


def test_opaque_directories_hide_what_is_below(stack2: Stack) -> None:
    build(stack2.lowers[1], {"d": {"old": b"", "sub": {"x": b""}}, "e": {"old": b""}})
    build(stack2.lowers[0], {"d": {"new": b"", "sub": {"y": b""}}})
    build(stack2.up, {"e": {"mine": b""}})
    opaque(stack2.lowers[0] / "d")
    opaque(stack2.up / "e")
    root = stack2.mount()
    assert names(root / "d") == ["new", "sub"]
    assert names(root / "d" / "sub") == ["y"]
    assert names(root / "e") == ["mine"]
    os.rename(root / "e", root / "e2")
    assert names(root / "e2") == ["mine"]
    (root / "e").mkdir()
    assert names(root / "e") == []


@pytest.mark.parametrize("below", ["file", "directory"])
def test_a_layer_of_another_type_ends_the_merge(stack2: Stack, below: str) -> None:
    file, directory = {"x": b"file"}, {"x": {"in": b"dir"}}
    build(stack2.lowers[1], {"x": {"deep": b""}})
    build(stack2.lowers[0], file if below == "file" else directory)
    build(stack2.up, directory if below == "file" else file)
    root = stack2.mount()
    if below == "file":
        assert names(root / "x") == ["in"]
    else:
        assert (root / "x").read_bytes() == b"file"


def test_unlink_of_a_lower_leaves_a_device_whiteout(stack: Stack) -> None:
    build(stack.lower, {"f": b"x", "d": {"g": b"y", "h": b""}, "l": Symlink("f")})
    root = stack.mount()
    os.unlink(root / "f")
    os.unlink(root / "d" / "g")
    os.unlink(root / "l")
    stack.umount()
    for name in ("f", "d/g", "l"):
        assert is_whiteout(stack.up / name), name
    assert names(stack.up) == ["d", "f", "l"]
    assert mark(stack.up / "d", "opaque") is None


def test_unlink_of_an_upper_leaves_nothing(stack: Stack) -> None:
    root = stack.mount()
    (root / "f").touch()
    (root / "d").mkdir()
    os.unlink(root / "f")
    os.rmdir(root / "d")
    stack.umount()
    assert names(stack.up) == []


def test_unlink_of_a_copied_file_leaves_a_whiteout(stack: Stack) -> None:
    build(stack.lower, {"f": b"x"})
    root = stack.mount()
    (root / "f").write_bytes(b"changed")
    os.unlink(root / "f")
    stack.umount()
    assert is_whiteout(stack.up / "f")


def test_making_over_a_whiteout_replaces_it(stack: Stack) -> None:
    build(stack.lower, {"f": b"x", "g": b"x", "d": {"old": b""}, "e": {"old": b""}, "s": b"", "p": b"", "t": b""})
    root = stack.mount()
    for name in ("f", "g", "s", "p", "t"):
        os.unlink(root / name)
    for name in ("d", "e"):
        os.unlink(root / name / "old")
        os.rmdir(root / name)
    (root / "f").write_bytes(b"new")
    (root / "g").mkdir()
    (root / "d").mkdir()
    (root / "e").write_bytes(b"file now")
    os.symlink("x", root / "s")
    os.mkfifo(root / "p")
    os.link(root / "f", root / "t")
    before = snapshot(root)
    assert names(root / "d") == names(root / "g") == []
    stack.remount()
    assert_same(before, snapshot(root))
    stack.umount()
    assert mark(stack.up / "d", "opaque") == b"y", "a directory over a lower one must hide it"
    assert not any(is_whiteout(stack.up / name) for name in os.listdir(stack.up))


def test_rmdir_of_a_merged_directory_leaves_a_whiteout(stack: Stack) -> None:
    build(stack.lower, {"d": {"a": b"", "sub": {"b": b""}}})
    root = stack.mount()
    with fails(errno.ENOTEMPTY):
        os.rmdir(root / "d")
    os.unlink(root / "d" / "a")
    os.unlink(root / "d" / "sub" / "b")
    os.rmdir(root / "d" / "sub")
    os.rmdir(root / "d")
    assert names(root) == []
    stack.umount()
    assert names(stack.up) == ["d"]
    assert is_whiteout(stack.up / "d")


def test_rmdir_of_directories_that_hold_only_whiteouts(stack2: Stack) -> None:
    build(stack2.lowers[1], {"d": {"a": b"", "b": b""}, "e": {"c": b""}, "g": {"h": b""}})
    build(stack2.lowers[0], {"d": {"a": WHITEOUT, "b": WHITEOUT}, "e": {"c": WHITEOUT}})
    build(stack2.up, {"g": {"h": WHITEOUT}})
    root = stack2.mount()
    for name in ("d", "e", "g"):
        assert names(root / name) == []
        os.rmdir(root / name)
    assert names(root) == []


def test_rmdir_of_directories_with_xattr_whiteouts_only(make_stack: Callable[..., Stack]) -> None:
    """Ours only: the kernel's check for emptiness does not look at the xattr form, and says ENOTEMPTY."""
    stack2 = make_stack("union", lowers=2)
    build(stack2.lowers[1], {"d": {"a": b"", "b": b""}})
    build(stack2.lowers[0], {"d": {}})
    xattr_whiteout(stack2.lowers[0] / "d" / "a")
    xattr_whiteout(stack2.lowers[0] / "d" / "b")
    root = stack2.mount()
    os.rmdir(root / "d")
    assert names(root) == []


def test_rename_over_a_directory_of_whiteouts(stack: Stack) -> None:
    build(stack.lower, {"victim": {"a": b""}, "mover": {"m": b""}})
    root = stack.mount()
    os.unlink(root / "victim" / "a")
    os.rename(root / "mover", root / "victim")
    assert names(root) == ["victim"]
    assert names(root / "victim") == ["m"]
    stack.remount()
    assert names(root / "victim") == ["m"]


def test_no_whiteout_lies_in_an_opaque_or_new_directory(stack: Stack) -> None:
    """The kernel rejects no such layer, but other tools do; and a whiteout there hides nothing."""
    build(stack.lower, {"d": {"a": b""}})
    root = stack.mount()
    os.unlink(root / "d" / "a")
    os.rmdir(root / "d")
    (root / "d").mkdir()
    (root / "d" / "a").touch()
    os.unlink(root / "d" / "a")
    (root / "new").mkdir()
    (root / "new" / "f").touch()
    os.rename(root / "new" / "f", root / "new" / "g")
    stack.umount()
    assert names(stack.up / "d") == []
    assert names(stack.up / "new") == ["g"]


def test_what_is_hidden_stays_hidden_after_remount(stack2: Stack) -> None:
    build(stack2.lowers[1], {"a": {"x": b"1", "y": b"2"}, "f": b"3"})
    build(stack2.lowers[0], {"a": {"x": b"4", "z": b"5"}, "g": b"6"})
    root = stack2.mount()
    os.unlink(root / "a" / "x")
    os.unlink(root / "f")
    os.rename(root / "g", root / "f")
    (root / "a" / "w").write_bytes(b"7")
    before = snapshot(root)
    stack2.remount()
    assert_same(before, snapshot(root))


def test_whiteout_devices_can_not_be_made_by_users(stack: Stack) -> None:
    root = stack.mount()
    with fails(errno.EPERM):
        os.mknod(root / "w", stat.S_IFCHR | 0o600, os.makedev(0, 0))
    assert names(root) == []


def test_kernel_overlayfs_reads_our_marks(ours: Stack, check_by_overlay: Oracle) -> None:
    build(ours.lower, {"f": b"x", "d": {"a": b"", "b": b""}, "e": {"c": b"", "s": {"t": b""}}, "k": b"keep"})
    root = ours.mount()
    os.unlink(root / "f")
    os.unlink(root / "d" / "a")
    os.unlink(root / "e" / "c")
    os.rename(root / "e" / "s", root / "s2")
    os.rmdir(root / "e")
    (root / "e").mkdir()
    (root / "e" / "fresh").write_bytes(b"1")
    ours_view = snapshot(root)
    ours.umount()
    assert_same(ours_view, snapshot(check_by_overlay(ours)))


@pytest.mark.parametrize("form", ["char", "xattr", "wh"])
def test_whiteout_forms_that_can_be_chosen(make_stack: Callable[..., Stack], form: str) -> None:
    stack = make_stack("union", options=f"whiteout={form}")
    build(stack.lower, {"f": b"x", "d": {"a": b"", "b": b""}, "e": {"x": b""}})
    root = stack.mount()
    os.unlink(root / "f")
    os.unlink(root / "d" / "a")
    os.unlink(root / "e" / "x")
    os.rmdir(root / "e")
    assert names(root) == ["d"]
    assert names(root / "d") == ["b"]
    stack.remount()
    assert names(root) == ["d"]
    assert names(root / "d") == ["b"]
    (root / "f").write_bytes(b"back")
    (root / "e").mkdir()
    assert names(root / "e") == []
    os.unlink(root / "f")
    stack.remount()
    assert names(root) == ["d", "e"]
    assert names(root / "e") == []
    stack.umount()
    upper = names(stack.up)
    if form == "char":
        assert is_whiteout(stack.up / "f")
    elif form == "xattr":
        assert mark(stack.up / "f", "whiteout") is not None
    else:
        assert ".wh.f" in upper


def test_xattr_form_is_read_by_kernel_overlayfs(make_stack: Callable[..., Stack], check_by_overlay: Oracle) -> None:
    stack = make_stack("union", options="whiteout=xattr")
    build(
        stack.lower,
        {
            "f": b"x",
            "d": {"a": b"", "b": b""},
            "g": {"file": b"g"},
            "h": {"file": b"h"},
            "i": {"file": b"i"},
            "to": {"h": b"old", "i": b"old"},
        },
    )
    root = stack.mount()
    os.unlink(root / "f")
    os.unlink(root / "d" / "a")
    os.unlink(root / "to" / "h")
    os.rename(root / "g" / "file", root / "to" / "g")
    view = snapshot(root)
    stack.remount()
    assert_same(view, snapshot(root))
    os.rename(root / "h" / "file", root / "to" / "h")  # where a whiteout is
    os.rename(root / "i" / "file", root / "to" / "i")
    view = snapshot(root)
    assert [os.listdir(root / name) for name in "ghi"] == [[], [], []]
    stack.umount()
    # An xattr whiteout in the root is honoured by the kernel in a lower only where the root is marked.
    assert layers.mark(stack.up / "d", "opaque") == b"x"
    lower_form = Stack.make("overlay", stack.base / "check", lowers=2)
    lower_form.lowers = [stack.up, stack.lower]
    lower_form.mount()
    try:
        assert_same(view, snapshot(lower_form.mnt))
    finally:
        lower_form.umount()
