"""lsattr and chattr: flags of lower, upper and merged objects, beside kernel overlayfs on ext4, xfs and btrfs.

The same is done to a union and to an overlay over equal layers; what each step gives (flags, or the errno) must be the
same. Then each mounts the other's layers, and must show the same again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.mount.posix.table import fails
from tests.support import raw
from tests.support.filesystems import FsKind, run
from tests.support.layers import build, mark, marks
from tests.support.mounts import Stack

StackMaker = Callable[..., Stack]
FileSystemMaker = Callable[[FsKind], Path]
DISKS: tuple[FsKind, ...] = ("ext4", "xfs", "btrfs")

FSGETXATTR, FSSETXATTR = 0x801C581F, 0x401C5820
SYNC, IMMUTABLE, APPEND, NODUMP, NOATIME = 0x08, 0x10, 0x20, 0x40, 0x80
SEEN = SYNC | IMMUTABLE | APPEND | NODUMP | NOATIME

TREE = {
    "plain": b"p" * 5000,
    "immutable": b"i" * 5000,
    "append": b"a" * 5000,
    "all": b"x" * 5000,
    "meta": b"m" * 5000,
    "d": {"f": b"f", "sub": {"g": b"g"}},
    "fixed": {"f": b"f", "sub": {}},
    "growing": {"f": b"f", "g": b"g"},
}
LOWER_FLAGS = {
    "immutable": "+i",
    "append": "+a",
    "all": "+aiAdS",
    "fixed": "+iA",
    "growing": "+a",
    "fixed/f": "+d",
}


def flags(path: Path) -> int:
    """The flags of a file or directory that all file systems here have."""
    fd = os.open(path, os.O_RDONLY)
    try:
        answer: int = struct.unpack_from("I", fcntl.ioctl(fd, raw.FS_IOC_GETFLAGS, bytes(8)))[0]
    finally:
        os.close(fd)
    return answer & SEEN


def fsxattr(path: Path, value: bytes = b"") -> bytes:
    """Get, or set, struct fsxattr."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return fcntl.ioctl(fd, FSSETXATTR if value else FSGETXATTR, value or bytes(28))
    finally:
        os.close(fd)


def chattr(path: Path, change: str) -> None:
    run("chattr", change, str(path))


def clear(base: Path) -> None:
    """Take away what keeps a tree from being removed; whiteouts, which have no flags, make chattr fail at the end."""
    subprocess.run(["chattr", "-R", "-f", "-ia", str(base)], check=False, capture_output=True)


@contextmanager
def freed(*stacks: Stack) -> Iterator[None]:
    """Leave nothing behind that can't be removed."""
    with ExitStack() as after:
        for stack in stacks:
            after.callback(clear, stack.base)
            after.callback(stack.umount)
        yield


