"""A long run of everything at once, in which nothing may fail, grow or get stuck.

A round is one mount, in another mode each time. In it the same load is put on several times: some of stress-ng's file
system stressors (others each time), dbench, fio with checksums, and our own clients (`tests.support.clients`): some that do the same on
a plain directory, the shadow, some that fight for the same names, some that move the same files about, some that list many.
In the mode `auto-restart` the daemon is killed now and then, which nobody may notice. After each load

- all of them must have ended well, what our clients left must be what the shadow has, and no file may be lost,
- the kernel forgets what it knows of the mount, no request may be left unanswered, and the daemon's memory and descriptors
  may not be more than after the first load of the round.

At the end of the round the union is unmounted: nothing may be left in the work directory, nor an error in the log, and
kernel overlayfs must show the same in the layers, which the next round takes over. The lower layer must stay as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.support import raw
from tests.support.clients import DIRECTORIES, KEPT, kept
from tests.support.filesystems import FS_KINDS, file_system, have_own_mounts
from tests.support.layers import Tree, build
from tests.support.mounts import (
    AUTO_RESTART,
    MANY_CRASHES,
    MountRefused,
    Stack,
    can_restart,
    daemons,
    environment,
    supervised,
    wait_gone,
)
from tests.support.repeating import repeating
from tests.support.snapshot import differences, snapshot

MODES = ("default", "passthrough=off", "native=off", *((AUTO_RESTART,) if can_restart() else ()))
CLIENTS = ("twins", "storm", "races", "listings")
PROGRAMS = ("stress-ng", "dbench", "fio")
STRESSORS = (
    *(
        "access",
        "chmod",
        "chown",
        "copy-file",
        "dentry",
        "dir",
        "dirdeep",
        "dirmany",
        "fallocate",
        "fiemap",
        "filename",
    ),
    *(
        "flock",
        "fstat",
        "getdent",
        "hdd",
        "iomix",
        "link",
        "locka",
        "lockf",
        "mknod",
        "open",
        "rename",
        "seek",
        "symlink",
    ),
    *("sync-file", "touch", "unlink", "utime", "xattr"),
)
"""Of stress-ng; those that this version lacks are left out."""
AT_A_TIME = 4
LATE_SECONDS = 120.0
SETTLE_SECONDS = 30.0
KILL_SECONDS = 5.0
MEMORY_SLACK = 12 << 20
"""Bytes of memory that a load may leave behind; the allocator's, not ours."""
DESCRIPTOR_SLACK = 24
MIB = 1 << 20
TREE: Tree = {"a": {"a": b"aa", "b": b"b" * 9000}, "b": b"b" * 80_000, "c": {"a": b"ca", "d": {}}, "d": b"d"}


class Wrong(Exception):
    """Something failed, grew or got stuck; the text says what."""


@dataclass
class Load:
    """What a load has come to, and how the daemon was after it.

    Attributes:
        mode: of the mount.
        seconds: how long it took.
        turns: of our clients.
        kills: of daemons under it.
        memory: of the daemon, anonymous and resident, in bytes.
        descriptors: that the daemon has.
        peak: what was resident at most since the mount, in bytes.
    """

    mode: str
    seconds: float = 0.0
    turns: int = 0
    kills: int = 0
    memory: int = 0
    descriptors: int = 0
    peak: int = 0


