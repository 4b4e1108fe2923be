"""`-o lower=watch`: changes of lowers behind the union's back are seen, whatever the kernel has cached before."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import StackMaker
from tests.mount.posix.table import fails
from tests.support.cli import user_namespaces
from tests.support.layers import WHITEOUT, build
from tests.support.mounts import Stack, environment
from tests.support.people import REPOSITORY, in_user_namespace
from tests.support.snapshot import assert_same, snapshot

SECONDS = 5.0


@pytest.fixture
def watching(make_stack: StackMaker) -> Stack:
    """A stack of two lowers, to be mounted."""
    return make_stack("union", lowers=2, options="lower=watch")


@pytest.fixture(params=["", ",native=off", ",slow_lower=on"], ids=["native", "plain", "slow"])
def any_watching(make_stack: StackMaker, request: pytest.FixtureRequest) -> Stack:
    """The same in each way of serving it."""
    return make_stack("union", lowers=2, options=f"lower=watch{request.param}")


def soon(what: Callable[[], object], wanted: object) -> None:
    """Wait until something is so."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            found: object = what()
        except OSError as error:
            found = error.errno
        if found == wanted or time.monotonic() > end:
            break
        time.sleep(0.01)
    assert found == wanted


def warm(root: Path, *absent: str) -> None:
    """Have everything cached: names, attributes, pages, listings, and that names are absent."""
    for _ in range(2):
        for directory, _, names in os.walk(root):
            for name in names:
                path = Path(directory, name)
                if path.is_file():
                    path.read_bytes()
        for name in absent:
            assert not (root / name).exists()


def test_content_attributes_and_names(any_watching: Stack) -> None:
    watching = any_watching
    lower = watching.lowers[0]
    build(lower, {"f": b"old", "d": {"g": b"old", "gone": b"", "sub": {"deep": b"old"}}, "other": b"stays"})
    root = watching.mount()
    warm(root, "new", "d/new")
    (lower / "f").write_bytes(b"changed")
    soon((root / "f").read_bytes, b"changed")
    assert (root / "f").stat().st_size == 7
    os.chmod(lower / "d" / "g", 0o600)
    soon(lambda: (root / "d" / "g").stat().st_mode & 0o777, 0o600)
    os.setxattr(lower / "d" / "g", "user.x", b"1")
    soon(lambda: os.listxattr(root / "d" / "g"), ["user.x"])
    (lower / "new").write_bytes(b"added")
    soon((root / "new").read_bytes, b"added")
    (lower / "d" / "gone").unlink()
    soon(lambda: (root / "d" / "gone").exists(), False)
    assert sorted(os.listdir(root / "d")) == ["g", "sub"]
    os.rename(lower / "d" / "g", lower / "d" / "new")
    soon(lambda: sorted(os.listdir(root / "d")), ["new", "sub"])
    assert (root / "d" / "new").read_bytes() == b"old"
    (lower / "d" / "sub" / "deep").write_bytes(b"changed deep")
    soon((root / "d" / "sub" / "deep").read_bytes, b"changed deep")
    os.symlink("f", lower / "link")
    soon(lambda: os.readlink(root / "link"), "f")
    os.unlink(lower / "link")
    os.symlink("new", lower / "link")
    soon(lambda: os.readlink(root / "link"), "new")
    assert sorted(os.listdir(root)) == ["d", "f", "link", "new", "other"]


def test_a_file_replaced_as_editors_do(watching: Stack) -> None:
    """The old one stays for whoever has it open; the new one is at the name."""
    lower = watching.lowers[0]
    build(lower, {"f": b"old", "f.new": b"replaced"})
    root = watching.mount()
    warm(root)
    descriptor = os.open(root / "f", os.O_RDONLY)
    for number in range(5):
        (lower / "f.new").write_bytes(b"replaced %d" % number)
        os.rename(lower / "f.new", lower / "f")
        soon((root / "f").read_bytes, b"replaced %d" % number)
    assert os.pread(descriptor, 10, 0) == b"old"
    assert os.fstat(descriptor).st_size == 3
    os.close(descriptor)