class Record:
    """What each step gave."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: list[str] = []

    def flags(self, *names: str) -> None:
        for name in names:
            xflags, _, _, project = struct.unpack_from("4I", fsxattr(self.root / name))
            self.steps.append(f"{name}: {flags(self.root / name):#x} {xflags & 0x7F:#x} project {project}")

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.steps.append(f"{what}: {errno.errorcode[error.errno or 0]}")
        else:
            self.steps.append(f"{what}: done")

    def chattr(self, name: str, change: str) -> None:
        chattr(self.root / name, change)
        self.steps.append(f"chattr {change}")
        self.flags(name)


def opened(path: Path, how: int, data: bytes = b"") -> None:
    fd = os.open(path, how)
    try:
        if data:
            os.write(fd, data)
    finally:
        os.close(fd)


def try_file(record: Record, name: str) -> None:
    """All that immutable or append-only files may refuse."""
    path = record.root / name
    other = record.root / f"{name}-2"
    actions: dict[str, Callable[[], object]] = {
        "read": path.read_bytes,
        "write": lambda: opened(path, os.O_WRONLY),
        "read and write": lambda: opened(path, os.O_RDWR),
        "append": lambda: opened(path, os.O_WRONLY | os.O_APPEND, b"more"),
        "O_TRUNC": lambda: opened(path, os.O_WRONLY | os.O_APPEND | os.O_TRUNC),
        "O_RDONLY|O_TRUNC": lambda: opened(path, os.O_TRUNC),
        "truncate": lambda: os.truncate(path, 10),
        "chmod": lambda: path.chmod(0o600),
        "chown": lambda: os.chown(path, 1, 1),
        "touch": lambda: os.utime(path),
        "utime": lambda: os.utime(path, (1, 1)),
        "setxattr": lambda: os.setxattr(path, "user.x", b"1"),
        "removexattr": lambda: os.removexattr(path, "user.y"),
        "link": lambda: os.link(path, other),
        "rename": lambda: os.rename(path, other),
        "rename over": lambda: os.rename(record.root / "spare", path),
        "exchange": lambda: raw.renameat2(record.root / "spare", path, raw.RENAME_EXCHANGE),
        "unlink": lambda: os.unlink(path),
    }
    (record.root / "spare").write_bytes(b"")
    for what, action in actions.items():
        record.attempt(f"{name}, {what}", action)


def try_directory(record: Record, name: str) -> None:
    """All that immutable or append-only directories may refuse."""
    path = record.root / name
    (record.root / "outside").write_bytes(b"")
    actions: dict[str, Callable[[], object]] = {
        "list": lambda: os.listdir(path),
        "create": lambda: opened(path / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY),
        "mkdir": lambda: os.mkdir(path / "newdir"),
        "symlink": lambda: os.symlink("x", path / "newlink"),
        "mkfifo": lambda: os.mkfifo(path / "newfifo"),
        "write to a file in it": lambda: opened(path / "f", os.O_WRONLY, b"w"),
        "chmod of a file in it": lambda: (path / "f").chmod(0o640),
        "link into": lambda: os.link(record.root / "outside", path / "linked"),
        "rename in": lambda: os.rename(path / "f", path / "f2"),
        "rename out": lambda: os.rename(path / "f", record.root / f"{name}-f"),
        "rename into": lambda: os.rename(record.root / "outside", path / "moved"),
        "unlink in": lambda: os.unlink(path / "f"),
        "chmod": lambda: path.chmod(0o700),
        "touch": lambda: os.utime(path),
        "setxattr": lambda: os.setxattr(path, "user.x", b"1"),
        "rename": lambda: os.rename(path, record.root / f"{name}-2"),
        "rmdir": lambda: os.rmdir(path),
    }
    for what, action in actions.items():
        record.attempt(f"{name}, {what}", action)


def change(root: Path) -> list[str]:
    """The scenario; each step's outcome."""
    record = Record(root)
    record.flags(*TREE, "fixed/f")
    for name in ("immutable", "append", "all"):
        try_file(record, name)
    for name in ("fixed", "growing"):
        try_directory(record, name)
    record.flags(*(name for name in TREE if (root / name).exists()))
    for step in ("+i", "-i", "+a", "-a", "+A", "+d", "+S", "+ai", "-S", "-i"):
        record.chattr("plain", step)
    try_file(record, "plain")
    record.chattr("immutable", "-i")
    record.chattr("all", "-ai")
    record.attempt("all, write", lambda: (root / "all").write_bytes(b"now"))
    record.flags("all")
    path = root / "meta"
    path.chmod(0o640)
    record.chattr("meta", "+dA")
    record.attempt("meta, write", lambda: opened(path, os.O_WRONLY, b"M"))
    record.flags("meta")
    for step in ("+d", "+A", "+i"):
        record.chattr("d", step)
    try_directory(record, "d")
    record.chattr("d/sub", "+a")
    record.attempt("d/sub, create", lambda: (root / "d/sub/new").write_bytes(b"n"))
    record.attempt("d/sub, unlink", lambda: os.unlink(root / "d/sub/new"))
    (root / "new").write_bytes(b"n")
    record.chattr("new", "+aAS")
    record.flags("new")
    value = fsxattr(root / "new")
    wanted = struct.unpack_from("I", value)[0] & ~0x10 | 0x08  # not append-only but immutable
    record.attempt("new, fsxattr", lambda: fsxattr(root / "new", struct.pack("I", wanted) + value[4:]))
    record.flags("new")
    record.attempt("new, project", lambda: fsxattr(root / "new", value[:12] + struct.pack("I", 7) + value[16:]))
    record.flags("new")
    try_file(record, "new")
    return record.steps


