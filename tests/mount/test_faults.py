"""Resources that end and come back: room, descriptors, a writable upper. The right error, nothing changed, and it goes on."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.support.cli import unionfs
from tests.support.filesystems import file_system, remove_tree, run
from tests.support.layers import is_whiteout
from tests.support.memory import can_limit, memory_group
from tests.support.mounts import Stack, wait_gone
from tests.support.snapshot import assert_same, snapshot

LIMIT = 256
CROWD = 100_000
CROWD_DIRECTORIES = 400
FEW = 6_000
BIG = os.urandom(2 << 20)


def outcome(act: Callable[[], object]) -> int:
    """The errno of an operation, 0 if it succeeds."""
    try:
        act()
    except OSError as error:
        return error.errno or -1
    return 0


@contextmanager
def small_upper(stack: Stack, ground: Path) -> Iterator[Path]:
    """Upper and work on a file system of their own, of 16 MiB."""
    with file_system("ext4", ground, size="16M", name="-small") as small:
        stack.upper, stack.work = small / "upper", small / "work"
        stack.up.mkdir()
        stack.work.mkdir()
        try:
            yield small
        finally:
            stack.umount()


def append(path: Path) -> None:
    with open(path, "ab", buffering=0) as stream:
        stream.write(BIG)


def changes(root: Path) -> dict[str, Callable[[], object]]:
    """Operations that need room in upper."""
    return {
        "copy-up": lambda: os.close(os.open(root / "big", os.O_RDWR)),
        "create": lambda: (root / "new").write_bytes(BIG),
        "append": lambda: append(root / "small"),
        "mkdir": lambda: (root / "dir").mkdir(),
        "unlink": lambda: os.unlink(root / "tree/leaf"),
        "rename": lambda: os.rename(root / "tree", root / "trunk"),
    }


def fill(directory: Path) -> None:
    """Use all inodes and all room of a file system."""
    with suppress(OSError):
        for number in range(100_000):
            (directory / f"ballast{number}").touch()
    with suppress(OSError), open(directory / "ballast0", "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))


def test_no_room(ours: Stack, ground: Path) -> None:
    """What fails for want of room leaves all as it was, and succeeds when there is room again."""
    (ours.lower / "tree").mkdir()
    for name, data in (("big", BIG), ("small", b"small"), ("tree/leaf", b"leaf")):
        (ours.lower / name).write_bytes(data)
    with small_upper(ours, ground) as small:
        root = ours.mount()
        fill(small)
        before = snapshot(root)
        failed = {name: outcome(act) for name, act in changes(root).items()}
        assert set(failed.values()) == {errno.ENOSPC}, failed
        assert_same(before, snapshot(root))
        for ballast in small.glob("ballast*"):
            ballast.unlink()
        assert {name: outcome(act) for name, act in changes(root).items()} == dict.fromkeys(failed, 0)
        assert (root / "small").read_bytes() == b"small" + BIG
        assert (root / "new").read_bytes() == BIG
        view = snapshot(root)
        ours.remount()
        assert_same(view, snapshot(root))


def test_mounted_without_room(ours: Stack, ground: Path) -> None:
    """That no whiteout can be made then says nothing about their form."""
    (ours.lower / "f").write_bytes(b"f")
    with small_upper(ours, ground) as small:
        root = ours.mount()
        ours.umount()
        fill(small)
        ours.mount()
        assert outcome(lambda: os.unlink(root / "f")) == errno.ENOSPC
        for ballast in small.glob("ballast*"):
            ballast.unlink()
        os.unlink(root / "f")
        assert is_whiteout(ours.up / "f")


def scatter(lower: Path, files: int, directories: int) -> None:
    """Make empty files `dX/fN`, in turn in each of the directories."""
    for number in range(files):
        directory = lower / f"d{number % directories}"
        if number < directories:
            directory.mkdir()
        (directory / f"f{number}").touch()


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of 100,000 files `dX/fN`; each fifth has its number in it."""
    path = tmp_path_factory.mktemp("crowd")
    for number in range(CROWD_DIRECTORIES):
        (path / f"d{number}").mkdir()
    for number in range(CROWD):
        place = crowd_name(number)
        if number % 5:
            os.mknod(path / place, 0o644)
        else:
            (path / place).write_bytes(b"%06d" % number)
    yield path
    remove_tree(path)


def crowd_name(number: int) -> str:
    return f"d{number % CROWD_DIRECTORIES}/f{number}"


