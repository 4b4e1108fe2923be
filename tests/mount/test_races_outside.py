"""Directories that change places with symbolic links leading out, again and again, while they are used: nothing outside is
read or written.

Somebody who may write to a lower layer, to the source of a bind path, to a volume, or who simply uses the mount, exchanges
names in a tight loop. Some links are relative and lead to the canary from where the layers are, the others absolute. Whoever
uses the mount does so in a chroot(2) around it, where neither leads anywhere, so that a user's own steps don't touch it.

UNIONFS_RACE_SECONDS says how long each race runs; the default is short.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import StackMaker
from tests.support.canary import SECRET, Canary
from tests.support.mounts import Stack, environment, mounted_below
from tests.support.swapper import swapping
from unionfs.archives import archive, copytree
from unionfs.errors import UnionError
from unionfs.store.volumes import Store

SECONDS = float(os.environ.get("UNIONFS_RACE_SECONDS", "1"))
PAIRS = 120
FEW_DESCRIPTORS = ["prlimit", "--nofile=200:200"]
"""So directories are opened anew again and again."""
FAULT_SECONDS = 100 + 10 * SECONDS

pytestmark = [pytest.mark.fault_seconds(FAULT_SECONDS), pytest.mark.timeout(FAULT_SECONDS + 60)]


@pytest.fixture
def canary(ground: Path) -> Iterator[Canary]:
    (ground / "s").mkdir()
    made = Canary(ground / "s" / "canary")
    yield made
    made.check()


@pytest.fixture
def far(make_stack: StackMaker, canary: Canary) -> Stack:
    """A stack beside the canary whose mount point lies elsewhere."""
    stack = make_stack("union", options="timeout=0")
    stack.mnt = canary.where.parent / "far" / "away" / "mnt"
    stack.mnt.mkdir(parents=True)
    return stack


def plant(directory: Path, canary: Path) -> list[tuple[Path, Path]]:
    """Directories and files in them, and for each something that leads out; the pairs to exchange."""
    pairs: list[tuple[Path, Path]] = []
    for number in range(PAIRS):
        home = directory / f"d{number}"
        (home / "sub").mkdir(parents=True)
        for name in ("f", "p", "secret", "sub/f"):
            (home / name).write_bytes(b"good")
        os.mkfifo(home / "evil-p")
        up = str(canary) if number % 2 else "../canary"
        inner = str(canary) if number % 2 else "../../canary"
        (home / "evil-f").symlink_to(f"{inner}/secret")
        (home / "evil-sub").symlink_to(f"{inner}/deep")
        (directory / f"evil{number}").symlink_to(up)
        pairs += [(home, directory / f"evil{number}")]
        pairs += [(home / name, home / f"evil-{name}") for name in ("p", "f", "sub")]
    return pairs


def use(far: Stack, seconds: float, *, below: str = "", changing: float = 0.3) -> Count:
    """Work in the mount, from a chroot around it, for some seconds; `changing` is the share of what changes something."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "died"
        try:
            os.chroot(far.mnt.parent)
            os.chdir("/")
            user = User(Path("/", far.mnt.name, below))
            user.work(seconds, changing=changing)
            said = json.dumps([sum(user.done.values()), sum(user.failed.values())])
        except BaseException as error:
            said = json.dumps(f"{type(error).__name__}: {error}")
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        result = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert isinstance(result, list), result
    return Count(*result)


@dataclass
class Count:
    """How many operations succeeded, and failed."""

    done: int
    failed: int

    def report(self, exchanges: int) -> None:
        """Print what was done, and fail where too little was for a race."""
        print(f"{self.done} done, {self.failed} refused, {exchanges} exchanges")
        assert self.done + self.failed > 5
        assert exchanges > 100 * SECONDS


