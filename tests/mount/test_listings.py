"""Listings of directories so large that the kernel takes them in several pieces, with attributes and without.

FUSE asks for the first piece with attributes, and for the others only if the reader looks at the entries.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.differential import syscalls
from tests.support import patched, raw
from tests.support.layers import FIFO, File, HardLink, Symlink, Tree, build
from tests.support.mounts import Stack

COUNT = 300
StackMaker = Callable[..., Stack]


def crowd(prefix: str, what: Callable[[int], object]) -> Tree:
    """Many entries of one kind."""
    return {f"{prefix}-{number:04}": what(number) for number in range(COUNT)}  # type: ignore[misc]


@pytest.fixture
def root(stack: Stack) -> Path:
    """A mounted union with a directory `d` that holds every kind of entry, some changed since."""
    return fill(stack)


def fill(stack: Stack) -> Path:
    """Mount a stack over layers that hold every kind of entry, and change some."""
    kinds: Tree = {
        **crowd("file", lambda number: f"{number}".encode()),
        "link": HardLink("d/file-0000"),
        **crowd("dir", lambda _: {"below": b"x"}),
        **crowd("symlink", lambda number: Symlink(f"file-{number:04}")),
        "fifo": FIFO,
        "rich": File(b"r", 0o640, 5, 6, {"user.x": b"1"}),
    }
    build(stack.lower, {"d": kinds, "elsewhere": {"far": b"f", "fardir": {"below": b"y"}}})
    root = stack.mount()
    here = root / "d"
    for number in range(0, COUNT, 7):
        (here / f"file-{number:04}").chmod(0o600)
        with open(here / f"file-{number + 1:04}", "ab") as file:
            file.write(b"more")
        (here / f"dir-{number:04}" / "new").touch()
        os.rename(here / f"dir-{number + 1:04}", here / f"moved-{number:04}")
        os.rename(here / f"file-{number + 2:04}", here / f"renamed-{number:04}")
        os.unlink(here / f"symlink-{number:04}")
        os.unlink(here / f"file-{number + 3:04}")
        (here / f"file-{number + 3:04}").mkdir()
        (here / f"new-{number:04}").touch()
    os.rename(root / "elsewhere" / "far", here / "zz-far")
    os.rename(root / "elsewhere" / "fardir", here / "zz-fardir")
    return root


def names_only(directory: Path) -> dict[str, tuple[int, bool, bool]]:
    """Number and type of each entry as the listing itself says, none of them looked at before all are read."""
    with os.scandir(directory) as entries:
        return {
            entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in entries
        }


def looked_at(directory: Path) -> dict[str, tuple[int, bool, bool]]:
    """The same by stat."""
    found = {}
    for name in os.listdir(directory):
        status = (directory / name).lstat()
        found[name] = (status.st_ino, stat.S_ISDIR(status.st_mode), stat.S_ISLNK(status.st_mode))
    return found


@pytest.mark.parametrize("again", ["as they are", "remounted", "kept"])
def test_numbers_and_types_are_those_of_stat(stack: Stack, root: Path, again: str) -> None:
    here = root / "d"
    if again == "remounted":
        stack.remount()
    elif again == "kept":
        names_only(here)
    listed = names_only(here)
    assert len(listed) > 3 * COUNT
    assert listed == looked_at(here)
    assert listed == names_only(here)


def attributes(directory: Path) -> dict[str, tuple[int, ...]]:
    """What stat says of each entry once the directory has been listed: the kernel has it from the listing then."""
    found = {}
    for name in os.listdir(directory):
        status = (directory / name).lstat()
        own = (status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_ctime_ns)
        sizes = (0, 0) if stat.S_ISDIR(status.st_mode) else (status.st_nlink, status.st_size)
        found[name] = (*own, *sizes, status.st_rdev)
    return found


def test_attributes_are_those_that_overlayfs_lists(ours: Stack, check_by_overlay: Callable[[Stack], Path]) -> None:
    """Of files that are plain and others, listed for the first time, when the kernel has dropped all, and once changed."""
    here = fill(ours) / "d"
    changed = here / "file-0104"
    ours.remount()
    first = attributes(here)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    assert attributes(here) == first
    assert attributes(here) == first
    with open(changed, "ab", buffering=0) as file:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        file.write(b"more")
        os.fchmod(file.fileno(), 0o604)
        now = attributes(here)
    assert now["file-0104"][1] & 0o777 == 0o604
    assert now["file-0104"][7] == len("104more")
    ours.umount()
    shown = attributes(check_by_overlay(ours) / "d")
    assert set(shown) == set(now)
    assert {name: seen for name, seen in shown.items() if seen != now[name]} == {}


def test_a_kept_listing_follows_changes(root: Path) -> None:
    here = root / "d"
    for number in range(10):
        before = names_only(here)
        assert names_only(here) == before
        (here / f"another-{number}").touch()
        os.unlink(here / f"file-{102 + number * 7:04}")
        os.rename(here / f"dir-{200 + number * 7:04}", here / f"again-{number}")
        after = names_only(here)
        assert set(after) - set(before) == {f"another-{number}", f"again-{number}"}
        assert set(before) - set(after) == {f"file-{102 + number * 7:04}", f"dir-{200 + number * 7:04}"}
        with open(here / f"file-{103 + number * 7:04}", "ab") as file:  # a copy-up changes no listing
            file.write(b"up")
        assert names_only(here) == after == looked_at(here)


def test_removing_while_listing_misses_nothing(root: Path) -> None:
    with os.scandir(root / "d") as entries:
        for entry in entries:
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
    assert os.listdir(root / "d") == []
    os.rmdir(root / "d")
    assert sorted(os.listdir(root)) == ["elsewhere"]


def test_two_readers_of_one_directory(root: Path) -> None:
    """Each has its own place, also when one began before a change."""
    here = root / "d"
    expected = set(os.listdir(here))
    with os.scandir(here) as first:
        seen = [next(first).name for _ in range(50)]
        (here / "late").touch()
        with os.scandir(here) as second:
            assert {entry.name for entry in second} == {*expected, "late"}
        seen += [entry.name for entry in first]
    assert len(seen) == len(set(seen))
    assert expected <= set(seen) <= {*expected, "late"}


def test_removing_while_another_lists(root: Path) -> None:
    """The other one has the kernel read its kept listing anew, in which the remover's place is gone."""
    here = root / "d"
    with os.scandir(here) as entries:
        for number, entry in enumerate(entries):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
            if number % 100 == 99:
                assert entry.name not in os.listdir(here)
                os.listdir(here)
    assert os.listdir(here) == []


