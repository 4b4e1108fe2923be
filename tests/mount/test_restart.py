"""`--auto-restart`: a daemon is killed, another one takes the mount over, and whoever uses it does not notice."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import multiprocessing
import os
import random
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.test_rootless import NAMESPACES, as_ordinary_user
from tests.support import raw, stepwise
from tests.support.cli import unionfs
from tests.support.mounts import Stack, can_restart, daemons, environment, parent_of, wait_gone
from tests.support.snapshot import assert_same, snapshot

pytestmark = [
    pytest.mark.expected_log("another one takes over"),
    pytest.mark.skipif(not can_restart(), reason="refused here, see test_restart_refused.py"),
]

BIG = 20 << 20


@pytest.fixture(autouse=True)
def many_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIONFS_MOST_CRASHES", "1000")


class Served:
    """A mount with a supervisor, and its present daemon."""

    def __init__(
        self, stack: Stack, *, options: str = "", under: tuple[str, ...] = (), words: tuple[str, ...] = ()
    ) -> None:
        self.stack = stack
        self.root = stack.mount(options, extra=["--auto-restart", *words], under=under)

    def pids(self) -> tuple[int, int]:
        """The supervisor and the daemon."""
        for _ in range(200):
            parents = {pid: parent_of(pid) for pid in daemons(self.stack.mnt)}
            for pid, parent in parents.items():
                if parent in parents:
                    return parent, pid
            time.sleep(0.05)
        raise AssertionError(f"no daemon: {parents}")

    def kill(self) -> None:
        """Kill the daemon. Requests wait for the next one."""
        daemon = self.pids()[1]
        os.kill(daemon, signal.SIGKILL)
        assert wait_gone(daemon)

    def end(self) -> None:
        """Unmount, and wait for the supervisor's end."""
        supervisor = self.pids()[0]
        raw.umount2(self.stack.mnt, 0)
        self.stack.mounted = False
        assert wait_gone(supervisor)
        assert not os.listdir(self.stack.work / "work")


