"""A daemon that is disturbed at its work: faults of its own, signals, stops, disks that fail, lowers that change.

The request that meets the fault gets the right error, nothing else does, and service goes on when the cause is gone.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mount.test_faults import outcome
from tests.mount.test_lazy import start, still_waits
from tests.support import injected, raw
from tests.support.disks import BAD, Disk, disk
from tests.support.filesystems import run
from tests.support.layers import Tree, build
from tests.support.mounts import Stack
from tests.support.snapshot import assert_same, snapshot

BIG = BAD + random.Random(8).randbytes(3 << 20)


def none_waits(mnt: Path, ground: Path) -> bool:
    """Whether all requests of a FUSE mount are answered; files that were closed are released a little later."""
    control = ground / "fusectl"
    control.mkdir()
    run("mount", "-t", "fusectl", "none", str(control))
    try:
        waiting = control / str(os.minor(mnt.stat().st_dev)) / "waiting"
        return any(not int(waiting.read_text()) for _ in range(300) if not time.sleep(0.01))
    finally:
        run("umount", str(control))
        control.rmdir()


# -- faults of its own --

Act = Callable[[Path, int], object]
TURNS = 2


def with_fd(path: Path, flags: int, act: Callable[[int], object]) -> object:
    """Do something with an open file."""
    fd = os.open(path, flags)
    try:
        return act(fd)
    finally:
        os.close(fd)


def read_past_the_cache(fd: int) -> object:
    """Read a page by a request of its own; the page cache would try a second time."""
    with mmap.mmap(-1, 4096) as page:
        return os.preadv(fd, [page], 0)


FLAGS = 0x80086601  # FS_IOC_GETFLAGS
HANDLERS: dict[str, Act] = {
    "lookup": lambda root, turn: os.stat(root / f"never{turn}"),
    "getattr": lambda root, turn: with_fd(root / "lower", os.O_RDONLY, os.fstat),
    "setattr": lambda root, turn: os.chmod(root / "lower", 0o600 + turn),
    "readlink": lambda root, turn: os.readlink(root / f"link{turn}"),
    "mknod": lambda root, turn: os.mkfifo(root / f"fifo{turn}"),
    "mkdir": lambda root, turn: os.mkdir(root / f"dir{turn}"),
    "symlink": lambda root, turn: os.symlink("x", root / f"symlink{turn}"),
    "link": lambda root, turn: os.link(root / "lower", root / f"hard{turn}"),
    "unlink": lambda root, turn: os.unlink(root / f"doomed{turn}"),
    "rmdir": lambda root, turn: os.rmdir(root / f"doomed-dir{turn}"),
    "rename": lambda root, turn: os.rename(root / f"old{turn}", root / f"new{turn}"),
    "rename2": lambda root, turn: raw.renameat2(root / f"one{turn}", root / f"two{turn}", raw.RENAME_EXCHANGE),
    "open": lambda root, turn: os.close(os.open(root / f"low{turn}", os.O_RDONLY)),
    "create": lambda root, turn: os.close(os.open(root / f"made{turn}", os.O_CREAT | os.O_RDWR)),
    "opendir": lambda root, turn: os.close(os.open(root / "d", os.O_RDONLY | os.O_DIRECTORY)),
    "readdir": lambda root, turn: os.listdir(root / f"list{turn}"),
    "fsyncdir": lambda root, turn: with_fd(root / "d", os.O_RDONLY, os.fsync),
    "statfs": lambda root, turn: os.statvfs(root),
    "ioctl": lambda root, turn: with_fd(root / "lower", os.O_RDONLY, lambda fd: fcntl.ioctl(fd, FLAGS, bytes(8))),
    "getxattr": lambda root, turn: os.getxattr(root / f"low{turn}", "user.x"),
    "listxattr": lambda root, turn: os.listxattr(root / "lower"),
    "setxattr": lambda root, turn: os.setxattr(root / "lower", f"user.new{turn}", b"1"),
    "removexattr": lambda root, turn: os.removexattr(root / "lower", f"user.x{turn}"),
}
PLAIN_HANDLERS: dict[str, Act] = {
    "read": lambda root, turn: with_fd(root / f"low{turn}", os.O_RDONLY | os.O_DIRECT, read_past_the_cache),
    "write": lambda root, turn: with_fd(root / f"one{turn}", os.O_WRONLY, lambda fd: os.write(fd, b"data")),
    "fsync": lambda root, turn: with_fd(root / f"one{turn}", os.O_WRONLY, os.fsync),
}
SILENT: dict[str, Act] = {
    "release": lambda root, turn: os.close(os.open(root / f"one{turn}", os.O_WRONLY)),
    "releasedir": lambda root, turn: os.close(os.open(root / "d", os.O_RDONLY)),
    "batch_forget": lambda root, turn: forget_all_below(root),
}
"""Handlers whose error nobody gets."""


def forget_all_below(root: Path) -> None:
    """Have the kernel learn many names and forget them."""
    for _ in os.walk(root):
        pass
    Path("/proc/sys/vm/drop_caches").write_text("2")


def fill_for_handlers(lower: Path) -> None:
    """What the acts above need."""
    build(lower, {"d": {"f": b"f"}, "lower": b"lower"})
    for turn in range(TURNS):
        for name in ("doomed", "old", "one", "two", "low"):
            (lower / f"{name}{turn}").write_bytes(name.encode() * 2000)
        (lower / f"link{turn}").symlink_to("lower")
        (lower / f"doomed-dir{turn}").mkdir()
        build(lower / f"list{turn}", {"a": b"", "b": b""})
        os.setxattr(lower / "lower", f"user.x{turn}", b"x")
        os.setxattr(lower / f"low{turn}", "user.x", b"x")


@pytest.mark.expected_log("InjectedFault|failed$|Traceback")
@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
def test_a_handler_that_raises(ours: Stack, ground: Path, native: bool) -> None:
    """Whatever it is, its request fails with EIO and one traceback is logged; asked again it works, like all others."""
    fill_for_handlers(ours.lower)
    flag = ground / "flag"
    options = "timeout=0" if native else "timeout=0,native=off"
    root = ours.mount(options, under=injected.command(ground))
    handlers = HANDLERS if native else {**HANDLERS, **PLAIN_HANDLERS}
    if not native:
        handlers = {name: act for name, act in handlers.items() if name not in ("ioctl", "rename2")}
    raised = 0
    for name, act in handlers.items():
        for turn in range(TURNS):
            expected = errno.ENOENT if name == "lookup" else 0
            if turn == 0:
                flag.write_text("readdirplus" if native and name == "readdir" else name)
                assert outcome(lambda act=act: act(root, 0)) == errno.EIO, name
                assert not flag.exists(), name
                raised += 1
            assert outcome(lambda act=act, turn=turn: act(root, turn)) == expected, (name, turn)
    for name, act in SILENT.items():
        if not native and name == "batch_forget":
            continue  # that one isn't asked through `handler`
        flag.write_text(name)
        act(root, 0)
        end = time.monotonic() + 40
        for tries in itertools.count(1):  # the kernel forgets when it likes to
            if not flag.exists():
                break
            assert time.monotonic() < end, name
            if tries % 100 == 0:
                act(root, 0)
            time.sleep(0.01)
        raised += 1
        assert outcome(lambda act=act: act(root, 1)) == 0
    text = ours.log.read_text()
    assert text.count("Traceback") == text.count("InjectedFault: ") == raised
    view = snapshot(root)
    ours.remount()
    assert_same(view, snapshot(root))


# -- signals --


def work(root: Path, number: int, seconds: float) -> int:
    """Change things in a directory of its own for a while; how many turns."""
    home = root / f"home{number}"
    home.mkdir()
    end = time.monotonic() + seconds
    turn = 0
    while time.monotonic() < end:
        (home / "f").write_bytes(b"%d" % turn * 100)
        os.rename(home / "f", home / f"g{turn % 5}")
        with open(root / f"lower{number}", "ab") as stream:
            stream.write(b"+")
        assert (home / f"g{turn % 5}").read_bytes() == b"%d" % turn * 100
        assert f"g{turn % 5}" in os.listdir(home)
        turn += 1
    assert (root / f"lower{number}").read_bytes() == b"low" + b"+" * turn
    return turn


@contextmanager
def at_work(root: Path, count: int, seconds: float) -> Iterator[list[int]]:
    """Clients at work meanwhile; at the end the turns that each has done."""
    turns: list[int] = []
    threads = [start(lambda number=number: turns.append(work(root, number, seconds))) for number in range(count)]
    yield turns
    for thread in threads:
        thread.join(60)
    assert len(turns) == count
    assert all(turns)


@pytest.fixture
def root(ours: Stack) -> Path:
    """A mount with a file for each client."""
    for number in range(8):
        (ours.lower / f"lower{number}").write_bytes(b"low")
    return ours.mount()


@pytest.mark.parametrize("options", ["", "native=off"])
def test_a_storm_of_signals_at_the_daemon(ours: Stack, options: str) -> None:
    for number in range(3):
        (ours.lower / f"lower{number}").write_bytes(b"low")
    root = ours.mount(options)
    daemon = ours.daemon()
    storm = [signal.SIGUSR1, signal.SIGWINCH, signal.SIGCHLD, signal.SIGPIPE, signal.SIGCONT, signal.SIGURG]
    sent: Counter[int] = Counter()
    with at_work(root, 3, 2):
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            for number in storm:
                os.kill(daemon, number)
                sent[number] += 1
            time.sleep(0.001)
    assert min(sent.values()) > 100
    assert none_waits(root, ours.base)
    assert ours.log.read_text().count("dump on SIGUSR1") > 10


CLIENT = """
import os, signal, sys, time
root, big = sys.argv[1:]
count = 0
def tick(*_):
    global count
    count += 1
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
end = time.monotonic() + 1.5
turn = 0
while time.monotonic() < end:
    path = f"{root}/s{turn}"
    with open(path, "wb") as f:
        f.write(b"%d" % turn * 1000)
        os.fsync(f.fileno())
    with open(path, "rb") as f:
        assert f.read() == b"%d" % turn * 1000
    os.rename(path, path + "-moved")
    assert not os.path.exists(path)
    with open(f"{root}/{big}{turn % 8}", "r+b") as f:
        f.seek(100)
        f.write(b"%4d" % turn)
    os.unlink(path + "-moved")
    turn += 1
