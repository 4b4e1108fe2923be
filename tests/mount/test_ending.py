"""The end of a mount on a signal, in the midst of work: what was answered is there, what is under way is finished."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import StackMaker
from tests.mount.posix.table import fails
from tests.mount.test_lazy import DATA, Held, held, published, start, still_waits  # noqa: F401  # held is a fixture
from tests.support.cli import Said, unionfs
from tests.support.mounts import Stack, environment, mounted_below, wait_gone
from tests.support.snapshot import assert_same, snapshot

WRITERS = 6
GONE = {errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT}
"""What a client gets from a mount that has ended; below the mount point there is nothing then."""


class Writer:
    """A client that works until its mount is gone, and knows what it was told is done."""

    def __init__(self, root: Path, number: int) -> None:
        self.root, self.number = root, number
        self.done: dict[str, bytes] = {}
        self.under_way = ""
        self.error = 0

    def run(self) -> None:
        try:
            for turn in range(100_000):
                self._turn(turn)
        except OSError as error:
            self.error = error.errno or -1

    def _turn(self, turn: int) -> None:
        name = f"w{self.number}-{turn}"
        self.under_way = name
        fd = os.open(self.root / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            os.write(fd, b"%d" % turn * 500)
        finally:
            os.close(fd)
        self.done[name] = b"%d" % turn * 500
        self.under_way = shared = f"lower{self.number}"
        fd = os.open(self.root / shared, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, b"+")
        finally:
            os.close(fd)
        self.done[shared] = self.done.get(shared, b"low") + b"+"
        if turn % 3 == 0:
            self.under_way = name
            os.rename(self.root / name, self.root / f"{name}-moved")
            self.done[f"{name}-moved"] = self.done.pop(name)

    def check(self, root: Path) -> None:
        """All that was done is there; what was under way may be."""
        assert self.error in GONE, errno.errorcode.get(self.error, self.error)
        for name, data in self.done.items():
            path = root / name
            if name == self.under_way and not path.exists():
                path = root / f"{name}-moved"
            found = path.read_bytes()
            assert found == data or (name == self.under_way and found == data + b"+"), name


@pytest.mark.parametrize("options", ["", "passthrough=off", "native=off"])
def test_clients_at_work(ours: Stack, check_by_overlay: Callable[[Stack], Path], options: str) -> None:
    for number in range(WRITERS):
        (ours.lower / f"lower{number}").write_bytes(b"low")
    root = ours.mount(options)
    daemon = ours.daemon()
    writers = [Writer(root, number) for number in range(WRITERS)]
    threads = [start(writer.run) for writer in writers]
    time.sleep(0.7)
    os.kill(daemon, signal.SIGTERM)
    assert wait_gone(daemon)
    ours.mounted = False
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert root not in mounted_below(ours.base)
    assert os.listdir(ours.work / "work") == []
    assert all(len(writer.done) > 3 for writer in writers)
    for name in os.listdir(root):  # made when the mount was gone already, in the directory below it
        writers[int(name[1])].done.pop(name)
        (root / name).unlink()
    for writer in writers:
        writer.check(ours.up)
    view = snapshot(ours.mount())
    ours.umount()
    assert_same(view, snapshot(check_by_overlay(ours)))


def test_whoever_waits_gets_an_answer(ours: Stack, held: Held) -> None:  # noqa: F811
    """An fsync that waits for the copy of a big file is answered, and so is what other clients ask meanwhile."""
    (ours.lower / "f").write_bytes(DATA)
    (ours.lower / "g").write_bytes(b"g")
    root = ours.mount()
    daemon = ours.daemon()
    fd = os.open(root / "f", os.O_RDWR)
    os.pwrite(fd, b"first", 0)
    outcome: list[int] = []

    def sync() -> None:
        try:
            os.fsync(fd)
            outcome.append(0)
        except OSError as error:
            outcome.append(error.errno or -1)

    thread = start(sync)
    assert still_waits(thread)
    os.kill(daemon, signal.SIGTERM)
    assert not wait_gone(daemon, 0.3)
    os.kill(daemon, signal.SIGTERM)  # nor does a second one hurry it
    (root / "g").write_bytes(b"changed")
    assert not wait_gone(daemon, 0.3)
    held.release()
    assert wait_gone(daemon)
    ours.mounted = False
    thread.join(20)
    assert outcome == [0]
    with fails(errno.ENOTCONN):
        os.close(fd)
    assert published(ours)
    assert (ours.up / "f").read_bytes() == b"first" + DATA[5:]
    assert (ours.up / "g").read_bytes() == b"changed"
    assert os.listdir(ours.work / "work") == []


@pytest.mark.parametrize("options", ["", "passthrough=off", "native=off"])
def test_what_was_written_to_a_mapping_is_kept(ours: Stack, options: str) -> None:
    for name, size in (("small", 8192), ("big", 20 << 20)):
        (ours.lower / name).write_bytes(bytes(size))
    root = ours.mount(options)
    (root / "new").write_bytes(bytes(8192))
    maps: list[mmap.mmap] = []
    for name in ("small", "big", "new"):
        fd = os.open(root / name, os.O_RDWR)
        maps.append(mmap.mmap(fd, 8192))
        os.close(fd)
        maps[-1][4090:4100] = b"0123456789"
    daemon = ours.daemon()
    os.kill(daemon, signal.SIGTERM)
    assert wait_gone(daemon)
    ours.mounted = False
    for name in ("small", "big", "new"):
        assert (ours.up / name).read_bytes()[4090:4100] == b"0123456789", name
    for mapped in maps:
        mapped.close()


@pytest.mark.parametrize("options", ["", "passthrough=off", "native=off"])
def test_what_was_written_to_a_mapping_in_a_bind_path_is_kept(make_stack: StackMaker, options: str) -> None:
    bound = make_stack("bind", options=options)
    (bound.below / "old").write_bytes(bytes(8192))
    bound.mount()
    (bound.inside / "new").write_bytes(bytes(8192))
    with ExitStack() as maps:
        for name in ("old", "new"):
            fd = os.open(bound.inside / name, os.O_RDWR)
            mapped = maps.enter_context(mmap.mmap(fd, 8192))
            os.close(fd)
            mapped[4090:4100] = b"0123456789"
        daemon = bound.daemon()
        os.kill(daemon, signal.SIGTERM)
        assert wait_gone(daemon)
        bound.mounted = False
        for name in ("old", "new"):
            assert (bound.below / name).read_bytes()[4090:4100] == b"0123456789", name


def test_one_of_several_daemons_that_start_at_once(ours: Stack, ground: Path) -> None:
    """Each wants the same upper and work; one gets them, the others say in one line who has them."""
    points = [ground / f"mnt{number}" for number in range(5)]
    for point in points:
        point.mkdir()
    command = [sys.executable, "-m", "unionfs", "mount", "--work", str(ours.work), str(ours.lower), str(ours.up)]
    started = [
        subprocess.Popen([*command, str(point)], env=environment(), stderr=subprocess.PIPE, text=True)
        for point in points
    ]
    said = [process.communicate(timeout=60)[1] for process in started]
    winners = [number for number, process in enumerate(started) if process.returncode == 0]
    assert len(winners) == 1, said
    for number, process in enumerate(started):
        if number not in winners:
            assert process.returncode == 4, said
            assert len(said[number].splitlines()) == 1
            assert str(ours.up) in said[number] or str(ours.work) in said[number]
    assert mounted_below(ground) == [points[winners[0]]]
    again = unionfs("mount", "--work", ours.work, ours.lower, ours.up, points[(winners[0] + 1) % 5])
    assert again.status == 4
    assert str(points[winners[0]]) in again.err
    assert unionfs("umount", points[winners[0]]) == Said(0, "", "")


def test_a_stopped_daemon_that_is_killed(ours: Stack) -> None:
    """Whoever waits for it is freed, and the dead mount is known and cleared."""
    (ours.lower / "f").write_bytes(b"f")
    root = ours.mount()
    daemon = ours.daemon()
    os.kill(daemon, signal.SIGSTOP)
    failed: list[int] = []

    def look() -> None:
        try:
            os.listdir(root)
        except OSError as error:
            failed.append(error.errno or -1)

    thread = start(look)
    assert still_waits(thread)
    os.kill(daemon, signal.SIGKILL)
    assert wait_gone(daemon)
    thread.join(20)
    assert failed
    assert failed[0] in GONE
    said = unionfs("umount", root)
    assert (said.status, said.err) == (0, f"unionfs: cleared the dead mount on {root}\n")
    ours.mounted = False


@pytest.mark.parametrize("delay", [0.002, 0.004, 0.008, 0.016, 0.03])
def test_one_more_signal(ours: Stack, delay: float) -> None:
    """It doesn't keep the daemon from ending in order."""
    root = ours.mount(extra=["--log-level", "info"])
    (root / "file").write_bytes(b"data")
    os.unlink(root / "file")
    pid = ours.daemon()
    os.kill(pid, signal.SIGTERM)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    assert wait_gone(pid)
    ours.mounted = False
    assert not mounted_below(ours.mnt)
    assert ours.log.read_text().endswith(": ended\n")
