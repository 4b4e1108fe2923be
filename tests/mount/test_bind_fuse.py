"""Bind paths that the daemon serves (`--bind-mode fuse`). That they behave as POSIX says is in test_posix.py; here is what
is theirs alone: the host beside them, their borders, read-only ones, and few descriptors for many files."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import sqlite3
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import FileSystemMaker, StackMaker
from tests.mount.posix.table import fails
from tests.support import raw
from tests.support.layers import ACL_DEFAULT, ACL_GROUP_OBJ, ACL_MASK, ACL_OTHER, ACL_USER, ACL_USER_OBJ, acl, build
from tests.support.mounts import Stack
from tests.support.people import ALICE, BOB, STAFF, as_user
from tests.support.snapshot import snapshot


@pytest.fixture
def bound(make_stack: StackMaker) -> Stack:
    """A mounted union with the host directory `below` bound at `inside`."""
    stack = make_stack("bind")
    stack.mount()
    return stack


def mount_with(stack: Stack, *words: str) -> Path:
    """Mount a union with bind paths, each `SRC:DST[:ro]`."""
    return stack.mount(extra=["--bind-mode", "fuse", *(word for bind in words for word in ("-v", bind))])


def mount_with_descriptors(stack: Stack, count: int) -> None:
    """Mount; the daemon may have `count` descriptors."""
    stack.mount(under=["prlimit", f"--nofile={count}:{count}"])


def drop_caches() -> None:
    """Have the kernel forget every dentry and inode that is not in use."""
    Path("/proc/sys/vm/drop_caches").write_text("2\n")


# --- what the host does -----------------------------------------------------------------------------


def test_content_of_the_host_is_seen_at_once(bound: Stack) -> None:
    host, inside = bound.below / "f", bound.inside / "f"
    host.write_bytes(b"one")
    assert inside.read_bytes() == b"one"
    for content in (b"two", b"longer than before", b"x", b""):
        host.write_bytes(content)
        assert inside.read_bytes() == content
        assert inside.stat().st_size == len(content)


def test_an_open_file_shows_what_the_host_writes(bound: Stack) -> None:
    host = bound.below / "f"
    host.write_bytes(b"a" * 10_000)
    with open(bound.inside / "f", "rb", buffering=0) as file:
        assert file.read() == b"a" * 10_000
        for content in (b"b" * 10_000, b"c" * 20_000, b"d" * 5):
            with open(host, "r+b", buffering=0) as writer:
                writer.write(content)
                writer.truncate()
            assert os.pread(file.fileno(), 30_000, 0) == content
            assert os.fstat(file.fileno()).st_size == len(content)


def test_a_write_that_keeps_size_and_time_is_seen_by_the_next_open(bound: Stack) -> None:
    host, inside = bound.below / "f", bound.inside / "f"
    host.write_bytes(b"one")
    os.utime(host, (1, 1))
    assert inside.read_bytes() == b"one"
    host.write_bytes(b"two")
    os.utime(host, (1, 1))
    assert inside.read_bytes() == b"two"


def test_names_of_the_host_come_and_go_at_once(bound: Stack) -> None:
    host, inside = bound.below, bound.inside
    for _ in range(3):
        assert not (inside / "f").exists()
        assert os.listdir(inside) == []
        (host / "f").write_bytes(b"x")
        assert (inside / "f").read_bytes() == b"x"
        assert os.listdir(inside) == ["f"]
        (host / "f").rename(host / "g")
        assert not (inside / "f").exists()
        assert (inside / "g").read_bytes() == b"x"
        (host / "g").unlink()
        with fails(errno.ENOENT):
            (inside / "g").read_bytes()


def test_what_the_host_replaces_is_seen_at_once(bound: Stack) -> None:
    host, inside = bound.below, bound.inside
    (host / "f").write_bytes(b"file")
    assert (inside / "f").read_bytes() == b"file"
    (host / "new").write_bytes(b"new file")
    (host / "new").rename(host / "f")
    assert (inside / "f").read_bytes() == b"new file"
    assert (inside / "f").stat().st_ino == (host / "f").stat().st_ino
    (host / "f").unlink()
    (host / "f").mkdir()
    (host / "f/below").touch()
    assert os.listdir(inside / "f") == ["below"]
    shutil.rmtree(host / "f")
    for target in ("one", "two", "one"):
        os.symlink(target, host / "f")
        assert os.readlink(inside / "f") == target
        os.unlink(host / "f")


def test_attributes_of_the_host_are_seen_at_once(bound: Stack) -> None:
    host, inside = bound.below / "f", bound.inside / "f"
    host.touch()
    for mode in (0o600, 0o644, 0o755):
        host.chmod(mode)
        assert stat.S_IMODE(inside.stat().st_mode) == mode
    os.chown(host, ALICE, STAFF)
    assert (inside.stat().st_uid, inside.stat().st_gid) == (ALICE, STAFF)
    os.setxattr(host, "user.x", b"1")
    assert os.getxattr(inside, "user.x") == b"1"
    host.chmod(0o600)
    with fails(errno.EACCES):
        as_user(BOB, lambda: inside.read_bytes())
    os.chown(host, BOB, BOB)
    assert as_user(BOB, lambda: inside.read_bytes()) == b""
    os.link(host, bound.below / "g")
    assert inside.stat().st_nlink == 2


def test_an_open_file_shows_attributes_of_the_host_at_once(bound: Stack) -> None:
    """What a lookup said just before the open must not be kept, and nothing that is said while it is open."""
    host, inside = bound.below / "f", bound.inside / "f"
    host.write_bytes(b"")
    for size in range(1, 200):
        assert inside.stat().st_size == size - 1
        fd = os.open(inside, os.O_RDONLY)
        os.truncate(host, size)
        assert os.fstat(fd).st_size == size
        os.chmod(host, 0o600 + size % 8)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600 + size % 8 == stat.S_IMODE(inside.stat().st_mode)
        os.close(fd)


def test_cached_takes_a_second_at_most(make_stack: StackMaker) -> None:
    """With Docker's option `cached` the kernel keeps names and attributes, so it asks for less, and forgets in time."""
    stack = make_stack("union")
    host = stack.base / "host"
    host.mkdir()
    (host / "f").write_bytes(b"old")
    merged = mount_with(stack, f"{host}:/cached:cached", f"{host}:/consistent:consistent")
    cached, consistent = merged / "cached", merged / "consistent"
    assert (cached / "f").stat().st_size == (consistent / "f").stat().st_size == 3
    (host / "f").rename(host / "g")
    (host / "g").write_bytes(b"longer")
    assert not (consistent / "f").exists()
    assert (consistent / "g").stat().st_size == (cached / "g").stat().st_size == 6
    deadline = time.monotonic() + 10
    while (cached / "f").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # What is done inside is seen inside, at once.
    (cached / "new").write_bytes(b"1")
    with open(cached / "new", "ab") as file:
        file.write(b"23")
        file.flush()
        assert (cached / "new").stat().st_size == os.fstat(file.fileno()).st_size == 3
    (cached / "new").rename(cached / "newer")
    assert sorted(os.listdir(cached)) == ["g", "newer"]
    (cached / "newer").unlink()
    assert not (cached / "newer").exists()
    assert os.listdir(host) == ["g"]