class User:
    """Does this and that below a directory, and looks at all that it gets to read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: Counter[str] = Counter()
        self.failed: Counter[int] = Counter()
        self._number = 0

    def work(self, seconds: float, *, changing: float) -> None:
        """Go on for some seconds."""
        dice = random.Random(1)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            home = self.root / f"d{dice.randrange(PAIRS)}"
            act = dice.choice(CHANGES if dice.random() < changing else LOOKS)
            self._number += 1
            try:
                read = act(home, self._number)
                self.done[act.__name__] += 1
                assert SECRET not in read, f"{act.__name__} read the canary"
            except OSError as error:
                self.failed[error.errno or 0] += 1


def read_file(path: Path) -> bytes:
    """Read a file; one that isn't regular isn't waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


def look_secret(home: Path, _: int) -> bytes:
    return read_file(home / "secret")


def look_sub(home: Path, _: int) -> bytes:
    return read_file(home / "sub" / "f") + b"".join(os.listxattr(home / "f", follow_symlinks=False) and [b""])


def look_list(home: Path, _: int) -> bytes:
    return os.fsencode("".join(os.listdir(home)) + str(os.lstat(home / "sub")))


def look_pipe(home: Path, _: int) -> bytes:
    return read_file(home / "p")


def look_deeper(home: Path, _: int) -> bytes:
    return read_file(home / "sub" / "deeper" / "secret")


def change_create(home: Path, number: int) -> bytes:
    (home / f"new{number}").write_bytes(b"new")
    return b""


def change_append(home: Path, _: int) -> bytes:
    descriptor = os.open(home / "f", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    os.write(descriptor, b"more")
    os.close(descriptor)
    return b""


def change_mode(home: Path, number: int) -> bytes:
    os.chmod(home / "secret", 0o600 + number % 64)
    return b""


def change_attribute(home: Path, _: int) -> bytes:
    os.setxattr(home / "sub", "user.mine", b"1")
    return os.getxattr(home / "f", "user.secret")


def change_directory(home: Path, number: int) -> bytes:
    os.mkdir(home / "sub" / f"dir{number}")
    os.rmdir(home / "sub" / f"dir{number}")
    return b""


def change_remove(home: Path, _: int) -> bytes:
    os.unlink(home / "secret")
    return b""


def change_rename(home: Path, number: int) -> bytes:
    os.rename(home / "sub", home / f"moved{number}")
    os.rename(home / f"moved{number}", home / "sub")
    return b""


def change_link(home: Path, number: int) -> bytes:
    os.link(home / "secret", home / f"link{number}")
    return read_file(home / f"link{number}")


Act = Callable[[Path, int], bytes]
LOOKS: list[Act] = [look_secret, look_sub, look_list, look_pipe, look_deeper]
CHANGES: list[Act] = [
    *(change_create, change_append, change_mode, change_attribute),
    *(change_directory, change_remove, change_rename, change_link),
]


def assert_not_copied(root: Path) -> None:
    """Nothing of the canary has come into a directory."""
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                assert SECRET not in path.read_bytes(), path


@pytest.mark.expected_log("changes of lowers came too fast")
@pytest.mark.parametrize(
    "options", ["timeout=0", "timeout=0,metacopy=off,index=off", "timeout=0,native=off", "timeout=31536000,lower=watch"]
)
def test_swaps_in_a_lower(far: Stack, canary: Canary, options: str) -> None:
    """Layers must not change below a mount, so any outcome will do; but for anything outside."""
    pairs = plant(far.lower, canary.where)
    far.mount(options, under=FEW_DESCRIPTORS)
    with swapping(pairs) as count:
        use(far, SECONDS / 2, changing=0.0)
        used = use(far, SECONDS / 2, changing=0.2)
    used.report(count.exchanges)
    far.umount()
    assert_not_copied(far.up)


def test_swaps_in_the_mount(far: Stack, canary: Canary) -> None:
    """A user of the mount itself does it; all of that is in upper, or comes there."""
    pairs = plant(far.lower, canary.where)
    far.mount("timeout=1000", under=FEW_DESCRIPTORS)
    inside = [(far.mnt / one.relative_to(far.lower), far.mnt / other.relative_to(far.lower)) for one, other in pairs]
    with swapping(inside) as count:
        used = use(far, SECONDS)
    used.report(count.exchanges)
    far.umount()
    assert_not_copied(far.up)


@pytest.mark.parametrize("options", ["", "native=off"])
def test_swaps_in_the_source_of_a_bind_path(far: Stack, canary: Canary, options: str) -> None:
    host = canary.where.parent / "host"
    pairs = plant(host, canary.where)
    far.mount(options, under=FEW_DESCRIPTORS, extra=["-v", f"{host}:/bind", "--bind-mode", "fuse"])
    with swapping(pairs) as count:
        used = use(far, SECONDS, below="bind")
    used.report(count.exchanges)
    far.umount()
    assert_not_copied(host)


@pytest.mark.expected_log("can't be filled|can't be made a mount point|can't bind|is missing|can't be bound")
def test_swaps_while_volumes_are_bound_and_filled(far: Stack, canary: Canary) -> None:
    """Mount points are made, and volumes filled, in a union whose lower is another one at each look."""
    pairs = plant(far.lower, canary.where)[:8]
    command = [sys.executable, "-m", "unionfs", "--root", str(far.base / "store"), "mount", "--log-file", str(far.log)]
    exchanges = 0
    mounts = 0
    host = canary.where.parent / "host"
    host.mkdir()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or not mounts:
        volumes = [
            "-v",
            f"vol{mounts}:/d0",
            "-v",
            f"{host}:/d1/sub",
            "-v",
            f"{host}:/d1/made",
            "-v",
            f"vol{mounts}:/d0/sub/x",
        ]
        modes = ["--bind-mode", ("kernel", "fuse")[mounts % 2]]
        words = [*command, *volumes, *modes, "--work", str(far.work), str(far.lower), str(far.up), str(far.mnt)]
        with swapping(pairs) as count:
            done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60)
            places = mounted_below(canary.where.parent)
        assert done.returncode in (0, 3, 6), done.stderr
        assert "internal error" not in done.stderr
        assert all(place.is_relative_to(far.mnt) for place in places), places
        if done.returncode == 0:
            mounts += 1
            subprocess.run([*command[:5], "umount", str(far.mnt)], env=environment(), check=True, capture_output=True)
        exchanges += count.exchanges
    print(f"{mounts} mounts, {exchanges} exchanges")
    assert_not_copied(far.base / "store")
    assert_not_copied(far.up)


