"""Several clients at once: other requests are answered while a big copy-up runs, and nothing is lost between clients."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.support.layers import Tree, build
from tests.support.mounts import Stack
from tests.support.snapshot import assert_same, snapshot

StackMaker = Callable[..., Stack]
BIG = 1500 << 20
PIECE = os.urandom(1 << 20)
TREE: Tree = {f"d{number}": {f"f{inner}": b"%d" % inner for inner in range(40)} for number in range(15)}


def big_file(path: Path, size: int) -> None:
    """A file without holes, that takes its time to copy."""
    with open(path, "wb") as stream:
        stream.writelines(PIECE for _ in range(size >> 20))


async def test_requests_are_answered_during_a_big_copy_up(
    make_stack: StackMaker, on_file_system: Callable[[str], Path]
) -> None:
    """Lower on ext4, upper on tmpfs: no reflink. While one client waits for its copy, others do all kinds of work."""
    stack = make_stack("union")
    big_file(stack.lower / "big", BIG)
    build(stack.lower, {"d": {"f": b"x", "g": b"y"}, "moved": {"z": b""}, "small": b"small"})
    room = on_file_system("tmpfs")
    stack.upper, stack.work = room / "upper", room / "work"
    stack.up.mkdir()
    stack.work.mkdir()
    root = await trio.to_thread.run_sync(stack.mount)
    finished = trio.Event()
    rounds = during = 0

    async def copy() -> None:
        def append() -> None:
            with open(root / "big", "ab") as stream:
                stream.write(b"tail")

        await trio.to_thread.run_sync(append)
        finished.set()

    def others(number: int) -> None:
        (root / f"new-{number}").write_bytes(b"n")
        assert (root / "d" / "f").read_bytes() == b"x"
        assert os.stat(root / "big").st_size in {BIG, BIG + 4}
        with open(root / "big", "rb") as stream:
            stream.seek(5 << 20)
            assert stream.read(100) == PIECE[:100]
        os.mkdir(root / f"dir-{number}")
        os.rename(root / f"new-{number}", root / f"dir-{number}" / "n")
        with open(root / "small", "ab") as stream:
            stream.write(b"+")
        os.chmod(root / "d" / "g", 0o600 + number % 8)
        os.listdir(root)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy)
            await trio.sleep(0.05)
            while not finished.is_set():
                await trio.to_thread.run_sync(others, rounds)
                rounds += 1
                during += not finished.is_set()
        assert during, "the others waited for the copy to end"
        assert (root / "big").stat().st_size == BIG + 4
        assert (root / "small").read_bytes() == b"small" + b"+" * rounds
    finally:
        await trio.to_thread.run_sync(stack.umount)
    with open(stack.up / "big", "rb") as stream:
        for _ in range(BIG >> 20):
            assert stream.read(1 << 20) == PIECE
        assert stream.read() == b"tail"


async def test_many_open_one_lower_file_for_writing_at_once(ours: Stack) -> None:
    """One copy-up, all descriptors on it, every write kept."""
    big_file(ours.lower / "f", 64 << 20)
    root = await trio.to_thread.run_sync(ours.mount)

    def write(number: int) -> None:
        descriptor = os.open(root / "f", os.O_RDWR)
        os.pwrite(descriptor, b"%04d" % number, number * 8192)
        assert os.pread(descriptor, 4, number * 8192) == b"%04d" % number
        os.close(descriptor)

    async with trio.open_nursery() as nursery:
        for number in range(24):
            nursery.start_soon(trio.to_thread.run_sync, write, number)
    expected = bytearray(PIECE * 64)
    for number in range(24):
        expected[number * 8192 : number * 8192 + 4] = b"%04d" % number
    assert (root / "f").read_bytes() == expected
    await trio.to_thread.run_sync(ours.umount)


async def test_races_during_one_copy_up(ours: Stack) -> None:
    """Chmod, rename, unlink and link of a file while its data is being copied up."""
    for name in ("chmod", "rename", "unlink", "link", "truncate", "xattr"):
        big_file(ours.lower / name, 48 << 20)
    root = await trio.to_thread.run_sync(ours.mount)
    acts: dict[str, Callable[[Path], object]] = {
        "chmod": lambda path: os.chmod(path, 0o600),
        "rename": lambda path: os.rename(path, root / "renamed"),
        "unlink": os.unlink,
        "link": lambda path: os.link(path, root / "linked"),
        "truncate": lambda path: os.truncate(path, 10),
        "xattr": lambda path: os.setxattr(path, "user.x", b"1"),
    }

    def write(path: Path) -> bytes:
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.pwrite(descriptor, b"W", 20 << 20)
            return os.pread(descriptor, 3, 20 << 20)
        finally:
            os.close(descriptor)

    for name, act in acts.items():
        found: list[bytes] = []

        async def writer(path: Path = root / name, found: list[bytes] = found) -> None:
            found.append(await trio.to_thread.run_sync(write, path))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer)
            await trio.sleep(0.005)
            await trio.to_thread.run_sync(act, root / name)
        assert found[0][:1] == b"W"
    assert (root / "chmod").stat().st_mode & 0o777 == 0o600
    assert (root / "renamed").stat().st_size == 48 << 20
    assert not (root / "unlink").exists()
    assert (root / "link").stat().st_ino == (root / "linked").stat().st_ino
    assert os.getxattr(root / "xattr", "user.x") == b"1"
    await trio.to_thread.run_sync(ours.umount)
    for name in ("chmod", "renamed", "link", "xattr"):
        expected = bytearray(PIECE * 48)
        expected[20 << 20] = ord("W")
        assert (ours.up / name).read_bytes() == expected, name


def test_two_clients_see_each_other(stack: Stack) -> None:
    """What one process does is seen at once by another, in names, attributes and data."""
    build(stack.lower, {"f": b"start", "d": {"x": b""}})
    root = stack.mount()
    program = """
