"""Copy-up whose data follows: opening a big lower file for writing is answered at once, and every byte is right meanwhile.

The copies in the background are held where a test needs them to be under way: then only what is asked for is copied.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.mount.posix.table import fails
from tests.mount.test_native_fs import FALLOC_PUNCH_HOLE, fallocate
from tests.support.cli import unionfs
from tests.support.filesystems import FsKind, file_system
from tests.support.mounts import Stack, wait_gone
from tests.support.people import ALICE, as_user
from tests.support.snapshot import assert_same, snapshot

MIB = 1 << 20
SIZE = 20 * MIB + 4321
DATA = random.Random(5).randbytes(SIZE)
SECONDS = 30


class Held:
    """Copies in the background wait until `release`."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def hold(self) -> None:
        self.flag.touch()

    def release(self) -> None:
        self.flag.unlink(missing_ok=True)


@pytest.fixture
def held(ground: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Copies are held from the begin on."""
    held = Held(ground / "hold")
    held.hold()
    monkeypatch.setenv("UNIONFS_HOLD_COPIES", str(held.flag))
    yield held
    held.release()


@pytest.fixture
def lower_root(ours: Stack, held: Held) -> Iterator[Path]:
    """A mounted union with a big lower file `f`; what is held is released before it is unmounted."""
    (ours.lower / "f").write_bytes(DATA)
    yield ours.mount()
    held.release()


@pytest.fixture(params=["lower", "metacopy"])
def root(lower_root: Path, request: pytest.FixtureRequest) -> Path:
    """The same; or with a metacopy of that file in upper."""
    if request.param == "metacopy":
        os.chmod(lower_root / "f", 0o640)
    return lower_root


@contextmanager
def descriptor(path: Path, flags: int) -> Iterator[int]:
    """An open file."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def published(stack: Stack, name: str = "f") -> bool:
    """Whether upper has the file with its data."""
    path = stack.up / name
    return path.exists() and "trusted.overlay.metacopy" not in os.listxattr(path)


def wait_published(stack: Stack, name: str = "f") -> None:
    """Wait until upper has the file with its data."""
    end = time.monotonic() + SECONDS
    while not published(stack, name):
        assert time.monotonic() < end
        time.sleep(0.01)


def read_all(fd: int) -> bytes:
    """All that a descriptor's file has."""
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


def start(act: Callable[[], object]) -> threading.Thread:
    """Do something in a thread."""
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def still_waits(thread: threading.Thread) -> bool:
    """Whether a thread has not ended after a moment."""
    thread.join(0.3)
    return thread.is_alive()


# -- reading and writing meanwhile --


def test_append_returns_at_once(ours: Stack, root: Path, held: Held) -> None:
    before = (root / "f").stat()
    with open(root / "f", "ab", buffering=0) as stream:
        stream.write(b"tail")
    assert not published(ours)
    now = (root / "f").stat()
    assert now.st_size == SIZE + 4
    assert now.st_mtime_ns > before.st_mtime_ns
    assert now.st_ino == before.st_ino
    assert now.st_blocks >= SIZE // 512
    with open(root / "f", "rb") as stream:
        stream.seek(SIZE - 3)
        assert stream.read() == DATA[-3:] + b"tail"
    assert not published(ours)
    held.release()
    wait_published(ours)
    assert (root / "f").read_bytes() == DATA + b"tail"
    assert (root / "f").stat().st_mtime_ns == now.st_mtime_ns
    ours.umount()
    assert (ours.up / "f").read_bytes() == DATA + b"tail"
    assert (ours.lower / "f").read_bytes() == DATA
    assert os.listdir(ours.work / "work") == []


def test_attributes_are_those_of_the_lower_file(ours: Stack, held: Held) -> None:
    lower = ours.lower / "f"
    lower.write_bytes(DATA)
    os.chown(lower, 1234, 5678)
    os.chmod(lower, 0o640)
    os.setxattr(lower, "user.a", b"1")
    os.utime(lower, ns=(111_000_000_222, 333_000_000_444))
    root = ours.mount()
    with descriptor(root / "f", os.O_RDWR):
        for moment in ("held", "published"):
            now = (root / "f").stat()
            assert (now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode)) == (1234, 5678, 0o640), moment
            assert now.st_mtime_ns == 333_000_000_444
            assert now.st_size == SIZE
            assert os.getxattr(root / "f", "user.a") == b"1"
            held.release()
            wait_published(ours)
    ours.remount()
    assert (root / "f").stat().st_mtime_ns == 333_000_000_444
    assert (root / "f").read_bytes() == DATA