def crowd_bytes(root: Path) -> int:
    """The sum of all sizes, and that all are there."""
    sizes: list[int] = []
    for number in range(CROWD_DIRECTORIES):
        with os.scandir(root / f"d{number}") as entries:
            sizes += [entry.stat().st_size for entry in entries]
    assert len(sizes) == CROWD
    return sum(sizes)


@pytest.mark.fault_seconds(300)
@pytest.mark.parametrize("options", ["", "native=off"])
def test_many_files_with_few_descriptors(ours: Stack, crowd: Path, options: str) -> None:
    """What is looked at, read and written costs no descriptor for long."""
    ours.lowers[:] = [crowd]
    root = ours.mount(options, under=["prlimit", f"--nofile={LIMIT}:{LIMIT}", "--"])
    assert crowd_bytes(root) == CROWD // 5 * 6
    for number in range(0, CROWD, 5):
        assert (root / crowd_name(number)).read_bytes() == b"%06d" % number
    for number in range(1, CROWD, 500):
        (root / crowd_name(number)).write_bytes(b"touched")
    assert crowd_bytes(root) == CROWD // 5 * 6 + CROWD // 500 * 7


def open_all(root: Path, opened: list[int]) -> int:
    """Open files until that fails; return the error."""
    try:
        while True:
            opened.append(os.open(root / f"f{len(opened)}", os.O_RDONLY))
    except OSError as error:
        return error.errno or -1


@pytest.mark.expected_log("Too many open files")
@pytest.mark.parametrize("spare", range(9))
def test_no_descriptor_left(ours: Stack, spare: int) -> None:
    """A copy-up that runs out of them fails whole; readers from before it see what is written after it."""
    for number in range(2 * LIMIT):
        (ours.lower / f"f{number}").write_bytes(b"old")
    root = ours.mount("passthrough=off", under=["prlimit", f"--nofile={LIMIT}:{LIMIT}", "--"])
    opened: list[int] = []
    try:
        assert open_all(root, opened) in (errno.EMFILE, errno.ENFILE)
        assert len(opened) > LIMIT // 4
        for _ in range(spare):
            os.close(opened.pop())
        failed = outcome(lambda: (root / "f0").write_bytes(b"new"))
        assert failed in (0, errno.EMFILE)
        assert os.pread(opened[0], 10, 0) == (b"old" if failed else b"new")
        for _ in range(20):
            os.close(opened.pop())
        (root / "f0").write_bytes(b"later")
        assert os.pread(opened[0], 10, 0) == (root / "f0").read_bytes() == b"later"
        os.chmod(root / "f1", 0o600)
        (root / "f1").write_bytes(b"later")
        assert os.pread(opened[1], 10, 0) == b"later"
    finally:
        for fd in opened:
            os.close(fd)


@pytest.mark.expected_log("Too many open files")
def test_idle_handles_leave_room(ours: Stack) -> None:
    """Those that are kept for the next reader are given up where another file is to be opened."""
    for number in range(2 * LIMIT):
        (ours.lower / f"f{number}").write_bytes(b"old")
    counts: list[int] = []
    for read_before in (0, LIMIT):
        root = ours.mount("passthrough=off", under=["prlimit", f"--nofile={LIMIT}:{LIMIT}", "--"])
        for number in range(read_before):
            assert (root / f"f{2 * LIMIT - 1 - number}").read_bytes() == b"old"
        opened: list[int] = []
        try:
            assert open_all(root, opened) in (errno.EMFILE, errno.ENFILE)
        finally:
            for fd in opened:
                os.close(fd)
        counts.append(len(opened))
        ours.umount()
    assert counts[0] > LIMIT // 3
    assert counts[1] >= counts[0] - 2


@pytest.mark.expected_log("Too many open files")
def test_read_without_a_descriptor_left(ours: Stack) -> None:
    """What is open can be read, also where the host has nothing of it in its cache."""
    for number in range(2 * LIMIT):
        (ours.lower / f"f{number}").write_bytes(BIG[:5000] if number < 20 else b"")
    root = ours.mount("passthrough=off", under=["prlimit", f"--nofile={LIMIT}:{LIMIT}", "--"])
    opened: list[int] = []
    try:
        assert open_all(root, opened) in (errno.EMFILE, errno.ENFILE)
        for number in range(20):
            uncache(ours.lower / f"f{number}")
        assert {outcome(partial(os.pread, fd, 5000, 0)) for fd in opened[:20]} == {0}
        assert {os.pread(fd, 5000, 0) for fd in opened[:20]} == {BIG[:5000]}
    finally:
        for fd in opened:
            os.close(fd)