def test_a_file_in_a_tight_loop(bound: Stack) -> None:
    """Content, size, mode, and who is at the name, each looked at right after the host's change, by path and descriptor."""
    host, inside = bound.below / "d/f", bound.inside / "d/f"
    host.parent.mkdir()
    for number in range(200):
        content = b"%d " % number * (number % 7 + 1)
        host.write_bytes(content)
        assert inside.read_bytes() == content
        with open(inside, "rb", buffering=0) as file:
            with open(host, "ab", buffering=0) as writer:
                writer.write(b"more")
            assert os.fstat(file.fileno()).st_size == inside.stat().st_size == len(content) + 4
            assert file.read() == content + b"more"
            host.chmod(0o600 | number % 8)
            assert (
                stat.S_IMODE(inside.stat().st_mode)
                == stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                == 0o600 | number % 8
            )
            (host.parent / "new").write_bytes(b"another %d" % number)
            (host.parent / "new").rename(host)
            assert inside.read_bytes() == b"another %d" % number
            assert file.read() == b""
            assert os.fstat(file.fileno()).st_nlink == 0
        host.unlink()
        assert not inside.exists()


def test_a_directory_in_a_tight_loop(bound: Stack) -> None:
    """Mode, names, and which directory is on the way, by path, descriptor and working directory."""
    host, inside = bound.below, bound.inside
    (host / "a/sub").mkdir(parents=True)
    before = os.getcwd()
    try:
        for number in range(200):
            os.chdir(inside / "a/sub")
            directory = os.open(inside / "a/sub", os.O_RDONLY)
            mode = 0o700 | number % 8
            (host / "a/sub").chmod(mode)
            for seen in (os.stat(inside / "a/sub"), os.stat("."), os.fstat(directory)):
                assert stat.S_IMODE(seen.st_mode) == mode
            (host / "a/sub/f").write_text(str(number))
            assert os.listdir(".") == os.listdir(directory) == os.listdir(inside / "a/sub") == ["f"]
            assert (inside / "a/sub/f").read_text() == Path("f").read_text() == str(number)
            (host / "a").rename(host / "b")
            assert not (inside / "a/sub/f").exists()
            assert (inside / "b/sub/f").read_text() == Path("f").read_text() == str(number)
            (host / "a/sub").mkdir(parents=True)
            (host / "a/sub/f").write_text("replaced")
            assert (inside / "a/sub/f").read_text() == "replaced"
            assert Path("f").read_text() == str(number)
            shutil.rmtree(host / "b")
            assert not Path("f").exists()
            (host / "a/sub/f").unlink()
            os.close(directory)
    finally:
        os.chdir(before)


def test_names_that_change_places(bound: Stack) -> None:
    """Hard links and exchanged names: each name shows what the host has there, and numbers agree."""
    host, inside = bound.below, bound.inside
    for name in ("one", "two"):
        (host / name).write_text(name)
    os.link(host / "one", host / "link")
    for _ in range(50):
        os.rename(host / "one", host / "third")
        os.rename(host / "two", host / "one")
        os.rename(host / "third", host / "two")
        for name in ("one", "two", "link"):
            assert (inside / name).read_text() == (host / name).read_text()
            assert os.stat(inside / name).st_ino == os.stat(host / name).st_ino


def test_a_name_that_is_a_point_elsewhere(make_stack: StackMaker) -> None:
    """Only where it is attached does a bind path cover a name."""
    stack = make_stack("union")
    for source in ("one", "two"):
        (stack.base / source / "deep").mkdir(parents=True)
        (stack.base / source / "deep/which").write_text(source)
    mnt = mount_with(stack, f"{stack.base}/one:/at", f"{stack.base}/two:/at/deep")
    (stack.base / "one/other/deep").mkdir(parents=True)
    for _ in range(3):
        assert os.listdir(mnt / "at/deep") == ["deep"]
        assert (mnt / "at/deep/deep/which").read_text() == "two"
        assert os.listdir(mnt / "at/other/deep") == []