def test_descriptors_from_before_see_what_is_written(ours: Stack, root: Path, held: Held) -> None:
    with ExitStack() as stack:
        old = [stack.enter_context(descriptor(root / "f", os.O_RDONLY)) for _ in range(3)]
        mapped = stack.enter_context(mmap.mmap(old[0], SIZE, prot=mmap.PROT_READ))
        assert os.pread(old[0], 10, 5 * MIB) == DATA[5 * MIB : 5 * MIB + 10]
        assert mapped[7 * MIB] == DATA[7 * MIB]
        writer = stack.enter_context(descriptor(root / "f", os.O_RDWR))
        late = stack.enter_context(descriptor(root / "f", os.O_RDONLY))
        os.pwrite(writer, b"WRITTEN", 5 * MIB + 3)
        os.pwrite(writer, b"WRITTEN", 7 * MIB)
        os.pwrite(writer, b"end", SIZE + 10)
        for fd in (*old, late, writer):
            assert os.pread(fd, 13, 5 * MIB) == DATA[5 * MIB : 5 * MIB + 3] + b"WRITTEN" + DATA[5 * MIB + 10 :][:3]
            assert os.pread(fd, 100, SIZE - 2) == DATA[-2:] + bytes(10) + b"end"
            assert os.pread(fd, 9, 12 * MIB - 4) == DATA[12 * MIB - 4 : 12 * MIB + 5]
        assert mapped[7 * MIB : 7 * MIB + 8] == b"WRITTEN" + DATA[7 * MIB + 7 : 7 * MIB + 8]
        assert not published(ours)
        held.release()
        wait_published(ours)
        os.pwrite(writer, b"AFTER", 9)
        expected = bytearray(DATA + bytes(10) + b"end")
        expected[5 * MIB + 3 : 5 * MIB + 10] = expected[7 * MIB : 7 * MIB + 7] = b"WRITTEN"
        expected[9:14] = b"AFTER"
        for fd in (*old, late, writer):
            assert read_all(fd) == expected
    ours.umount()
    assert (ours.up / "f").read_bytes() == expected


