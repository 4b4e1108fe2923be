"""The host under test: where things lie, and how programs are run there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.cli import ended
from tests.support.mounts import mounted_below

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND_SECONDS = 1800.0
"""Longest time of one program, which is to end what hangs: an emulated machine on a busy host is fifty times slower."""


class Wrong(Exception):
    """A check failed; the text says how."""


class LeftOut(Exception):
    """This host lacks what a check is about; the text says what."""


@dataclass
class Host:
    """What all checks share.

    Attributes:
        base: a directory on a disk that takes trusted xattrs; everyone may enter it.
        python: the host's own, which makes virtual environments.
        wheel: the wheel that is installed; given, or set by the check that builds it.
        wheelhouse: a directory with the wheels of all that ours needs; nothing is asked of a package index then.
        quick: whether a short run is wanted.
        system: whether the host's own fstab and systemd may be used.
        emulated: whether its processor is a program, some ten times slower than a real one.
    """

    base: Path
    python: str
    wheel: Path | None = None
    wheelhouse: Path | None = None
    quick: bool = False
    system: bool = False
    emulated: bool = False
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def venv(self) -> Path:
        """The virtual environment that all checks use."""
        return self.base / "venv"

    @property
    def checks(self) -> Path:
        """A copy of our tests apart from the checkout, so that what they import as unionfs is what was installed."""
        return self.base / "checks"

    def room(self, name: str) -> Path:
        """An empty directory that everyone may enter."""
        path = self.base / name
        path.mkdir()
        path.chmod(0o755)
        return path

    def program(self, name: str) -> str:
        """The path of a program that was installed with the wheel."""
        return str(self.venv / "bin" / name)

    def unionfs(self, *words: str | Path, status: int = 0) -> str:
        """Run the installed `unionfs`, with a volume store below `base`; what it printed."""
        return run([self.program("unionfs"), "--root", self.base / "store", *words], status=status)

    def python_environment(self) -> dict[str, str]:
        """The environment in which the Python of `venv` finds the copied tests."""
        return {**os.environ, "PYTHONPATH": str(self.checks), "PYTHONNOUSERSITE": "1"}

    @contextmanager
    def union(self, room: Path, lowers: Sequence[Path], *words: str | Path) -> Iterator[Path]:
        """Mount a union with upper and work in `room`, and unmount it after the block; the mount point."""
        merged = room / "merged"
        for name in ("upper", "work", "merged"):
            (room / name).mkdir(exist_ok=True)
        self.unionfs("mount", *words, "--work", room / "work", ":".join(map(str, lowers)), room / "upper", merged)
        with _detached_after_errors(merged):
            yield merged
        self.unionfs("umount", merged)
        if mounted_below(merged):
            raise Wrong(f"{merged} is still mounted after its unmount")


def run(
    words: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    status: int | None = 0,
    seconds: float = COMMAND_SECONDS,
) -> str:
    """Run a program; what it printed.

    Args:
        status: the exit status that it must have; None for any.
        env: variables besides our own.

    Raises:
        Wrong: it had another one, or took longer than `seconds`; the text has the end of what it said.
    """
    command = [str(word) for word in words]
    try:
        done = ended(command, cwd=cwd, env={**os.environ, **(env or {})}, seconds=seconds, errors="backslashreplace")
    except FileNotFoundError:
        raise LeftOut(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise Wrong(f"{' '.join(command)}: took longer than {seconds:.0f} s") from None
    if status is not None and done.status != status:
        raise Wrong(f"{' '.join(command)}: exit status {done.status}\n{done.out[-2000:]}{done.err[-4000:]}")
    return done.out


def shell(script: str, *, cwd: Path, env: Mapping[str, str] | None = None, seconds: float = COMMAND_SECONDS) -> str:
    """Run a shell script that ends at its first error; what it printed. Raises Wrong."""
    return run(["sh", "-euc", script], cwd=cwd, env=env, seconds=seconds)


def need(*programs: str) -> None:
    """Raise LeftOut if a program is missing."""
    missing = [name for name in programs if not shutil.which(name)]
    if missing:
        raise LeftOut(f"{' and '.join(missing)} not installed")


def has_file_system(kind: str) -> bool:
    """Whether the kernel has a file system, or gets it from a module."""
    word = f"\t{kind}\n"
    if word not in Path("/proc/filesystems").read_text():
        load_module(kind)
    return word in Path("/proc/filesystems").read_text()


@contextmanager
def _detached_after_errors(merged: Path) -> Iterator[None]:
    """Detach a mount after an error: the error is what counts, not that something is busy afterwards."""
    try:
        yield
    except BaseException:
        subprocess.run(["umount", "-l", str(merged)], capture_output=True, check=False)
        raise


def kernel_version() -> tuple[int, int]:
    """Major and minor version of the running kernel."""
    major, minor = os.uname().release.split("-", maxsplit=1)[0].split(".")[:2]
    return int(major), int(minor)


def load_module(name: str) -> None:
    """Load a kernel module, if there are such."""
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "-q", name], capture_output=True, check=False)


@contextmanager
def overlay(room: Path, lowers: Sequence[Path], options: str = "") -> Iterator[Path]:
    """Mount kernel overlayfs with upper and work in `room`; raises LeftOut where there is none.

    The options are our own defaults, said aloud.
    """
    if not has_file_system("overlay"):
        raise LeftOut("this kernel has no overlayfs")
    for name in ("upper", "work", "merged"):
        (room / name).mkdir(exist_ok=True)
    layers = f"lowerdir={':'.join(map(str, lowers))},upperdir={room / 'upper'},workdir={room / 'work'}"
    words = f"{layers},redirect_dir=on,metacopy=on,index=on,xino=on{options}"
    run(["mount", "-t", "overlay", "-o", words, "overlay", room / "merged"])
    with _detached_after_errors(room / "merged"):
        yield room / "merged"
    run(["umount", room / "merged"])


def expect(found: object, wanted: object, what: str) -> None:
    """Raise Wrong unless two things are equal."""
    if found != wanted:
        raise Wrong(f"{what}: {found!r}, expected {wanted!r}")