def test_attributes_by_path(make_stack: StackMaker) -> None:
    """chmod, chown and times of what is not open: files, directories, symbolic links; on the host at once."""
    stack = make_stack("union")
    host = stack.base / "host"
    (host / "d").mkdir(parents=True)
    (host / "f").touch()
    os.symlink("nowhere", host / "s")
    mnt = mount_with(stack, f"{host}:/rw", f"{host}:/ro:ro")
    for name in ("d", "f", "s"):
        inside, below = mnt / "rw" / name, host / name
        os.chown(inside, ALICE, STAFF, follow_symlinks=False)
        os.utime(inside, ns=(1_000_000_001, 2_000_000_002), follow_symlinks=False)
        if name != "s":
            inside.chmod(0o751)
            assert stat.S_IMODE(below.stat().st_mode) == 0o751
        for seen in (inside.lstat(), below.lstat(), (mnt / "ro" / name).lstat()):
            assert (seen.st_uid, seen.st_gid) == (ALICE, STAFF)
            assert (seen.st_atime_ns, seen.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
        with fails(errno.EROFS):
            os.chown(mnt / "ro" / name, 0, 0, follow_symlinks=False)
    (mnt / "rw/f").chmod(0o6755)
    os.chown(mnt / "rw/f", BOB, -1)
    assert stat.S_IMODE((host / "f").stat().st_mode) == 0o755


def test_a_working_directory_follows_the_hosts_rename(bound: Stack) -> None:
    (bound.below / "a/b").mkdir(parents=True)
    directory = os.open(bound.inside / "a/b", os.O_RDONLY)
    try:
        (bound.below / "a").rename(bound.below / "c")
        (bound.below / "c/b/f").touch()
        assert os.listdir(directory) == ["f"]
        os.stat("f", dir_fd=directory)
        (bound.below / "c/b/f").unlink()
        (bound.below / "c/b").rmdir()
        assert os.listdir(directory) == []
        with fails(errno.ENOENT):
            os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
    finally:
        os.close(directory)


def test_the_host_sees_everything_at_once(bound: Stack) -> None:
    host, inside = bound.below, bound.inside
    (inside / "d/e").mkdir(parents=True)
    (inside / "d/f").write_bytes(b"text")
    os.symlink("f", inside / "d/l")
    os.mkfifo(inside / "d/p", 0o640)
    os.link(inside / "d/f", inside / "d/h")
    os.setxattr(inside / "d/f", "user.x", b"1")
    os.utime(inside / "d/f", (5, 6))
    assert snapshot(host) == snapshot(inside)
    assert sorted(os.listdir(host / "d")) == ["e", "f", "h", "l", "p"]
    (inside / "d").rename(inside / "D")
    (inside / "D/f").unlink()
    (inside / "D/e").rmdir()
    assert sorted(os.listdir(host / "D")) == ["h", "l", "p"]
    assert list(bound.up.iterdir()) == [bound.up / "bind"]
    assert list((bound.up / "bind").iterdir()) == []


def test_a_shared_mapping(bound: Stack) -> None:
    host = bound.below / "f"
    host.write_bytes(bytes(8192))
    with open(bound.inside / "f", "r+b", buffering=0) as file, mmap.mmap(file.fileno(), 8192) as mapped:
        mapped[:5] = b"inner"
        mapped.flush()
        assert host.read_bytes()[:5] == b"inner"
        with open(host, "r+b") as writer:
            writer.seek(4096)
            writer.write(b"outer")
        assert os.pread(file.fileno(), 5, 4096) == b"outer"
        assert mapped[4096:4101] == b"outer"


def test_a_mapping_of_a_file_that_appends(bound: Stack) -> None:
    """Its pages go where they belong, though its writes go to the end."""
    (bound.below / "f").write_bytes(b"." * 4096)
    descriptor = os.open(bound.inside / "f", os.O_RDWR | os.O_APPEND)
    try:
        with mmap.mmap(descriptor, 4096) as mapped:
            mapped[:1] = b"x"
            mapped.flush()
        os.write(descriptor, b"end")
    finally:
        os.close(descriptor)
    assert (bound.below / "f").read_bytes() == b"x" + b"." * 4095 + b"end"


# --- what is raw ------------------------------------------------------------------------------------


def test_nothing_is_taken_for_overlay_marks(bound: Stack) -> None:
    host, inside = bound.below, bound.inside
    os.mknod(host / "device", stat.S_IFCHR | 0o600, os.makedev(0, 0))
    (host / ".wh.file").touch()
    (host / "d").mkdir()
    for name in ("trusted.overlay.opaque", "user.overlay.opaque", "trusted.overlay.redirect"):
        os.setxattr(host / "d", name, b"y")
        assert os.getxattr(inside / "d", name) == b"y"
    assert sorted(os.listxattr(inside / "d")) == sorted(os.listxattr(host / "d"))
    assert stat.S_ISCHR((inside / "device").stat().st_mode)
    assert sorted(os.listdir(inside)) == [".wh.file", "d", "device"]
    os.mknod(inside / "other", stat.S_IFCHR | 0o600, os.makedev(0, 0))
    os.setxattr(inside / "d", "trusted.overlay.metacopy", b"z")
    assert os.getxattr(host / "d", "trusted.overlay.metacopy") == b"z"
    os.unlink(inside / "device")
    assert sorted(os.listdir(host)) == [".wh.file", "d", "other"]


def test_a_lowers_content_under_it_is_hidden(make_stack: StackMaker) -> None:
    stack = make_stack("bind")
    build(stack.lower, {"bind": {"below": b"hidden", "sub": {"f": b"hidden"}}})
    stack.mount()
    assert os.listdir(stack.inside) == []
    with fails(errno.ENOENT):
        (stack.inside / "below").read_bytes()
    (stack.inside / "sub").mkdir()
    assert os.listdir(stack.inside / "sub") == []
    assert (stack.lower / "bind/below").read_bytes() == b"hidden"


def test_the_parent_lists_it_once(bound: Stack) -> None:
    with raw.DirStream(bound.mnt) as stream:
        found = [entry for entry in stream if entry[0] == b"bind"]
    assert found == [(b"bind", bound.inside.stat().st_ino, stat.S_IFDIR >> 12)]
    assert bound.inside.stat().st_ino == bound.below.stat().st_ino
    with raw.DirStream(bound.inside) as stream:
        numbers = {name: ino for name, ino, _ in stream}
    assert numbers[b"."] == bound.inside.stat().st_ino
    assert numbers[b".."] == bound.mnt.stat().st_ino


def test_another_file_systems_numbers_are_no_loop(make_stack: StackMaker, on_file_system: FileSystemMaker) -> None:
    """On different devices the same inode numbers occur; find and rm take a directory in itself for a loop."""
    source = on_file_system("tmpfs")
    build(source, {"d": {"e": {"f": b"1"}}})
    stack = make_stack("union")
    mnt = mount_with(stack, f"{source}:/a")
    assert len({path.stat().st_ino for path in (mnt, *mnt.rglob("*"))}) == 5
    with raw.DirStream(mnt / "a/d") as stream:
        assert (b"e", (mnt / "a/d/e").stat().st_ino, stat.S_IFDIR >> 12) in list(stream)


def test_a_source_that_holds_the_mount_point(make_stack: StackMaker) -> None:
    """The way into itself is refused; to look there would wait for ever."""
    stack = make_stack("union")
    mnt = mount_with(stack, f"{stack.base}:/bind")
    assert "mnt" in os.listdir(mnt / "bind")
    with fails(errno.ELOOP):
        (mnt / "bind/mnt").stat()
    assert (mnt / "bind/upper/bind").is_dir()


# --- borders ----------------------------------------------------------------------------------------


def test_a_bind_point_is_busy(bound: Stack) -> None:
    mnt, inside = bound.mnt, bound.inside
    (mnt / "d").mkdir()
    (mnt / "f").touch()
    attempts: list[Callable[[], object]] = [
        lambda: os.rename(inside, mnt / "other"),
        lambda: os.rename(mnt / "d", inside),
        lambda: os.rename(inside, mnt / "d/x"),
        lambda: os.rmdir(inside),
        lambda: raw.renameat2(inside, mnt / "d", raw.RENAME_EXCHANGE),
        lambda: raw.renameat2(mnt / "d", inside, raw.RENAME_EXCHANGE),
    ]
    for attempt in attempts:
        with fails(errno.EBUSY):
            attempt()
    with fails(errno.EEXIST):
        os.mkdir(inside)
    with fails(errno.EISDIR):
        os.unlink(inside)
    with fails(errno.ENOTEMPTY, errno.EBUSY):
        shutil.rmtree(mnt)
    assert inside.is_dir()


def test_nothing_moves_across_the_border(make_stack: StackMaker) -> None:
    stack = make_stack("union")
    host = build(stack.base / "host", {"f": b"host", "d": {}})
    mnt = mount_with(stack, f"{host}:/a", f"{host}:/b")
    (mnt / "u").write_bytes(b"union")
    (mnt / "v").mkdir()
    before = snapshot(host)
    for source, target in (
        ("u", "a/u"),
        ("v", "a/v"),
        ("a/f", "f"),
        ("a/d", "d"),
        ("a/f", "b/g"),
        ("a/f", "b/f"),
        ("u", "b/f"),
        ("b/f", "u"),
    ):
        with fails(errno.EXDEV):
            os.rename(mnt / source, mnt / target)
    with fails(errno.EXDEV):
        raw.renameat2(mnt / "u", mnt / "a/f", raw.RENAME_EXCHANGE)
    for source, target in (("u", "a/u"), ("a/f", "f"), ("a/f", "b/g")):
        with fails(errno.EXDEV):
            os.link(mnt / source, mnt / target)
    assert snapshot(host) == before
    assert (mnt / "u").read_bytes() == b"union"
    assert subprocess.run(["mv", "u", "a/moved"], cwd=mnt, check=False).returncode == 0
    assert (host / "moved").read_bytes() == b"union"


def test_it_follows_its_ancestors(make_stack: StackMaker) -> None:
    stack = make_stack("union")
    host = build(stack.base / "host", {"f": b"host"})
    build(stack.lower, {"x": {"y": {"old": b""}}})
    mnt = mount_with(stack, f"{host}:/x/y/bind")
    (mnt / "x").rename(mnt / "z")
    assert (mnt / "z/y/bind/f").read_bytes() == b"host"
    (mnt / "z/y").rename(mnt / "w")
    assert (mnt / "w/bind/f").read_bytes() == b"host"
    with fails(errno.EBUSY):
        os.rmdir(mnt / "w/bind")
    assert not (mnt / "x").exists()


def test_one_in_another(make_stack: StackMaker) -> None:
    stack = make_stack("union")
    outer, inner = build(stack.base / "outer", {"f": b"outer", "in": {"hidden": b""}}), stack.base / "inner"
    build(inner, {"f": b"inner"})
    mnt = mount_with(stack, f"{outer}:/o", f"{inner}:/o/in", f"{inner}:/o/made/here:ro")
    assert (mnt / "o/in/f").read_bytes() == b"inner"
    assert sorted(os.listdir(mnt / "o")) == ["f", "in", "made"]
    assert os.listdir(mnt / "o/in") == ["f"]
    assert (outer / "made/here").is_dir()
    (mnt / "o/in/new").write_bytes(b"x")
    assert (inner / "new").read_bytes() == b"x"
    with fails(errno.EROFS):
        (mnt / "o/made/here/new").write_bytes(b"y")
    with fails(errno.EXDEV):
        os.rename(mnt / "o/f", mnt / "o/in/g")
    with fails(errno.EBUSY):
        os.rmdir(mnt / "o/in")
    (outer / "made").rename(outer / "moved")
    assert sorted(os.listdir(mnt / "o/moved/here")) == ["f", "new"]
    shutil.rmtree(outer / "in")  # a mount point lives as long as its mount
    assert sorted(os.listdir(mnt / "o")) == ["f", "in", "moved"]
    assert (mnt / "o/in/f").read_bytes() == b"inner"


def test_without_the_mounts_below(make_stack: StackMaker) -> None:
    stack = make_stack("union")
    host = stack.base / "host"
    (host / "sub").mkdir(parents=True)
    (host / "sub/covered").touch()
    raw.mount("tmpfs", host / "sub", "tmpfs")
    try:
        (host / "sub/mounted").touch()
        mnt = stack.mount(
            extra=[
                "--bind-mode",
                "fuse",
                "-v",
                f"{host}:/a",
                "--mount",
                f"type=bind,src={host},dst=/b,bind-nonrecursive",
            ]
        )
        assert os.listdir(mnt / "a/sub") == ["mounted"]
        for _ in range(2):
            assert os.listdir(mnt / "b/sub") == ["covered"]
            drop_caches()
        (mnt / "b/sub/new").touch()
        (mnt / "b/f").write_text("x")
        assert (host / "f").read_text() == "x"
    finally:
        raw.umount2(host / "sub", 0)
    assert sorted(os.listdir(host / "sub")) == ["covered", "new"]


def test_a_single_file(make_stack: StackMaker) -> None:
    stack = make_stack("union")
    host = stack.base / "config"
    host.write_bytes(b"host")
    build(stack.lower, {"etc": {"config": b"lower", "other": b"lower"}})
    mnt = mount_with(stack, f"{host}:/etc/config", f"{host}:/etc/new:ro")
    file = mnt / "etc/config"
    assert file.read_bytes() == b"host"
    assert file.stat().st_ino == host.stat().st_ino
    file.write_bytes(b"changed inside")
    assert host.read_bytes() == b"changed inside"
    assert (mnt / "etc/new").read_bytes() == b"changed inside"
    with fails(errno.EROFS):
        (mnt / "etc/new").write_bytes(b"no")
    with fails(errno.EBUSY):
        file.unlink()
    with fails(errno.EBUSY):
        os.rename(mnt / "etc/other", file)
    with fails(errno.EBUSY):
        os.rename(file, mnt / "etc/moved")
    with fails(errno.EXDEV):
        os.link(file, mnt / "etc/link")
    assert sorted(os.listdir(mnt / "etc")) == ["config", "new", "other"]
    host.write_bytes(b"changed outside")
    assert file.read_bytes() == b"changed outside"
    assert (stack.lower / "etc/config").read_bytes() == b"lower"


# --- read-only --------------------------------------------------------------------------------------


def changes(d: Path) -> dict[str, Callable[[], object]]:
    """Everything that would change something below a directory that has `f`, `d/` and the symbolic link `l`."""
    f = d / "f"
    return {
        "open for writing": lambda: os.open(f, os.O_WRONLY),
        "open for both": lambda: os.open(f, os.O_RDWR),
        "append": lambda: os.open(f, os.O_WRONLY | os.O_APPEND),
        "O_TRUNC": lambda: os.open(f, os.O_RDONLY | os.O_TRUNC),
        "create": lambda: os.open(d / "new", os.O_CREAT | os.O_WRONLY),
        "truncate": lambda: os.truncate(f, 0),
        "chmod": lambda: os.chmod(f, 0o600),
        "chmod of a directory": lambda: os.chmod(d, 0o700),
        "chown": lambda: os.chown(f, ALICE, ALICE),
        "chown of a link": lambda: os.lchown(d / "l", ALICE, ALICE),
        "utimens": lambda: os.utime(f, (1, 1)),
        "utimens now": lambda: os.utime(f),
        "setxattr": lambda: os.setxattr(f, "user.y", b"2"),
        "removexattr": lambda: os.removexattr(f, "user.x"),
        "set an ACL": lambda: os.setxattr(f, "system.posix_acl_access", SOME_ACL),
        "mkdir": lambda: os.mkdir(d / "new"),
        "mknod": lambda: os.mkfifo(d / "new"),
        "symlink": lambda: os.symlink("x", d / "new"),
        "link": lambda: os.link(f, d / "new"),
        "unlink": lambda: os.unlink(f),
        "rmdir": lambda: os.rmdir(d / "d"),
        "rename": lambda: os.rename(f, d / "new"),
        "rename over": lambda: os.rename(f, d / "l"),
        "exchange": lambda: raw.renameat2(f, d / "d", raw.RENAME_EXCHANGE),
    }


SOME_ACL = acl((ACL_USER_OBJ, 6), (ACL_USER, 7, ALICE), (ACL_GROUP_OBJ, 4), (ACL_MASK, 7), (ACL_OTHER, 4))


def test_read_only(make_stack: StackMaker) -> None:
    stack = make_stack("union")
    host = build(stack.base / "host", {"f": b"text", "d": {}})
    os.symlink("f", host / "l")
    os.setxattr(host / "f", "user.x", b"1")
    for name in ("f", "d", "."):
        os.utime(host / name, (1, 10**9))
    mnt = mount_with(stack, f"{host}:/ro:ro", f"{host}:/rw")
    before = snapshot(host)
    for name in ("f", "."):
        os.utime(host / name, (1, 10**9))  # what was read before it was last changed is due for a new access time
    times = [(os.stat(host / name).st_ctime_ns, os.stat(host / name).st_atime_ns) for name in ("f", "d", ".")]
    time.sleep(0.01)
    assert (mnt / "ro/f").read_bytes() == b"text"
    assert sorted(os.listdir(mnt / "ro")) == ["d", "f", "l"]
    descriptor = os.open(mnt / "ro/f", os.O_RDONLY)
    try:
        for name, change in {
            **changes(mnt / "ro"),
            "fchmod": lambda: os.fchmod(descriptor, 0o600),
            "fchown": lambda: os.fchown(descriptor, ALICE, ALICE),
            "futimens": lambda: os.utime(descriptor, (2, 2)),
            "fsetxattr": lambda: os.setxattr(descriptor, "user.z", b""),
            "set flags": lambda: raw.fallocate(descriptor, 0, 0, 100),
        }.items():
            with pytest.raises(OSError) as failed:  # noqa: PT011
                change()
            wanted = {errno.EROFS} if name != "set flags" else {errno.EBADF}
            assert failed.value.errno in wanted, f"{name}: {failed.value}"
        with pytest.raises((OSError, ValueError)):
            mmap.mmap(descriptor, 4, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_SHARED)
    finally:
        os.close(descriptor)
    assert [(os.stat(host / name).st_ctime_ns, os.stat(host / name).st_atime_ns) for name in ("f", "d", ".")] == times
    assert snapshot(host) == before
    (mnt / "rw/f").write_bytes(b"through the other")
    assert (mnt / "ro/f").read_bytes() == b"through the other"


def test_in_a_read_only_union(make_stack: StackMaker) -> None:
    """The bind path is writable, the union is not: with upper or without."""
    for name in ("with", "without"):
        stack = make_stack("union", name=name)
        host = build(stack.base / "host", {})
        for layer in (stack.lower, stack.up):
            build(layer, {"bind": {}, "f": b"text", "d": {}})
            os.symlink("f", layer / "l")
            os.setxattr(layer / "f", "user.x", b"1")
        before = snapshot(stack.up)
        if name == "without":
            stack.upper = None
        stack.mount("ro", extra=["--bind-mode", "fuse", "-v", f"{host}:/bind"])
        for what, change in changes(stack.mnt).items():
            with pytest.raises(OSError) as failed:  # noqa: PT011
                change()
            assert failed.value.errno == errno.EROFS, f"{what}: {failed.value}"
        with open(stack.mnt / "f", "rb") as file, fails(errno.EROFS):
            fcntl.ioctl(file, raw.FS_IOC_SETFLAGS, struct.pack("Q", 0x80))  # FS_NOATIME_FL
        (stack.mnt / "bind/f").write_bytes(b"new")
        assert (host / "f").read_bytes() == b"new"
        assert snapshot(stack.base / "upper") == before


# --- others' files ----------------------------------------------------------------------------------


def test_new_objects_belong_to_who_made_them(bound: Stack) -> None:
    host, inside = bound.below, bound.inside
    host.chmod(0o777)

    def make() -> None:
        os.umask(0o027)
        (inside / "d").mkdir()
        (inside / "d/f").touch()
        os.symlink("f", inside / "d/l")
        os.mkfifo(inside / "d/p")

    as_user(ALICE, make)
    for name, mode in (("d", 0o750), ("d/f", 0o640), ("d/l", 0o777), ("d/p", 0o640)):
        found = os.lstat(host / name)
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (ALICE, ALICE, mode), name


def test_a_directory_of_a_group(bound: Stack) -> None:
    """Writable for a supplementary group only; set-group-id hands the group on."""
    host, inside = bound.below / "shared", bound.inside / "shared"
    host.mkdir()
    os.chown(host, BOB, STAFF)
    host.chmod(0o2770)

    def make() -> None:
        (inside / "f").touch()
        (inside / "d").mkdir()

    with fails(errno.EACCES):
        as_user(ALICE, make)
    as_user(ALICE, make, groups=(STAFF,))
    assert [(host / name).stat().st_gid for name in ("f", "d")] == [STAFF, STAFF]
    assert (host / "d").stat().st_uid == ALICE
    assert (host / "d").stat().st_mode & stat.S_ISGID


def test_default_acls_of_the_host_are_inherited(bound: Stack) -> None:
    bound.below.chmod(0o777)
    os.setxattr(bound.below, ACL_DEFAULT, SOME_ACL)
    on_host, in_bind = bound.below / "host", bound.inside / "bind"

    def make(path: Path) -> None:
        os.umask(0o077)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o664))
        path.with_suffix(".d").mkdir(0o775)

    as_user(ALICE, lambda: make(on_host))
    as_user(ALICE, lambda: make(in_bind))
    for suffix in ("", ".d"):
        one, other = (bound.below / f"{name}{suffix}" for name in ("host", "bind"))
        assert (one.stat().st_mode, one.stat().st_uid) == (other.stat().st_mode, other.stat().st_uid)
        names = os.listxattr(one)
        assert names == os.listxattr(other)
        assert [os.getxattr(one, name) for name in names] == [os.getxattr(other, name) for name in names]