class Model:
    """Random operations through many descriptors of one file, each compared with the same bytes in memory."""

    def __init__(self, path: Path, seed: int, stack: ExitStack) -> None:
        self.chance = random.Random(seed)
        self.bytes = bytearray(DATA)
        readers = [stack.enter_context(descriptor(path, os.O_RDONLY)) for _ in range(2)]
        self.read(readers[0])
        self.writers = [stack.enter_context(descriptor(path, os.O_RDWR)) for _ in range(2)]
        self.appender = stack.enter_context(descriptor(path, os.O_RDWR | os.O_APPEND))
        self.direct = stack.enter_context(descriptor(path, os.O_RDWR | os.O_DIRECT))
        self.readers = [*readers, *self.writers, stack.enter_context(descriptor(path, os.O_RDONLY))]
        self.map = stack.enter_context(mmap.mmap(self.writers[0], SIZE))
        self.path = path

    def at(self) -> int:
        """An offset: anywhere, or near a boundary of a chunk."""
        if self.chance.random() < 0.5:
            return max(0, self.chance.randrange(SIZE // MIB + 1) * MIB + self.chance.randint(-5000, 5000))
        return self.chance.randrange(SIZE)

    def length(self) -> int:
        return self.chance.choice([1, 17, 4096, 70_000, MIB, 2 * MIB + 5])

    def read(self, fd: int) -> None:
        at, length = self.at(), self.length()
        assert os.pread(fd, length, at) == self.bytes[at : at + length], (at, length)

    def put(self, at: int, data: bytes) -> None:
        if at > len(self.bytes):
            self.bytes.extend(bytes(at - len(self.bytes)))
        self.bytes[at : at + len(data)] = data

    def step(self) -> None:
        at, data = self.at(), self.chance.randbytes(self.length())
        match self.chance.choice(["read"] * 4 + ["write"] * 3 + ["append", "direct", "map", "look", "stat"]):
            case "read":
                self.read(self.chance.choice(self.readers))
            case "write":
                assert os.pwrite(self.chance.choice(self.writers), data, at) == len(data)
                self.put(at, data)
            case "append":
                assert os.write(self.appender, data) == len(data)
                self.bytes += data
            case "direct":
                page = mmap.mmap(-1, 8192)
                page[:] = self.chance.randbytes(8192)
                at -= at % 4096
                assert os.pwrite(self.direct, page, at) == 8192
                self.put(at, page[:])
            case "map":
                at = min(at, SIZE - 3000)
                self.map[at : at + 3000] = fresh = self.chance.randbytes(3000)
                self.put(at, fresh)
            case "look":
                at = min(at, SIZE - 3000)
                assert self.map[at : at + 3000] == self.bytes[at : at + 3000]
            case "stat":
                assert self.path.stat().st_size == len(self.bytes)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("racing", [False, True])
def test_every_byte_is_right(ours: Stack, root: Path, held: Held, seed: int, racing: bool) -> None:
    """While only what is asked for is copied, and while the copy in the background is at work."""
    with ExitStack() as stack:
        model = Model(root / "f", seed, stack)
        if racing:
            held.release()
        for _ in range(60):
            model.step()
        assert racing or not published(ours)
        held.release()
        for _ in range(60):
            model.step()
        for fd in model.readers:
            assert read_all(fd) == model.bytes
        os.fsync(model.writers[1])
        assert (ours.up / "f").read_bytes() == model.bytes
    ours.remount()
    assert (root / "f").read_bytes() == model.bytes


def test_holes_stay_holes(ours: Stack, held: Held) -> None:
    with open(ours.lower / "f", "wb") as stream:
        for at in (3, 40, 41, 90):
            stream.seek(at * MIB + 8192)
            stream.write(b"data" * 5000)
        stream.truncate(200 * MIB)
    before = (ours.lower / "f").read_bytes()
    root = ours.mount()
    with descriptor(root / "f", os.O_RDWR) as fd:
        assert os.pread(fd, 2 * MIB, 40 * MIB) == before[40 * MIB : 42 * MIB]
        assert (root / "f").stat().st_blocks <= 8 * MIB // 512
        held.release()
        assert os.lseek(fd, 0, os.SEEK_DATA) == 3 * MIB + 8192
        assert os.lseek(fd, 50 * MIB, os.SEEK_DATA) == 90 * MIB + 8192
    wait_published(ours)
    assert (root / "f").read_bytes() == before
    ours.umount()
    assert (ours.up / "f").stat().st_blocks <= 8 * MIB // 512


@pytest.mark.parametrize("lower_kind", ["tmpfs", "xfs"])
def test_layers_on_different_file_systems(
    ours: Stack, held: Held, on_file_system: Callable[[FsKind], Path], lower_kind: FsKind
) -> None:
    ours.lowers = [on_file_system(lower_kind) / "lower"]
    ours.lower.mkdir()
    (ours.lower / "f").write_bytes(DATA)
    root = ours.mount()
    with descriptor(root / "f", os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * 10, 3 * MIB - 5)
        assert os.pread(fd, 30, 3 * MIB - 15) == DATA[3 * MIB - 15 :][:10] + b"x" * 10 + DATA[3 * MIB + 5 :][:10]
        assert not published(ours)
        held.release()
    wait_published(ours)
    ours.umount()
    assert (ours.up / "f").read_bytes() == DATA[: 3 * MIB - 5] + b"x" * 10 + DATA[3 * MIB + 5 :]


def test_a_metacopy_keeps_what_it_has(ours: Stack, held: Held, check_by_overlay: Callable[[Stack], Path]) -> None:
    """Moved, so that its data is found by a redirect; owner, attributes, times and number as before."""
    (ours.lower / "d").mkdir()
    (ours.lower / "d" / "f").write_bytes(DATA)
    root = ours.mount()
    os.rename(root / "d" / "f", root / "g")
    os.chown(root / "g", 12, 34)
    os.setxattr(root / "g", "user.a", b"1")
    os.utime(root / "g", ns=(5_000_000_001, 6_000_000_002))
    before = (root / "g").stat()
    with descriptor(root / "g", os.O_RDWR) as fd, descriptor(root / "g", os.O_RDONLY) as other:
        assert not published(ours, "g")
        held.release()
        wait_published(ours, "g")
        for _ in range(2):
            now = (root / "g").stat()
            assert (now.st_uid, now.st_gid, now.st_mode, now.st_size) == (12, 34, before.st_mode, SIZE)
            assert (now.st_ino, now.st_mtime_ns, now.st_nlink) == (before.st_ino, before.st_mtime_ns, 1)
            assert os.getxattr(root / "g", "user.a") == b"1"
            with open(root / "g", "ab"):
                pass
        os.pwrite(fd, b"new", 0)
        assert os.pread(other, 4, 0) == b"new" + DATA[3:4]
    os.rename(root / "g", root / "h")
    os.link(root / "h", root / "i")
    ours.remount()
    assert (root / "h").stat().st_ino == before.st_ino
    assert (root / "i").read_bytes() == b"new" + DATA[3:]
    view = snapshot(root)
    ours.umount()
    assert os.listdir(ours.work / "work") == []
    assert_same(view, snapshot(check_by_overlay(ours)))


# -- what waits for the end --

ACTS: dict[str, Callable[[Path, int], object]] = {
    "chmod": lambda root, fd: os.chmod(root / "f", 0o600),
    "chown": lambda root, fd: os.chown(root / "f", 77, 88),
    "utime": lambda root, fd: os.utime(root / "f", (5, 5)),
    "setxattr": lambda root, fd: os.setxattr(root / "f", "user.x", b"1"),
    "rename": lambda root, fd: os.rename(root / "f", root / "g"),
    "replace": lambda root, fd: os.rename(root / "small", root / "f"),
    "link": lambda root, fd: os.link(root / "f", root / "g"),
    "unlink": lambda root, fd: os.unlink(root / "f"),
    "truncate": lambda root, fd: os.truncate(root / "f", 5 * MIB),
    "ftruncate": lambda root, fd: os.ftruncate(fd, 5 * MIB),
    "grow": lambda root, fd: os.ftruncate(fd, SIZE + MIB),
    "open for truncation": lambda root, fd: os.close(os.open(root / "f", os.O_WRONLY | os.O_TRUNC)),
    "open for synced writing": lambda root, fd: os.close(os.open(root / "f", os.O_WRONLY | os.O_SYNC)),
    "fsync": lambda root, fd: os.fsync(fd),
    "fdatasync": lambda root, fd: os.fdatasync(fd),
}


@pytest.mark.parametrize("kind", ["lower", "metacopy"])
@pytest.mark.parametrize("name", ACTS)
def test_other_changes_wait_for_the_end(
    ours: Stack, held: Held, check_by_overlay: Callable[[Stack], Path], name: str, kind: str
) -> None:
    (ours.lower / "f").write_bytes(DATA)
    (ours.lower / "small").write_bytes(b"small")
    root = ours.mount()
    if kind == "metacopy":
        os.chmod(root / "f", 0o604)
    with descriptor(root / "f", os.O_RDWR) as fd:
        os.pwrite(fd, b"W", 4 * MIB)
        thread = start(lambda: ACTS[name](root, fd))
        waited = still_waits(thread)
        above = set(os.listdir(ours.up)) - {"small"}
        early = published(ours)
        held.release()
        thread.join(SECONDS)
        assert waited
        assert above == ({"f"} if kind == "metacopy" else set())
        assert not early
        truncated = {"truncate": 5 * MIB, "ftruncate": 5 * MIB, "open for truncation": 0}.get(name)
        expected = DATA[: 4 * MIB] + b"W" + DATA[4 * MIB + 1 : truncated] if truncated != 0 else b""
        expected += bytes(MIB) if name == "grow" else b""
        assert read_all(fd) == expected
        os.pwrite(fd, b"V", 2)
        assert os.pread(fd, 1, 2) == b"V"
    ours.remount()
    shown = {"rename": "g", "unlink": None, "replace": None}.get(name, "f")
    if shown:
        assert (root / shown).read_bytes() == expected[:2].ljust(2, b"\0") + b"V" + expected[3:]
    if name == "replace":
        assert (root / "f").read_bytes() == b"small"
    view = snapshot(root)
    ours.umount()
    assert os.listdir(ours.work / "work") == []
    assert_same(view, snapshot(check_by_overlay(ours)))


def test_holes_are_punched_into_what_is_there(ours: Stack, root: Path, held: Held) -> None:
    with descriptor(root / "f", os.O_RDWR) as fd:
        fallocate(fd, FALLOC_PUNCH_HOLE | 1, 3 * MIB + 5, 2 * MIB)
        expected = DATA[: 3 * MIB + 5] + bytes(2 * MIB) + DATA[5 * MIB + 5 :]
        assert read_all(fd) == expected
        fallocate(fd, 0, SIZE, 1000)
        assert read_all(fd) == expected + bytes(1000)
        held.release()
    wait_published(ours)
    ours.umount()
    assert (ours.up / "f").read_bytes() == expected + bytes(1000)


def test_copy_file_range_from_and_into(ours: Stack, root: Path, held: Held) -> None:
    with (
        descriptor(root / "f", os.O_RDWR) as fd,
        descriptor(root / "new", os.O_RDWR | os.O_CREAT) as new,
    ):
        os.write(new, b"n" * 100)
        assert os.copy_file_range(fd, new, 2 * MIB, 7 * MIB - 9, 50) == 2 * MIB
        assert read_all(new) == b"n" * 50 + DATA[7 * MIB - 9 : 9 * MIB - 9]
        assert os.copy_file_range(new, fd, 40, 0, 11 * MIB - 20) == 40
        assert not published(ours)
        assert read_all(fd) == DATA[: 11 * MIB - 20] + b"n" * 40 + DATA[11 * MIB + 20 :]


def test_passthrough_begins_after_the_end(ours: Stack, held: Held) -> None:
    ours.options = "passthrough=on"
    (ours.lower / "f").write_bytes(DATA)
    root = ours.mount()
    with descriptor(root / "f", os.O_RDWR) as one:
        held.release()
        wait_published(ours)
        with descriptor(root / "f", os.O_RDWR) as two:
            os.pwrite(two, b"two", 0)
            assert os.pread(one, 3, 0) == b"two"
    with descriptor(root / "f", os.O_RDWR) as three:
        os.pwrite(three, b"three", 0)
        assert read_all(three) == b"three" + DATA[5:]


def test_suid_is_cleared_as_ever(ours: Stack, held: Held) -> None:
    """Such a file is copied the old way: what a write clears need not be kept apart."""
    (ours.lower / "f").write_bytes(DATA)
    os.chmod(ours.lower / "f", 0o6777)
    root = ours.mount()

    def write() -> None:
        with descriptor(root / "f", os.O_WRONLY) as fd:
            assert published(ours)
            os.pwrite(fd, b"x", 0)

    as_user(ALICE, write)
    assert stat.S_IMODE((root / "f").stat().st_mode) == 0o777


# -- many --


def test_many_open_it_at_once(ours: Stack, root: Path, held: Held) -> None:
    """One copy, all processes at once."""
    program = (
        "import os, sys; path, number = sys.argv[1], int(sys.argv[2]);"
        "os.pwrite(os.open(path, os.O_RDWR), b'%04d' % number, number * 300_001)"
    )
    workers = [subprocess.Popen(["python3", "-c", program, str(root / "f"), str(number)]) for number in range(50)]
    for worker in workers:
        assert worker.wait(SECONDS) == 0
    assert not published(ours)
    with descriptor(root / "f", os.O_RDWR) as fd:
        held.release()
        os.fsync(fd)
    expected = bytearray(DATA)
    for number in range(50):
        expected[number * 300_001 : number * 300_001 + 4] = b"%04d" % number
    assert (root / "f").read_bytes() == expected
    assert ours.counter("copy_ups") == 1


def test_many_files_at_once(ours: Stack, held: Held) -> None:
    for number in range(9):
        (ours.lower / f"f{number}").write_bytes(DATA)
    root = ours.mount()
    for number in range(9):
        with descriptor(root / f"f{number}", os.O_RDWR) as fd:
            os.pwrite(fd, b"%d" % number, 6 * MIB)
    for number in range(9):
        with descriptor(root / f"f{number}", os.O_RDONLY) as fd:
            assert (
                os.pread(fd, 3, 6 * MIB - 1) == DATA[6 * MIB - 1 : 6 * MIB] + b"%d" % number + DATA[6 * MIB + 1 :][:1]
            )
    assert os.listdir(ours.up) == []
    held.release()
    for number in range(9):
        wait_published(ours, f"f{number}")
        assert (root / f"f{number}").read_bytes() == DATA[: 6 * MIB] + b"%d" % number + DATA[6 * MIB + 1 :]


# -- the end of the mount, and of the daemon --


@pytest.mark.parametrize("how", ["umount", "SIGTERM"])
def test_the_end_of_the_mount_waits(
    ours: Stack, root: Path, held: Held, check_by_overlay: Callable[[Stack], Path], how: str
) -> None:
    with open(root / "f", "ab") as stream:
        stream.write(b"tail")
    daemon = ours.daemon()
    if how == "SIGTERM":
        os.kill(daemon, signal.SIGTERM)
        assert not wait_gone(daemon, 0.5)
        assert not published(ours)
        held.release()
        assert wait_gone(daemon)
        ours.mounted = False
    else:
        thread = start(ours.umount)
        assert not wait_gone(daemon, 0.5)
        assert not published(ours)
        held.release()
        thread.join(SECONDS)
    assert (ours.up / "f").read_bytes() == DATA + b"tail"
    assert os.listdir(ours.work / "work") == []
    assert (check_by_overlay(ours) / "f").read_bytes() == DATA + b"tail"


def close_dead(fd: int) -> None:
    """Close a descriptor whose daemon is gone."""
    with fails(errno.ENOTCONN):
        os.close(fd)


def kill(stack: Stack) -> None:
    """Kill the daemon and clear its mount."""
    daemon = stack.daemon()
    os.kill(daemon, signal.SIGKILL)
    assert wait_gone(daemon)
    assert unionfs("umount", stack.mnt).status == 0
    stack.mounted = False


@pytest.mark.parametrize("seed", range(6))
def test_killed(ours: Stack, root: Path, held: Held, check_by_overlay: Callable[[Stack], Path], seed: int) -> None:
    """At any moment: the old file or the new one, wholly; what an fsync has confirmed is there."""
    chance = random.Random(seed)
    before = (ours.lower / "f").stat()
    fd = os.open(root / "f", os.O_RDWR | os.O_APPEND)
    os.pwrite(fd, b"W" * 5, 0)  # appends
    synced = seed % 3 == 0
    if seed:
        held.release()
        time.sleep(chance.uniform(0, 0.06))
    if synced:
        held.release()
        os.fsync(fd)
    kill(ours)
    close_dead(fd)
    held.release()
    ours.mount()
    assert os.listdir(ours.work / "work") == []
    found, now = (root / "f").read_bytes(), (root / "f").stat()
    assert found == DATA + b"WWWWW" or (not synced and found == DATA)
    if found == DATA:
        assert (now.st_mtime_ns, now.st_blocks) == (before.st_mtime_ns, before.st_blocks)
    view = snapshot(root)
    ours.umount()
    assert os.listdir(ours.work / "work") == []
    assert_same(view, snapshot(check_by_overlay(ours)))


# -- failures --


def test_no_room(ours: Stack, ground: Path) -> None:
    """The opener's error, and nothing has changed."""
    (ours.lower / "f").write_bytes(DATA)
    with file_system("ext4", ground, size="16M", name="-small") as small:
        ours.upper, ours.work = small / "upper", small / "work"
        ours.up.mkdir()
        ours.work.mkdir()
        root = ours.mount()
        free = os.statvfs(small).f_bavail
        with fails(errno.ENOSPC):
            os.open(root / "f", os.O_RDWR)
        assert os.listdir(ours.up) == os.listdir(ours.work / "work") == []
        assert os.statvfs(small).f_bavail == free
        assert (root / "f").read_bytes() == DATA
        ours.umount()


@pytest.mark.expected_log(r"f: the copy-up has failed \(Input/output error\), to be tried again")
def test_a_lower_file_that_can_not_be_read_for_a_while(ours: Stack, root: Path, held: Held) -> None:
    with descriptor(root / "f", os.O_RDWR) as fd:
        os.pwrite(fd, b"kept", 2 * MIB)
        os.truncate(ours.lower / "f", 6 * MIB)
        with fails(errno.EIO):
            os.pread(fd, 10, 8 * MIB)
        with fails(errno.EIO):
            os.pwrite(fd, b"x", 8 * MIB + 5)
        assert os.pread(fd, 5, 2 * MIB) == b"kept" + DATA[2 * MIB + 4 : 2 * MIB + 5]
        held.release()
        for act in (lambda: os.fsync(fd), lambda: os.chmod(root / "f", 0o600)):
            with fails(errno.EIO):
                act()
        assert not published(ours)
        (ours.lower / "f").write_bytes(DATA)
        assert os.pread(fd, 10, 8 * MIB) == DATA[8 * MIB : 8 * MIB + 10]
        os.fsync(fd)
        assert published(ours)
    ours.remount()
    assert (root / "f").read_bytes() == DATA[: 2 * MIB] + b"kept" + DATA[2 * MIB + 4 :]


@pytest.mark.expected_log(r"f: the copy-up has failed \(Input/output error\), to be tried again")
@pytest.mark.expected_log(r"f: can't be copied up \(Input/output error\): what was written to it is lost")
@pytest.mark.parametrize("end", ["close", "SIGTERM"])
def test_a_lower_file_that_can_not_be_read_any_more(ours: Stack, lower_root: Path, held: Held, end: str) -> None:
    root = lower_root
    fd = os.open(root / "f", os.O_RDWR)
    os.pwrite(fd, b"lost", 2 * MIB)
    os.truncate(ours.lower / "f", 18 * MIB)
    held.release()
    with fails(errno.EIO):
        os.fsync(fd)
    if end == "SIGTERM":
        daemon = ours.daemon()
        os.kill(daemon, signal.SIGTERM)
        assert wait_gone(daemon)
        ours.mounted = False
        close_dead(fd)
        ours.mount()
    else:
        os.close(fd)
        deadline = time.monotonic() + SECONDS
        while "what was written to it is lost" not in ours.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
    assert (root / "f").stat().st_size == 18 * MIB
    assert (root / "f").read_bytes() == DATA[: 18 * MIB]
    with open(root / "f", "ab") as stream:
        stream.write(b"new")
    ours.umount()
    assert (ours.up / "f").read_bytes() == DATA[: 18 * MIB] + b"new"
    assert os.listdir(ours.work / "work") == []


def test_without_the_native_layer_the_opener_waits(ours: Stack, held: Held) -> None:
    ours.options = "native=off"
    (ours.lower / "f").write_bytes(DATA)
    root = ours.mount()
    with descriptor(root / "f", os.O_RDWR) as fd:
        assert published(ours)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        assert read_all(fd) == DATA
