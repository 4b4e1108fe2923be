"""Union mounts under test: ours, kernel overlayfs, a plain directory, and a bind path of ours, behind one interface.

A `Stack` is the layers of one union and the place where it is mounted. A test fills its lowers, mounts, acts in
`mnt`, unmounts and looks at `upper`. On a plain directory the (only) lower is the mount point itself, so that what a
test says of POSIX behaviour can be checked against the file system below, too. A bind path is `host` at `mnt/bind` of a union,
served by the daemon. So that all kinds look alike, tests act in `inside` and prepare `below`.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.support import raw
from tests.support.people import REPOSITORY

Kind = Literal["plain", "overlay", "union", "bind"]
OVERLAY_DEFAULTS = {"redirect_dir": "on", "metacopy": "on", "index": "on", "xino": "on"}
"""Our own defaults, said aloud to the kernel."""
USERXATTR_DEFAULTS = {"userxattr": "", "index": "off", "xino": "on"}
MOUNT_SECONDS = 60
BUSY_SECONDS = 5
END_SECONDS = 60
AUTO_RESTART = "auto-restart"
"""Among the modes of long runs: `--auto-restart`, which is no mount option."""
MANY_CRASHES = {"UNIONFS_MOST_CRASHES": "1000"}
"""The environment of a supervisor that does not give up."""
BAD_LOG = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|Traceback|^\w*(Error|Exception):")


class MountRefused(Exception):
    """The mount command failed: its exit status (or errno, for the kernel) and what it said."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"exit {code}: {message}")
        self.code = code
        self.message = message


def mounted_below(base: Path) -> list[Path]:
    """Mount points below `base`, the latest last."""
    found: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        target = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4])
        if Path(target).is_relative_to(base):
            found.append(Path(target))
    return found


def daemons(base: Path) -> dict[int, str]:
    """Processes of ours that were given a path below `base`: pid → command line."""
    found: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with suppress(OSError):
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            text = b" ".join(words).decode(errors="surrogateescape")
            if b"unionfs" in words and str(base) in text:
                found[int(entry)] = text
    return found


def parent_of(pid: int) -> int:
    """The parent of a process, 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def can_restart() -> bool:
    """Whether this kernel asks again what a daemon had not answered (Linux 6.9)."""
    return tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 9)


def supervised(base: Path) -> list[int]:
    """The daemon that serves under a supervisor, as `daemons`; none just after it has died."""
    found = daemons(base)
    return [pid for pid in found if parent_of(pid) in found]


def wait_gone(pid: int, seconds: float = 20) -> bool:
    """Wait until process `pid` has ended; False where it has not after `seconds`."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def mounted_elsewhere(mnt: Path) -> bool:
    """Whether some other mount namespace, made while `mnt` was mounted, still has it and so keeps it alive."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and f" {mnt} " in (entry / "mountinfo").read_text(errors="surrogateescape"):
                return True
    return False


def where_it_waits(pid: int) -> str:
    """State and kernel stack of each thread of a process, for the report of one that won't end."""
    lines: list[str] = []
    with suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            stack = " ".join((task / "stack").read_text().split("\n")[:5])
            lines.append(f"thread {task.name}: {state} {(task / 'syscall').read_text().strip()} {stack}")
    return "\n".join(lines)