def uncache(path: Path) -> None:
    """Have the host forget the content of a file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def limit_memory(pid: int, limit: str) -> None:
    """Set how much address space a process may have."""
    run("prlimit", "--pid", str(pid), f"--as={limit}")


def address_space(pid: int) -> int:
    """How much address space a process has, in bytes."""
    size = re.search(r"VmSize:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert size
    return int(size[1]) << 10


@pytest.mark.expected_log("out of memory")
@pytest.mark.parametrize("options", ["", "native=off"])
def test_no_memory_left(ours: Stack, options: str) -> None:
    """What is not known yet can't be had then; what is in use goes on, and all comes back with the memory."""
    scatter(ours.lower, FEW, 20)
    (ours.lower / "known").write_bytes(b"known")
    root = ours.mount(options)
    daemon = ours.daemon()
    with open(root / "known", "ab", buffering=0) as stream:
        paths = [root / f"d{number % 20}/f{number}" for number in range(FEW)]
        found, most = set(), address_space(daemon) + (1 << 20)
        for start in range(0, FEW, FEW // 8):  # a thread that ends meanwhile leaves room: the limit follows
            most = min(most, address_space(daemon) + (1 << 18))
            limit_memory(daemon, f"{most}:")
            found |= {outcome(path.stat) for path in paths[start : start + FEW // 8]}
        assert found == {0, errno.ENOMEM}
        assert stream.write(b" to all") == 7
        assert (root / "known").read_bytes() == b"known to all"
        new = [root / f"new{number}" for number in range(20)]
        failed = [outcome(path.touch) for path in new]
        assert set(failed) <= {0, errno.ENOMEM}
        limit_memory(daemon, "unlimited:")
        time.sleep(0.2)
        assert {outcome(path.stat) for path in paths} == {0}
        assert [(ours.up / path.name).exists() for path in new] == [not error for error in failed]
        for path in new:
            path.write_bytes(b"new")
        assert sum(len(os.listdir(root / f"d{number}")) for number in range(20)) == FEW
    assert ours.log.read_text().count("out of memory") == 1
    ours.remount()
    assert (root / "known").read_bytes() == b"known to all"
    assert {path.read_bytes() for path in new} == {b"new"}


def use_memory(root: Path, made: list[Path]) -> None:
    """Have a daemon know more and more files, and make some: until it fails."""
    for number in range(FEW):
        (root / f"d{number % 20}/f{number}").stat()
        if number % 100 == 0:
            made.append(root / f"new{number}")
            made[-1].write_bytes(b"new")


@pytest.mark.skipif(not can_limit(), reason="no control group for memory can be made here")
@pytest.mark.parametrize("options", ["", "native=off"])
def test_killed_for_its_memory(ours: Stack, check_by_overlay: Callable[[Stack], Path], options: str) -> None:
    """A daemon that the kernel kills because its group has used up its memory: known as dead, cleared, nothing lost."""
    scatter(ours.lower, FEW, 20)
    root = ours.mount(options)
    daemon = ours.daemon()
    made: list[Path] = []
    with memory_group(1 << 20) as group:
        (group / "cgroup.procs").write_text(str(daemon))
        with pytest.raises(OSError, match="onnect") as gone:
            use_memory(root, made)
        assert wait_gone(daemon)
    assert gone.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert "dead" in unionfs("ls").out
    assert unionfs("umount", root).err == f"unionfs: cleared the dead mount on {root}\n"
    ours.mounted = False
    ours.mount(options)
    assert {path.read_bytes() for path in made[:-1]} == {b"new"}
    view = snapshot(root)
    ours.umount()
    assert os.listdir(ours.work / "work") == []
    assert_same(view, snapshot(check_by_overlay(ours)))


def test_upper_read_only_for_a_while(ours: Stack, ground: Path) -> None:
    (ours.lower / "tree").mkdir()
    for name, data in (("big", BIG), ("small", b"small"), ("tree/leaf", b"leaf")):
        (ours.lower / name).write_bytes(data)
    with small_upper(ours, ground) as small:
        root = ours.mount()
        (root / "mine").write_bytes(b"mine")
        before = snapshot(root)
        run("mount", "-o", "remount,ro", str(small))
        failed = {name: outcome(act) for name, act in changes(root).items()}
        assert set(failed.values()) == {errno.EROFS}, failed
        assert_same(before, snapshot(root))
        run("mount", "-o", "remount,rw", str(small))
        assert {name: outcome(act) for name, act in changes(root).items()} == dict.fromkeys(failed, 0)
        view = snapshot(root)
        ours.remount()
        assert_same(view, snapshot(root))