@pytest.fixture
def fill(ours: Stack) -> Stack:
    """Layers with a bit of everything."""
    lower = ours.lower
    (lower / "plain").write_bytes(b"plain lower")
    (lower / "big").write_bytes(b"big." * (BIG // 4))
    (lower / "merged/below").mkdir(parents=True)
    (lower / "merged/below2").mkdir()
    for number in range(300):
        (lower / f"merged/f{number:03}").write_bytes(b"%d" % number)
    (ours.up / "merged").mkdir()
    (ours.up / "merged/up").write_bytes(b"upper file")
    (lower / "link1").write_bytes(b"linked")
    os.link(lower / "link1", lower / "link2")
    return ours


def test_what_is_open_goes_on(fill: Stack, check_by_overlay: Callable[[Stack], Path]) -> None:
    served = Served(fill)
    root = served.root
    names = ["plain", "big", "merged", "merged/up", "merged/below", "merged/f007", "link1", "link2"]
    numbers = {name: os.stat(root / name).st_ino for name in names}
    lower = os.open(root / "plain", os.O_RDONLY)
    upper = os.open(root / "merged/up", os.O_RDWR)
    before = os.open(root / "merged/f001", os.O_RDONLY)
    deleted = os.open(root / "merged/f002", os.O_RDONLY)
    os.unlink(root / "merged/f002")
    made = os.open(root / "made", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.write(made, b"made here")
    os.unlink(root / "made")
    path_only = os.open(root / "merged/f003", os.O_PATH)
    (root / "merged/going").mkdir()
    going = os.open(root / "merged/going", os.O_PATH | os.O_DIRECTORY)
    os.rmdir(root / "merged/going")
    here = os.open(root / "merged/below", os.O_RDONLY | os.O_DIRECTORY)
    mapped = mmap.mmap(upper, 0)
    lower_map = mmap.mmap(lower, 0, prot=mmap.PROT_READ)
    fcntl.flock(upper, fcntl.LOCK_EX)
    listing = os.scandir(root / "merged")
    listed = [next(listing).name for _ in range(50)]

    changed = [os.open(root / name, os.O_PATH) for name in ("merged/f010", "merged/below2")]
    exchanged = [os.fstat(fd).st_ino for fd in changed]

    for turn in range(2):
        raw.renameat2(root / "merged/f010", root / "merged/below2", raw.RENAME_EXCHANGE)
        served.kill()
        assert [os.fstat(fd).st_ino for fd in changed] == exchanged
        assert os.stat(root / "merged/f010").st_ino == exchanged[1 - turn]
        assert {name: os.stat(root / name).st_ino for name in names} == numbers
        assert os.pread(lower, 100, 0) == b"plain lower"
        assert os.pread(upper, 5, 0) == b"upper" if not turn else b"UPPER"
        assert os.pread(deleted, 10, 0) == b"2"
        assert os.fstat(deleted).st_nlink == 0
        assert os.pread(made, 100, 0) == b"made here"
        os.pwrite(made, b"MADE", 0)
        assert os.fstat(made).st_nlink == 0
        os.pwrite(made, b"made", 0)
        assert os.fstat(path_only).st_size == 1
        assert os.fstat(going).st_nlink == 0
        assert lower_map[:5] == b"plain"
        mapped[:5] = b"UPPER"
        mapped.flush()
        assert (root / "merged/up").read_bytes() == b"UPPER file"
        assert os.stat("..", dir_fd=here).st_ino == numbers["merged"]
        os.mkdir(f"new{turn}", dir_fd=here)
        assert os.listdir(here) == [f"new{number}" for number in range(turn + 1)] or turn

        again = os.open(root / "merged/up", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(again)
        with open(root / "merged/f001", "ab") as file:  # copied up behind a handle
            file.write(b"+")
        assert os.pread(before, 10, 0) == b"1" + b"+" * (turn + 1)
    listed += [entry.name for entry in listing]
    listing.close()
    assert sorted(listed) == sorted(
        {"below", "below2", "up", *(f"f{number:03}" for number in range(300) if number != 2)}
    )
    for fd in (lower, upper, before, deleted, made, path_only, going, here, *changed):
        os.close(fd)
    mapped.close()
    lower_map.close()
    # What was known of deleted files goes with them: nothing of them stays open.
    assert _none_stays_open(served.pids()[1], fill.base)
    seen = snapshot(root)
    served.end()
    assert_same(seen, snapshot(check_by_overlay(fill)))


def _none_stays_open(daemon: int, base: Path) -> bool:
    """Wait until a daemon has no deleted file of a place open; it hears of what is closed a little later."""
    for _ in range(100):
        targets = []
        for link in os.listdir(f"/proc/{daemon}/fd"):
            with contextlib.suppress(FileNotFoundError):
                targets.append(os.readlink(f"/proc/{daemon}/fd/{link}"))
        if not any("(deleted)" in target and str(base) in target for target in targets):
            return True
        time.sleep(0.05)
    return False


def test_big_copy_under_way(fill: Stack, check_by_overlay: Callable[[Stack], Path]) -> None:
    served = Served(fill)
    with multiprocessing.Pool(1) as pool:
        opening = pool.apply_async(_patch, (served.root / "big",))
        served.kill()
        served.kill()
        assert opening.get(30)
    assert (served.root / "big").read_bytes() == b"BIG." + b"big." * (BIG // 4 - 1)
    served.end()
    assert (check_by_overlay(fill) / "big").read_bytes()[:8] == b"BIG.big."


def _patch(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR)
    done = os.pwrite(fd, b"BIG.", 0)
    os.fsync(fd)
    os.close(fd)
    return done == 4


@pytest.mark.parametrize("where", ["lower", "above"])
def test_layers_that_the_mount_hides(fill: Stack, ground: Path, where: str) -> None:
    """The next daemon has no way to them but the descriptors of the last one."""
    inner = ground / "inner"
    inner.mkdir()
    for layer in (fill.lower, fill.up, fill.work):
        layer.rename(inner / layer.name)
    lower, upper = inner / fill.lower.name, inner / "upper"
    fill.lowers, fill.upper, fill.work = [lower], upper, inner / "work"
    fill.mnt = lower if where == "lower" else inner
    served = Served(fill)
    with open(served.root / "plain", "rb", buffering=0) as file:
        for turn in range(2):
            served.kill()
            assert file.read(5) == b"plain" if not turn else b" lowe"
            (served.root / f"new{turn}").write_bytes(b"new")
            assert (served.root / "merged/up").read_bytes() == b"upper file"
    supervisor = served.pids()[0]
    os.kill(supervisor, signal.SIGTERM)
    assert wait_gone(supervisor)
    fill.mounted = False
    assert sorted(os.listdir(upper)) == ["merged", "new0", "new1"]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_other_deaths(fill: Stack, number: signal.Signals) -> None:
    served = Served(fill)
    with open(served.root / "plain", "r+b", buffering=0) as file:
        os.kill(served.pids()[1], number)
        assert file.read() == b"plain lower"
        assert file.write(b"!") == 1
    assert number.name in fill.log.read_text()
    served.end()


@pytest.mark.expected_log("the daemon failed")
@pytest.mark.expected_log("Traceback|Error")
def test_a_failure_that_nobody_catches(fill: Stack, ground: Path) -> None:
    """The daemon that ends by it leaves open what is open, too."""
    site = ground / "site"
    site.mkdir()
    served = Served(fill, under=tuple(stepwise.command(site)))
    with open(served.root / "merged/up", "r+b", buffering=0) as file, open(served.root / "plain", "rb") as lower:
        (site / "step.fail").touch()
        daemon = served.pids()[1]
        os.kill(daemon, signal.SIGUSR1)
        assert wait_gone(daemon)
        assert file.read() == b"upper file"
        assert lower.read() == b"plain lower"
        assert (served.root / "merged/f001").read_bytes() == b"1"
    assert "failed (exit status 1): another one takes over" in fill.log.read_text()
    served.end()


# -- at each step of a request --

MOST_STEPS = 30


def _create(at: Path) -> None:
    fd = os.open(at / "new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o640)
    os.write(fd, b"data")
    os.close(fd)


def _open_for_writing(at: Path) -> None:
    with open(at / "file", "r+b") as file:
        file.write(b"FI")


def _special(at: Path) -> None:
    os.mkfifo(at / "fifo", 0o600)
    os.symlink("target", at / "symlink")


def _truncate(at: Path) -> None:
    os.close(os.open(at / "file", os.O_WRONLY | os.O_TRUNC))


def _rename_changed(at: Path) -> None:
    (at / "file").write_bytes(b"changed")
    os.rename(at / "file", at / "other")


def _mark(at: Path) -> None:
    os.setxattr(at / "file", "user.new", b"1", os.XATTR_CREATE)


REQUESTS: dict[str, Callable[[Path], object]] = {
    "create": _create,
    "create-over-whiteout": lambda at: os.close(os.open(at / "gone", os.O_CREAT | os.O_EXCL | os.O_RDWR)),
    "mkdir": lambda at: os.mkdir(at / "new"),
    "mkdir-over-whiteout": lambda at: os.mkdir(at / "gone"),
    "special": _special,
    "link": lambda at: os.link(at / "file", at / "second"),
    "unlink": lambda at: os.unlink(at / "file"),
    "unlink-upper": lambda at: os.unlink(at / "upper"),
    "rmdir": lambda at: os.rmdir(at / "empty"),
    "rename": lambda at: os.rename(at / "file", at / "moved"),
    "rename-upper": lambda at: os.rename(at / "upper", at / "other"),
    "rename-over": lambda at: os.rename(at / "file", at / "other"),
    "rename-changed": _rename_changed,
    "rename-dir": lambda at: os.rename(at / "dir", at / "moved"),
    "rename-dir-over": lambda at: os.rename(at / "dir", at / "empty"),
    "exchange": lambda at: raw.renameat2(at / "file", at / "dir", raw.RENAME_EXCHANGE),
    "exchange-upper": lambda at: raw.renameat2(at / "upper", at / "link", raw.RENAME_EXCHANGE),
    "open-for-writing": _open_for_writing,
    "chmod": lambda at: os.chmod(at / "file", 0o600),
    "truncate": _truncate,
    "setxattr": _mark,
    "removexattr": lambda at: os.removexattr(at / "file", "user.old"),
}


CHOSEN = {
    "": list(REQUESTS),
    "whiteout=xattr": [
        "create-over-whiteout",
        "mkdir-over-whiteout",
        "rename",
        "rename-over",
        "rename-changed",
        "rename-dir",
        "rename-dir-over",
    ],
    "index=off": ["link", "rename-over", "exchange-upper"],
}
"""By mount options: what is done otherwise."""


def _ground(lower: Path, names: Iterable[str]) -> None:
    for name in names:
        for number in range(MOST_STEPS):
            at = lower / name / str(number)
            (at / "dir/inner").mkdir(parents=True)
            (at / "empty").mkdir()
            for file in ("file", "other", "gone"):
                (at / file).write_bytes(file.encode())
            os.setxattr(at / "file", "user.old", b"old")
            os.link(at / "other", at / "link")


@pytest.mark.parametrize("options", CHOSEN)
def test_last_steps(ours: Stack, make_stack: Callable[..., Stack], ground: Path, options: str) -> None:
    """From about the step that shows on to the answer."""
    _kill_at_steps(ours, make_stack, ground, options, lambda last: range(max(1, last - 2), last + 1))


@pytest.mark.slow
@pytest.mark.fault_seconds(300)
@pytest.mark.parametrize("options", CHOSEN)
def test_each_step(ours: Stack, make_stack: Callable[..., Stack], ground: Path, options: str) -> None:
    _kill_at_steps(ours, make_stack, ground, options, lambda last: range(1, last + 1))


def _kill_at_steps(
    ours: Stack,
    make_stack: Callable[..., Stack],
    ground: Path,
    options: str,
    choose: Callable[[int], Iterable[int]],
) -> None:
    """Have each request carried out by a daemon that is killed at a step of it, and by kernel overlayfs: alike."""
    oracle = make_stack("overlay", name="o", options=options if "index" in options else "")
    chosen = CHOSEN[options]
    _ground(ours.lower, chosen)
    _ground(oracle.lower, chosen)
    site = ground / "site"
    site.mkdir()
    served = Served(ours, options=options, under=tuple(stepwise.command(site)))
    reference = oracle.mount()
    flag = site / "step"
    kills = 0
    for name in chosen:
        act, last = REQUESTS[name], MOST_STEPS
        for number in [0, *range(1, MOST_STEPS)]:
            if number and number not in choose(last):
                continue
            places = [root / name / str(number) for root in (served.root, reference)]
            for at in places:
                (at / "upper").write_bytes(b"upper")
                os.unlink(at / "gone")
                os.statvfs(at)  # all that came before has been answered
            numbers = {entry.name: entry.inode() for entry in os.scandir(places[0])}
            stepwise.arm(flag, number or MOST_STEPS)
            try:
                act(places[0])
            except OSError as error:
                raise AssertionError(f"{name}, killed at step {number}") from error
            kills += not flag.exists()
            if not number:
                last = MOST_STEPS - int(flag.read_text())
                assert 2 <= last < MOST_STEPS
            flag.unlink(missing_ok=True)  # at another time there may be less to do
            act(places[1])
            found = [_view(at) for at in places]
            assert found[0] == found[1], f"{name}, killed at step {number}"
            if "exchange" not in name and "rename" not in name:
                kept = {entry.name: entry.inode() for entry in os.scandir(places[0])}
                assert all(numbers[entry] == kept[entry] for entry in numbers if entry in kept and entry != "gone")
    assert kills > 2 * len(chosen)
    assert _counters(served)["open_files"] == _counters(served)["open_directories"] == 0
    served.end()
    if not options:
        after = ours.by("overlay")
        root = after.mount()
        try:
            assert_same(snapshot(root, times=False), snapshot(reference, times=False))
        finally:
            after.umount()


@pytest.mark.parametrize("options", ["", "metacopy=off"])
def test_handles_see_a_copy_up(ours: Stack, ground: Path, options: str) -> None:
    """Who has the lower file open reads what is written to its copy, wherever the daemon was killed meanwhile."""
    site = ground / "site"
    site.mkdir()
    for number in range(MOST_STEPS):
        (ours.lower / f"file{number}").write_bytes(b"lower")
    served = Served(ours, options=options, under=tuple(stepwise.command(site)))
    flag, kills = site / "step", 0
    for number in range(MOST_STEPS):
        path = served.root / f"file{number}"
        reader = os.open(path, os.O_RDONLY)
        stepwise.arm(flag, number + 1)
        if number % 2:
            os.chmod(path, 0o600)
        with open(path, "r+b") as file:
            file.write(b"UPPER")
        os.statvfs(path)
        lived = flag.exists()
        flag.unlink(missing_ok=True)
        os.posix_fadvise(reader, 0, 0, os.POSIX_FADV_DONTNEED)  # so the daemon has to read it
        assert os.pread(reader, 10, 0) == b"UPPER", number
        os.close(reader)
        assert (ours.up / path.name).read_bytes() == b"UPPER"
        kills += not lived
        if lived:
            break
    assert 4 < kills < MOST_STEPS - 1
    served.end()


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("unlink-upper", 2),
        ("create", 3),
        pytest.param("mkdir", 2, marks=pytest.mark.slow),
        pytest.param("rename-upper", 2, marks=pytest.mark.slow),
    ],
)
def test_killed_again(ours: Stack, ground: Path, name: str, step: int) -> None:
    """A request was carried out; the next daemon is killed too, at each step from its start to the answer."""
    _ground(ours.lower, [name])
    site = ground / "site"
    site.mkdir()
    served = Served(ours, under=tuple(stepwise.command(site)))
    flag = site / "step"
    kills, expected = 0, None
    for number in range(MOST_STEPS):
        at = served.root / name / str(number)
        (at / "upper").write_bytes(b"upper")
        os.statvfs(at)  # all that came before has been answered
        if number:
            stepwise.arm(flag, step, number)
        REQUESTS[name](at)
        end = time.monotonic() + 0.3
        while flag.exists() and number and time.monotonic() < end:
            time.sleep(0.01)  # a FORGET comes after the answer, and is a step too
        lived = flag.exists()
        flag.unlink(missing_ok=True)
        expected = expected or _view(at)
        assert _view(at) == expected, number
        if number and lived:
            break
        kills += 1
    assert 6 < kills < MOST_STEPS
    assert _counters(served)["open_files"] == 0
    served.end()


def _counters(served: Served) -> dict[str, int]:
    """What the daemon says on SIGUSR1, which its supervisor passes on."""
    before = served.stack.log.read_text()
    os.kill(served.pids()[0], signal.SIGUSR1)
    for _ in range(200):
        time.sleep(0.02)
        fresh = served.stack.log.read_text()[len(before) :]
        if "threads" in fresh:
            return {name: int(value) for name, value in re.findall(r"^  (\w+) (\d+)$", fresh, re.MULTILINE)}
    raise AssertionError("no dump")


def _view(at: Path) -> list[object]:
    seen: list[object] = []
    for directory, below, files in os.walk(at):
        below.sort()
        for name in sorted([*below, *files]):
            path = Path(directory, name)
            st = path.lstat()
            data = path.read_bytes() if stat.S_ISREG(st.st_mode) else b""
            links = 0 if stat.S_ISDIR(st.st_mode) else st.st_nlink
            marks = () if stat.S_ISLNK(st.st_mode) else tuple(sorted(os.listxattr(path)))
            seen.append((str(path.relative_to(at)), st.st_mode, links, data, marks))
    return seen


def test_an_append_is_done_once(ours: Stack) -> None:
    """Killed when the data is written, but not answered."""
    served = Served(ours, options="passthrough=off")
    fd = os.open(served.root / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    written = 0
    for number in range(4):  # some are killed before, when the kernel asks for the file's capability
        trace = ours.base / f"strace{number}.txt"
        with _killed_answering(served.pids()[1], trace):
            assert os.write(fd, b"%08d" % number) == 8
        written += "pwritev2" in trace.read_text()
    assert os.fstat(fd).st_size == 8 * 4
    os.close(fd)
    assert written >= 2
    assert (served.root / "log").read_bytes() == b"".join(b"%08d" % number for number in range(4))
    served.end()


@contextmanager
def _killed_answering(pid: int, trace: Path) -> Iterator[None]:
    """Have a daemon killed in the place of its next answer."""
    words = ["-e", "trace=pwritev2,writev", "-e", "inject=writev:signal=SIGKILL", "-p", str(pid)]
    with subprocess.Popen(["strace", "-f", "-o", str(trace), *words], stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        while "attached" not in tracer.stderr.readline():
            pass
        yield
        tracer.communicate(timeout=20)


# -- at random moments --

SECONDS = 3.0


def _storm(root: Path, number: int, end: float, results: multiprocessing.Queue[object]) -> None:
    """Make, move and remove; know at each time what there must be."""
    try:
        results.put((number, _storming(root / f"home{number}", random.Random(number), end)))
    except BaseException as error:
        results.put((number, f"{type(error).__name__}: {error}"))


def _storming(home: Path, chance: random.Random, end: float) -> tuple[set[str], int]:
    there = set(os.listdir(home))
    turn = 0
    while time.time() < end:
        turn += 1
        name = f"n{turn}"
        match chance.randrange(6):
            case 0:
                os.mkdir(home / name)
                there.add(name)
            case 1:
                os.close(os.open(home / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                there.add(name)
            case 2 if there:
                victim = chance.choice(sorted(there))
                path = home / victim
                os.rmdir(path) if stat.S_ISDIR(path.lstat().st_mode) else os.unlink(path)
                there.remove(victim)
            case 3 | 4 if there:
                moved = chance.choice(sorted(there))
                os.rename(home / moved, home / name)
                there.remove(moved)
                there.add(name)
            case 5:
                os.symlink(name, home / name)
                there.add(name)
        if turn % 50 == 0:
            assert set(os.listdir(home)) == there
    assert set(os.listdir(home)) == there
    return there, turn


def _append(root: Path, number: int, end: float, results: multiprocessing.Queue[object]) -> None:
    """Append numbered records with fsync, each once."""
    try:
        fd = os.open(root / f"log{number}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        turn = 0
        while time.time() < end:
            assert os.write(fd, b"%08d" % turn) == 8
            os.fsync(fd)
            turn += 1
        os.close(fd)
        results.put((number, turn))
    except BaseException as error:
        results.put((number, f"{type(error).__name__}: {error}"))


@pytest.mark.parametrize("options", ["", "passthrough=off"])
def test_storms(ours: Stack, check_by_overlay: Callable[[Stack], Path], options: str) -> None:
    for number in range(2):
        (ours.lower / f"home{number}/sub").mkdir(parents=True)
        for file in range(30):
            (ours.lower / f"home{number}/low{file}").write_bytes(b"low")
    (ours.lower / "log2").write_bytes(b"")
    served = Served(ours, options=options)
    results: multiprocessing.Queue[object] = multiprocessing.Queue()
    end = time.time() + SECONDS
    works = [_storm, _storm, _append, _append]
    clients = [
        multiprocessing.Process(target=work, args=(served.root, number, end, results))
        for number, work in enumerate(works)
    ]
    for client in clients:
        client.start()
    chance = random.Random(options)
    kills = 0
    while time.time() < end - 0.5:
        time.sleep(0.1 + chance.random() * 0.4)
        served.kill()
        kills += 1
    found = dict(results.get(timeout=60) for _ in clients)  # type: ignore[call-overload]
    for client in clients:
        client.join()
    results.close()
    assert not [result for result in found.values() if isinstance(result, str)], found
    assert kills > 2
    seen = snapshot(served.root)
    served.end()
    merged = check_by_overlay(ours)
    assert_same(seen, snapshot(merged))
    for number in range(2):
        there, turns = found[number]
        assert set(os.listdir(merged / f"home{number}")) == there
        assert turns > 50
    for number in (2, 3):
        assert (merged / f"log{number}").read_bytes() == b"".join(b"%08d" % turn for turn in range(found[number]))


# -- the supervisor --


@NAMESPACES
def test_an_ordinary_user(ground: Path) -> None:
    """The mount is fusermount3's, so is its end; all else is the same."""
    python = f"{sys.executable} -m unionfs"
    script = f"""# by fusermount3
cd '{ground}'
mkdir lower upper work mnt
echo low > lower/file
{python} mount --auto-restart --log-file '{ground}/log' --work work lower upper mnt
exec 7<>mnt/file
supervisor=$(pgrep -o -u $(id -u) -f auto-restart)
kill -9 $(pgrep -P $supervisor)
echo more >&7
exec 7>&-
cat mnt/file
kill $supervisor
while pgrep -u $(id -u) -f auto-restart > /dev/null; do sleep 0.05; done
ls mnt; cat upper/file
"""
    done = as_ordinary_user(script, ground, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "more\nmore\n", "")


def test_locks_on_the_layers_stay(fill: Stack) -> None:
    served = Served(fill)
    fds = [os.open(directory, os.O_RDONLY | os.O_DIRECTORY) for directory in (fill.up, fill.work)]
    for _ in range(2):
        served.kill()
        end = time.monotonic() + 1
        while time.monotonic() < end:
            for fd in fds:
                with pytest.raises(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert (served.root / "plain").read_bytes() == b"plain lower"
    for fd in fds:
        os.close(fd)
    served.end()


def test_listed_and_unmounted_by_the_commands(fill: Stack) -> None:
    served = Served(fill)
    served.kill()
    (served.root / "new").write_bytes(b"new")
    supervisor = served.pids()[0]
    line = next(line for line in unionfs("ls").out.splitlines() if str(fill.mnt) in line)
    assert " mounted " in line
    assert f" {supervisor} " in line
    said = unionfs("umount", fill.mnt)
    fill.mounted = False
    assert (said.status, said.err) == (0, "")
    assert wait_gone(supervisor, 0)
    assert str(fill.mnt) not in unionfs("ls").out


@pytest.mark.parametrize("whom", ["supervisor", "daemon", "next daemon"])
def test_a_signal_ends_it(fill: Stack, whom: str) -> None:
    served = Served(fill)
    if whom == "next daemon":
        served.kill()
        assert (served.root / "plain").read_bytes()
    supervisor, daemon = served.pids()
    os.kill(supervisor if whom == "supervisor" else daemon, signal.SIGTERM)
    assert wait_gone(supervisor)
    fill.mounted = False
    assert not os.path.ismount(fill.mnt)
    assert not os.listdir(fill.mnt)
    assert str(fill.mnt) not in unionfs("ls").out


@pytest.mark.parametrize("how", ["signal", "unmount"])
@pytest.mark.parametrize("wait", [0, 0.03, 0.08])
def test_the_end_between_two_daemons(fill: Stack, how: str, wait: float) -> None:
    served = Served(fill)
    supervisor, daemon = served.pids()
    os.kill(daemon, signal.SIGKILL)
    time.sleep(wait)
    if how == "signal":
        os.kill(supervisor, signal.SIGTERM)
    else:
        raw.umount2(fill.mnt, 0)
    assert wait_gone(supervisor)
    fill.mounted = False
    assert not os.path.ismount(fill.mnt)
    assert str(fill.mnt) not in unionfs("ls").out


@pytest.mark.expected_log("giving up")
def test_too_many_crashes(fill: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIONFS_MOST_CRASHES", "2")
    served = Served(fill)
    fd = os.open(served.root / "plain", os.O_RDONLY)
    supervisor = served.pids()[0]
    for _ in range(3):
        assert os.stat(served.root).st_ino
        served.kill()
    assert wait_gone(supervisor)
    with pytest.raises(OSError, match=r"not connected|aborted"):
        os.stat(served.root / "merged")
    with pytest.raises(OSError, match=r"not connected|aborted"):
        os.close(fd)
    assert "giving up" in fill.log.read_text()
    said = unionfs("umount", fill.mnt)
    fill.mounted = False
    assert said.status == 0
    assert "dead" in said.err


def test_the_supervisor_is_killed(fill: Stack) -> None:
    served = Served(fill)
    supervisor, daemon = served.pids()
    os.kill(supervisor, signal.SIGKILL)
    assert wait_gone(daemon)
    fill.mounted = False
    assert not os.path.ismount(fill.mnt)


@pytest.mark.parametrize("how", ["signal", "unmount"])
def test_in_the_foreground(fill: Stack, how: str) -> None:
    """The service manager hears it from the process that it knows."""
    address = str(fill.base / "notify")
    config = fill.mnt.with_name("mnt.toml")  # so that its daemons are found by their words
    layers = f'lower = "{fill.lower}"\nupper = "{fill.up}"\nwork = "{fill.work}"\nmountpoint = "{fill.mnt}"\n'
    config.write_text(f"{layers}auto-restart = true\n")
    words = [sys.executable, "-m", "unionfs", "mount", "--foreground", "--config", str(config)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        manager.bind(address)
        manager.settimeout(30)
        service = subprocess.Popen(
            words, env=environment() | {"NOTIFY_SOCKET": address}, text=True, stderr=subprocess.PIPE
        )
        fill.mounted = True
        assert _heard(manager) == (b"READY=1", service.pid)
        served = Served.__new__(Served)
        served.stack, served.root = fill, fill.mnt
        served.kill()
        assert (fill.mnt / "plain").read_bytes() == b"plain lower"
        if how == "signal":
            service.terminate()
        else:
            raw.umount2(fill.mnt, 0)
        assert _heard(manager) == (b"STOPPING=1", service.pid)
        said = service.communicate(timeout=30)[1].splitlines()
    fill.mounted = False
    assert service.returncode == 0
    assert len(said) == 1, said
    assert "died of SIGKILL: another one takes over" in said[0]
    assert not os.path.ismount(fill.mnt)


def _heard(manager: socket.socket) -> tuple[bytes, int]:
    """A message and who sent it."""
    message, credentials, _, _ = manager.recvmsg(100, 100)
    return message, struct.unpack("iII", credentials[0][2])[0]