def test_directories_come_go_and_merge(watching: Stack) -> None:
    top, bottom = watching.lowers
    build(bottom, {"d": {"below": b"below"}, "e": {"x": b"x"}})
    root = watching.mount()
    (root / "mine").mkdir()
    warm(root, "d/above", "mine/under")
    build(top, {"d": {"above": b"above"}})
    soon(lambda: sorted(os.listdir(root / "d")), ["above", "below"])
    build(bottom, {"mine": {"under": b"under"}})
    soon(lambda: os.listdir(root / "e"), ["x"])
    os.rename(bottom / "e", bottom / "e2")
    soon(lambda: sorted(os.listdir(root)), ["d", "e2", "mine"])
    assert (root / "e2" / "x").read_bytes() == b"x"
    shutil.rmtree(top / "d")
    soon(lambda: os.listdir(root / "d"), ["below"])
    shutil.rmtree(bottom / "d")
    soon(lambda: (root / "d").exists(), False)
    build(bottom, {"d": {"again": b"again"}})
    soon(lambda: (root / "d" / "again").read_bytes(), b"again")
    build(top, {"e2": WHITEOUT})
    soon(lambda: (root / "e2").exists(), False)
    (top / "e2").unlink()
    soon(lambda: os.listdir(root / "e2"), ["x"])


def test_a_directory_that_becomes_merged_while_it_is_listed(watching: Stack) -> None:
    above, below = watching.lowers
    names = {f"file-{number:04}" for number in range(2000)}
    build(above, {"d": dict.fromkeys(names, b"")})
    root = watching.mount()
    with os.scandir(root / "d") as entries:
        listed = [next(entries).name for _ in range(100)]
        build(below, {"d": {"late": b""}, "marker": b""})
        soon((root / "marker").exists, True)
        listed += [entry.name for entry in entries]
    assert sorted(set(listed) - {"late"}) == sorted(names)
    assert len(listed) == len(set(listed))
    assert set(os.listdir(root / "d")) == {*names, "late"}


def test_upper_stays(watching: Stack) -> None:
    lower = watching.lowers[0]
    build(lower, {"d": {"f": b"old", "g": b"old", "h": b"old"}})
    root = watching.mount()
    (root / "d" / "f").write_bytes(b"mine")
    os.unlink(root / "d" / "g")
    writer = os.open(root / "d" / "h", os.O_RDWR)
    warm(root)
    for name in ("f", "g", "h"):
        (lower / "d" / name).write_bytes(b"theirs")
        (lower / "d" / name).unlink()
        (lower / "d" / name).write_bytes(b"theirs again")
    (lower / "d" / "last").write_bytes(b"")
    soon(lambda: sorted(os.listdir(root / "d")), ["f", "h", "last"])
    assert (root / "d" / "f").read_bytes() == b"mine"
    assert (root / "d" / "h").read_bytes() == b"old"
    os.write(writer, b"new")
    os.close(writer)
    assert (root / "d" / "h").read_bytes() == b"new"


def test_a_lower_that_goes_and_comes_back(watching: Stack) -> None:
    lower = watching.lowers[0]
    build(lower, {"f": b"first", "d": {"g": b"first"}})
    root = watching.mount()
    (root / "mine").write_bytes(b"mine")
    warm(root, "later")
    away = lower.with_name("away")
    os.rename(lower, away)
    (away / "f").write_bytes(b"changed while away")
    soon((root / "f").read_bytes, b"changed while away")
    os.rename(away, lower)
    shutil.rmtree(lower)
    soon(lambda: os.listdir(root), ["mine"])
    os.mkdir(away)
    build(away, {"f": b"second", "d": {"h": b"second"}, "later": b"second"})
    os.rename(away, lower)
    soon(lambda: sorted(os.listdir(root)), ["d", "f", "later", "mine"])
    assert (root / "f").read_bytes() == b"second"
    soon((root / "later").read_bytes, b"second")
    assert os.listdir(root / "d") == ["h"]
    (lower / "d" / "h").write_bytes(b"third")
    soon((root / "d" / "h").read_bytes, b"third")
    (root / "d" / "h").write_bytes(b"mine")
    assert (lower / "d" / "h").read_bytes() == b"third"


def test_nothing_else_is_forgotten(watching: Stack) -> None:
    """What was not changed is not asked for again."""
    lower = watching.lowers[0]
    build(lower, {"f": b"old", "d": {f"f{number}": b"" for number in range(50)}, "quiet": {"x": b""}})
    root = watching.mount()
    warm(root)
    before = [(root / "quiet" / "x").stat(), (root / "d" / "f1").stat()]
    (lower / "f").write_bytes(b"changed")
    soon((root / "f").read_bytes, b"changed")
    os.kill(watching.daemon(), 19)  # SIGSTOP: only what is cached can be had
    try:
        found: list[os.stat_result] = []
        thread = threading.Thread(
            target=lambda: found.extend([(root / "quiet" / "x").stat(), (root / "d" / "f1").stat()])
        )
        thread.start()
        thread.join(3)
        assert found == before
    finally:
        os.kill(watching.daemon(), 18)
        thread.join()


