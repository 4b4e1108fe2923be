"""Many processes in one mount at the same time: each gets what it would get alone, and nothing is lost between them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.test_lazy import start
from tests.support import raw
from tests.support.cli import unionfs
from tests.support.clients import DIRECTORIES, RECORD
from tests.support.layers import Tree, build
from tests.support.mounts import Stack, environment
from tests.support.snapshot import assert_same, snapshot

SECONDS = 1.5
CLIENTS = 50
MIB = 1 << 20
TREE: Tree = {
    "a": {"a": b"aa", "b": b"b" * 9000, "c": {"f": b"f"}},
    "b": b"b" * 80_000,
    "c": {"a": b"ca", "d": {}},
    "d": b"d",
}


def run_clients(what: str, count: int, seconds: float, *roots: Path, seed: int = 1) -> int:
    """Run clients to their end; how many turns they made together."""
    words = [what, str(count), str(seconds), str(seed), *map(str, roots)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.clients", *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return int(done.stdout)


@pytest.mark.parametrize("options", ["", "native=off", "metacopy=off"])
def test_subtrees_of_their_own(
    ours: Stack, ground: Path, check_by_overlay: Callable[[Stack], Path], options: str
) -> None:
    """Whatever the others do, each call ends as on a plain directory, and so does the whole."""
    plain = ground / "plain"
    for number in range(4):
        build(ours.lower / f"home{number}", TREE)
    shutil.copytree(ours.lower, plain)
    root = ours.mount(options)
    assert run_clients("subtrees", 4, SECONDS, root, plain, seed=hash(options) % 1000) > 60
    wanted = contents(plain)
    assert contents(root) == wanted
    view = snapshot(root)
    ours.remount()
    assert_same(view, snapshot(root))
    ours.umount()
    assert os.listdir(ours.work / "work") == []
    assert contents(check_by_overlay(ours)) == wanted


def contents(root: Path) -> dict[str, object]:
    """What there is below a directory, with modes, data and targets."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        st = path.lstat()
        data = os.readlink(path) if path.is_symlink() else b"" if path.is_dir() else path.read_bytes()
        found[str(path.relative_to(root))] = (st.st_mode, st.st_nlink if path.is_file() else 0, data)
    return found


@pytest.mark.parametrize("options", ["", "native=off"])
def test_a_storm_of_renames(ours: Stack, check_by_overlay: Callable[[Stack], Path], options: str) -> None:
    """All move the same files and directories about: none is lost, none is twice."""
    tokens: set[bytes] = set()
    for directory in range(DIRECTORIES):
        for number in range(10):
            token = b"token %d %d " % (directory, number)
            build(ours.lower / f"dir{directory}", {f"f{number}": token + b"f", f"d{number}": {"token": token + b"d"}})
            tokens |= {token + b"f", token + b"d"}
    root = ours.mount(options)
    assert run_clients("storm", 6, SECONDS, root) > 60

    def found(below: Path) -> list[bytes]:
        return sorted(path.read_bytes() for path in below.rglob("*") if path.is_file())

    assert found(root) == sorted(tokens)
    ours.remount()
    assert found(root) == sorted(tokens)
    ours.umount()
    assert os.listdir(ours.work / "work") == []
    assert found(check_by_overlay(ours)) == sorted(tokens)


@pytest.mark.parametrize("options", ["", "native=off"])
def test_open_unlink_recreate(ours: Stack, options: str) -> None:
    """Who has created a file has that one, whatever becomes of its name."""
    for number in range(3):
        (ours.lower / f"raced{number}").write_bytes(b"\x01" * RECORD)
    root = ours.mount(options)
    assert run_clients("races", 6, SECONDS, root) > 60
    view = snapshot(root)
    ours.remount()
    assert_same(view, snapshot(root))
    ours.umount()
    assert os.listdir(ours.work / "work") == []


def arrivals(watch: int, name: str) -> int:
    """How often something came to be under a name, by what inotify has told since."""
    with suppress(BlockingIOError):
        return os.read(watch, 1 << 20).count(name.encode() + b"\0")
    return 0


@pytest.mark.parametrize(("options", "mebibytes"), [("", 8), ("", 40), ("passthrough=off", 40), ("native=off", 8)])
def test_one_copy_up_for_all_who_want_it(ours: Stack, options: str, mebibytes: int) -> None:
    data = random.Random(mebibytes).randbytes(mebibytes * MIB)
    (ours.lower / "shared").write_bytes(data)
    root = ours.mount(options)
    watch = raw.inotify(ours.up, raw.IN_CREATE | raw.IN_MOVED_TO)
    assert run_clients("copy-up", CLIENTS, 30, root) == CLIENTS
    with open(root / "shared", "rb") as stream:
        os.fsync(stream.fileno())
    assert arrivals(watch, "shared") == 1
    os.close(watch)
    expected = bytearray(data)
    for number in range(CLIENTS):
        expected[number * RECORD : number * RECORD + 8] = b"%8d" % number
    assert (root / "shared").read_bytes() == expected
    ours.umount()
    assert os.listdir(ours.work / "work") == []
    assert (ours.up / "shared").read_bytes() == expected


@pytest.mark.parametrize("options", ["", "native=off"])
def test_unmounted_during_a_copy_up(ours: Stack, check_by_overlay: Callable[[Stack], Path], options: str) -> None:
    """Busy, or done with: the file is the old one or the new one, wholly, and the rest of the copy is nowhere."""
    data = random.Random(3).randbytes(30 * MIB)
    chance = random.Random(9)
    changed = 0
    for turn in range(4):
        (ours.lower / f"f{turn}").write_bytes(data)
    for turn in range(4):
        root = ours.mount(options)
        outcomes: list[int] = []

        def append(path: Path = root / f"f{turn}", outcomes: list[int] = outcomes) -> None:
            try:
                with open(path, "ab") as stream:
                    stream.write(b"tail")
                outcomes.append(0)
            except OSError as error:
                outcomes.append(error.errno or -1)

        thread = start(append)
        time.sleep(chance.uniform(0, 0.08))
        said = unionfs("umount", root)
        assert said.status in (0, 4), said
        thread.join(30)
        if said.status:
            assert outcomes == [0]
            ours.umount()
        else:
            ours.mounted = False
        whole = ours.up / f"f{turn}"
        assert os.listdir(ours.work / "work") == []
        if outcomes == [0] and whole.exists():
            changed += 1
            assert whole.read_bytes() == data + b"tail"
        else:
            assert not whole.exists()
    assert changed
    merged = check_by_overlay(ours)
    assert all((merged / f"f{turn}").read_bytes() in (data, data + b"tail") for turn in range(4))
