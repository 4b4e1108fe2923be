"""The session loop of `unionfs.fuse.dispatch`: requests overlap, other tasks get their turn, idle costs nothing, it ends."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.test_native_fs import Served, served
from tests.support import raw


@pytest.fixture(params=["dispatch ticks", "plain dispatch ticks"])
def fs(ground: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    """The file system under our dispatch, with the native layer and without, beside a task that counts its turns."""
    with served(ground, *request.param.split()) as running:
        (running.source / "f").write_bytes(b"x")
        yield running


def look_up(path: Path) -> threading.Thread:
    """Look `path` up in a thread of its own."""
    thread = threading.Thread(target=path.exists)
    thread.start()
    return thread


def test_requests_go_on_while_handlers_wait(fs: Served) -> None:
    """Twelve lookups that wait in a worker thread leave room for hundreds of others, and don't wait for each other."""
    waiting = []
    for number in range(12):
        (fs.source / f"d{number}").mkdir()  # one directory each: without the layer a lookup holds its parent's lock
        (fs.mnt / f"d{number}").stat()
        waiting.append(look_up(fs.mnt / f"d{number}" / "slow"))
    answered = [sum(thread.is_alive() for thread in waiting)]
    while answered[-1]:
        (fs.mnt / "f").chmod(0o644)
        answered.append(sum(thread.is_alive() for thread in waiting))
    assert answered.count(12) > 1
    assert len(answered) > 20
    fs.end()


def test_requests_go_on_while_the_host_reads(ground: Path) -> None:
    """Reads that the host's cache can't answer wait in the native layer's threads. The host here is a slow FUSE."""
    (ground / "below").mkdir()
    (ground / "above").mkdir()
    with served(ground / "below", "plain", "dispatch") as below:
        for number in range(6):
            (below.source / f"lazy{number}").write_bytes(b"data" * number)
        (ground / "above" / "source").symlink_to(below.mnt)
        with served(ground / "above", "dispatch") as above:
            results: list[bytes] = []
            readers = [
                threading.Thread(target=lambda path=path: results.append(path.read_bytes()))  # type: ignore[misc]
                for path in (above.mnt / f"lazy{number}" for number in range(6))
            ]
            for thread in readers:
                thread.start()
            answered = 0
            while any(thread.is_alive() for thread in readers):
                (above.mnt / "lazy0").chmod(0o600 + answered % 8)
                answered += 1
            assert sorted(results) == [b"data" * number for number in range(6)]
            assert answered > 20
            above.end()
        below.end()


def test_other_tasks_run_under_load(fs: Served) -> None:
    """A task that wakes up every millisecond goes on while requests come without a pause."""
    stop = threading.Event()

    def load(name: str) -> None:
        while not stop.is_set():
            fd = os.open(fs.mnt / name, os.O_RDWR | os.O_CREAT)
            os.pwrite(fd, b"data", 0)
            os.close(fd)

    threads = [threading.Thread(target=load, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    first = fs.report()
    deadline = time.monotonic() + 30
    for number in itertools.count():
        last = fs.report()
        opens = last["python"].get("open", 0) - first["python"].get("open", 0)
        if (number >= 20 and opens and last["ticks"] > first["ticks"]) or time.monotonic() > deadline:
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert opens > 0
    assert last["ticks"] > first["ticks"]


def cpu_ticks(pid: int) -> int:
    """User and system time of a process so far, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.parametrize("words", ["dispatch", "plain dispatch"])
def test_idle_uses_no_processor(ground: Path, words: str) -> None:
    with served(ground, *words.split()) as fs:
        (fs.mnt / "f").write_bytes(b"y")
        time.sleep(0.2)
        before = cpu_ticks(fs.process.pid)
        time.sleep(1)
        assert cpu_ticks(fs.process.pid) - before <= 1
        fs.end()


def test_ends_when_unmounted(fs: Served) -> None:
    (fs.mnt / "f").write_bytes(b"y")
    fs.end()


def test_ends_on_terminate_and_unmounts(fs: Served) -> None:
    (fs.mnt / "f").write_bytes(b"y")
    fs.process.send_signal(signal.SIGTERM)
    fs.ended()
    assert not os.path.ismount(fs.mnt)


def test_ends_on_terminate_with_many_idle_tasks(fs: Served) -> None:
    threads = []
    for number in range(8):
        (fs.source / f"d{number}").mkdir()
        threads.append(look_up(fs.mnt / f"d{number}" / "slow"))
    for thread in threads:
        thread.join()
    fs.process.send_signal(signal.SIGTERM)
    fs.ended()


def test_ends_when_cancelled(fs: Served) -> None:
    (fs.mnt / "f").write_bytes(b"y")
    fs.process.send_signal(signal.SIGUSR2)
    fs.ended()


def test_ends_when_the_connection_is_aborted(fs: Served) -> None:
    raw.umount2(fs.mnt, raw.MNT_FORCE | raw.MNT_DETACH)
    fs.ended()