# --- many, and lost ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault_seconds(240)
def test_many_files_with_few_descriptors(make_stack: StackMaker) -> None:
    stack = make_stack("bind")
    for directory in range(20):
        build(stack.below / f"d{directory}", {f"f{number}": b"%d" % number for number in range(1000)})
    mount_with_descriptors(stack, 256)
    inside = stack.inside
    held = [os.open(inside / f"d{number}/f1", os.O_RDONLY) for number in range(20)]
    try:
        assert sum(1 for path in inside.rglob("f*") if path.is_file()) == 20_000
        assert len(os.listdir(f"/proc/{stack.daemon()}/fd")) < 200
        (stack.below / "d3").rename(stack.below / "moved")
        for number in (0, 500, 999):
            assert (inside / f"moved/f{number}").read_bytes() == b"%d" % number
            assert (inside / f"d7/f{number}").read_bytes() == b"%d" % number
        assert [os.read(descriptor, 9) for descriptor in held] == [b"1"] * 20
        assert all(os.fstat(descriptor).st_nlink == 1 for descriptor in held)
    finally:
        for descriptor in held:
            os.close(descriptor)
    shutil.rmtree(inside / "moved")
    assert not (stack.below / "moved").exists()


def test_a_number_used_again_is_another_file(make_stack: StackMaker) -> None:
    """ext4 gives a removed inode's number to the next new one."""
    stack = make_stack("bind")
    mount_with_descriptors(stack, 128)
    host, inside = stack.below, stack.inside
    for round_ in range(3):
        (host / "victim").write_bytes(b"old")
        os.symlink(f"target{round_}", host / "link")
        assert (inside / "victim").read_bytes() == b"old"
        assert os.readlink(inside / "link") == f"target{round_}"
        build(host / "many", {f"f{number}": b"" for number in range(300)})
        assert all((inside / f"many/f{number}").exists() for number in range(300))
        (host / "victim").unlink()
        (host / "link").unlink()
        shutil.rmtree(host / "many")