def wait_for(stack: Stack, counter: str, value: int) -> None:
    """The kernel reports a close in the background."""
    for _ in range(50):
        if stack.counter(counter) == value:
            return
    raise AssertionError(f"{counter} {stack.counter(counter)}")


def test_a_directory_is_opened_again_without_python(ours: Stack) -> None:
    build(ours.lower, {"d": {f"f{number}": b"x" for number in range(20)}})
    here = ours.mount() / "d"
    expected = names_only(here)
    wait_for(ours, "open_directories", 0)
    for _ in range(10):
        assert names_only(here) == expected
    wait_for(ours, "native_reopened", 20)
    (here / "late").touch()
    (here / "f3").unlink()
    assert set(names_only(here)) == {*expected, "late"} - {"f3"}
    wait_for(ours, "open_directories", 0)


def test_readers_at_once(ours: Stack) -> None:
    """The kernel keeps a listing for all of its readers, and nothing else is asked for, as long as nothing changes."""
    build(ours.lower, {"d": {f"f{number}": b"x" for number in range(20)}})
    here = ours.mount() / "d"
    expected = names_only(here)
    kept = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    before = ours.counter("native_direct")
    for _ in range(10):
        assert names_only(here) == expected
        assert set(os.listdir(kept)) == set(expected)
    assert ours.counter("native_direct") <= before + 1  # one opendir(3) asks for the times that reading has changed
    first = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    assert set(os.listdir(first)) == set(expected)
    (here / "late").touch()
    (here / "f3").unlink()
    changed = {*expected, "late"} - {"f3"}
    second = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    for fd in (first, second, kept):
        assert set(os.listdir(fd)) == changed
        os.fsync(fd)
    with raw.DirStream(here) as stream:
        some = [name for name, _, _ in itertools.islice(stream, 2)]
        (here / "f4").rename(here / "g4")
        some += [name for name, _, _ in stream]
    assert {os.fsencode(name) for name in changed - {"f4"}} <= set(some)
    shutil.rmtree(here)
    for fd in (first, second, kept):
        assert os.listdir(fd) == []
        os.close(fd)
    wait_for(ours, "open_directories", 0)