signal.setitimer(signal.ITIMER_REAL, 0)
assert count > 100, count
print(turn)
"""


@pytest.mark.parametrize("options", ["", "passthrough=off", "native=off"])
def test_a_storm_of_signals_at_a_client(ours: Stack, options: str) -> None:
    """Each one interrupts the request that the client waits for, which is finished all the same."""
    for number in range(8):
        (ours.lower / f"big{number}").write_bytes(BIG)
    root = ours.mount(options)
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(root), "big"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    turns = int(done.stdout)
    assert turns > 8
    assert none_waits(root, ours.base)
    for number in range(8):
        last = next(turn for turn in range(turns - 1, -1, -1) if turn % 8 == number)
        assert (ours.up / f"big{number}").read_bytes() == BIG[:100] + b"%4d" % last + BIG[104:]


# -- a stop --


def test_a_daemon_that_is_suspended(ours: Stack, root: Path) -> None:
    """Whoever asks it waits, and may be killed; it goes on with the requests of the others."""
    daemon = ours.daemon()
    with at_work(root, 3, 2.5):
        for _ in range(3):
            time.sleep(0.1)
            os.kill(daemon, signal.SIGSTOP)
            asking = ["cat", str(root / "lower7"), str(root / "none")]
            killed = subprocess.Popen(asking, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            patient = start(lambda: (root / "lower6").write_bytes(b"late"))
            assert still_waits(patient)
            killed.kill()
            with suppress(subprocess.TimeoutExpired):
                killed.wait(0.5)  # a request that the daemon has read can't be taken back
            os.kill(daemon, signal.SIGCONT)
            killed.wait(20)
            patient.join(20)
            assert (root / "lower6").read_bytes() == b"late"
    assert none_waits(root, ours.base)
    view = snapshot(root)
    ours.remount()
    assert_same(view, snapshot(root))


# -- disks that fail --


@contextmanager
def on_disk(ground: Path, *mkfs: str, options: str = "rw") -> Iterator[tuple[Disk, Path]]:
    """A disk that can be told to fail, and where its file system is mounted."""
    directory, mounted = ground / "disk", ground / "on-disk"
    directory.mkdir()
    mounted.mkdir()
    run("truncate", "-s", "320M", str(directory / "image"))
    run(*mkfs, str(directory / "image"))
    with disk(directory) as made:
        run("mount", "-o", options, str(made.device), str(mounted))
        try:
            yield made, mounted
        finally:
            run("umount", str(mounted))


EXT4 = ("mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-O", "^has_journal")
XFS = ("mkfs.xfs", "-q", "-f", "-K")


def upper_on(stack: Stack, mounted: Path) -> None:
    """Upper and work there."""
    stack.upper, stack.work = mounted / "upper", mounted / "work"
    stack.up.mkdir()
    stack.work.mkdir()


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@pytest.mark.expected_log(r"upper can't be synced \(Input/output error\)")
@pytest.mark.parametrize("options", ["", "native=off"])
def test_an_upper_that_can_not_be_read_for_a_while(ours: Stack, ground: Path, options: str) -> None:
    (ours.lower / "low").write_bytes(b"low")
    with on_disk(ground, *EXT4) as (below, mounted):
        upper_on(ours, mounted)
        root = ours.mount(options)
        for name in ("open", "closed"):
            (root / name).write_bytes(BIG)
        view = snapshot(root)
        with open(root / "open", "rb", buffering=0) as stream, open(root / "low", "rb", buffering=0) as low:
            drop_caches()
            with below.failing("read"):
                for act in (lambda: stream.read(5), lambda: (root / "closed").read_bytes()):
                    assert outcome(act) == errno.EIO
                assert low.read(5) == b"low"
            assert stream.read(5) == BIG[:5]
            assert_same(view, snapshot(root))
        ours.umount()


@pytest.mark.expected_log(r"upper can't be synced \(Input/output error\)")
@pytest.mark.parametrize("options", ["", "native=off"])
def test_an_upper_that_can_not_be_written_for_a_while(ours: Stack, ground: Path, options: str) -> None:
    """What the disk has lost fsync tells, once to each who has the file open; a copy-up that can't last isn't shown."""
    for name in ("whole", "meta", "small"):
        (ours.lower / name).write_bytes(BIG)
    with on_disk(ground, *EXT4) as (below, mounted):
        upper_on(ours, mounted)
        root = ours.mount(options)
        (root / "file").write_bytes(b"before")
        os.chmod(root / "meta", 0o600)
        fds = [os.open(root / "file", os.O_RDWR) for _ in range(2)]
        os.sync()
        before = snapshot(root)
        with below.failing("bad"):
            for name in ("whole", "meta"):
                assert outcome(lambda name=name: os.close(os.open(root / name, os.O_RDWR))) == errno.EIO
            assert_same(before, snapshot(root))
            os.pwrite(fds[0], BAD, 0)
            assert [outcome(lambda fd=fd: os.fsync(fd)) for fd in fds] == [errno.EIO] * 2
        os.pwrite(fds[0], b"before, and after it", 0)
        for fd in fds:
            os.fsync(fd)
            os.close(fd)
        for name in ("whole", "meta"):
            with open(root / name, "r+b") as stream:
                stream.write(b"new")
                os.fsync(stream.fileno())
        ours.umount()
        assert os.listdir(ours.work / "work") == []
        drop_caches()
        root = ours.mount(options)
        assert (root / "file").read_bytes() == b"before, and after it"
        for name in ("whole", "meta"):
            assert (root / name).read_bytes() == b"new" + BIG[3:]
        ours.umount()


@pytest.mark.expected_log(r"upper can't be synced \(Input/output error\)")
@pytest.mark.expected_log(r"huge: (the copy-up has failed|can't be copied up) \(Input/output error\)")
def test_data_that_follows_and_can_not_be_written(ours: Stack, ground: Path) -> None:
    """An fsync that fails leaves nothing in the page cache to try again with: no later one may say that it is there."""
    data = BIG + bytes(17 << 20)
    (ours.lower / "huge").write_bytes(data)
    with on_disk(ground, *EXT4) as (below, mounted):
        upper_on(ours, mounted)
        root = ours.mount()
        with below.failing("bad"):
            fd = os.open(root / "huge", os.O_RDWR)
            os.pwrite(fd, b"mine", 10 << 20)
            assert outcome(lambda: os.fsync(fd)) == errno.EIO
        assert [outcome(lambda: os.fsync(fd)) for _ in range(2)] == [errno.EIO] * 2
        assert os.pread(fd, 4, 10 << 20) == b"mine"
        os.close(fd)
        end = time.monotonic() + 20
        while "what was written to it is lost" not in ours.log.read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        drop_caches()
        assert (root / "huge").read_bytes() == data
        with open(root / "huge", "r+b", buffering=0) as stream:
            stream.write(b"later")
            os.fsync(stream.fileno())
        drop_caches()
        assert (root / "huge").read_bytes() == b"later" + data[5:]
        ours.umount()


@pytest.mark.expected_log(r"upper can't be synced \(Input/output error\)")
def test_an_upper_whose_file_system_gives_up(ours: Stack, ground: Path) -> None:
    """Nothing in upper can be had any more; the mount says so and can be taken off, and after a repair all is there."""
    build(ours.lower, {"low": b"low", "d": {"f": b"f"}})
    with on_disk(ground, *XFS) as (below, mounted):
        upper_on(ours, mounted)
        root = ours.mount()
        (root / "file").write_bytes(b"kept")
        os.unlink(root / "low")
        os.sync()
        view = snapshot(root)
        with below.failing("write", "flush"):
            outcome(lambda: (root / "lost").write_bytes(b"lost"))
            outcome(lambda: os.sync())
            end = time.monotonic() + 20
            while outcome(lambda: os.mkdir(root / "dir")) == 0 and time.monotonic() < end:
                os.rmdir(root / "dir")
        for act in (
            lambda: os.mkdir(root / "another"),
            lambda: os.unlink(root / "file"),
            lambda: os.chmod(root / "d/f", 0o600),
            lambda: os.rename(root / "d", root / "e"),
        ):
            assert outcome(act) == errno.EIO
        ours.umount()
        run("umount", str(mounted))
        run("mount", str(below.device), str(mounted))
        root = ours.mount()
        os.unlink(root / "lost") if (root / "lost").exists() else None
        assert_same(view, snapshot(root))
        (root / "d/f").write_bytes(b"goes on")
        ours.umount()


# -- lowers --


def test_a_lower_that_can_not_be_read_for_a_while(ours: Stack, ground: Path) -> None:
    with on_disk(ground, *EXT4) as (below, mounted):
        ours.lowers = [mounted / "lower", ours.lower]
        build(ours.lower, {"d": {f"f{number}": BIG[:9000] for number in range(40)}, "big": BIG})
        build(ours.lowers[1], {"d": {"other": b"other"}, "else": b"else"})
        view = snapshot(ours.lower)
        root = ours.mount()
        (root / "own").mkdir()
        drop_caches()
        with open(root / "else", "rb", buffering=0) as stream, below.failing("read"):
            assert outcome(lambda: (root / "d/f7").read_bytes()) == errno.EIO
            assert outcome(lambda: os.close(os.open(root / "big", os.O_WRONLY | os.O_APPEND))) == errno.EIO
            assert outcome(lambda: os.unlink(root / "d/f8")) in (0, errno.EIO)
            (root / "own/new").write_bytes(b"new")
            assert stream.read() == b"else"
        if not (root / "d/f8").exists():
            (root / "d/f8").write_bytes(BIG[:9000])
        for path in view:
            found = root / os.fsdecode(path[1:])
            assert found.is_dir() or found.read_bytes() in (BIG, BIG[:9000]), path
        with open(root / "big", "ab") as appended:
            appended.write(b"tail")
        ours.remount()
        assert (root / "big").read_bytes() == BIG + b"tail"
        assert (root / "own/new").read_bytes() == b"new"
        ours.umount()


def test_a_lower_that_vanishes_and_comes_back(ours: Stack, check_by_overlay: Callable[[Stack], Path]) -> None:
    """It must not be changed, but if it is: what has been seen fails or shows the one or the other, upper is not touched."""
    tree: Tree = {"d": {f"f{number}": b"%d" % number * 100 for number in range(30)}, "e": {"x": b"x"}, "top": b"top"}
    build(ours.lower, tree)
    root = ours.mount()
    (root / "mine").write_bytes(b"mine")
    (root / "d/f0").write_bytes(b"changed")
    with open(root / "d/f1", "rb") as held, open(root / "d/f2", "rb") as gone:
        assert gone.read(3) == b"222"
        os.rename(ours.lower, ours.base / "away")
        assert held.read() == b"1" * 100  # a name is not what the union has of a layer
        os.rename(ours.base / "away", ours.lower)
        for name in ("d", "e"):
            os.rename(ours.lower / name, ours.base / f"away-{name}")
        os.unlink(ours.lower / "top")
        drop_caches()
        acts: list[Callable[[], object]] = [
            lambda: os.listdir(root / "d"),
            lambda: (root / "d/f5").read_bytes(),
            lambda: os.chmod(root / "d/f6", 0o600),
            lambda: os.close(os.open(root / "d/f7", os.O_WRONLY | os.O_APPEND)),
            lambda: os.unlink(root / "d/f8"),
            lambda: os.rename(root / "e", root / "moved"),
            lambda: os.rename(root / "d/f9", root / "d/renamed"),
            lambda: (root / "top").read_bytes(),
            lambda: os.listdir(root),
        ]
        found = [outcome(act) for act in acts]
        assert set(found) <= {0, errno.ENOENT, errno.ESTALE, errno.EIO}, found
        assert (root / "mine").read_bytes() == b"mine"
        assert (root / "d/f0").read_bytes() == b"changed"
        (root / "later").write_bytes(b"later")
    for name in ("d", "e"):
        os.rename(ours.base / f"away-{name}", ours.lower / name)
    (ours.lower / "top").write_bytes(b"other")
    ours.remount()
    assert (root / "mine").read_bytes() == b"mine"
    assert (root / "later").read_bytes() == b"later"
    assert (root / "d/f0").read_bytes() == b"changed"
    for number in range(10, 30):
        assert (root / f"d/f{number}").read_bytes() == b"%d" % number * 100
    assert (root / "top").read_bytes() == b"other"
    view = snapshot(root)
    ours.umount()
    assert_same(view, snapshot(check_by_overlay(ours)))