import os, sys
root = sys.argv[1]
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(expression: str) -> str:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(expression + "\n")
        other.stdin.flush()
        return other.stdout.readline().strip()

    try:
        assert ask("open(root + '/f').read()") == "'start'"
        assert ask("os.path.exists(root + '/new')") == "False"
        (root / "new").write_bytes(b"made")
        assert ask("open(root + '/new').read()") == "'made'"
        with open(root / "f", "ab") as stream:
            stream.write(b" and more")
        assert ask("open(root + '/f').read()") == "'start and more'"
        assert ask("os.stat(root + '/f').st_size") == "14"
        assert ask("os.rename(root + '/d', root + '/e')") == "None"
        assert sorted(os.listdir(root)) == ["e", "f", "new"]
        assert ask("os.truncate(root + '/f', 2)") == "None"
        assert (root / "f").read_bytes() == b"st"
        os.unlink(root / "new")
        assert ask("os.path.exists(root + '/new')") == "False"
        assert ask("os.mkdir(root + '/new')") == "None"
        assert (root / "new").is_dir()
    finally:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.close()
        other.stdout.close()
        other.wait(20)


def churn(root: Path, number: int) -> None:
    """A bounded workload in a directory of its own, ending in a known tree."""
    home = root / f"work-{number}"
    home.mkdir()
    for turn in range(6):
        for inner in range(25):
            (home / f"f{inner}").write_bytes(b"%d" % (turn * inner))
            os.rename(home / f"f{inner}", home / f"g{inner}")
        shutil.copytree(root / f"d{number}", home / "copy")
        with open(root / f"d{number}" / f"f{turn}", "ab") as stream:
            stream.write(b"+")
        os.unlink(root / f"d{number}" / f"f{20 + turn}")
        shutil.rmtree(home / "copy")
        os.rename(root / f"d{number}", root / "moving")
        os.rename(root / "moving", root / f"d{number}")
    for inner in range(25):
        assert (home / f"g{inner}").read_bytes() == b"%d" % (5 * inner)


