"""What is compared: the bare file system, kernel overlayfs, and three FUSE programs.

A subject is named on the command line by its name, and may be followed by mount options of its own:
`unionfs+native=off`, `overlayfs+metacopy=on+index=on`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from tests.compare.machine import mounts
from tests.compare.processes import Failed, end, last_line, naming, wait_gone
from tests.compare.stage import Site, Stage, remove

MOUNT_SECONDS = 60.0
END_SECONDS = 20.0


class Unavailable(Exception):
    """The subject can't be had on this machine; the text says why."""


class Subject(ABC):
    """Something that shows the lower layers of a site, and takes changes.

    Attributes:
        name: what the command line calls it, with options; unique in a run.
        options: mount options that the user gave it.
    """

    kind: ClassVar[str]
    is_mount: ClassVar[bool] = True
    has_daemon: ClassVar[bool] = True
    uncached: ClassVar[tuple[str, ...]] = ()
    """The mount options with which the kernel caches no names and attributes."""

    def __init__(self, stage: Stage, options: Sequence[str], *, rootless: bool) -> None:
        self.name = "+".join((self.kind, *options))
        self.options = tuple(options)
        self.stage = stage
        self.rootless = rootless

    @abstractmethod
    def version(self) -> str:
        """What it is, with its version; raises Unavailable where it is not installed."""

    @abstractmethod
    def command(self, site: Site, options: Sequence[str]) -> list[str]:
        """The command that mounts it on `site`."""

    def mount(self, site: Site, more: Sequence[str] = ()) -> None:
        """Mount on `site`, with `more` options. Raises Failed."""
        # A file takes what the command says: a daemon that keeps its standard error would hold a pipe open.
        log = site.base / "mount.log"
        with log.open("wb") as file:
            command = self.command(site, (*self.options, *more))
            try:
                status = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=MOUNT_SECONDS, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                raise Failed(f"mount: took longer than {MOUNT_SECONDS:.0f} s") from None
        if status:
            raise Failed(f"mount: {last_line(log.read_text(errors='replace')) or f'exit status {status}'}")
        deadline = time.monotonic() + 5
        while not mounted(site.merged):
            if time.monotonic() > deadline:
                raise Failed(f"mount: nothing is mounted; {last_line(log.read_text(errors='replace'))}")
            time.sleep(0.005)

    def shown(self) -> str:
        """The mount command as the report has it, with names in place of the directories."""
        return shlex.join(self.command(Site(Path("SITE"), (Path("TOP"), Path("BASE"))), self.options))

    def where(self, site: Site) -> Path:
        """The directory in which the content is seen and the work is done."""
        return site.merged

    def unmount(self, site: Site, *, spoilt: Sequence[str] = ()) -> float:
        """Unmount, and return when the daemon has ended, with the seconds that it took.

        Args:
            spoilt: the parts that the workload changed.
        """
        daemons = self.daemons(site) if self.has_daemon else []
        start = time.perf_counter()
        unmount(site.merged)
        left = wait_gone(daemons, END_SECONDS)
        taken = time.perf_counter() - start
        end(left)
        if left:
            raise Failed(f"its daemon had not ended {END_SECONDS:.0f} s after the unmount")
        return taken

    def daemons(self, site: Site) -> list[int]:
        """The processes that serve the mount."""
        return naming(site.base)


class Bare(Subject):
    """The file system itself, without a union: the merged content as plain files."""

    kind = "bare"
    is_mount = False
    has_daemon = False

    def version(self) -> str:
        return "the file system itself"

    def command(self, site: Site, options: Sequence[str]) -> list[str]:
        return []

    def mount(self, site: Site, more: Sequence[str] = ()) -> None:
        pass

    def where(self, site: Site) -> Path:
        return self.stage.bare

    def unmount(self, site: Site, *, spoilt: Sequence[str] = ()) -> float:
        remove(self.stage.bare / "new")
        for part in spoilt:
            self.stage.spoil_bare(part)
        return 0.0


class Overlayfs(Subject):
    """The kernel's overlay file system with the kernel's default options."""

    kind = "overlayfs"
    has_daemon = False

    def version(self) -> str:
        if "\toverlay\n" not in Path("/proc/filesystems").read_text():
            subprocess.run(["modprobe", "-q", "overlay"], check=False)
        if "\toverlay\n" not in Path("/proc/filesystems").read_text():
            raise Unavailable("this kernel has no overlayfs")
        return f"overlayfs of Linux {Path('/proc/sys/kernel/osrelease').read_text().strip()}"

    def command(self, site: Site, options: Sequence[str]) -> list[str]:
        options = (*(["userxattr"] if self.rootless else []), *options)
        return ["mount", "-t", "overlay", "-o", _layers(site, options), "overlay", str(site.merged)]


