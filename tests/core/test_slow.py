"""Slow lowers without a mount: each operation is begun anew until its questions are answered, and leaves no trace before."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest

from tests.support.layers import Tree, build, is_whiteout
from unionfs.core.caller import Caller
from unionfs.core.changes import Changes
from unionfs.core.dirhandle import DirHandle
from unionfs.core.inodes import Dir
from unionfs.core.layers import LayerStack
from unionfs.core.slow import SlowDoor, SlowFd, SlowPath, WouldBlock, attempting, committed
from unionfs.core.union import Union

P = ParamSpec("P")
R = TypeVar("R")
Opener = Callable[..., Union]

LOWER: Tree = {"d": {"f": b"content", "sub": {"g": b"g"}}, "e": {}, "x": b"x"}
ROOT = Caller(0, 0, 0o022, 0)


class Driver:
    """Answers questions at once, and sees to it that what is blocked has left nothing behind."""

    def __init__(self, union: Union, base: Path) -> None:
        self.union = union
        self.base = base
        self.asked = 0
        union.door.waits = True

    def run(self, operation: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call an operation until nothing blocks it."""
        with attempting() as attempt:
            for _ in range(200):
                try:
                    return operation(*args, **kwargs)
                except WouldBlock as blocked:
                    question = blocked.question
                work = self.base / "work" / "work"
                assert [name for name in os.listdir(work) if not is_whiteout(work / name)] == []
                answers = question.find()
                assert question.key in answers
                self.union.door.learn(question, answers)
                attempt.take(answers)
                self.asked += 1
        raise AssertionError("it never comes to an end")

    def walk(self, path: str) -> Dir:
        """The directory at a path."""
        here: Dir = self.union.tree.root
        for name in path.split("/") if path else []:
            child = self.run(self.union.tree.need, here, os.fsencode(name))
            assert isinstance(child, Dir)
            child.nlookup += 1
            here = child
        return here


@pytest.fixture(params=[None, 0.0], ids=["remembering", "timeout=0"])
def driver(open_union: Opener, tmp_path: Path, request: pytest.FixtureRequest) -> Driver:
    """A union over two slow lowers, whose driver waits for them."""
    build(tmp_path / "l2", LOWER)
    build(tmp_path / "l1", {"d": {"above": b""}})
    return Driver(open_union(slow_lower="on", timeout=request.param), tmp_path)


def test_lookups_and_listings(driver: Driver) -> None:
    union = driver.union
    directory = driver.walk("d")
    assert driver.asked
    looked = driver.run(union.tree.look, directory, b"f")
    assert looked is not None
    assert looked[1].st_size == 7
    assert driver.run(union.tree.look, directory, b"none") is None
    entries = [entry.name for _, entry in driver.run(union.read_entries, DirHandle(directory), 0)]
    assert sorted(entries) == [b"above", b"f", b"sub"]


def test_what_is_remembered_is_not_asked_again(driver: Driver) -> None:
    directory = driver.walk("d")
    assert driver.run(driver.union.tree.look, directory, b"none") is None
    before = driver.asked
    assert driver.run(driver.union.tree.look, directory, b"none") is None
    assert (driver.asked == before) == (driver.union.config.timeout is None)


def test_changes(driver: Driver, tmp_path: Path) -> None:
    union, upper = driver.union, tmp_path / "upper"
    directory = driver.walk("d")
    node = driver.run(union.tree.need, directory, b"f")
    node.nlookup += 1
    fd = driver.run(union.open_file, node, os.O_RDWR)
    os.pwrite(fd, b"C", 0)
    union.close_file(fd)
    assert (upper / "d" / "f").read_bytes() == b"Content"
    driver.run(union.setattr, driver.walk("d/sub"), Changes(mode=0o700), who=ROOT)
    assert (upper / "d" / "sub").stat().st_mode & 0o777 == 0o700
    root = union.tree.root
    driver.run(union.dirs.rename, root, b"x", directory, b"y", 0)
    assert (upper / "d" / "y").stat().st_size == 1
    driver.run(union.dirs.unlink, directory, b"f")
    driver.run(union.dirs.rmdir, root, b"e")
    with pytest.raises(OSError, match="not empty"):
        driver.run(union.dirs.rmdir, root, b"d")
    driver.run(union.dirs.rename, root, b"d", root, b"moved", 0)
    moved = driver.walk("moved/sub")
    assert [entry.name for _, entry in driver.run(union.read_entries, DirHandle(moved), 0)] == [b"g"]
    assert sorted(os.listdir(upper)) == ["d", "e", "moved", "x"]


def test_a_committed_attempt_asks_on_the_spot(driver: Driver) -> None:
    with attempting():
        committed()
        assert driver.union.tree.look(driver.union.tree.root, b"x") is not None


def test_an_error_of_the_moment_is_not_remembered(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    root = driver.union.tree.root
    driver.run(driver.union.dirfds.fds, root)
    real = os.stat

    def failing(*args: object, **kwargs: object) -> object:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(OSError, match="Input/output"):
        driver.run(driver.union.tree.look, root, b"x")
    monkeypatch.setattr(os, "stat", real)
    assert driver.run(driver.union.tree.look, root, b"x") is not None


def test_a_question_has_a_descriptor_of_its_own(tmp_path: Path) -> None:
    """The one it was asked of may be closed, and its number used again, before the answer is there."""
    (tmp_path / "there").mkdir()
    (tmp_path / "f").touch()
    door = SlowDoor(remember=True)
    door.waits = True
    place = SlowFd(os.open(tmp_path, os.O_PATH))
    with pytest.raises(WouldBlock) as blocked:
        door.stat(b"f", dir_fd=place, follow_symlinks=False)
    os.close(place)
    again = SlowFd(os.open(tmp_path / "there", os.O_PATH))
    assert again == place
    question = blocked.value.question
    door.learn(question, question.find())
    with pytest.raises(WouldBlock):
        door.stat(b"f", dir_fd=again, follow_symlinks=False)
    os.close(again)
    before = len(os.listdir("/proc/self/fd"))
    del question, blocked
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < before


def test_marked_descriptors_are_as_good_as_plain_ones(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"f")
    place = SlowFd(os.open(tmp_path, os.O_PATH))
    try:
        assert os.stat(b"f", dir_fd=place).st_size == 1
        assert os.stat(SlowPath(place, b"f")).st_size == 1
        assert {int(place): 1}[place] == 1
    finally:
        os.close(place)


@pytest.mark.parametrize(("wanted", "slow"), [("auto", False), ("off", False), ("on", True)])
def test_which_layers_are_slow(open_union: Opener, wanted: str, slow: bool) -> None:
    layers: LayerStack = open_union(slow_lower=wanted).layers
    assert [layer.is_slow for layer in layers.lowers] == [slow, slow]
    assert layers.door.is_slow == slow
    assert layers.upper is not None
    assert not layers.upper.is_slow
