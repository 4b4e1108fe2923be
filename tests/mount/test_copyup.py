"""Copy-up: what a first change of a lower file or directory leaves in upper, and when data is copied at all."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.posix.table import fails
from tests.support import layers
from tests.support.layers import FIFO, File, Node, Symlink, acl, build, capability, mark
from tests.support.mounts import Stack
from tests.support.people import ALICE, as_user
from tests.support.snapshot import assert_same, snapshot

BIG = os.urandom(1 << 20) * 3 + b"odd tail"
ACL = acl(
    (layers.ACL_USER_OBJ, 6),
    (layers.ACL_USER, 4, 12345),
    (layers.ACL_GROUP_OBJ, 4),
    (layers.ACL_MASK, 6),
    (layers.ACL_OTHER, 0),
)
StackMaker = Callable[..., Stack]


def rich_file(content: bytes = BIG) -> File:
    """A file with everything that must survive its copying."""
    xattrs = {"user.a": b"1", "trusted.b": b"2", "security.c": b"3", layers.ACL_ACCESS: ACL}
    return File(content, 0o660, 1234, 5678, {**xattrs, "security.capability": capability()}, 10**18 + 7)


def only_in_upper(stack: Stack) -> list[str]:
    """All paths in upper, for seeing that nothing else was copied."""
    found = [os.path.join(base, name) for base, dirs, files in os.walk(stack.up) for name in dirs + files]
    return sorted(os.path.relpath(path, stack.up) for path in found)


def test_reading_copies_nothing(stack: Stack) -> None:
    build(stack.lower, {"d": {"f": b"x", "s": Symlink("f")}, "g": b""})
    root = stack.mount()
    snapshot(root)
    os.close(os.open(root / "d" / "f", os.O_RDONLY))
    assert os.access(root / "d" / "f", os.W_OK)
    stack.umount()
    assert only_in_upper(stack) == []


@pytest.mark.parametrize("metacopy", ["on", "off"])
@pytest.mark.parametrize("change", ["append", "middle", "past the end", "shrink", "grow", "chmod", "chown", "xattr"])
def test_every_byte_and_attribute_survives(stack: Stack, change: str, metacopy: str) -> None:
    build(stack.lower, {"f": rich_file()})
    before = os.stat(stack.lower / "f")
    root = stack.mount(f"metacopy={metacopy}")
    path = root / "f"
    expected = bytearray(BIG)
    match change:
        case "append":
            with open(path, "ab") as stream:
                stream.write(b"tail")
            expected += b"tail"
        case "middle":
            with open(path, "r+b") as stream:
                stream.seek(1_000_001)
                stream.write(b"middle")
            expected[1_000_001:1_000_007] = b"middle"
        case "past the end":
            with open(path, "r+b") as stream:
                stream.seek(len(BIG) + 99_999)
                stream.write(b"far")
            expected += bytes(99_999) + b"far"
        case "shrink":
            os.truncate(path, 1_234_567)
            del expected[1_234_567:]
        case "grow":
            os.truncate(path, len(BIG) + 5000)
            expected += bytes(5000)
        case "chmod":
            os.chmod(path, 0o640)
        case "chown":
            os.chown(path, 4321, -1)
        case "xattr":
            os.setxattr(path, "user.new", b"n")
    for _ in range(2):
        assert path.read_bytes() == expected
        status = path.stat()
        assert status.st_uid == (4321 if change == "chown" else 1234)
        assert status.st_gid == 5678
        assert stat.S_IMODE(status.st_mode) == (0o640 if change == "chmod" else 0o660)
        if change in {"chmod", "chown", "xattr"}:
            assert status.st_mtime_ns == before.st_mtime_ns
            assert status.st_atime_ns >= before.st_atime_ns
        assert os.getxattr(path, "user.a") == b"1"
        assert os.getxattr(path, "trusted.b") == b"2"
        assert os.getxattr(path, "security.c") == b"3"
        if change != "chmod":
            assert os.getxattr(path, layers.ACL_ACCESS) == ACL
        keeps = change in {"chmod", "xattr"}
        assert ("security.capability" in os.listxattr(path)) is keeps
        stack.remount(f"metacopy={metacopy}")
    assert (stack.lower / "f").read_bytes() == BIG


def test_open_for_truncation_copies_no_data(stack: Stack) -> None:
    build(stack.lower, {"big": b"", "f": rich_file(b"old")})
    with open(stack.lower / "big", "wb") as stream:
        stream.truncate(1 << 40)
    root = stack.mount()
    with open(root / "big", "wb") as stream:
        stream.write(b"new")
    with open(root / "f", "wb") as stream:
        stream.write(b"new")
    assert (root / "big").read_bytes() == b"new"
    assert os.getxattr(root / "f", "user.a") == b"1"
    assert (root / "f").stat().st_uid == 1234
    stack.umount()
    assert (stack.up / "big").stat().st_size == 3


def test_truncation_copies_only_what_stays(ours: Stack) -> None:
    """A truncate of a terabyte (of a hole here) to ten bytes ends at once, whatever the file system's size."""
    with open(ours.lower / "f", "wb") as stream:
        stream.write(b"0123456789abc")
        stream.truncate(1 << 40)
    root = ours.mount()
    os.truncate(root / "f", 10)
    assert (root / "f").read_bytes() == b"0123456789"