def environment() -> dict[str, str]:
    """The environment for `python -m unionfs`: the caller's, with the repository on the module path."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1", "COLUMNS": "200"}


def options_text(options: dict[str, str]) -> str:
    """Options as mount(8) takes them: `name=value` and bare names, joined by commas."""
    return ",".join(f"{name}={value}" if value else name for name, value in options.items())


def parse_options(text: str) -> dict[str, str]:
    """The reverse of `options_text`."""
    pairs = (word.partition("=") for word in text.split(",") if word)
    return {name: value for name, _, value in pairs}


@dataclass
class Stack:
    """One union: layers below `base`, a mount point, and what is mounted there by which `kind`.

    lowers: index 0 on top; upper None: read-only; data: data-only lowers, below all others.
    options: comma-separated overlayfs options, added to the defaults that both kinds share.
    """

    kind: Kind
    base: Path
    lowers: list[Path] = field(default_factory=list)
    upper: Path | None = None
    work: Path = Path()
    mnt: Path = Path()
    data: list[Path] = field(default_factory=list)
    options: str = ""
    expected_log: list[str] = field(default_factory=list)
    mounted: bool = False
    _mounts: int = 0
    _logs_read: dict[Path, int] = field(default_factory=dict)

    def by(self, kind: Kind) -> Stack:
        """The same layers and mount point, for `kind` to mount while this one isn't."""
        return Stack(kind, self.base, list(self.lowers), self.upper, self.work, self.mnt, list(self.data))

    @classmethod
    def make(cls, kind: Kind, base: Path, *, lowers: int = 1, options: str = "") -> Stack:
        """Lay out a stack below `base`: `lower0` (top) and so on, `upper`, `work`, `mnt`."""
        base.mkdir(exist_ok=True)
        base.chmod(0o755)
        stack = cls(kind, base, options=options, mnt=base / "mnt", upper=base / "upper", work=base / "work")
        stack.lowers = [base / f"lower{number}" for number in range(lowers)]
        if kind == "plain":
            stack.lowers = [stack.mnt]
        for directory in {stack.mnt, stack.below, base / "upper", base / "work", *stack.lowers}:
            directory.mkdir(exist_ok=True)
        return stack

    @property
    def lower(self) -> Path:
        """The topmost lower."""
        return self.lowers[0]

    @property
    def below(self) -> Path:
        """What shows through in `inside`: the topmost lower, or the source of the bind path."""
        return self.base / "host" if self.kind == "bind" else self.lower

    @property
    def inside(self) -> Path:
        """Where to act: the mount point, or the bind path."""
        return self.mnt / "bind" if self.kind == "bind" else self.mnt

    @property
    def up(self) -> Path:
        """The upper directory of a stack that has one."""
        assert self.upper is not None
        return self.upper

    @property
    def log(self) -> Path:
        """The log file of the running (or last) daemon."""
        return self.base / f"daemon-{self._mounts}.log"

    def mount(self, options: str = "", *, extra: Sequence[str] = (), under: Sequence[str] = ()) -> Path:
        """Mount, with `options` besides those of the stack; returns the mount point. Raises `MountRefused`.

        extra: further command line words for our daemon; under: a command that runs it.
        """
        merged = {**parse_options(self.options), **parse_options(options)}
        self._mounts += 1
        if self.kind == "union":
            self._mount_union(merged, extra, under)
        elif self.kind == "bind":
            self._mount_union(merged, [*extra, "--bind-mode", "fuse", "-v", f"{self.below}:/bind"], under)
        elif self.kind == "overlay":
            self._mount_overlay(merged)
        self.mounted = True
        return self.mnt

    def _layer_words(self) -> str:
        escaped = [str(path).replace("\\", "\\\\").replace(":", "\\:") for path in self.lowers]
        return ":".join(escaped) + "".join(f"::{path}" for path in self.data)

    def _mount_overlay(self, options: dict[str, str]) -> None:
        defaults = USERXATTR_DEFAULTS if "userxattr" in options or os.environ.get("UFS_USERXATTR") else OVERLAY_DEFAULTS
        options = {name: value for name, value in options.items() if name not in {"timeout", "native"}}
        words = {**defaults, **options, "lowerdir": self._layer_words()}
        if self.upper is not None:
            words |= {"upperdir": str(self.upper), "workdir": str(self.work)}
        command = ["mount", "-t", "overlay", "-o", options_text(words), "overlay", str(self.mnt)]
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                _run_mount(command)
                return
            except MountRefused as refused:
                # A mount namespace that somebody made meanwhile may hold the last mount of these layers a moment longer.
                if "busy" not in refused.message or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def _mount_union(self, options: dict[str, str], extra: Sequence[str], under: Sequence[str]) -> None:
        options = {**parse_options(os.environ.get("UFS_OPTIONS", "")), **options}
        store = ["--root", str(self.base / "store")] if "-v" in extra else []
        command = [*under, sys.executable, "-m", "unionfs", *store, "mount", "--log-file", str(self.log), *extra]
        if options:
            command += ["-o", options_text(options)]
        if self.upper is not None:
            command += ["--work", str(self.work)]
        command += [self._layer_words(), *([str(self.upper)] if self.upper else []), str(self.mnt)]
        _run_mount(command)

    def umount(self) -> None:
        """Unmount, and wait for our daemon's end."""
        if not self.mounted:
            return
        self.mounted = False
        if self.kind == "plain":
            return
        pid = self.daemon() if self.kind in ("union", "bind") else None
        for attempt in range(20):
            try:
                raw.umount2(self.mnt, 0)
                break
            except OSError as error:
                if error.errno != 16 or attempt == 19:
                    raw.umount2(self.mnt, raw.MNT_DETACH)
                    raise
                time.sleep(0.1)
        if pid is not None and not wait_gone(pid, 3) and mounted_elsewhere(self.mnt):
            os.kill(pid, signal.SIGTERM)
        if pid is not None and not wait_gone(pid, END_SECONDS):  # it syncs what others have written there, too
            state = where_it_waits(pid)
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(
                f"the daemon of {self.mnt} still ran {END_SECONDS} s after its unmount; killed\n{state}"
            )

    def remount(self, options: str = "") -> Path:
        """Unmount and mount again: nothing of the daemon's or the kernel's memory remains."""
        self.umount()
        return self.mount(options)

    def daemon(self) -> int:
        """The process id of our running daemon, of its supervisor if it has one."""
        found = daemons(self.mnt)
        found = {pid: line for pid, line in found.items() if parent_of(pid) not in found}
        assert len(found) == 1, f"expected one daemon of {self.mnt}: {found}"
        return next(iter(found))

    def counter(self, name: str) -> int:
        """A counter of our running daemon, from its dump on SIGUSR1."""
        before = len(self.log.read_text())
        os.kill(self.daemon(), signal.SIGUSR1)
        for _ in range(200):
            if found := re.search(rf"^\s*{name} (\d+)$", self.log.read_text()[before:], re.MULTILINE):
                return int(found[1])
            time.sleep(0.05)
        raise AssertionError(f"no counter {name} in a dump in the log")

    def abort(self) -> None:
        """Free whoever hangs in this mount: abort its connection and detach it."""
        with suppress(OSError):
            raw.umount2(self.mnt, raw.MNT_FORCE | raw.MNT_DETACH)

    def bad_log_lines(self) -> list[str]:
        """Lines at WARNING or above, and of tracebacks, new since the last call and not declared as expected."""
        bad: list[str] = []
        for log in sorted(self.base.glob("daemon-*.log")):
            text = log.read_text(errors="replace")
            fresh = text[self._logs_read.get(log, 0) :]
            self._logs_read[log] = len(text)
            bad += [line for line in fresh.splitlines() if BAD_LOG.search(line) and "dump on SIGUSR1" not in line]
        return [line for line in bad if not any(re.search(pattern, line) for pattern in self.expected_log)]


