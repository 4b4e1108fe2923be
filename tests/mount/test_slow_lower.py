"""A lower on slow storage: a FUSE file system of the test's own that takes 20 ms for each operation and caches nothing.

Who wants something of it waits; nobody else does.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.layers import FIFO, WHITEOUT, File, HardLink, Symlink, Tree, build, is_whiteout, opaque
from tests.support.mounts import Stack, overlay_mount, wait_gone
from tests.support.slowfs import slow_view
from tests.support.snapshot import assert_same, snapshot

StackMaker = Callable[..., Stack]
SECONDS = 0.02

PART: Tree = {f"d{number}": {f"f{inner}": b"%d" % inner for inner in range(4)} for number in range(2)}
FAR: Tree = {
    **{f"part{number}": PART for number in range(4)},
    "big": os.urandom(300_000),
    "small": File(b"content", mode=0o640, uid=7, gid=8, xattrs={"user.x": b"value", "trusted.y": b"z"}, mtime=10**18),
    "suid": File(b"s", mode=0o4755),
    "link": Symlink("small"),
    "fifo": FIFO,
    "one": b"linked",
    "other": HardLink("one"),
    "empty": {},
    "merged": {"far": b"far", "hidden": b"h", "both": b"below", "deep": {"far": b"f"}},
    "opaque": {"old": b"old"},
    "gone": b"gone",
    "gone-dir": {"x": b""},
    "dir": {"sub": {"f": b"f"}, "l": Symlink("sub/f"), "g": b"g"},
}
NEAR: Tree = {
    "merged": {"near": b"near", "hidden": WHITEOUT, "both": b"above", "deep": {"near": b"n"}},
    "opaque": {"new": b"new"},
    "gone": WHITEOUT,
    "gone-dir": WHITEOUT,
    "own": {"n": b"near", "dir": {}},
}


@dataclass
class Far:
    """A union over a fast lower and a slow one, whose content lies in `source`."""

    stack: Stack
    source: Path
    server: int

    @property
    def near(self) -> Path:
        """The fast lower."""
        return self.stack.lowers[0]


@pytest.fixture
def far(make_stack: StackMaker, ground: Path, request: pytest.FixtureRequest) -> Iterator[Far]:
    """A stack whose second lower is slow (how slow, a parameter may say); not yet mounted."""
    stack = make_stack("union", lowers=2)
    build(stack.lowers[0], NEAR)
    opaque(stack.lowers[0] / "opaque")
    source = stack.lowers[1]
    build(source, FAR)
    with slow_view(source, ground / "slow", getattr(request, "param", SECONDS)) as server:
        stack.lowers[1] = ground / "slow"
        yield Far(stack, source, server)
        stack.umount()


def walk(top: Path) -> int:
    """Look at, list and read all below a directory; how many files there are."""
    count = 0
    for base, _, names in os.walk(top):
        for name in names:
            path = Path(base, name)
            if stat.S_ISREG(path.lstat().st_mode):
                path.read_bytes()
            count += 1
    return count


not_so_slow = pytest.mark.parametrize("far", [SECONDS / 20], indirect=True, ids=["1ms"])
"""For tests of what is done, not of who waits."""


def act_near(own: int, number: int) -> int:
    """Make requests that no cache of the kernel's can answer, in a directory that isn't slow; how many, at least."""
    name = f"made-{number}"
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=own))
    with suppress(FileNotFoundError):
        os.stat(f"no-{number}", dir_fd=own)
    os.rename(name, name + "+", src_dir_fd=own, dst_dir_fd=own)
    listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=own)
    assert sorted(os.listdir(listing)) == ["dir", name + "+", "n"]
    os.close(listing)
    os.unlink(name + "+", dir_fd=own)
    return 5


@pytest.mark.parametrize("options", ["", "timeout=0", "native=off"])
def test_others_are_answered_meanwhile(far: Far, options: str) -> None:
    """If each of the others' requests waited for one of the slow layer's answers, there could be only so many."""
    root = far.stack.mount(options)
    own = os.open(root / "own", os.O_RDONLY | os.O_DIRECTORY)
    done = 0
    try:
        with ThreadPoolExecutor(4) as pool:
            began = time.monotonic()
            walkers = [pool.submit(walk, root / f"part{number}") for number in range(4)]
            while not all(walker.done() for walker in walkers):
                done += act_near(own, done)
            elapsed = time.monotonic() - began
            assert [walker.result() for walker in walkers] == [8] * 4
    finally:
        os.close(own)
    assert done > 3 * elapsed / SECONDS, f"{done} operations in {elapsed:.2f} s"


def test_others_are_answered_while_the_server_is_away(far: Far) -> None:
    """Who waits for it is served when it is back."""
    root = far.stack.mount()
    (root / "own").stat()  # to find out whether the slow lower has a part of it, too
    os.kill(far.server, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(150) as pool:
            waiting = [pool.submit(walk, root / f"part{number}") for number in range(4)]
            waiting += [pool.submit(lambda: len((root / "small").read_bytes())) for _ in range(2)]
            absent = [pool.submit(os.path.lexists, root / f"no-{number}") for number in range(130)]
            try:
                time.sleep(0.3)
                for number in range(50):
                    assert (root / "own" / "n").read_bytes() == b"near"
                    (root / "own" / f"x{number}").write_bytes(b"x")
                assert not any(future.done() for future in waiting + absent)
            finally:
                os.kill(far.server, signal.SIGCONT)
            assert [future.result(60) for future in waiting] == [8, 8, 8, 8, 7, 7]
            assert not any(future.result(60) for future in absent)
    finally:
        os.kill(far.server, signal.SIGCONT)


def test_a_server_that_dies(far: Far) -> None:
    """Who wants something of it gets an error; all else goes on, and the end is a clean one."""
    root = far.stack.mount()
    (root / "own").stat()  # to find out whether the slow lower has a part of it, too
    with open(root / "big", "rb") as opened, ThreadPoolExecutor(4) as pool:
        walkers = [pool.submit(walk, root / f"part{number}") for number in range(4)]
        time.sleep(0.1)
        os.kill(far.server, signal.SIGKILL)
        for walker in walkers:
            with suppress(OSError):
                walker.result(30)
        with pytest.raises(OSError, match="not connected"):
            (root / "small").stat()
        assert opened.fileno()
        assert (root / "own" / "n").read_bytes() == b"near"
        (root / "own" / "n").write_bytes(b"changed")
    assert (root / "own" / "n").read_bytes() == b"changed"
    far.stack.umount()


def test_two_clients_are_faster_than_one(far: Far) -> None:
    """What waits for a slow layer leaves time for others who do."""
    root = far.stack.mount()

    def seconds(*parts: int) -> float:
        with ThreadPoolExecutor(len(parts)) as pool:
            began = time.monotonic()
            assert list(pool.map(walk, [root / f"part{part}" for part in parts])) == [8] * len(parts)
            return time.monotonic() - began

    (root / "own").stat()
    alone = seconds(0)
    together = seconds(1, 2, 3)
    assert together < 2 * alone, f"three at once took {together:.2f} s, one {alone:.2f} s"


@not_so_slow
@pytest.mark.parametrize("options", ["", "timeout=0", "native=off"])
def test_everything_is_seen_as_it_is(far: Far, ground: Path, options: str) -> None:
    """Files, links, attributes, listings, and what the other lower hides or adds, as kernel overlayfs shows it."""
    root = far.stack.mount(options)
    links = options != "native=off"  # plain pyfuse3 can't show one number for the names of a lower hard link
    seen = snapshot(root, links=links)
    far.stack.umount()
    oracle = ground / "oracle"
    oracle.mkdir()
    with overlay_mount([far.near, far.source], None, oracle / "mnt") as kernel:
        assert_same(seen, snapshot(kernel.mnt, links=links))


def change(root: Path) -> None:
    """All kinds of changes to what is in the slow lower."""
    (root / "small").chmod(0o600)
    with open(root / "big", "r+b") as stream:
        stream.seek(1000)
        stream.write(b"changed")
    (root / "link").unlink()
    os.symlink("big", root / "link")
    os.setxattr(root / "suid", "user.new", b"1")
    os.chown(root / "fifo", 3, 4)
    os.truncate(root / "part3" / "d0" / "f1", 0)
    os.rename(root / "part3" / "d0" / "f2", root / "part3" / "renamed")
    os.rename(root / "dir", root / "moved")
    (root / "moved" / "sub" / "new").write_bytes(b"new")
    os.rename(root / "moved" / "l", root / "moved" / "sub" / "l2")
    os.rmdir(root / "empty")
    os.mkdir(root / "empty")
    shutil.rmtree(root / "part2")
    os.rename(root / "part1" / "d0" / "f0", root / "part1" / "d1" / "f0")
    os.link(root / "part1" / "d1" / "f0", root / "again")
    os.unlink(root / "merged" / "both")
    os.unlink(root / "merged" / "far")
    (root / "merged" / "hidden").write_bytes(b"back")
    os.rename(root / "merged" / "deep", root / "opaque" / "deep")
    with pytest.raises(OSError, match="not empty"):
        os.rmdir(root / "part0" / "d0")


@not_so_slow
@pytest.mark.parametrize("options", ["", "timeout=0", "metacopy=off", "native=off"])
def test_changes_are_those_of_overlayfs(far: Far, ground: Path, options: str) -> None:
    """The same changes through both, on the same lowers, once slow and once not: the same union, now and mounted anew."""
    root = far.stack.mount(options)
    change(root)
    seen = snapshot(root, times=False, links=False)
    assert_same(seen, snapshot(far.stack.remount(options), times=False, links=False))
    far.stack.umount()
    assert is_whiteout(far.stack.up / "part2")
    oracle = ground / "oracle"
    (oracle / "upper").mkdir(parents=True)
    with overlay_mount([far.near, far.source], oracle / "upper", oracle / "mnt", options="index=off") as kernel:
        change(kernel.mnt)
        assert_same(seen, snapshot(kernel.mnt, times=False, links=False))


@not_so_slow
def test_one_copy_up_for_many_who_want_it(far: Far) -> None:
    root = far.stack.mount()
    barrier = threading.Barrier(12)

    def append(number: int) -> None:
        barrier.wait()
        with open(root / "big", "r+b", buffering=0) as stream:
            os.pwrite(stream.fileno(), b"%04d" % number, number * 8192)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(append, range(12)))
    expected = bytearray((far.source / "big").read_bytes())
    for number in range(12):
        expected[number * 8192 : number * 8192 + 4] = b"%04d" % number
    assert (root / "big").read_bytes() == expected
    assert far.stack.counter("copy_ups") == 1
    assert sorted(os.listdir(far.stack.up)) == ["big"]


def test_many_change_the_same_things_at_once(far: Far) -> None:
    """Whoever comes second finds what the first one left; no outcome but the usual ones."""
    root = far.stack.mount()
    outcomes: list[OSError] = []

    def attempt(act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as exc:
            outcomes.append(exc)

    def append(path: Path) -> None:
        with open(path, "ab") as stream:
            stream.write(b"x")

    acts: list[Callable[[], object]] = []
    for number in range(3):
        acts += [lambda: os.unlink(root / "part0" / "d0" / "f0")]
        acts += [lambda number=number: os.rename(root / "part0" / "d0" / "f1", root / f"to{number}")]
        acts += [lambda number=number: (root / "part0" / "d0" / f"new{number}").write_bytes(b"n")]
        acts += [lambda: (root / "part0" / "d0" / "f2").chmod(0o600)]
        acts += [lambda: append(root / "part0" / "d0" / "f3")]
        acts += [lambda: shutil.rmtree(root / "part1", ignore_errors=True)]
        acts += [lambda: os.listdir(root / "part0" / "d0")]
        acts += [lambda: walk(root / "part1")]
    with ThreadPoolExecutor(len(acts)) as pool:
        list(pool.map(attempt, acts))
    assert all(isinstance(exc, FileNotFoundError) for exc in outcomes), outcomes
    below = root / "part0" / "d0"
    assert sorted(os.listdir(below)) == ["f2", "f3", "new0", "new1", "new2"]
    assert (below / "f3").read_bytes() == b"3xxx"
    assert stat.S_IMODE((below / "f2").stat().st_mode) == 0o600
    assert len([name for name in os.listdir(root) if name.startswith("to")]) == 1
    shutil.rmtree(root / "part1", ignore_errors=True)
    assert not (root / "part1").exists()


@pytest.mark.parametrize("how", ["terminated", "detached"])
def test_ends_while_requests_wait(far: Far, how: str) -> None:
    root = far.stack.mount()
    daemon = far.stack.daemon()

    def look(number: int) -> None:
        with suppress(OSError):
            walk(root / f"part{number}")

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(look, number) for number in range(4)]
        time.sleep(0.1)
        if how == "terminated":
            os.kill(daemon, signal.SIGTERM)
        else:
            far.stack.abort()
        for client in clients:
            client.result(30)
    assert wait_gone(daemon, 20)
    far.stack.mounted = False


@not_so_slow
@pytest.mark.parametrize(("options", "waits"), [("", True), ("slow_lower=on", True), ("slow_lower=off", False)])
def test_the_option_decides(far: Far, options: str, waits: bool) -> None:
    root = far.stack.mount(options)
    assert (root / "small").read_bytes() == b"content"
    assert bool(far.stack.counter("slow_answers")) == waits


def test_local_layers_are_not_slow(ours: Stack) -> None:
    build(ours.lower, {"f": b"x"})
    root = ours.mount()
    assert (root / "f").read_bytes() == b"x"
    assert ours.counter("slow_answers") == 0
