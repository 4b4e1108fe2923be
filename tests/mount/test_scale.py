"""Big directories and many inodes: what they cost is counted in requests, system calls and bytes, never in time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import Stack
from tests.support.raw import DirStream

NAMES = 100_000
SOME = 40_000


def fill(directory: Path, count: int) -> None:
    """Make `count` empty files: hard links of a few, which is far quicker."""
    directory.mkdir(exist_ok=True)
    here = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    for number in range(count):
        os.close(os.open(f"name-{number:06}", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


@contextmanager
def counted_calls(pid: int, output: Path) -> Iterator[dict[str, int]]:
    """Count the system calls of a process by strace(1); the dict is filled at the end."""
    counts: dict[str, int] = {}
    tracer = subprocess.Popen(
        ["strace", "-f", "-c", "-U", "name,calls", "-o", str(output), "-p", str(pid)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert tracer.stderr is not None
    while "attached" not in tracer.stderr.readline():
        pass
    try:
        yield counts
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(30)
        tracer.stderr.close()
        for line in output.read_text().splitlines():
            if found := re.match(r"^(\w+)\s+(\d+)$", line.strip()):
                counts[found[1]] = int(found[2])


def resident(pid: int) -> int:
    """Anonymous resident memory of a process in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    assert found
    return int(found[1]) * 1024


def drop_caches() -> None:
    """Make the kernel forget inodes and names."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


@pytest.mark.fault_seconds(240)
def test_a_directory_of_a_hundred_thousand_names(ours: Stack) -> None:
    fill(ours.lower / "d", NAMES)
    root = ours.mount()
    pid = ours.daemon()
    trace = ours.base / "strace.txt"
    with counted_calls(pid, trace) as listing, DirStream(root / "d") as stream:
        count = sum(1 for _ in stream)
    assert count == NAMES + 2
    batches = NAMES // 300
    assert listing.get("getdents64", 0) < batches, "the layer is read once, in big pieces"
    for call in ("newfstatat", "statx", "llistxattr", "openat"):
        assert listing.get(call, 0) < NAMES * 1.02, f"{call} more than once for an entry"
    pairs = 50
    (root / "d" / "warm").touch()
    os.unlink(root / "d" / "warm")
    with counted_calls(pid, trace) as changes:
        for number in range(pairs):
            os.close(os.open(root / "d" / f"new-{number}", os.O_CREAT | os.O_WRONLY))
            os.unlink(root / "d" / f"new-{number}")
    assert changes.get("getdents64", 0) == 0, "creating and removing lists nothing"
    total = sum(changes.values())
    assert total < pairs * 100, f"{total / pairs:.0f} system calls for a create and an unlink"
    with counted_calls(pid, trace) as lower_changes:
        for number in range(pairs):
            os.unlink(root / "d" / f"name-{number:06}")
    assert lower_changes.get("getdents64", 0) == 0
    with DirStream(root / "d") as stream:
        assert sum(1 for _ in stream) == NAMES + 2 - pairs


@pytest.mark.fault_seconds(240)
def test_cost_of_a_pair_does_not_grow_with_the_directory(ours: Stack) -> None:
    """The same number of system calls beside ten names and beside many thousands, in lower, upper and merged ones."""
    for where in ("small", "large"):
        fill(ours.lower / where, 10 if where == "small" else 20_000)
    root = ours.mount()
    pid = ours.daemon()
    costs: dict[str, int] = {}
    for where in ("small", "large"):
        for name in ("first", "second"):
            (root / where / name).touch()
            os.unlink(root / where / name)
        with counted_calls(pid, ours.base / "strace.txt") as calls:
            for number in range(30):
                path = root / where / f"new-{number}"
                path.touch()
                os.rename(path, root / where / f"newer-{number}")
                os.unlink(root / where / f"newer-{number}")
                os.unlink(root / where / f"name-{number % 10:06}") if number < 10 else None
        costs[where] = sum(
            count for name, count in calls.items() if name not in {"epoll_wait", "ppoll", "read", "futex"}
        )
    assert abs(costs["large"] - costs["small"]) < costs["small"] * 0.25, costs


@pytest.mark.fault_seconds(240)
def test_memory_per_inode_and_on_forget(ours: Stack) -> None:
    """At most 1 KB of daemon memory for an inode that the kernel knows, given back when it forgets."""
    fill(ours.lower / "d", SOME)
    root = ours.mount()
    pid = ours.daemon()
    for _ in range(2):  # the second round: what the allocator needs is there
        drop_caches()
        time.sleep(1)
        before = resident(pid)
        total = sum(os.lstat(root / "d" / f"name-{number:06}").st_nlink for number in range(SOME))
        assert total == SOME
        grown = resident(pid) - before
        assert grown <= SOME * 1024, f"{grown / SOME:.0f} bytes for each inode"
    peak = resident(pid)
    for _ in range(30):
        drop_caches()
        time.sleep(0.3)
        if resident(pid) < peak / 2 or ours.counter("nodes") < 100:
            break
    assert ours.counter("nodes") < 100, "nodes are freed on forget"


@pytest.mark.fault_seconds(240)
def test_no_growth_over_many_rounds(ours: Stack) -> None:
    """Create, write, rename, remove, list: again and again, and neither memory nor descriptors nor nodes pile up."""
    fill(ours.lower / "d", 200)
    root = ours.mount()
    pid = ours.daemon()

    def turn(number: int) -> None:
        for inner in range(150):
            path = root / "d" / f"x{inner}"
            path.write_bytes(b"data")
            os.rename(path, root / "d" / f"y{inner}")
            os.unlink(root / "d" / f"y{inner}")
        os.listdir(root / "d")
        (root / f"dir{number}").mkdir()
        os.rmdir(root / f"dir{number}")

    for number in range(4):
        turn(number)
    before = resident(pid), len(os.listdir(f"/proc/{pid}/fd"))
    for number in range(12):
        turn(number)
    after = resident(pid), len(os.listdir(f"/proc/{pid}/fd"))
    assert after[1] <= before[1] + 5
    assert after[0] <= before[0] + (2 << 20)
    assert ours.counter("nodes") < 2000


def test_deep_tree(ours: Stack) -> None:
    """A tree deeper than PATH_MAX in a lower, entered by steps, changed at its end, and found again after remounting."""
    part = "deep" * 25
    here = os.open(ours.lower, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(60):
        os.mkdir(part, dir_fd=here)
        below = os.open(part, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    descriptor = os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    os.write(descriptor, b"bottom")
    os.close(descriptor)
    os.mkdir("d", dir_fd=here)
    os.close(here)

    def enter(root: Path) -> int:
        here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        for _ in range(60):
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
            os.close(here)
            here = below
        return here

    root = ours.mount()
    here = enter(root)
    descriptor = os.open("f", os.O_RDWR | os.O_APPEND, dir_fd=here)
    os.write(descriptor, b" line")
    os.close(descriptor)
    os.rename("d", "e", src_dir_fd=here, dst_dir_fd=here)
    os.mkdir("new", dir_fd=here)
    os.symlink("x", "s", dir_fd=here)
    os.close(here)
    ours.remount()
    here = enter(root)
    assert sorted(os.listdir(here)) == ["e", "f", "new", "s"]
    descriptor = os.open("f", os.O_RDONLY, dir_fd=here)
    assert os.read(descriptor, 100) == b"bottom line"
    os.close(descriptor)
    os.unlink("f", dir_fd=here)
    os.rmdir("e", dir_fd=here)
    assert sorted(os.listdir(here)) == ["new", "s"]
    os.close(here)