def _run_mount(command: list[str]) -> None:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(),
        stdin=subprocess.DEVNULL,
        timeout=MOUNT_SECONDS,
        check=False,
    )
    if done.returncode:
        raise MountRefused(done.returncode, (done.stderr + done.stdout).strip())


@contextmanager
def union_mount(
    lowers: Sequence[Path], upper: Path | None, mnt: Path, options: str = "", *, work: Path | None = None
) -> Iterator[Stack]:
    """Our union over given directories, mounted by `python -m unionfs mount` as a user does; unmounted at the end.

    work: default `NAME.work` beside upper. The log lies beside the mount point.
    """
    with _mounted("union", lowers, upper, mnt, options, work) as stack:
        yield stack


@contextmanager
def overlay_mount(
    lowers: Sequence[Path], upper: Path | None, mnt: Path, options: str = "", *, work: Path | None = None
) -> Iterator[Stack]:
    """Kernel overlayfs, the oracle, over given directories; the interface of `union_mount`."""
    with _mounted("overlay", lowers, upper, mnt, options, work) as stack:
        yield stack


@contextmanager
def _mounted(
    kind: Kind, lowers: Sequence[Path], upper: Path | None, mnt: Path, options: str, work: Path | None
) -> Iterator[Stack]:
    mnt.mkdir(exist_ok=True)
    if upper is not None:
        work = work or upper.with_name(upper.name + ".work")
        work.mkdir(exist_ok=True)
    stack = Stack(kind, mnt.parent, list(lowers), upper, work or Path(), mnt, options=options)
    stack.mount()
    try:
        yield stack
        bad = stack.bad_log_lines()
        assert not bad, "unexpected log lines:\n" + "\n".join(bad)
    finally:
        stack.umount()
