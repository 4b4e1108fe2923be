"""Open files in every I/O mode: what one descriptor writes all others see, and `stat` and listings with them.

Each test runs with passthrough, without it, on what looks like an old kernel, on plain pyfuse3, and on kernel overlayfs
where that does the same.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.posix.table import fails
from tests.mount.test_native_fs import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, fallocate
from tests.support.layers import build
from tests.support.mounts import Stack
from tests.support.people import ALICE, as_user

SIZE = 300_000
DATA = bytes(range(256)) * (SIZE // 256) + b"tail"
MODES = ["passthrough=on", "passthrough=off", "old kernel", "native=off"]
StackMaker = Callable[..., Stack]


def make_mode(make_stack: StackMaker, mode: str, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """A stack that is mounted in a mode."""
    if mode == "overlay":
        return make_stack("overlay")
    if mode == "old kernel":
        monkeypatch.setenv("UNIONFS_OLD_KERNEL", "1")
        return make_stack("union")
    return make_stack("union", options=mode)


@pytest.fixture(params=MODES)
def ours(make_stack: StackMaker, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """Our union in every mode."""
    return make_mode(make_stack, request.param, monkeypatch)


@pytest.fixture(params=[*MODES, "overlay"])
def stack(make_stack: StackMaker, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """Our union in every mode, and kernel overlayfs."""
    return make_mode(make_stack, request.param, monkeypatch)


@pytest.fixture
def passing(make_stack: StackMaker) -> Stack:
    """Our union with passthrough."""
    return make_stack("union", options="passthrough=on")


@pytest.fixture
def opened() -> Iterator[Callable[..., int]]:
    """Open files that are closed at the end."""
    fds: list[int] = []

    def open_(path: Path, flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
        fds.append(os.open(path, flags, mode))
        return fds[-1]

    yield open_
    for fd in fds:
        os.close(fd)


def passed(stack: Stack) -> int:
    """How many opens have been passthrough."""
    return stack.counter("native_passthrough")


def content(fd: int) -> bytes:
    """All that a descriptor reads."""
    return os.pread(fd, SIZE * 4, 0)


# --- copy-up while it is open --------------------------------------------------------------------


def test_a_write_after_copy_up_goes_up_and_old_descriptors_see_it(stack: Stack, opened: Callable[..., int]) -> None:
    """The trap of passthrough: with the lower file as backing file the write would reach the lower layer."""
    build(stack.lower, {"f": DATA})
    root = stack.mount()
    reader = opened(root / "f")
    assert os.pread(reader, 4, 0) == DATA[:4]
    writer = opened(root / "f", os.O_RDWR)
    os.pwrite(writer, b"written", 1000)
    expected = DATA[:1000] + b"written" + DATA[1007:]
    assert content(reader) == expected
    assert content(writer) == expected
    os.pwrite(writer, b"more", len(DATA))
    assert content(reader) == expected + b"more"
    late = opened(root / "f", os.O_WRONLY | os.O_APPEND)
    os.write(late, b"!")
    assert content(reader) == expected + b"more!"
    assert (stack.lower / "f").read_bytes() == DATA
    assert (stack.up / "f").read_bytes() == expected + b"more!"


def test_a_mapping_from_before_the_copy_up(ours: Stack, opened: Callable[..., int]) -> None:
    """Here ours is stricter than kernel overlayfs, whose old mappings keep the old data."""
    build(ours.lower, {"f": DATA})
    root = ours.mount()
    reader = opened(root / "f")
    with mmap.mmap(reader, 0, prot=mmap.PROT_READ) as view:
        assert view[:4] == DATA[:4]
        writer = opened(root / "f", os.O_RDWR)
        os.pwrite(writer, b"new", 0)
        assert view[:4] == b"new" + DATA[3:4]
        with mmap.mmap(writer, 0) as writable:
            writable[5000:5003] = b"map"
            assert view[5000:5003] == b"map"
    assert content(reader)[5000:5003] == b"map"
    assert (ours.lower / "f").read_bytes() == DATA


def test_data_of_a_metacopy_that_is_open(stack: Stack, opened: Callable[..., int]) -> None:
    build(stack.lower, {"f": DATA})
    root = stack.mount()
    (root / "f").chmod(0o600)
    reader = opened(root / "f")
    assert content(reader) == DATA
    writer = opened(root / "f", os.O_WRONLY)
    os.pwrite(writer, b"new", 7)
    second = opened(root / "f", os.O_RDWR)
    os.pwrite(second, b"NEW", 17)
    expected = DATA[:7] + b"new" + DATA[10:17] + b"NEW" + DATA[20:]
    assert content(reader) == content(second) == expected
    assert (stack.lower / "f").read_bytes() == DATA


def test_the_mode_changes_when_all_handles_are_gone(passing: Stack, opened: Callable[..., int]) -> None:
    """A file that was open during its copy-up stays cached, then it is passed; and nothing old is cached then."""
    build(passing.lower, {"f": DATA})
    root = passing.mount()
    reader = os.open(root / "f", os.O_RDONLY)
    assert content(reader) == DATA
    with open(root / "f", "r+b") as file:
        file.write(b"one")
    assert passed(passing) == 0
    assert content(reader) == b"one" + DATA[3:]
    os.close(reader)
    with open(root / "f", "r+b", buffering=0) as file:
        assert passed(passing) == 1
        file.write(b"two")
        assert (root / "f").read_bytes() == b"two" + DATA[3:]
        assert passed(passing) == 2
    (root / "f").chmod(0o4755)  # with suid it is cached
    assert (root / "f").read_bytes() == b"two" + DATA[3:]
    assert passed(passing) == 2
    (root / "f").chmod(0o755)
    (root / "f").write_bytes(b"three" * SIZE)
    assert passed(passing) == 3
    (root / "f").chmod(0o4755)
    assert (root / "f").read_bytes() == b"three" * SIZE


# --- readers that share a handle -----------------------------------------------------------------


def test_readers_share_a_handle(passing: Stack) -> None:
    """Opened again and again for reading, a lower file is opened once below; each change of it ends the sharing."""
    build(passing.lower, {"f": DATA, "g": b"g"})
    root = passing.mount()
    for _ in range(5):
        assert (root / "f").read_bytes() == DATA
        with open(root / "f", "rb") as one, open(root / "f", "rb") as two:
            assert one.read() == two.read() == DATA
    assert passing.counter("native_shared") >= 20  # all but the first open, and all but that one's close
    assert passing.counter("open_files") == 1
    with open(root / "f", "r+b") as file:
        file.write(b"one")
    assert passed(passing) == 1
    assert (root / "f").read_bytes() == b"one" + DATA[3:]
    (root / "g").read_bytes()
    os.truncate(root / "g", 0)
    assert (root / "g").read_bytes() == b""
    assert passing.counter("open_files") == 0
    assert (passing.lower / "f").read_bytes() == DATA


def test_a_shared_handle_in_use_sees_the_copy(ours: Stack, opened: Callable[..., int]) -> None:
    build(ours.lower, {"f": DATA})
    root = ours.mount()
    assert (root / "f").read_bytes() == DATA
    readers = [opened(root / "f") for _ in range(3)]
    writer = opened(root / "f", os.O_RDWR)
    os.pwrite(writer, b"new", 0)
    later = opened(root / "f")
    assert {content(fd) for fd in (*readers, later, writer)} == {b"new" + DATA[3:]}
    (root / "f").unlink()
    os.pwrite(writer, b"newer", 0)
    assert {content(fd) for fd in (*readers, later, writer)} == {b"newer" + DATA[5:]}
    assert (ours.lower / "f").read_bytes() == DATA


def test_idle_handles_are_few(passing: Stack) -> None:
    """Handles that nobody uses are given up for newer ones, and with the files that the kernel forgets."""
    files = {f"f{number}": b"%d" % number for number in range(200)}
    build(passing.lower, files)
    root = passing.mount(under=["prlimit", "--nofile=400:400"])
    for _ in range(2):
        assert {name: (root / name).read_bytes() for name in files} == files
        assert 0 < passing.counter("open_files") <= 100
    for name in files:
        (root / name).unlink()
    for _ in range(100):
        if passing.counter("open_files") == 0:
            break
    assert passing.counter("open_files") == 0
    assert passing.counter("nodes") == 1


# --- what is known about what was written --------------------------------------------------------


def test_stat_and_listings_follow_writes(stack: Stack, opened: Callable[..., int]) -> None:
    root = stack.mount()
    fd = opened(root / "f", os.O_RDWR | os.O_CREAT)
    for number in range(5):
        os.utime(root / "f", (1, 1))
        assert {entry.name: entry.stat().st_mtime for entry in os.scandir(root)} == {"f": 1}
        os.pwrite(fd, DATA, number * SIZE)
        now, real = (root / "f").stat(), (stack.up / "f").stat()
        assert now.st_size == number * SIZE + len(DATA)
        assert now.st_mtime_ns == real.st_mtime_ns > 10**9
        listed = subprocess.run(["ls", "-l", "--time-style=+%s", root], capture_output=True, text=True, check=True)
        assert str(now.st_size) in listed.stdout
        assert str(int(real.st_mtime)) in listed.stdout
        os.ftruncate(fd, 3)
        assert (root / "f").stat().st_size == os.fstat(fd).st_size == 3
        assert (root / "f").stat().st_blocks == (stack.up / "f").stat().st_blocks


def test_times_follow_a_written_mapping(stack: Stack, opened: Callable[..., int]) -> None:
    root = stack.mount()
    (root / "f").write_bytes(DATA)
    os.utime(root / "f", (1, 1))
    assert (root / "f").stat().st_mtime == 1
    fd = os.open(root / "f", os.O_RDWR)
    with mmap.mmap(fd, 0) as view:
        os.close(fd)
        view[0:3] = b"map"
        view.flush()
        assert (root / "f").stat().st_mtime_ns == (stack.up / "f").stat().st_mtime_ns > 10**9
        os.utime(root / "f", (1, 1))
        assert (root / "f").stat().st_mtime == 1
    assert (root / "f").read_bytes()[:4] == b"map" + DATA[3:4]


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_attributes_set_while_it_is_open(stack: Stack, opened: Callable[..., int], flags: int) -> None:
    root = stack.mount()
    (root / "f").write_bytes(DATA)
    fd = opened(root / "f", flags)
    (root / "f").chmod(0o640)
    os.chown(root / "f", 5, 6)
    os.utime(root / "f", ns=(10**9 + 1, 10**9 + 2))
    os.link(root / "f", root / "g")
    for status in (os.fstat(fd), (root / "f").stat(), (root / "g").stat()):
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_nlink) == (0o640, 5, 6, 2)
        assert (status.st_atime_ns, status.st_mtime_ns) == (10**9 + 1, 10**9 + 2)
    os.truncate(root / "f", len(DATA))
    assert os.fstat(fd).st_mtime_ns == (stack.up / "f").stat().st_mtime_ns  # some file systems set it, others don't
    os.unlink(root / "f")
    assert os.fstat(fd).st_nlink == 1
    os.unlink(root / "g")
    assert os.fstat(fd).st_nlink == 0
    os.fchmod(fd, 0o600)
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    assert content(fd) == DATA


def test_suid_ends_with_a_write_through_a_handle_from_before(ours: Stack, opened: Callable[..., int]) -> None:
    root = ours.mount()
    shutil.copyfile("/usr/bin/id", root / "id")
    (root / "id").chmod(0o777)
    root.chmod(0o777)

    def write() -> None:
        fd = os.open(root / "id", os.O_RDWR)
        assert os.fstat(fd).st_mode & stat.S_ISUID
        os.pwrite(fd, Path("/usr/bin/id").read_bytes()[:100], 0)
        os.close(fd)

    reader = opened(root / "id")
    assert os.pread(reader, 4, 0) == b"\x7fELF"
    (root / "id").chmod(0o6777)
    as_user(ALICE, write)
    assert stat.S_IMODE((root / "id").stat().st_mode) == 0o777
    assert stat.S_IMODE((ours.up / "id").stat().st_mode) == 0o777


def test_chown_of_nothing_clears_suid_of_an_open_file(stack: Stack, opened: Callable[..., int]) -> None:
    root = stack.mount()
    fd = opened(root / "f", os.O_RDWR | os.O_CREAT)
    os.write(fd, DATA)
    os.fchmod(fd, 0o4755)
    os.fchown(fd, -1, -1)
    assert stat.S_IMODE(os.fstat(fd).st_mode) == stat.S_IMODE((stack.up / "f").stat().st_mode) == 0o755


# --- the ways to change data ---------------------------------------------------------------------


@pytest.mark.parametrize("where", ["upper", "lower"])
def test_every_way_to_write(stack: Stack, opened: Callable[..., int], where: str) -> None:
    """A model in memory and the file are the same after each step, through every descriptor."""
    build(stack.lower, {"f": DATA} if where == "lower" else {})
    root = stack.mount()
    if where == "upper":
        (root / "f").write_bytes(DATA)
    early = opened(root / "f")
    model = bytearray(content(early))
    one, two = opened(root / "f", os.O_RDWR), opened(root / "f", os.O_WRONLY | os.O_APPEND)

    def same() -> None:
        assert content(early) == content(one) == (root / "f").read_bytes() == model
        assert (root / "f").stat().st_size == len(model)

    os.pwrite(one, b"x" * 5000, 4000)
    model[4000:9000] = b"x" * 5000
    same()
    os.write(two, b"appended")
    model += b"appended"
    same()
    os.ftruncate(one, 200_001)
    del model[200_001:]
    same()
    os.truncate(root / "f", 250_000)
    model += bytes(250_000 - 200_001)
    same()
    if stack.options != "native=off":  # pyfuse3 has no fallocate
        fallocate(one, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 8192, 8192)
        model[8192:16384] = bytes(8192)
        same()
        fallocate(one, 0, 250_000, 4096)
        model += bytes(4096)
        same()
    assert os.copy_file_range(one, one, 5000, 0, 100_000) == 5000
    model[100_000:105_000] = model[:5000]
    same()
    with mmap.mmap(one, 0) as view:
        view[70_000:70_010] = b"0123456789"
        model[70_000:70_010] = b"0123456789"
        same()
    with mmap.mmap(-1, 4096) as page:
        page[:] = b"d" * 4096
        direct = opened(root / "f", os.O_RDWR | os.O_DIRECT)
        assert os.pwrite(direct, page, 12288) == 4096
        model[12288:16384] = b"d" * 4096
        same()
        assert os.preadv(direct, [page], 0) == 4096
        assert page[:] == model[:4096]
    os.close(os.open(root / "f", os.O_WRONLY | os.O_TRUNC))
    model.clear()
    same()
    os.write(two, b"again")
    model += b"again"
    same()
    os.unlink(root / "f")
    os.pwrite(one, b"nameless", 10)
    assert content(early) == b"again" + bytes(5) + b"nameless"
    (root / "f").write_bytes(b"another file")
    assert content(early) == b"again" + bytes(5) + b"nameless"


def test_renamed_and_replaced_while_open(stack: Stack, opened: Callable[..., int]) -> None:
    root = stack.mount()
    (root / "a").write_bytes(DATA)
    (root / "b").write_bytes(b"b" * SIZE)
    one, two = opened(root / "a", os.O_RDWR), opened(root / "b", os.O_RDWR)
    os.rename(root / "a", root / "b")
    os.pwrite(one, b"one", 0)
    os.pwrite(two, b"two", 0)
    assert (root / "b").read_bytes() == b"one" + DATA[3:]
    assert content(two) == b"two" + b"b" * (SIZE - 3)
    assert (os.fstat(two).st_nlink, os.fstat(one).st_nlink) == (0, 1)


def test_fsync_and_many_handles(stack: Stack) -> None:
    """Modes come and go; each descriptor number is used again and again, by small and by large files."""
    root = stack.mount()
    for turn in range(4):
        fds = {}
        for number in range(30):
            path = root / f"f{number % 10}"
            fds[number] = os.open(path, (os.O_RDWR, os.O_RDONLY, os.O_WRONLY)[number % 3] | os.O_CREAT)
            if number % 3 != 1:
                os.pwrite(fds[number], str(number).encode() * (1 + number * turn * 400), 0)
                os.fsync(fds[number])
        for number in sorted(fds, key=lambda number: (number * 7) % 30):
            os.fdatasync(fds[number])
            os.close(fds[number])
    for number in range(10):
        assert (root / f"f{number}").read_bytes() == (stack.up / f"f{number}").read_bytes()


# --- which files are passed ----------------------------------------------------------------------


def test_which_opens_are_passed(passing: Stack, opened: Callable[..., int]) -> None:
    build(passing.lower, {"low": DATA})
    root = passing.mount()
    count = 0

    def opens(path: Path, flags: int, *, passes: bool) -> None:
        nonlocal count
        fd = os.open(path, flags, 0o644)
        count += passes
        assert passed(passing) == count
        os.close(fd)

    opens(root / "low", os.O_RDONLY, passes=False)
    opens(root / "new", os.O_RDWR | os.O_CREAT, passes=True)
    opens(root / "new", os.O_RDONLY, passes=False)
    opens(root / "new", os.O_WRONLY, passes=True)
    (root / "new").write_bytes(DATA)
    count += 1
    opens(root / "new", os.O_RDONLY, passes=True)
    opens(root / "low", os.O_WRONLY, passes=True)


def test_a_large_file_that_was_read_stays_cached_for_appending(passing: Stack) -> None:
    """The kernel would drop what it has of it, and read it anew from the copy."""
    size = 65 << 20
    with open(passing.lower / "read", "wb") as file:
        file.truncate(size)
    root = passing.mount()
    with open(root / "new", "wb") as file:
        file.truncate(size)
    for name, expected in ("read", 1), ("new", 3):
        assert (root / name).read_bytes() == bytes(size)
        with open(root / name, "ab") as file:
            file.write(b"x")
        assert passed(passing) == expected
        assert (root / name).stat().st_size == size + 1
    with open(root / "read", "rb") as file:
        assert file.seek(-2, os.SEEK_END) == size - 1
        assert file.read() == b"\0x"
        with open(root / "read", "ab") as other:
            other.write(b"y")
        assert file.read() == b"y"
    assert passed(passing) == 3
    with open(root / "read", "r+b") as file:
        file.write(b"z")
    assert passed(passing) == 4
    with open(root / "read", "rb") as file:
        assert file.read(2) == b"z\0"
    with open(root / "read", "ab") as file:
        file.write(b"end")
    assert passed(passing) == 6
    assert (passing.upper / "read").read_bytes() == b"z" + bytes(size - 1) + b"xyend" == (root / "read").read_bytes()


def test_a_union_without_upper_passes_its_lowers(passing: Stack) -> None:
    build(passing.lower, {"f": DATA, "small": b"x"})
    passing.upper = None
    root = passing.mount()
    assert (root / "f").read_bytes() == DATA
    assert (root / "small").read_bytes() == b"x"
    assert passed(passing) == 1
    with fails(errno.EROFS):
        os.open(root / "f", os.O_RDWR)


def test_one_overlay_fits_over_a_mount_that_passes(make_stack: StackMaker) -> None:
    """As over kernel overlayfs. Two fit with passthrough=off."""
    depth = {}
    for mode in ("passthrough=auto", "passthrough=off"):
        inner = make_stack("union", options=mode, name=f"inner-{mode[-3:]}")
        build(inner.lower, {"f": DATA})
        below = inner.mount()
        depth[mode] = 0
        for level in range(2):
            outer = make_stack("overlay", options="index=off,metacopy=off,redirect_dir=off", name=f"{mode[-3:]}{level}")
            outer.lowers, outer.upper = [below, outer.lowers[0]], None
            try:
                below = outer.mount()
            except Exception:
                break
            assert (below / "f").read_bytes() == DATA
            depth[mode] += 1
    assert depth == {"passthrough=auto": 1, "passthrough=off": 2}


def test_nothing_is_asked_for_over_stacked_layers(make_stack: StackMaker) -> None:
    """Over kernel overlayfs no file could be passed, so the mount need not count as stacked."""
    below = make_stack("overlay", name="below")
    (below.lower / "u").mkdir()
    (below.lower / "w").mkdir()
    build(below.lower / "u", {"f": DATA})
    base = below.mount()
    ours = make_stack("union", name="ours")
    ours.upper, ours.work = base / "u", base / "w"
    root = ours.mount()
    assert (root / "f").read_bytes() == DATA
    (root / "g").write_bytes(DATA)
    assert (base / "u" / "g").read_bytes() == DATA
    assert passed(ours) == 0
    ours.umount()


@pytest.mark.parametrize("mode", MODES)
def test_a_program_runs_and_cannot_be_written(
    make_stack: StackMaker, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make_mode(make_stack, mode, monkeypatch)
    build(ours.lower, {"low": Path("/bin/sleep").read_bytes()})
    root = ours.mount()
    shutil.copyfile("/bin/sleep", root / "up")
    for name in ("low", "up"):
        (root / name).chmod(0o755)
        with subprocess.Popen([root / name, "60"]) as process:
            try:
                while Path(f"/proc/{process.pid}/comm").read_text() != f"{name}\n":
                    time.sleep(0.01)
                with fails(errno.ETXTBSY):
                    os.open(root / name, os.O_WRONLY)
            finally:
                process.kill()