def show(root: Path) -> list[str]:
    """Flags of all files and directories."""
    record = Record(root)
    for directory, _, names in sorted(os.walk(root)):
        for path in [Path(directory), *(Path(directory, name) for name in sorted(names))]:
            if not path.is_symlink() and (path.is_file() or path.is_dir()):
                record.flags(str(path.relative_to(root)))
    return record.steps


def kept(upper: Path) -> dict[str, tuple[int, bytes | None]]:
    """The real flags and the protection mark of each object in an upper layer."""
    return {
        str(path.relative_to(upper)): (flags(path), mark(path, "protattr"))
        for path in sorted(upper.rglob("*"))
        if path.is_dir() or path.is_file()
    }


def prepared(make_stack: StackMaker, base: Path, kind: str) -> Stack:
    stack = make_stack(kind, base=base, name=kind)
    build(stack.lower, TREE)
    for name, change_ in reversed(LOWER_FLAGS.items()):
        chattr(stack.lower / name, change_)
    return stack


@pytest.mark.parametrize("file_system", DISKS)
def test_like_overlayfs(make_stack: StackMaker, on_file_system: FileSystemMaker, file_system: FsKind) -> None:
    base = on_file_system(file_system)
    ours, theirs = prepared(make_stack, base, "union"), prepared(make_stack, base, "overlay")
    with freed(ours, theirs):
        before = [show(stack.lower) for stack in (ours, theirs)]
        done = change(ours.mount())
        assert done == change(theirs.mount())
        view = show(ours.mnt)
        assert view == show(theirs.mnt)
        assert kept(ours.up) == kept(theirs.up)
        ours.remount()
        theirs.remount()
        assert view == show(ours.mnt) == show(theirs.mnt)
        ours.umount()
        theirs.umount()
        swapped = {"overlay": (ours, make_stack("overlay", name="o")), "union": (theirs, make_stack("union", name="u"))}
        for layers, other in swapped.values():
            other.lowers, other.upper, other.work = layers.lowers, layers.upper, layers.work
            with freed(other):
                assert show(other.mount()) == view
                record = Record(other.mnt)
                try_file(record, "plain")
                try_directory(record, "d")
                assert [step for step in record.steps if step.endswith("EPERM")]
                assert not (other.mnt / "plain-2").exists()
        assert before == [show(stack.lower) for stack in (ours, theirs)]


def test_where_copies_wait(ours: Stack) -> None:
    """Without metacopy, chattr of a big file copies its data, off the loop, or waits for data that follows."""
    build(ours.lower, {"big": b"b" * (20 << 20), "other": b"o" * (20 << 20)})
    root = ours.mount("metacopy=off")
    chattr(root / "big", "+d")
    assert flags(root / "big") == NODUMP
    with open(root / "other", "r+b") as file:
        file.write(b"x")
        chattr(root / "other", "+dA")
        assert flags(root / "other") == NODUMP | NOATIME
        assert file.seek(0) == 0
        assert file.read(2) == b"xo"
    assert flags(ours.up / "other") == NODUMP | NOATIME


def test_flags_of_a_metacopy_outlive_its_data(ours: Stack) -> None:
    """The upper file of a metacopy is not replaced by another one if it has flags that a copy-up would not carry."""
    build(ours.lower, {"big": b"b" * (20 << 20), "plain": b"b" * (20 << 20)})
    root = ours.mount()
    chattr(root / "big", "+dS")
    chattr(root / "plain", "+S")
    assert "metacopy" in marks(ours.up / "big")
    for name in ("big", "plain"):
        with open(root / name, "r+b") as file:
            file.write(b"x")
            os.fsync(file)
        assert "metacopy" not in marks(ours.up / name)
    assert flags(root / "big") == flags(ours.up / "big") == NODUMP | SYNC
    assert flags(root / "plain") == flags(ours.up / "plain") == SYNC


