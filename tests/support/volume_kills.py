"""Killing steps of the volume store at every instant: `python -m tests.support.volume_kills STEP DIRECTORY`.

A step is run in a forked child that kills itself before its Nth system call or database statement, for N = 1, 2, 3...
until it comes to its end. So each of them is once the last thing that was done. After every kill the store must hold the old state or the new one, whole, with nothing left beside it. Prints the number of kills.

`random ROOT SEED` does random steps until it is killed from outside.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from unionfs.archives.copytree import copy_tree
from unionfs.core import sysio
from unionfs.errors import UnionError
from unionfs.host import control
from unionfs.store.volumes import Store
from unionfs.volumespec import parse_volume

State = dict[str, dict[str, str]]
"""Each volume's files and their content; what the device has is under its path."""

FILES = {"a": "alpha", "sub/b": "beta", "sub/c": "gamma"}
NEW = {"a": "new", "d": "delta"}


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def read(directory: Path) -> dict[str, str]:
    """The files below a directory; an empty directory counts as a file without a name."""
    found = {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}
    empty = [path for path in directory.rglob("*") if path.is_dir() and not any(path.iterdir())]
    return found | {f"{path.relative_to(directory)}/": "" for path in empty}


class Ground:
    """A store with a full volume, an empty one, and one whose device is elsewhere."""

    def __init__(self, base: Path) -> None:
        self.base, self.device = base, base / "device"
        self.store = Store.open(str(base / "root"))

    def make(self, device_files: dict[str, str]) -> None:
        self.device.mkdir()
        write(self.device, device_files)
        write(Path(self.store.create("full", labels={"kept": "yes"}).path), FILES)
        self.store.create("empty")
        self.store.create("dev", options={"type": "none", "device": str(self.device)})

    def state(self) -> State:
        """What the store holds; asserts that nothing is half-made and nothing is left over."""
        self.store.clean()
        volumes = self.store.volumes()
        directory = Path(self.store.root, "volumes")
        assert sorted(path.name for path in directory.iterdir()) == [volume.name for volume in volumes]
        for volume in volumes:
            assert [path.name for path in (directory / volume.name).iterdir()] == ["_data"]
        return {volume.name: read(Path(volume.path)) for volume in volumes}


def fill(ground: Ground, name: str) -> None:
    volume = ground.store.find(name)
    directory = ground.store.begin_fill(volume)
    assert directory is not None
    write(Path(directory), FILES)
    ground.store.end_fill(volume)


def restore(ground: Ground, name: str) -> None:
    with ground.store.replacing([name], force=True) as (directory,):
        write(Path(directory), NEW)


def acquire(ground: Ground, text: str) -> None:
    pid = os.getpid()
    ground.store.acquire(
        name="web",
        mountpoint="/mnt",
        specs=[parse_volume(text)],
        pid=pid,
        start=control.process_start(pid) or 0,
        pidns=control.pid_namespace(),
    )


def fill_shared(ground: Ground) -> None:
    """Two running mounts have the volume, so its directory must stay the same."""
    ground.store.acquire(
        name=None,
        mountpoint="/1",
        specs=[parse_volume("empty:/v")],
        pid=1,
        start=control.process_start(1) or 0,
        pidns=control.pid_namespace(),
    )
    acquire(ground, "empty:/v")
    before = os.stat(ground.store.find("empty").path).st_ino
    fill(ground, "empty")
    assert os.stat(ground.store.find("empty").path).st_ino == before


STEPS: dict[str, tuple[dict[str, str], Callable[[Ground], object]]] = {
    "create": ({}, lambda ground: ground.store.create("new")),
    "remove": ({}, lambda ground: ground.store.remove("full")),
    "rename": ({}, lambda ground: ground.store.rename("full", "other")),
    "clone": ({}, lambda ground: ground.store.clone("full", "copy", copy_tree)),
    "restore": ({}, lambda ground: restore(ground, "full")),
    "restore-new": ({}, lambda ground: restore(ground, "fresh")),
    "restore-device": (FILES, lambda ground: restore(ground, "dev")),
    "fill": ({}, lambda ground: fill(ground, "empty")),
    "fill-device": ({}, lambda ground: fill(ground, "dev")),
    "fill-shared": ({}, fill_shared),
    "acquire": ({}, lambda ground: acquire(ground, "wanted:/data")),
}


READING = frozenset(
    ("stat", "lstat", "fstat", "listdir", "scandir", "fspath", "listxattr", "getxattr", "geteuid", "getpid", "urandom")
    + ("close", "readlink", "WIFSIGNALED", "fetchone", "fetchall", "cursor")
)
"""Calls that change nothing: a kill before them is one before the next that does."""


def matters(frame: FrameType, event: str, argument: object) -> bool:
    """Whether a profiling event is the start of what a kill could come between."""
    if event == "call":
        return frame.f_code.co_filename == sysio.__file__
    if event != "c_call" or getattr(argument, "__name__", "") in READING:
        return False
    kind = type(getattr(argument, "__self__", None))
    return getattr(argument, "__module__", None) in ("posix", "fcntl") or kind.__module__.startswith("sqlite3")


def killed_at(instant: int, act: Callable[[], object]) -> bool:
    """Run `act` in a child that is killed before its call number `instant`; False if it got to its end."""
    child = os.fork()
    if child == 0:
        calls = 0

        def count(frame: FrameType, event: str, argument: object) -> None:
            nonlocal calls
            if matters(frame, event, argument):
                calls += 1
                if calls == instant:
                    sys.setprofile(None)
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        try:
            act()
        except BaseException as error:
            sys.setprofile(None)
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        sys.setprofile(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the step itself failed"
    return False


def kill_at_every_instant(step: str, base: Path) -> int:
    device_files, act = STEPS[step]
    place, spare = base / "t", base / "spare"
    place.mkdir()
    ground = Ground(place)
    ground.make(device_files)
    old = ground.state()
    shutil.copytree(place, spare)
    seen = [old]
    instant = 0
    while True:
        instant += 1
        ended = not killed_at(instant, lambda: act(ground))
        state = ground.state()
        assert ground.state() == state
        if ended:
            assert state != old
            assert state in seen, "the last kill was early"
            return instant - 1
        if state not in seen:
            seen.append(state)
        assert len(seen) <= 2, f"neither old nor new after a kill at {instant}: {seen}"
        shutil.rmtree(place)
        shutil.copytree(spare, place)


def work_at_random(root: str, seed: int) -> None:
    """Do random steps for ever; those that the store refuses are none of this test's business."""
    chance = random.Random(seed)
    store = Store.open(root)
    while True:
        with contextlib.suppress(UnionError):
            random_step(store, chance)


def random_step(store: Store, chance: random.Random) -> None:
    one, other = chance.sample(["aa", "bb", "cc"], 2)
    steps: list[Callable[[], object]] = [
        lambda: store.create(one),
        lambda: store.remove(one),
        lambda: store.rename(one, other),
        lambda: store.clone(one, other, copy_tree),
        lambda: restore_files(store, one),
    ]
    chance.choice(steps)()


def restore_files(store: Store, name: str) -> None:
    with store.replacing([name], force=True) as (directory,):
        write(Path(directory), FILES)


if __name__ == "__main__":
    if sys.argv[1] == "random":
        work_at_random(sys.argv[2], int(sys.argv[3]))
    print(kill_at_every_instant(sys.argv[1], Path(sys.argv[2])))