def test_files_made_inside_with_few_descriptors(make_stack: StackMaker) -> None:
    """Made, opened again, moved by the host, removed: the next round's files get the same numbers on ext4."""
    stack = make_stack("bind")
    mount_with_descriptors(stack, 128)
    host, inside = stack.below, stack.inside
    for round_ in range(3):
        names = [f"f{round_}.{number}" for number in range(200)]
        for name in names:
            (inside / name).write_text(name)
        for name in names:
            with open(inside / name, "a+b", buffering=0) as again, open(inside / name, "rb") as reader:
                again.write(b" more")
                assert reader.read() == f"{name} more".encode()
        assert [(host / name).read_text() for name in names] == [f"{name} more" for name in names]
        with os.scandir(inside) as listing:
            listed = {entry.name: entry.inode() for entry in listing}
        assert listed == {name: (inside / name).stat().st_ino for name in names}
        assert len(set(listed.values())) == len(names)
        for name in names[::2]:
            (host / name).rename(host / f"{name}.moved")
        for name in names:
            assert (inside / name).exists() == (name not in names[::2])
            (inside / (name if name not in names[::2] else f"{name}.moved")).unlink()
        assert os.listdir(host) == []


def test_modes_of_files_that_the_daemons_own_user_makes(bound: Stack) -> None:
    host, inside = bound.below, bound.inside

    def modes(directory: Path) -> list[tuple[int, list[str]]]:
        found = []
        for umask, mode in ((0o022, 0o666), (0o077, 0o777), (0, 0o1777), (0o027, 0o6755)):
            before = os.umask(umask)
            os.close(os.open(directory / "f", os.O_CREAT | os.O_EXCL | os.O_RDWR, mode))
            os.umask(before)
            found.append(((directory / "f").stat().st_mode, os.listxattr(directory / "f")))
            (directory / "f").unlink()
        return found

    (host / "plain").mkdir()
    (host / "acl").mkdir()
    os.setxattr(host / "acl", ACL_DEFAULT, SOME_ACL)
    for directory in ("plain", "acl"):
        assert modes(inside / directory) == modes(host / directory)