class FuseOverlayfs(Subject):
    """containers/fuse-overlayfs."""

    kind = "fuse-overlayfs"
    uncached = ("timeout=0",)

    def version(self) -> str:
        found = re.search(r"^fuse-overlayfs: version (.+)$", ask(self._program(), "--version"), re.MULTILINE)
        if not found:
            raise Unavailable(f"{self._program()} doesn't say that it is fuse-overlayfs")
        return f"fuse-overlayfs {found[1]}"

    def command(self, site: Site, options: Sequence[str]) -> list[str]:
        return [self._program(), "-o", _layers(site, options), str(site.merged)]

    def _program(self) -> str:
        return find("fuse-overlayfs")


class UnionfsFuse(Subject):
    """rpodgorny/unionfs-fuse, whose program Debian calls `unionfs`, as ours is called: it is asked what it is."""

    kind = "unionfs-fuse"
    uncached = ("entry_timeout=0", "attr_timeout=0")

    def version(self) -> str:
        return f"unionfs-fuse {self._found()[1]}"

    def command(self, site: Site, options: Sequence[str]) -> list[str]:
        branches = ":".join([f"{site.upper}=RW", *(f"{lower}=RO" for lower in site.lowers)])
        return [self._found()[0], "-o", ",".join(("cow", *options)), branches, str(site.merged)]

    def _found(self) -> tuple[str, str]:
        for program in ("/usr/bin/unionfs-fuse", "/usr/bin/unionfs", "/usr/local/bin/unionfs-fuse"):
            if Path(program).exists() and (version := self.asked(program)):
                return program, version
        raise Unavailable("not installed (Debian and Ubuntu: apt install unionfs-fuse)")

    @staticmethod
    def asked(*command: str) -> str:
        """The version of unionfs-fuse that a command says it is; empty if it is something else."""
        found = re.search(r"^unionfs-fuse version: *(\S+)", ask(*command, "--version"), re.MULTILINE)
        return found[1] if found else ""


class Ours(Subject):
    """This project, run from this checkout by the Python that runs the comparison."""

    kind = "unionfs"
    uncached = ("timeout=0",)

    def version(self) -> str:
        return ", ".join(ask(*self.unionfs("--version")).split("\n")).strip(", ")

    def command(self, site: Site, options: Sequence[str]) -> list[str]:
        lowers, layers = ":".join(map(str, site.lowers)), (str(site.upper), str(site.merged))
        words = [word for option in options for word in ("-o", option)]
        return self.unionfs("mount", *words, "--work", str(site.work), lowers, *layers)

    def unionfs(self, *words: str) -> list[str]:
        """A command of ours; what it remembers stays within the stage."""
        return [sys.executable, "-m", "unionfs", "--root", str(self.stage.base / "store"), *words]


SUBJECTS: tuple[type[Subject], ...] = (Bare, Overlayfs, FuseOverlayfs, UnionfsFuse, Ours)


def _layers(site: Site, options: Sequence[str]) -> str:
    lowers = ":".join(map(str, site.lowers))
    return ",".join((f"lowerdir={lowers}", f"upperdir={site.upper}", f"workdir={site.work}", *options))


def find(program: str) -> str:
    """The path of an installed program. Raises Unavailable."""
    found = shutil.which(program, path="/usr/bin:/usr/local/bin:/bin")
    if not found:
        raise Unavailable(f"not installed (Debian and Ubuntu: apt install {program})")
    return found


def ask(*words: str) -> str:
    """What a program says on both its outputs."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def mounts_below(base: Path) -> list[Path]:
    """Mount points at or below `base` in this mount namespace, the latest first."""
    return [point for point, _, _ in reversed(mounts()) if point.is_relative_to(base)]


def mounted(point: Path) -> bool:
    """Whether something is mounted on `point`."""
    return point in mounts_below(point)


def unmount(point: Path) -> None:
    """Unmount `point`; while it is busy try again, and detach it in the end. Raises Failed if it had to be detached."""
    for _ in range(100):
        done = subprocess.run(["umount", str(point)], capture_output=True, text=True, check=False)
        if not done.returncode or not mounted(point):
            return
        time.sleep(0.05)
    detach(point)
    raise Failed(f"umount: {last_line(done.stderr)}")


def detach(point: Path) -> None:
    """Take a mount out of the tree, busy or dead."""
    subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False)


def clear(base: Path) -> None:
    """Remove `base` and all below it; mounts that are still there are detached first, and their daemons ended."""
    for point in mounts_below(base):
        detach(point)
    end(wait_gone(naming(base), 5))
    if not mounts_below(base):
        remove(base)