@pytest.mark.parametrize("place", [".", "d"])
@pytest.mark.parametrize("ends", ["reads on", "closes"])
def test_what_readers_of_different_times_have_read_is_not_kept(ours: Stack, ends: str, place: str) -> None:
    """The kernel puts together what one reader got before a change and another one behind it."""
    build(ours.lower / place, {f"f{number:03}": b"" for number in range(200)})
    here = ours.mount() / place
    first, second = (os.open(here, os.O_RDONLY | os.O_DIRECTORY) for _ in range(2))
    begun = syscalls.getdents(first, 100)
    order = syscalls.all_dents(second)  # now the kernel has all of it
    os.unlink(here / os.fsdecode(order[100].name))
    (here / "late").touch()
    third = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    again = syscalls.getdents(third, 100)  # it begins anew
    assert again == begun or "late" in {os.fsdecode(entry.name) for entry in again}
    while order[-1] not in syscalls.getdents(first, 1000):
        pass
    if ends == "reads on":
        assert syscalls.getdents(first) == []
    for fd in (first, second) if ends == "reads on" else (first, second, third):
        os.close(fd)
    changed = {os.fsdecode(entry.name) for entry in order} - {os.fsdecode(order[100].name), ".", ".."} | {"late"}
    for _ in range(3):
        assert set(os.listdir(here)) == changed
    if ends == "reads on":
        assert {os.fsdecode(entry.name) for entry in syscalls.all_dents(third)} <= changed
        os.close(third)


def test_readers_at_once_and_a_writer(ours: Stack) -> None:
    """Whatever pieces they take of a listing, each has what was there all the time once, and nothing old remains."""
    names = {f"always-{number:03}-{'x' * (number % 60)}" for number in range(300)}
    build(ours.lower, {"d": dict.fromkeys(names, b"")})
    here = ours.mount() / "d"
    with multiprocessing.Pool(6) as pool:
        seconds = 4.0
        reading = [pool.apply_async(read_on, (here, names, size, seconds)) for size in (100, 1000, 5000, 40_000)]
        changing = [pool.apply_async(change_on, (here, seed, seconds)) for seed in (1, 2)]
        for result in [*reading, *changing]:
            assert result.get(60) > 10
    for _ in range(3):
        assert set(os.listdir(here)) == set(os.listdir(ours.up / "d")) | names


def read_on(here: Path, names: set[str], size: int, seconds: float) -> int:
    """List a directory for some time, at most `size` bytes at once, and sometimes not to its end."""
    dice = random.Random(size)
    turns, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        fd = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
        try:
            seen: list[str] = []
            while piece := syscalls.getdents(fd, size):
                seen += [os.fsdecode(entry.name) for entry in piece]
                if dice.random() < 0.01:
                    break
            else:
                lost = names - set(seen)
                assert not lost, f"{len(lost)} lost"
            assert len(seen) == len(set(seen)), "some came twice"
        finally:
            os.close(fd)
        turns += 1
    return turns


def change_on(here: Path, seed: int, seconds: float) -> int:
    """Make and remove names for some time; what has been removed or made is seen by the next reader."""
    dice = random.Random(seed)
    turns, until = 0, time.monotonic() + seconds
    there: set[str] = set()
    while time.monotonic() < until:
        name = f"{dice.choice('abxyz')}-{seed}-{dice.randrange(30)}"
        if name in there:
            os.unlink(here / name)
        else:
            (here / name).touch()
        there ^= {name}
        mine = {entry for entry in os.listdir(here) if f"-{seed}-" in entry and not entry.startswith("always")}
        assert mine == there
        turns += 1
    return turns


def test_whatever_is_asked_of_a_directory_opened_again(stack: Stack) -> None:
    build(stack.lower, {"d": {f"f{number}": b"x" for number in range(20)}})
    here = stack.mount() / "d"
    before = set(os.listdir(here))
    assert set(os.listdir(here)) == before
    first = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    (here / "late").touch()
    os.fsync(first)
    assert set(os.listdir(first)) == {*before, "late"}
    second = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    (here / "f3").unlink()
    assert set(os.listdir(second)) == set(os.listdir(first)) == {*before, "late"} - {"f3"}
    os.fsync(second)
    shutil.rmtree(here)
    for fd in (first, second):
        assert os.listdir(fd) == []
        os.close(fd)
    here.mkdir()
    (here / "new").touch()
    for _ in range(3):
        assert os.listdir(here) == ["new"]