def test_a_file_that_the_host_makes_first(bound: Stack) -> None:
    """Between the kernel's lookup and its CREATE: with O_EXCL it exists, without it is opened and keeps its content."""
    host, inside = bound.below / "f", bound.inside / "f"
    stop = threading.Event()

    def appear_and_go() -> None:
        while not stop.is_set():
            host.write_bytes(b"host")
            host.unlink(missing_ok=True)

    other = threading.Thread(target=appear_and_go)
    other.start()
    seen = set()
    try:
        for _ in range(2000):
            try:
                with open(os.open(inside, os.O_CREAT | os.O_RDWR, 0o600), "rb") as file:
                    seen.add(file.read())
            except OSError as exc:
                assert exc.errno in (errno.ESTALE, errno.ENOENT)
    finally:
        stop.set()
        other.join()
    assert seen <= {b"", b"host"}


def test_open_files_without_names(bound: Stack) -> None:
    host, inside = bound.below, bound.inside
    for name in ("a", "b"):
        (host / name).write_bytes(b"text")
    with open(inside / "a", "r+b", buffering=0) as one, open(inside / "b", "r+b", buffering=0) as two:
        (inside / "a").unlink()
        (host / "b").unlink()
        drop_caches()
        assert os.listdir(inside) == []
        for file in (one, two):
            assert file.read() == b"text"
            file.write(b" and more")
            os.ftruncate(file.fileno(), 8)
            os.fchmod(file.fileno(), 0o600)
            found = os.fstat(file.fileno())
            assert (found.st_nlink, found.st_size, stat.S_IMODE(found.st_mode)) == (0, 8, 0o600)
            assert os.pread(file.fileno(), 20, 0) == b"text and"
        (inside / "a").write_bytes(b"another")
        assert os.pread(one.fileno(), 20, 0) == b"text and"