def expected_after_churn(numbers: int) -> dict[str, set[str]]:
    """The names that `churn` leaves."""
    left = {f"f{inner}" for inner in range(40)} - {f"f{inner}" for inner in range(20, 26)}
    return {f"d{number}": left for number in range(numbers)} | {
        f"work-{number}": {f"g{inner}" for inner in range(25)} for number in range(numbers)
    }


@pytest.mark.parametrize("which", ["2", "3"])
def test_work_goes_on_while_the_kernel_drops_its_caches(stack: Stack, which: str) -> None:
    """Lookup counts: a peer loses entries when nodes are forgotten in the middle of work."""
    build(stack.lower, TREE)
    root = stack.mount()
    stop = threading.Event()

    def drop() -> None:
        while not stop.wait(0.2):
            with open("/proc/sys/vm/drop_caches", "w") as control:
                control.write(which)

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        for number in range(4):
            churn(root, number)
    finally:
        stop.set()
        thread.join()
    found = {path.name: set(os.listdir(path)) for path in root.iterdir()}
    for name, names in expected_after_churn(4).items():
        assert found[name] == names, name
    before = snapshot(root)
    stack.remount()
    assert_same(before, snapshot(root))


async def test_clients_at_work_in_parallel(ours: Stack) -> None:
    build(ours.lower, TREE)
    root = await trio.to_thread.run_sync(ours.mount)

    def work(number: int) -> None:
        home = root / f"d{number}"
        for turn in range(10):
            for inner in range(20):
                with open(home / f"f{inner}", "ab") as stream:
                    stream.write(b"%d" % turn)
            (home / "sub").mkdir()
            for inner in range(10):
                os.link(home / f"f{inner}", home / "sub" / f"l{inner}")
            assert len(os.listdir(home / "sub")) == 10
            shutil.rmtree(home / "sub")
            os.rename(home / "f39", root / f"shared-{number}")
            os.rename(root / f"shared-{number}", home / "f39")

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(trio.to_thread.run_sync, work, number)
    for number in range(6):
        for inner in range(20):
            path = root / f"d{number}" / f"f{inner}"
            assert path.read_bytes() == b"%d" % inner + b"0123456789"
            assert path.stat().st_nlink == 1
    await trio.to_thread.run_sync(ours.umount)
    assert os.listdir(ours.work / "work") == []


async def test_clients_fight_over_the_same_names(ours: Stack) -> None:
    """Any outcome of a race is fine as long as it is one of the outcomes; the tree is whole afterwards."""
    build(ours.lower, {"d": {f"f{number}": b"x" for number in range(10)}})
    root = await trio.to_thread.run_sync(ours.mount)

    def fight(seed: int) -> None:
        import random

        chance = random.Random(seed)
        for _ in range(150):
            one = root / "d" / f"f{chance.randrange(10)}"
            two = root / "d" / f"f{chance.randrange(10)}"
            acts: list[Callable[[Path, Path], object]] = [
                lambda one, two: one.write_bytes(b"w"),
                lambda one, two: os.unlink(one),
                lambda one, two: os.rename(one, two),
                lambda one, two: os.link(one, two),
                lambda one, two: os.chmod(one, 0o600),
                lambda one, two: one.read_bytes(),
                lambda one, two: os.listdir(root / "d"),
            ]
            try:
                chance.choice(acts)(one, two)
            except (FileNotFoundError, FileExistsError):
                pass

    async with trio.open_nursery() as nursery:
        for seed in range(4):
            nursery.start_soon(trio.to_thread.run_sync, fight, seed)
    before = snapshot(root)
    await trio.to_thread.run_sync(ours.umount)
    await trio.to_thread.run_sync(ours.mount)
    assert_same(before, snapshot(root))
    await trio.to_thread.run_sync(ours.umount)
    assert os.listdir(ours.work / "work") == []