def test_a_place_is_found_again(root: Path) -> None:
    """telldir(3) and seekdir(3), also after changes on both sides of the place."""
    here = root / "d"
    with raw.DirStream(here) as stream:
        first = [name for name, _, _ in itertools.islice(stream, 500)]
        place = stream.tell()
        rest = {name for name, _, _ in stream}
        assert {*first, *rest} == {*map(os.fsencode, os.listdir(here)), b".", b".."}
        new = {b"another-%d" % number for number in range(20)}
        for name in new:
            (here / os.fsdecode(name)).touch()
        stream.seek(place)
        again = {name for name, _, _ in stream}
        assert rest <= again <= rest | new


COLD = """
def change(module):
    module._COLD_SECONDS = {seconds}

PATCHES = {{"unionfs.fuse.direct": change}}
"""


@pytest.fixture(params=["warm", "cold"])
def long_listing(ours: Stack, ground: Path, request: pytest.FixtureRequest) -> tuple[Stack, set[str]]:
    """A mounted union with a directory `d` of ten thousand names, some of which are in upper."""
    build(ours.lower, {"d": {"sub": {"below": b"x"}}})
    names = {f"file-{number:05}" for number in range(10_000)}
    for name in names:
        os.close(os.open(ours.lower / "d" / name, os.O_CREAT | os.O_WRONLY))
    root = ours.mount("timeout=0")
    for number in range(0, 10_000, 500):
        os.chmod(root / "d" / f"file-{number:05}", 0o600)
        os.unlink(root / "d" / f"file-{number + 1:05}")
        (root / "d" / f"new-{number:05}").touch()
    gone = {f"file-{number + 1:05}" for number in range(0, 10_000, 500)}
    made = {f"new-{number:05}" for number in range(0, 10_000, 500)}
    ours.umount()
    seconds = 0.0 if request.param == "cold" else 1.0  # what an entry may take at most to count as one from memory
    ours.mount(under=patched.command(ground, COLD.format(seconds=seconds)))
    return ours, (names | made | {"sub"}) - gone


def test_a_long_listing_goes_on_with_names_alone(
    long_listing: tuple[Stack, set[str]], request: pytest.FixtureRequest
) -> None:
    """After some eight thousand, or soon if their attributes come from a disk."""
    stack, names = long_listing
    cold = request.node.callspec.params["long_listing"] == "cold"
    with os.scandir(stack.mnt / "d") as entries:
        listed = {entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in entries}
    assert set(listed) == names
    assert stack.counter("nodes") < (1000 if cold else 9000)
    for name, (ino, is_dir) in listed.items():
        st = os.lstat(stack.mnt / "d" / name)
        assert (ino, is_dir) == (st.st_ino, stat.S_ISDIR(st.st_mode)), name


def test_who_looks_at_each_entry_gets_attributes_along(long_listing: tuple[Stack, set[str]]) -> None:
    stack, names = long_listing

    def requests() -> int:
        return stack.counter("native_direct") + stack.counter("native_lookup")

    before = requests()
    with os.scandir(stack.mnt / "d") as entries:
        looked = {entry.name for entry in entries if entry.stat(follow_symlinks=False)}
    assert looked == names
    assert requests() - before < len(names) // 2


def test_a_long_listing_goes_on_behind_what_was_removed_meanwhile(ours: Stack) -> None:
    """Also if nothing is left of what the next piece of it would have."""
    (ours.lower / "d").mkdir()
    (ours.up / "d").mkdir()
    for number in range(12_000):
        os.close(os.open(ours.up / "d" / f"file-{number:05}", os.O_CREAT | os.O_WRONLY))
    here = ours.mount("timeout=0") / "d"
    order = os.listdir(here)
    with os.scandir(here) as entries:
        listed = [entry.name for entry in itertools.islice(entries, 9000)]
        for name in order[9000:-1]:
            os.unlink(here / name)
        listed += [entry.name for entry in entries]
    assert listed[:9000] == order[:9000]
    assert listed[-1] == order[-1]