def test_hard_links(bound: Stack) -> None:
    host, inside = bound.below, bound.inside
    (host / "d").mkdir()
    (host / "a").write_bytes(b"1")
    os.link(host / "a", host / "d/b")
    assert (inside / "a").stat() == (inside / "d/b").stat()
    (inside / "a").write_bytes(b"22")
    assert (inside / "d/b").read_bytes() == b"22"
    os.link(inside / "d/b", inside / "c")
    assert (host / "c").stat().st_nlink == (inside / "a").stat().st_nlink == 3
    (host / "a").unlink()
    assert (inside / "c").stat().st_nlink == 2
    (inside / "d/b").unlink()
    assert (inside / "c").read_bytes() == b"22"
    assert (host / "c").stat().st_nlink == 1


def test_caches_dropped_in_the_middle(bound: Stack) -> None:
    host, inside = bound.below, bound.inside
    done = threading.Event()

    def drop() -> None:
        while not done.wait(0.1):
            drop_caches()

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        for round_ in range(10):
            build(inside / f"r{round_}", {f"d{a}": {f"f{b}": b"%d" % b for b in range(10)} for a in range(10)})
            (inside / f"r{round_}").rename(inside / f"R{round_}")
            for path in (inside / f"R{round_}").rglob("f*"):
                path.rename(path.with_name(path.name + "x"))
                path.with_name(path.name + "x").chmod(0o600)
            if round_ % 2:
                shutil.rmtree(inside / f"R{round_}")
    finally:
        done.set()
        thread.join()
    assert snapshot(host) == snapshot(inside)
    assert len(list(host.rglob("f*x"))) == 500