def test_open_handles_after_a_change(ours: Stack) -> None:
    """Who has the file open for writing goes on writing, as on overlayfs; its attributes are refused from then on."""
    root = ours.mount()
    with open(root / "f", "wb", buffering=0) as file:
        file.write(b"1")
        chattr(root / "f", "+i")
        file.write(b"2")
        with fails(errno.EPERM):
            os.fchmod(file.fileno(), 0o600)
        with fails(errno.EPERM):
            os.utime(file.fileno(), (1, 1))
        chattr(root / "f", "-i")
        os.fchmod(file.fileno(), 0o600)
    assert (root / "f").read_bytes() == b"12"


@pytest.mark.parametrize("kind", ["union", "overlay"])
def test_what_is_refused_copies_nothing_up(make_stack: StackMaker, kind: str) -> None:
    stack = make_stack(kind)
    build(stack.lower, {"d": {"fixed": b"", "growing": b""}})
    chattr(stack.lower / "d/fixed", "+i")
    chattr(stack.lower / "d/growing", "+a")
    with freed(stack):
        root = stack.mount()
        for name in ("d/fixed", "d/growing"):
            for action in (
                lambda path: path.chmod(0o600),
                lambda path: os.chown(path, 1, -1),
                lambda path: os.utime(path, (1, 1)),
                lambda path: os.truncate(path, 0),
            ):
                with fails(errno.EPERM):
                    action(root / name)
        with fails(errno.EPERM):
            os.utime(root / "d/fixed")
        assert list(stack.up.iterdir()) == []


def test_who_may(ours: Stack) -> None:
    """The kernel asks for the owner, and for CAP_LINUX_IMMUTABLE where it is about these two."""
    (ours.lower / "theirs").write_bytes(b"")
    os.chown(ours.lower / "theirs", 65534, 65534)
    (ours.lower / "mine").write_bytes(b"")
    root = ours.mount()
    user = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    for words, allowed in (
        (("+d", root / "theirs"), True),
        (("+i", root / "theirs"), False),
        (("+d", root / "mine"), False),
    ):
        if allowed:
            run(*user, "chattr", *map(str, words))
        else:
            with pytest.raises(AssertionError, match="Operation not permitted"):
                run(*user, "chattr", *map(str, words))
    assert flags(root / "theirs") == NODUMP
    assert not (ours.up / "mine").exists()


def test_read_only_union(make_stack: StackMaker) -> None:
    ours = make_stack("union")
    ours.upper = None
    build(ours.lower, {"f": b"f"})
    chattr(ours.lower / "f", "+d")
    with freed(ours):
        root = ours.mount()
        assert flags(root / "f") == NODUMP
        with pytest.raises(AssertionError, match="Read-only file system"):
            chattr(root / "f", "+A")


def test_bind_paths(make_stack: StackMaker) -> None:
    """Those of the host's objects, which the host's file system enforces."""
    bind = make_stack("bind")
    build(bind.below, {"f": b"f", "d": {}})
    with freed(bind):
        bind.mount()
        for name in ("f", "d"):
            chattr(bind.inside / name, "+id")
            assert flags(bind.inside / name) == flags(bind.below / name) == IMMUTABLE | NODUMP
        with fails(errno.EPERM):
            (bind.inside / "f").write_bytes(b"")
        with fails(errno.EPERM):
            (bind.inside / "d/x").mkdir()
        chattr(bind.below / "f", "-i")
        (bind.inside / "f").write_bytes(b"")
        (bind.mnt / "own").write_bytes(b"")
        chattr(bind.mnt / "own", "+d")
        assert flags(bind.mnt / "own") == NODUMP


def test_without_the_native_layer(ours: Stack) -> None:
    """No ioctl gets through, but what is marked is refused all the same."""
    build(ours.lower, {"f": b"f"})
    chattr(ours.lower / "f", "+i")
    with freed(ours):
        root = ours.mount("native=off")
        with fails(errno.ENOTTY):
            flags(root)
        with fails(errno.EPERM):
            (root / "f").write_bytes(b"")