@pytest.mark.parametrize("kind_of_fs", ["ext4", "btrfs", "tmpfs"])
def test_holes_are_kept(
    make_stack: StackMaker, on_file_system: Callable[[str], Path], kind_of_fs: str, kind: str
) -> None:
    stack = make_stack(kind, base=on_file_system(kind_of_fs))
    piece = os.urandom(1 << 16)
    with open(stack.lower / "f", "wb") as stream:
        for offset in (0, 10 << 20, 77 << 20):
            stream.seek(offset)
            stream.write(piece)
        stream.truncate(500 << 20)
    root = stack.mount()
    with open(root / "f", "r+b") as stream:
        stream.seek(100 << 20)
        stream.write(b"x")
    stack.umount()
    status = (stack.up / "f").stat()
    assert status.st_size == 500 << 20
    assert status.st_blocks * 512 < 8 << 20
    with open(stack.up / "f", "rb") as stream:
        for offset in (0, 10 << 20, 77 << 20):
            stream.seek(offset)
            assert stream.read(1 << 16) == piece
            assert stream.read(10) == bytes(10)
        stream.seek(100 << 20)
        assert stream.read(2) == b"x\0"


def test_parents_come_first_with_all_they_have(stack: Stack) -> None:
    build(stack.lower, {"a": {"b": {"c": {"f": b"x"}}}, "other": {"g": b""}})
    for number, name in enumerate(("a", "a/b", "a/b/c")):
        path = stack.lower / name
        os.chown(path, 100 + number, 200 + number)
        os.chmod(path, 0o2750 + number)
        os.setxattr(path, "user.level", str(number).encode())
        os.setxattr(path, layers.ACL_DEFAULT, ACL)
        os.utime(path, ns=(10**18, 10**18 + number))
    lower = {name: os.stat(stack.lower / name) for name in ("a", "a/b", "a/b/c")}
    root = stack.mount()
    os.chmod(root / "a/b/c/f", 0o600)
    stack.umount()
    assert only_in_upper(stack) == ["a", "a/b", "a/b/c", "a/b/c/f"]
    for number, name in enumerate(("a", "a/b", "a/b/c")):
        status, was = os.stat(stack.up / name), lower[name]
        assert (status.st_uid, status.st_gid, status.st_mode) == (was.st_uid, was.st_gid, was.st_mode)
        assert os.getxattr(stack.up / name, "user.level") == str(number).encode()
        assert os.getxattr(stack.up / name, layers.ACL_DEFAULT) == ACL
        if name != "a/b/c":
            assert status.st_mtime_ns == was.st_mtime_ns
        assert mark(stack.up / name, "origin")
        assert mark(stack.up / name, "opaque") is None


def test_copied_into_a_directory_with_default_acl(stack: Stack) -> None:
    """A copy is not a new file: neither the parent's default ACL nor its setgid bit nor umask touch it."""
    build(stack.lower, {"d": {"f": File(b"x", 0o644, 5, 6), "sub": {}, "s": Symlink("x")}})
    os.setxattr(stack.lower / "d", layers.ACL_DEFAULT, ACL)
    os.chown(stack.lower / "d", -1, 999)
    os.chmod(stack.lower / "d", 0o2777)
    root = stack.mount()
    old = os.umask(0o077)
    try:
        with open(root / "d" / "f", "ab") as stream:
            stream.write(b"y")
        os.chmod(root / "d" / "sub", 0o755)
        os.lchown(root / "d" / "s", 1, 2)
    finally:
        os.umask(old)
    status = (root / "d" / "f").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o644, 5, 6)
    assert os.listxattr(root / "d" / "f") == []
    assert (root / "d" / "sub").stat().st_gid == 0
    assert os.listxattr(root / "d" / "sub") == []