def test_positions_in_a_listing(bound: Stack) -> None:
    build(bound.below, {f"file{number:04}": b"" for number in range(2000)})
    with raw.DirStream(bound.inside) as stream:
        seen: dict[int, bytes] = {}
        position = stream.tell()
        while entry := stream.read():
            seen[position] = entry[0]
            position = stream.tell()
        assert len(set(seen.values())) == 2002
        for position in list(seen)[::97]:
            stream.seek(position)
            found = stream.read()
            assert found is not None
            assert found[0] == seen[position]
        (bound.below / "new").touch()
        stream.rewind()
        assert b"new" in [name for name, _, _ in stream]


# --- programs ---------------------------------------------------------------------------------------


def test_appending_from_two_mounts_and_the_host(make_stack: StackMaker) -> None:
    """Every line of every writer is there, whole."""
    first, second = make_stack("bind", name="one"), make_stack("union", name="two")
    first.mount()
    mount_with(second, f"{first.below}:/bind")
    places = {"host": first.below, "one": first.inside, "two": second.mnt / "bind"}
    script = 'i=0; while [ $i -lt 300 ]; do echo "$1 $i" >&3; i=$((i+1)); done 3>>"$2"'
    writers = [subprocess.Popen(["sh", "-c", script, "sh", who, str(place / "log")]) for who, place in places.items()]
    for number in range(100):
        for who, place in places.items():
            (place / f"{who}{number}").write_text(who)
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    for place in places.values():
        lines = (place / "log").read_text().splitlines()
        assert sorted(lines) == sorted(f"{who} {number}" for who in places for number in range(300))
        assert len(os.listdir(place)) == 301
    assert snapshot(first.inside) == snapshot(second.mnt / "bind") == snapshot(first.below)


def test_sqlite_with_a_write_ahead_log(bound: Stack) -> None:
    """Two connections inside at once share the log's index by a mapping; the host has its turn between them."""

    def connect(place: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(place / "db", timeout=30, isolation_level=None)
        connection.execute("pragma journal_mode=wal")
        return connection

    for round_ in range(3):
        one, two = connect(bound.inside), connect(bound.inside)
        one.execute("create table if not exists t (x)")
        for number in range(50):
            (one, two)[number % 2].execute("insert into t values (?)", (number,))
            assert two.execute("select count(*) from t").fetchone()[0] == round_ * 60 + number + 1
        one.close()
        two.close()
        host = connect(bound.below)
        assert host.execute("pragma integrity_check").fetchone() == ("ok",)
        host.executemany("insert into t values (?)", [(number,) for number in range(10)])
        host.close()
        inside = connect(bound.inside)
        assert inside.execute("select count(*) from t").fetchone()[0] == (round_ + 1) * 60
        inside.close()


def test_git(bound: Stack) -> None:
    def git(*words: str, cwd: Path) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "safe.directory=*")
        done = subprocess.run(["git", *identity, *words], cwd=cwd, check=True, capture_output=True, text=True)
        return done.stdout

    source = bound.inside / "source"
    build(source, {f"d{a}": {f"f{b}": b"%d %d\n" % (a, b) * 50 for b in range(20)} for a in range(5)})
    git("init", "-q", cwd=source)
    git("add", ".", cwd=source)
    git("commit", "-qm", "one", cwd=source)
    git("clone", "-q", "source", "clone", cwd=bound.inside)
    (bound.below / "clone/d1/f1").write_text("changed by the host\n")
    assert git("status", "--porcelain", cwd=bound.inside / "clone") == " M d1/f1\n"
    git("commit", "-qam", "two", cwd=bound.below / "clone")
    git("gc", "-q", cwd=bound.inside / "clone")
    assert git("status", "--porcelain", cwd=bound.inside / "clone") == ""
    git("fsck", "--strict", cwd=bound.below / "clone")
    assert git("log", "--format=%s", cwd=bound.inside / "clone") == "two\none\n"


def test_running_a_program_and_changing_it(bound: Stack) -> None:
    program = bound.inside / "true"
    shutil.copy2("/bin/true", bound.below / "true")
    subprocess.run([program], check=True)
    shutil.copy2("/bin/false", bound.below / "true")
    assert subprocess.run([program], check=False).returncode == 1
    shutil.copy2("/bin/true", program)
    subprocess.run([program], check=True)


def test_what_was_written_is_there_after_a_killed_daemon(bound: Stack) -> None:
    (bound.inside / "f").write_bytes(b"text")
    os.kill(bound.daemon(), 9)
    time.sleep(0.2)
    raw.umount2(bound.mnt, raw.MNT_DETACH)
    bound.mounted = False
    assert (bound.below / "f").read_bytes() == b"text"
