"""Identity: one device, one number for a file from every call, kept over copy-up and remounting, shared by no two files."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.layers import FIFO, HardLink, Symlink, Tree, build
from tests.support.mounts import Stack
from tests.support.raw import DirStream

StackMaker = Callable[..., Stack]
TREE: Tree = {
    "f": b"1",
    "big": b"x" * 100_000,
    "d": {"g": b"2", "e": {"h": b"3"}},
    "s": Symlink("f"),
    "p": FIFO,
    "l1": b"linked",
    "l2": HardLink("l1"),
}


def identities(root: Path) -> dict[str, int]:
    """Path → st_ino of the whole tree, after seeing that readdir, stat and fstat agree and the device is one."""
    device = root.stat().st_dev
    found: dict[str, int] = {}
    for base, directories, files in os.walk(root):
        with DirStream(base) as stream:
            listed = {os.fsdecode(name): (inode, kind) for name, inode, kind in stream}
        assert listed["."][0] == os.stat(base).st_ino, f"{base}: d_ino of . is not st_ino"
        for name in directories + files:
            path = os.path.join(base, name)
            status = os.lstat(path)
            assert listed[name] == (status.st_ino, stat.S_IFMT(status.st_mode) >> 12), path
            if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
                descriptor = os.open(path, os.O_RDONLY)
                assert os.fstat(descriptor).st_ino == status.st_ino, path
                os.close(descriptor)
            if not stat.S_ISDIR(status.st_mode):
                assert status.st_dev == device, path
            found[os.path.relpath(path, root)] = status.st_ino
    return found


def assert_unique(found: dict[str, int], linked: tuple[tuple[str, ...], ...] = ()) -> None:
    """No two paths share a number, but for groups of hard links, which do."""
    for group in linked:
        assert len({found[path] for path in group}) == 1, group
    extra = {path for group in linked for path in group[1:]}
    numbers = [inode for path, inode in found.items() if path not in extra]
    assert len(numbers) == len(set(numbers))


def change_all(root: Path) -> None:
    """Copy everything up: data of files, attributes of the rest."""
    for base, directories, files in os.walk(root):
        for name in directories + files:
            path = os.path.join(base, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                with open(path, "ab") as stream:
                    stream.write(b"+")
            os.utime(path, (1, 1), follow_symlinks=False)


def test_number_of_dot_dot(ours: Stack) -> None:
    """Ours only: overlayfs gives for `..` of a merged directory whatever its layers hold."""
    build(ours.lower, {"d": {"e": {}}})
    root = ours.mount()
    (root / "d" / "e" / "f").mkdir()
    for path in (root / "d", root / "d" / "e", root / "d" / "e" / "f"):
        with DirStream(path) as stream:
            listed = {name: inode for name, inode, _ in stream}
        assert listed[b".."] == path.parent.stat().st_ino


def test_numbers_over_copy_up_and_remount(stack: Stack) -> None:
    build(stack.lower, TREE)
    root = stack.mount()
    before = identities(root)
    assert_unique(before, (("l1", "l2"),))
    change_all(root)
    assert identities(root) == before
    stack.remount()
    assert identities(root) == before
    stack.remount()
    assert identities(root) == before


def test_numbers_of_new_files_over_remount(stack: Stack) -> None:
    build(stack.lower, TREE)
    root = stack.mount()
    build(root / "new", TREE)
    before = identities(root)
    assert_unique(before, (("l1", "l2"), ("new/l1", "new/l2")))
    stack.remount()
    assert identities(root) == before


def test_numbers_over_renames_and_remount(stack: Stack) -> None:
    build(stack.lower, TREE)
    root = stack.mount()
    before = identities(root)
    os.rename(root / "f", root / "f2")
    os.rename(root / "d", root / "d2")
    os.rename(root / "d2" / "e", root / "e2")
    names = {"f": "f2", "d": "d2", "d/g": "d2/g", "d/e": "e2", "d/e/h": "e2/h"}
    want = {names.get(path, path): inode for path, inode in before.items()}
    assert identities(root) == want
    stack.remount()
    assert identities(root) == want


def test_numbers_of_merged_directories(stack2: Stack) -> None:
    build(stack2.lowers[0], {"d": {"top": b""}, "only0": {}})
    build(stack2.lowers[1], {"d": {"low": b""}, "only1": {}})
    if stack2.kind == "union":  # without its marks the kernel lists other numbers than it gives to stat
        build(stack2.up, {"d": {"up": b""}, "only2": {}})
    root = stack2.mount()
    before = identities(root)
    assert_unique(before)
    (root / "d" / "new").touch()
    os.chmod(root / "only0", 0o700)
    os.chmod(root / "only1", 0o700)
    after = identities(root)
    assert {path: after[path] for path in before} == before
    stack2.remount()
    assert identities(root) == after


@pytest.mark.parametrize("upper_on", ["ext4", "tmpfs"])
def test_lowers_on_several_file_systems(
    make_stack: StackMaker, kind: str, on_file_system: Callable[[str], Path], upper_on: str
) -> None:
    """Fresh file systems hand out the same small numbers; the union may not."""
    stack = make_stack(kind, lowers=3)
    stack.lowers = [on_file_system(name) / "layer" for name in ("ext4", "btrfs", "tmpfs")]
    base = on_file_system(upper_on)
    stack.upper, stack.work = base / "upper", base / "work"
    for directory in (*stack.lowers, stack.upper, stack.work):
        directory.mkdir(exist_ok=True)
    for number, lower in enumerate(stack.lowers):
        build(lower / f"t{number}", TREE)
        build(lower, {"merged": {f"m{number}": b""}, **{f"{number}-{i}": b"" for i in range(50)}})
    root = stack.mount()
    before = identities(root)
    linked = tuple((f"t{number}/l1", f"t{number}/l2") for number in range(3))
    assert_unique(before, linked)
    change_all(root / "t0")
    change_all(root / "t1")
    change_all(root / "merged")
    build(root / "new", TREE)
    after = identities(root)
    assert_unique(after, (*linked, ("new/l1", "new/l2")))
    assert {path: after[path] for path in before} == before
    stack.remount()
    assert identities(root) == after


def test_two_layers_with_the_same_numbers(make_stack: StackMaker, ground: Path, kind: str) -> None:
    """Two copies of one image: every inode number occurs twice below."""
    from tests.support.filesystems import file_system, run

    with file_system("ext4", ground, size="64M", name="-first") as first:
        build(first / "layer", TREE)
        for number in range(20):
            (first / "layer" / f"first-{number}").touch()
        os.sync()
        run("umount", str(first))
        image = ground / "fs-ext4-first.img"
        copy = ground / "copy.img"
        run("cp", "--sparse=always", str(image), str(copy))
        run("tune2fs", "-f", "-U", "random", str(copy))
        run("mount", "-o", "loop", str(image), str(first))
        second = ground / "second"
        second.mkdir()
        run("mount", "-o", "loop", str(copy), str(second))
        try:
            for number in range(20):
                os.rename(second / "layer" / f"first-{number}", second / "layer" / f"second-{number}")
            os.rename(second / "layer" / "d", second / "layer" / "d2")
            stack = make_stack(kind)
            stack.lowers = [first / "layer", second / "layer"]
            root = stack.mount()
            assert_unique(identities(root), (("l1", "l2"),))
            os.chmod(root / "second-3", 0o600)
            os.chmod(root / "first-3", 0o600)
            assert_unique(identities(root), (("l1", "l2"),))
            stack.umount()
        finally:
            run("umount", str(second))


def test_a_recycled_number_is_a_new_file(ours: Stack) -> None:
    """Upper hands the number of a removed file to the next one: an open descriptor must stay with the old file."""
    root = ours.mount()
    for _ in range(50):
        (root / "f").write_bytes(b"old")
        descriptor = os.open(root / "f", os.O_RDONLY)
        os.unlink(root / "f")
        (root / "g").write_bytes(b"new one")
        assert os.pread(descriptor, 10, 0) == b"old"
        assert (root / "g").read_bytes() == b"new one"
        os.close(descriptor)
        os.unlink(root / "g")


def test_readdir_numbers_without_lookups(stack: Stack) -> None:
    """getdents alone, on a fresh mount: the numbers are already those that stat will give."""
    build(stack.lower, {"d": {f"{number}": b"" for number in range(300)}})
    root = stack.mount()
    os.chmod(root / "d" / "7", 0o600)
    (root / "d" / "new").touch()
    stack.remount()
    with DirStream(root / "d") as stream:
        listed = {os.fsdecode(name): inode for name, inode, _ in stream}
    for name, inode in listed.items():
        if name not in (".", ".."):
            assert (root / "d" / name).stat().st_ino == inode


@pytest.mark.parametrize("xino", ["on", "auto", "off"])
def test_xino_options(stack: Stack, xino: str) -> None:
    build(stack.lower, TREE)
    root = stack.mount(f"xino={xino}")
    before = identities(root)
    change_all(root)
    assert identities(root) == before