def test_swaps_in_a_volume(ground: Path, canary: Canary) -> None:
    """Backup, restore and copies of a volume that lies in a directory in which somebody else may write."""
    base = canary.where.parent
    device = base / "device"
    pairs = plant(device, canary.where)
    store = Store.open(str(base / "store"))
    store.create("vol", options={"type": "none", "device": str(device)})
    done: Counter[str] = Counter()
    good = io.BytesIO()
    (base / "small" / "d0" / "sub").mkdir(parents=True)
    (base / "small" / "d0" / "f").write_bytes(b"restored")
    archive.backup([archive.Root("", str(base / "small"))], good)
    with swapping(pairs) as count:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            out = io.BytesIO()
            with suppress(UnionError), store.reading(["vol"]) as (volume,):
                archive.backup([archive.Root("", volume.path)], out, warn=lambda _: None)
                done["backup"] += 1
            assert SECRET not in out.getvalue()
            done["backup refused"] += not out.getvalue()
            name = f"copy{done['copy']}"
            with suppress(UnionError, OSError):
                store.clone("vol", name, lambda source, target: copytree.copy_tree(source, target))
                done["copy"] += 1
                store.remove(name)
        for _ in range(10):
            with suppress(UnionError, OSError):
                with store.replacing(["vol"], force=True) as (path,):
                    good.seek(0)
                    archive.restore(good, [archive.Root("", path)])
                done["restore"] += 1
            plant_again(device)
    print(f"{dict(done)}, {count.exchanges} exchanges")
    assert_not_copied(base / "store")
    store.close()


def plant_again(device: Path) -> None:
    """What a restore has taken away comes back, as far as nothing stands in its way."""
    for number in range(10):
        with suppress(OSError):
            (device / f"evil{number}").symlink_to("../canary")