class Site:
    """The directories of a run: one stack of layers, and the shadow of what our clients do."""

    def __init__(self, base: Path, ground: Path, seed: int) -> None:
        self.base, self.shadow = base, ground / "shadow"
        self.stack = Stack.make("union", ground / "s")
        self.stack.expected_log.append("another one takes over")
        self.chance = random.Random(seed)
        lower = self.stack.lower
        self.tokens = sorted(b"token %d %d" % (at // 10 % DIRECTORIES, at) for at in range(10 * DIRECTORIES))
        for at, token in enumerate(self.tokens):
            build(lower / "storm" / f"dir{at % DIRECTORIES}", {f"f{at}": token})
        for number in range(2):
            build(lower / "twins" / f"home{number}", TREE)
        build(lower / "listings", {kept(number): str(number).encode() for number in range(KEPT)})
        for name in ("races", "dbench", "fio", "stress"):
            (lower / name).mkdir()
        for name in ("big", "small"):
            (lower / "fio" / name).write_bytes(os.urandom((20 if name == "big" else 2) * MIB))
        shutil.copytree(lower / "twins", self.shadow)
        self.lower = snapshot(lower)

    # -- the load --

    def commands(self, seconds: float) -> dict[str, list[str]]:
        """What is run at once: name → command, each of which ends after so many seconds."""
        root, whole = self.stack.mnt, str(int(seconds))
        clients = [sys.executable, "-m", "tests.support.clients"]
        seed = str(self.chance.randrange(10**6))
        chosen = self.chance.sample(known_stressors(), AT_A_TIME)
        return {
            "stress-ng " + " ".join(chosen): [
                *("stress-ng", "--temp-path", str(root / "stress"), "--timeout", whole, "--verify", "--seed", seed),
                *("--hdd-bytes", "16m", "--fallocate-bytes", "16m", "--iomix-bytes", "16m", "--seek-size", "16m"),
                *(word for name in chosen for word in (f"--{name}", "1")),
            ],
            "dbench": ["dbench", "-D", str(root / "dbench"), "-t", whole, "2"],
            "fio": ["fio", f"--directory={root / 'fio'}", "--output-format=terse", *FIO, *_fio_jobs()],
            "twins": [*clients, "subtrees", "2", str(seconds), seed, str(root / "twins"), str(self.shadow)],
            "storm": [*clients, "storm", "2", str(seconds), seed, str(root / "storm")],
            "races": [*clients, "races", "2", str(seconds), seed, str(root / "races")],
            "listings": [*clients, "listings", "2", str(seconds), seed, str(root / "listings")],
        }

    def kill(self, load: Load) -> None:
        """Kill the daemon that serves, if one does; its supervisor starts the next one."""
        for pid in supervised(self.stack.mnt):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                load.kills += 1

    def run_load(self, load: Load, seconds: float) -> None:
        """Put the load on, and look whether all went well. Raises Wrong."""
        began = time.monotonic()
        with ExitStack() as stack:
            started = {
                name: stack.enter_context(_running(command, self.base / f"said-{number}"))
                for number, (name, command) in enumerate(self.commands(seconds).items())
            }
            for name, process in started.items():
                left = began + seconds + LATE_SECONDS - time.monotonic()
                try:
                    status = process.wait(max(1.0, left))
                except subprocess.TimeoutExpired:
                    raise Wrong(f"{name} is stuck") from None
                text = _said(process)
                if status not in ((0, 3, 4) if name.startswith("stress-ng") else (0,)):
                    raise Wrong(f"{name}: exit {status}: {_last_lines(text)}")
                load.turns += int(text.split()[-1]) if name in CLIENTS else 0
        load.seconds = time.monotonic() - began

    # -- looking --

    def check(self, root: Path) -> None:
        """Compare with the shadow, and look for what was lost. Raises Wrong."""
        if lines := differences(snapshot(root / "twins", times=False), snapshot(self.shadow, times=False)):
            raise Wrong(f"the union and the shadow differ: {lines[:6]}")
        found = sorted(path.read_bytes() for path in (root / "storm").rglob("*") if path.is_file())
        if found != self.tokens:
            raise Wrong(f"of {len(self.tokens)} files that were moved about {len(set(found))} are there")

    def settle(self, load: Load) -> None:
        """Let the kernel forget, and see how the daemon is then. Raises Wrong."""
        daemon, mnt = next(iter(supervised(self.stack.mnt)), self.stack.daemon()), self.stack.mnt
        shutil.rmtree(mnt / "stress", ignore_errors=True)
        (mnt / "stress").mkdir(exist_ok=True)
        end = time.monotonic() + SETTLE_SECONDS
        previous = -1
        with _fuse_control(self.base) as control:
            waiting = control / str(os.minor(mnt.stat().st_dev)) / "waiting"
            while True:
                Path("/proc/sys/vm/drop_caches").write_text("2")
                time.sleep(1)
                load.descriptors = len(os.listdir(f"/proc/{daemon}/fd"))
                asked = int(waiting.read_text())
                if not asked and load.descriptors == previous:
                    break
                if time.monotonic() > end:
                    raise Wrong(f"{asked} requests are not answered")
                previous = load.descriptors
        status = Path(f"/proc/{daemon}/status").read_text()
        load.memory = _kilobytes(status, "RssAnon") * 1024
        load.peak = _kilobytes(status, "VmHWM") * 1024

    def clear(self) -> None:
        """Take off what a round that has failed has left."""
        for pid in daemons(self.stack.mnt):
            self.stack.abort()
            if not wait_gone(pid):
                os.kill(pid, signal.SIGKILL)
                wait_gone(pid)

    def close_round(self) -> None:
        """Unmount, and look at what is left. Raises Wrong."""
        before = snapshot(self.stack.mnt, times=False)
        self.stack.umount()
        if bad := self.stack.bad_log_lines():
            raise Wrong(f"the daemon says: {bad[:3]}")
        if left := os.listdir(self.stack.work / "work"):
            raise Wrong(f"left in work: {left[:5]}")
        overlay = Stack(
            "overlay", self.stack.base, self.stack.lowers, self.stack.upper, self.stack.work, self.stack.mnt
        )
        overlay.mount()
        try:
            if lines := differences(before, snapshot(overlay.mnt, times=False)):
                raise Wrong(f"kernel overlayfs shows something else: {lines[:6]}")
        finally:
            overlay.umount()
        if snapshot(self.stack.lower) != self.lower:
            raise Wrong("the lower layer has changed")


FIO = ("--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--loops=3", "--thread=0")


def _fio_jobs() -> list[str]:
    jobs = (("big", 20, "16k", "psync"), ("small", 2, "4k", "mmap"), ("new", 8, "8k", "libaio"))
    return [
        word
        for name, size, block, engine in jobs
        for word in (f"--name={name}", f"--filename={name}", f"--size={size}m", f"--bs={block}", f"--ioengine={engine}")
    ]


def known_stressors() -> list[str]:
    """Those of `STRESSORS` that this stress-ng has."""
    text = subprocess.run(["stress-ng", "--stressors"], capture_output=True, text=True, check=True).stdout
    return [name for name in STRESSORS if name in text.split()]


@contextlib.contextmanager
def _running(command: Sequence[str], said: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program whose output goes to a file; ended with all that it started."""
    with open(said, "wb") as stream:
        process = subprocess.Popen(
            command,
            env=environment(),
            cwd=said.parent,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process.said = said  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _said(process: subprocess.Popen[bytes]) -> str:
    said: Path = process.said  # type: ignore[attr-defined]
    return said.read_text(errors="replace")


def _last_lines(text: str) -> str:
    wanted = [line for line in text.splitlines() if "fail" in line or "rror" in line] or text.splitlines()
    return " / ".join(wanted[-6:])


@contextlib.contextmanager
def _fuse_control(base: Path) -> Iterator[Path]:
    control = base / "fusectl"
    control.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
    try:
        yield control
    finally:
        raw.umount2(control, raw.MNT_DETACH)
        control.rmdir()


def _kilobytes(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) if found else 0


# -- rounds --


def rounds(site: Site, options: argparse.Namespace) -> Iterator[Load]:
    """Do loads, round after round; yields each before and after. Raises Wrong."""
    end = time.monotonic() + options.minutes * 60
    number = 0
    while number < 1 or time.monotonic() < end:
        mode = options.modes[number % len(options.modes)]
        number += 1
        restarts = mode == AUTO_RESTART
        words = ["--auto-restart"] if restarts else []
        site.stack.mount("" if mode in ("default", AUTO_RESTART) else mode, extra=words)
        first: Load | None = None
        for _ in range(options.loads):
            load = Load(mode)
            with repeating(partial(site.kill, load), KILL_SECONDS) if restarts else contextlib.nullcontext():
                site.run_load(load, options.seconds)
            site.settle(load)
            site.check(site.stack.mnt)
            first = first or load
            yield load
            _compare(first, load)
            if time.monotonic() > end:
                break
        site.close_round()


def _compare(first: Load, load: Load) -> None:
    if load.memory > first.memory + MEMORY_SLACK:
        raise Wrong(f"memory grows: {first.memory >> 10} KiB after the first load, {load.memory >> 10} KiB now")
    if load.descriptors > first.descriptors + DESCRIPTOR_SLACK:
        raise Wrong(f"descriptors grow: {first.descriptors} after the first load, {load.descriptors} now")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if all was well, 1 if not, 2 where it can't be run."""
    options = _parse(arguments)
    console = Console(stderr=True)
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        console.print(f"soak: {missing[0]} is missing: scripts/packages soak installs it")
        return 2
    if os.geteuid() != 0:
        console.print("soak: it mounts file systems and drops caches: run it as root")
        return 2
    os.umask(0o022)
    os.environ.update(MANY_CRASHES)
    have_own_mounts()
    loads: list[Load] = []
    wrong = ""
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unionfs-soak-", dir=options.dir)))
        base.chmod(0o755)
        ground = stack.enter_context(file_system(options.fs, base, size="8G"))
        site = Site(base, ground, options.seed)
        status = stack.enter_context(console.status("the first load"))
        try:
            for load in rounds(site, options):
                loads.append(load)
                status.update(
                    f"{len(loads)} loads; {load.mode}; {load.memory >> 20} MiB, {load.descriptors} descriptors"
                )
        except (Wrong, MountRefused, AssertionError) as error:
            wrong = str(error) or repr(error)
            console.print(wrong, markup=False, highlight=False)
        finally:
            site.clear()
    _report(loads, wrong, as_json=options.json)
    return 1 if wrong else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make soak", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="how long (default: 20); at least a round")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long a load lasts (default: 30)")
    parser.add_argument("--loads", type=int, default=4, help="how many loads a round has (default: 4)")
    parser.add_argument(
        "--modes", nargs="+", default=list(MODES), help="mount options, `default`, `auto-restart`; default: all"
    )
    parser.add_argument("--fs", choices=FS_KINDS, default="ext4", help="the layers' file system (default: ext4)")
    parser.add_argument("--dir", default="/var/tmp", help="where it lies; 2 GiB free (default: /var/tmp)")
    parser.add_argument("--seed", type=int, default=None, help="for the same choices once more")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(arguments)


def _report(loads: Sequence[Load], wrong: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"loads": [asdict(load) for load in loads], "wrong": wrong}, indent=2))
        return
    table = Table(title="Everything at once")
    for heading in ("mode", "seconds", "clients' turns", "kills", "MiB after it", "descriptors", "MiB at most"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for load in loads:
        sizes = (f"{load.memory / MIB:.1f}", str(load.descriptors), f"{load.peak / MIB:.1f}")
        table.add_row(load.mode, f"{load.seconds:.0f}", str(load.turns), str(load.kills), *sizes)
    console = Console()
    console.print(table)
    total = sum(load.seconds for load in loads) / 60
    console.print(f"{total:.1f} minutes of load, {sum(load.turns for load in loads)} turns; failed, grown or stuck:")
    console.print(wrong or "nothing", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
