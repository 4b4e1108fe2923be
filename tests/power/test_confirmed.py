"""What a system call has confirmed is there after a power cut right behind it, each way in which one can.

The first change of a lower file is the delicate one: not only the data must be on the disk then, but also the name that
leads to the copy, and no longer to the lower file.
"""

from __future__ import annotations

import mmap
import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.power.__main__ import Ground, raw_sync
from tests.power.cuts import Cut, Replay, read_log
from tests.support.disks import disk
from tests.support.filesystems import run
from tests.support.mounts import Stack, wait_gone

OLD, NEW = b"o" * 800, b"n" * 200
BIG_BYTES = 20 << 20  # enough for its data to follow
HOLE_BYTES = 50_000
CUT_BYTES = 500


@contextmanager
def changed(path: Path, flags: int = 0) -> Iterator[int]:
    """A file of which some bytes in the middle were just written."""
    fd = os.open(path, os.O_RDWR | flags)
    try:
        assert os.pwrite(fd, NEW, 300) == len(NEW)
        yield fd
    finally:
        os.close(fd)


def fsync(path: Path) -> None:
    with changed(path) as fd:
        os.fsync(fd)


def fdatasync(path: Path) -> None:
    with changed(path) as fd:
        os.fdatasync(fd)


def dsync(path: Path) -> None:
    with changed(path, os.O_DSYNC):
        pass


def msync(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, len(OLD)) as mapped:
        os.close(fd)
        mapped[300:500] = NEW
        mapped.flush()


def after_chmod(path: Path) -> None:
    path.chmod(0o644)
    fdatasync(path)


def to_nothing(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    os.fdatasync(fd)
    os.close(fd)


def to_nothing_after_chmod(path: Path) -> None:
    path.chmod(0o644)
    to_nothing(path)


def anew_after_chmod(path: Path) -> None:
    path.chmod(0o644)
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    assert os.pwrite(fd, NEW, 300) == len(NEW)
    os.fdatasync(fd)
    os.close(fd)


def cut(path: Path) -> None:
    os.truncate(path, CUT_BYTES)
    fd = os.open(path, os.O_WRONLY)
    os.fdatasync(fd)
    os.close(fd)


def chmod(path: Path) -> None:
    path.chmod(0o600)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def fchmod(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fchmod(fd, 0o600)
    os.fsync(fd)
    os.close(fd)


def is_new(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(300)
        return stream.read(len(NEW)) == NEW


def is_empty(path: Path) -> bool:
    return path.stat().st_size == 0


def is_cut(path: Path) -> bool:
    return path.read_bytes() == OLD[:CUT_BYTES]


def is_private(path: Path) -> bool:
    return stat.S_IMODE(path.stat().st_mode) == 0o600


Way = tuple[Callable[[Path], None], Callable[[Path], bool]]
WAYS: dict[str, Way] = {
    "fsync": (fsync, is_new),
    "fdatasync": (fdatasync, is_new),
    "O_DSYNC": (dsync, is_new),
    "msync": (msync, is_new),
    "chmod, fdatasync": (after_chmod, is_new),
    "big": (fdatasync, is_new),
    "hole": (fdatasync, is_new),
    "hard link": (fdatasync, is_new),
    "in a lower directory/file": (fdatasync, is_new),
    "truncate": (to_nothing, is_empty),
    "chmod, truncate": (to_nothing_after_chmod, is_empty),
    "chmod, truncate, write": (anew_after_chmod, is_new),
    "cut": (cut, is_cut),
    "chmod": (chmod, is_private),
    "fchmod": (fchmod, is_private),
}


def build_lower(lower: Path) -> None:
    for name in WAYS:
        path = lower / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(OLD)
    (lower / "big").write_bytes(bytes(BIG_BYTES))
    os.truncate(lower / "hole", 0)
    os.truncate(lower / "hole", HOLE_BYTES)
    os.link(lower / "hard link", lower / "its other name")


def record(made: Ground, union: Stack, directory: Path) -> dict[str, int]:
    """Go each way on a disk that remembers; return how long its log was right behind each."""
    behind: dict[str, int] = {}
    run("cp", "--sparse=always", str(made.baseline), str(directory / "image"))
    with disk(directory) as device, made.on(device.device):
        root = union.mount()
        daemon = union.daemon()
        for name, (act, _) in WAYS.items():
            raw_sync(made.mounted)
            act(root / name)
            behind[name] = device.log.stat().st_size
        union.umount()
        assert wait_gone(daemon)
    return behind


@pytest.mark.parametrize(("kind", "options"), [("ext4", ""), ("ext4", "native=off"), ("xfs", ""), ("btrfs", "")])
def test_what_is_confirmed_is_there_after_a_power_cut(ground: Path, kind: str, options: str) -> None:
    made = Ground(ground, kind)
    layers = [made.mounted / name for name in ("lower", "upper", "work")]
    union = Stack("union", ground, layers[:1], layers[1], layers[2], ground / "mnt", options=options)
    for name in ("recorded", "mnt"):
        (ground / name).mkdir()
    with made.on(made.baseline):
        for layer in layers:
            layer.mkdir()
        build_lower(layers[0])
    behind = record(made, union, ground / "recorded")
    writes = read_log(ground / "recorded/log")
    replay = Replay(made.baseline, writes, random.Random(1))
    lost: list[str] = []
    for name, (_, is_there) in WAYS.items():
        replay.image(Cut(sum(write.end <= behind[name] for write in writes), "nothing"), made.image)
        with made.on(made.image):
            root = union.mount()
            if not is_there(root / name):
                lost.append(name)
            union.umount()
    assert lost == []