@pytest.mark.parametrize("used_before", [False, True], ids=["new", "used before"])
def test_nothing_is_inherited_from_the_work_directory(stack: Stack, used_before: bool) -> None:
    """Where the work directory has a default ACL and a setgid bit, from the directory it lies in."""
    tree: layers.Tree = {
        "f": File(b"x", 0o640),
        "big": File(BIG, 0o640),
        "sub": {"g": b""},
        "s": Symlink("x"),
        "r": b"",
    }
    build(stack.lower, {"d": tree})
    os.chmod(stack.lower / "d", 0o777)
    os.setxattr(stack.work, layers.ACL_DEFAULT, ACL)
    os.chown(stack.work, -1, 999)
    os.chmod(stack.work, 0o2755)
    if used_before:
        (stack.work / "work").mkdir()
        assert os.listxattr(stack.work / "work")
    d = stack.mount() / "d"
    with open(d / "f", "ab") as stream:
        stream.write(b"y")
    os.chmod(d / "big", 0o660)
    os.chmod(d / "sub", 0o775)
    os.lchown(d / "s", 1, 2)
    os.unlink(d / "r")
    os.mkdir(d / "r", 0o755)
    as_user(ALICE, lambda: ((d / "hers").write_bytes(b""), (d / "her sub").mkdir(), os.mkfifo(d / "her fifo")))
    for path in [Path(base) / name for base, dirs, files in os.walk(stack.up) for name in dirs + files]:
        names = [name for name in os.listxattr(path, follow_symlinks=False) if "posix_acl" in name]
        assert names == [], path
        assert not path.lstat().st_mode & stat.S_ISGID, path
    modes = {name: oct(stat.S_IMODE((d / name).stat().st_mode)) for name in ("f", "big", "sub", "r", "hers", "her sub")}
    assert modes == {"f": "0o640", "big": "0o660", "sub": "0o775", "r": "0o755", "hers": "0o644", "her sub": "0o755"}
    assert {(d / name).stat().st_gid for name in ("f", "sub", "r")} == {0}
    assert (d / "hers").stat().st_gid == ALICE


def test_special_files(stack: Stack) -> None:
    build(
        stack.lower,
        {
            "link": Symlink("over/there"),
            "fifo": FIFO,
            "char": Node(stat.S_IFCHR | 0o640, os.makedev(1, 3)),
            "block": Node(stat.S_IFBLK | 0o640, os.makedev(7, 70)),
        },
    )
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(stack.lower)
        server.bind("socket")
        os.chdir(here)
    for name in ("link", "fifo", "char", "block", "socket"):
        os.lchown(stack.lower / name, 11, 22)
        os.setxattr(stack.lower / name, "trusted.mark", name.encode(), follow_symlinks=False)
        os.utime(stack.lower / name, ns=(10**18, 10**18 + 3), follow_symlinks=False)
    want = snapshot(stack.lower)
    root = stack.mount()
    for name in ("link", "fifo", "char", "block", "socket"):
        os.lchown(root / name, 12, -1)
        os.lchown(root / name, 11, -1)
    assert_same(want, snapshot(root))
    stack.umount()
    assert only_in_upper(stack) == ["block", "char", "fifo", "link", "socket"]
    assert_same(want, snapshot(stack.up, hide=("trusted.overlay.",)))


def test_a_read_only_file_is_copied_for_its_metadata(stack: Stack) -> None:
    build(stack.lower, {"f": File(b"x" * 5000, 0o000, 5, 5)})
    root = stack.mount()
    os.utime(root / "f", (1, 1))
    with open(root / "f", "ab") as stream:
        stream.write(b"y")
    assert (root / "f").read_bytes() == b"x" * 5000 + b"y"
    assert stat.S_IMODE((root / "f").stat().st_mode) == 0


def test_each_change_that_copies_a_directory_up(stack: Stack) -> None:
    build(stack.lower, {name: {"f": b""} for name in ("chmod", "chown", "utime", "xattr", "create", "unlink", "mkdir")})
    root = stack.mount()
    os.chmod(root / "chmod", 0o700)
    os.chown(root / "chown", 1, 1)
    os.utime(root / "utime", (5, 5))
    os.setxattr(root / "xattr", "user.x", b"1")
    (root / "create" / "g").touch()
    os.unlink(root / "unlink" / "f")
    (root / "mkdir" / "d").mkdir()
    stack.umount()
    assert only_in_upper(stack) == sorted(
        ["chmod", "chown", "utime", "xattr", "create", "create/g", "unlink", "unlink/f", "mkdir", "mkdir/d"]
    )