@pytest.mark.expected_log("changes of lowers came too fast")
@pytest.mark.parametrize("kind", ["union", "bind"])
def test_what_is_gone_is_forgotten(make_stack: StackMaker, kind: str) -> None:
    """The daemon remembers the number of what is no more for just as long as the kernel does."""
    watching = make_stack(kind, options="lower=watch")
    build(watching.lower, {"d": {f"f{number}": b"" for number in range(300)}})
    root = watching.mount()
    assert len([entry for entry in os.scandir(watching.mnt / "d") if entry.stat().st_size == 0]) == 300
    before = watching.counter("nodes")
    (watching.lower / "d").rename(watching.lower.parent / "away")
    soon((watching.mnt / "d").exists, False)
    soon(lambda: watching.counter("retired"), 0)
    assert watching.counter("nodes") < before - 299
    assert root.exists()


def test_a_storm_ends_well(watching: Stack) -> None:
    """Many changes at once, more than the queue holds, while the union is used: in the end it shows what there is."""
    lower = watching.lowers[0]
    build(lower, {f"d{number}": {f"f{inner}": b"old" for inner in range(20)} for number in range(10)})
    root = watching.mount()
    warm(root)
    stop = threading.Event()

    def use() -> None:
        while not stop.is_set():
            for directory, _, names in os.walk(root):
                for name in names:
                    try:
                        Path(directory, name).read_bytes()
                    except OSError as error:
                        assert error.errno in (errno.ENOENT, errno.ESTALE), error

    thread = threading.Thread(target=use)
    thread.start()
    for turn in range(20):
        home = lower / f"d{turn % 10}"
        for number in range(100):
            (home / f"new{number}").write_bytes(b"%d" % turn)
            os.rename(home / f"new{number}", home / f"f{number % 20}")
        if turn % 3 == 0:
            os.rename(home, lower / "moved")
            os.rename(lower / "moved", home)
    stop.set()
    thread.join()
    wanted = snapshot(lower)

    def same() -> bool:
        try:
            assert_same(wanted, snapshot(root))
        except (AssertionError, OSError):
            return False
        return True

    soon(same, True)
    assert_same(wanted, snapshot(root))


@pytest.mark.skipif(not user_namespaces(), reason="no user namespaces here: a chroot, perhaps")
def test_more_directories_than_may_be_watched(ground: Path) -> None:
    """In a user namespace with a limit of its own: the log says so once, and the union works."""
    build(ground, {"lower": {f"d{number}": {"f": b""} for number in range(20)}, "upper": {}, "work": {}, "mnt": {}})
    script = f"""
import logging, os
from pathlib import Path
from unionfs.config import MountConfig
from unionfs.core.dirhandle import DirHandle
from unionfs.core.union import Union
from unionfs.fuse.watching import Watching
Path("/proc/sys/user/max_inotify_watches").write_text("5")
logging.basicConfig(format="%(message)s")
base = {str(ground)!r}
union = Union.open(MountConfig(lowers=(base + "/lower",), upper=base + "/upper", work=base + "/work", mountpoint=base + "/mnt"))
watching = Watching(union, forget_entry=print, forget_inode=print)
for number in range(20):
    found = union.tree.look(union.tree.root, b"d%d" % number)
    assert [entry.name for _, entry in union.read_entries(DirHandle(found[0]), 0)] == [b"f"]
assert len(watching) == 4, len(watching)
"""
    done = in_user_namespace([sys.executable, "-c", script], cwd=REPOSITORY, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stderr == "no more watches (see fs.inotify.max_user_watches): changes of lowers may be missed\n"


def test_without_it_nothing_is_watched(make_stack: StackMaker) -> None:
    stack = make_stack("union")
    build(stack.lower, {"f": b"old"})
    root = stack.mount()
    warm(root, "new")
    (stack.lower / "new").write_bytes(b"")
    time.sleep(0.3)
    with fails(errno.ENOENT):
        (root / "new").stat()