def test_failed_changes_copy_nothing_visible(stack: Stack) -> None:
    build(stack.lower, {"f": b"x", "d": {"g": b""}})
    root = stack.mount()
    with fails(errno.ENOTEMPTY):
        os.rmdir(root / "d")
    with fails(errno.ENODATA):
        os.removexattr(root / "f", "user.none")
    with fails(errno.EEXIST):
        os.mkdir(root / "d")
    stack.umount()
    assert "f" not in only_in_upper(stack) or not mark(stack.up / "f", "metacopy")


def test_work_is_empty_after_all(stack: Stack) -> None:
    build(stack.lower, {"f": BIG, "d": {"g": b""}, "s": Symlink("x")})
    root = stack.mount()
    with open(root / "f", "ab") as stream:
        stream.write(b"x")
    os.rename(root / "d", root / "e")
    os.unlink(root / "s")
    (root / "s").mkdir()
    stack.umount()
    assert os.listdir(stack.work / "work") == []


def test_copy_up_when_the_disk_is_full(make_stack: StackMaker, kind: str, ground: Path, session_ground: Path) -> None:
    """ENOSPC, the lower's content still there, no partial file in upper, and room again once there is some."""
    from tests.support.filesystems import file_system

    with file_system("tmpfs", ground, size="4M") as small:
        stack = make_stack(kind)
        build(stack.lower, {"f": os.urandom(8 << 20), "g": b"small"})
        stack.upper = small / "upper"
        stack.work = small / "work"
        stack.up.mkdir()
        stack.work.mkdir()
        root = stack.mount()
        with fails(errno.ENOSPC):
            os.close(os.open(root / "f", os.O_RDWR))
        assert (root / "f").stat().st_size == 8 << 20
        assert (root / "f").read_bytes() == (stack.lower / "f").read_bytes()
        with open(root / "g", "ab") as stream:
            stream.write(b"!")
        assert (root / "g").read_bytes() == b"small!"
        stack.umount()
        assert not (stack.up / "f").exists() or mark(stack.up / "f", "metacopy") is not None
        assert os.listdir(stack.work / "work") == []


def test_reflink_on_xfs(make_stack: StackMaker, on_file_system: Callable[[str], Path], kind: str) -> None:
    """Lower and upper on one reflinking file system: the copy takes no room."""
    base = on_file_system("xfs")
    stack = make_stack(kind, base=base)
    (stack.lower / "f").write_bytes(os.urandom(64 << 20))
    root = stack.mount()
    os.sync()
    before = os.statvfs(base).f_bfree
    with open(root / "f", "r+b") as stream:
        stream.write(b"x")
    stack.umount()
    os.sync()
    used = (before - os.statvfs(base).f_bfree) * os.statvfs(base).f_frsize
    assert used < 16 << 20
    assert (stack.up / "f").stat().st_size == 64 << 20
    with open(stack.up / "f", "rb") as up, open(stack.lower / "f", "rb") as low:
        up.read(1), low.read(1)
        assert up.read() == low.read()


def test_mmap_write_after_copy_up_reaches_upper(stack: Stack) -> None:
    import mmap

    build(stack.lower, {"f": b"a" * 10000})
    root = stack.mount()
    descriptor = os.open(root / "f", os.O_RDWR)
    with mmap.mmap(descriptor, 0) as view:
        view[5000:5003] = b"map"
    os.close(descriptor)
    stack.umount()
    assert (stack.up / "f").read_bytes() == b"a" * 5000 + b"map" + b"a" * 4997


def test_lower_is_never_written(stack: Stack) -> None:
    build(stack.lower, {"f": BIG, "d": {"g": b"x", "s": Symlink("g")}, "h": b""})
    before = snapshot(stack.lower)
    root = stack.mount()
    reader = os.open(root / "f", os.O_RDONLY)
    with open(root / "f", "r+b") as stream:
        stream.write(b"changed")
        os.fchmod(reader, 0o600)
        os.utime(reader, (1, 1))
    os.close(reader)
    os.rename(root / "d", root / "d2")
    (root / "d2" / "g").write_bytes(b"y")
    os.unlink(root / "h")
    stack.umount()
    assert_same(before, snapshot(stack.lower))
