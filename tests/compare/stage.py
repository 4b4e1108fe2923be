"""The place of a comparison: the content of the lower layers, and a fresh site for each sample.

A stage is one new directory, and everything is below it:

    layers/base, layers/top   the two lower layers; `tree` is spread over both, so that its directories are merged
    bare                      what both together show, as plain files: for the bare file system
    source                    what workloads take in from outside: a tar archive, an image, a git repository
    site-N                    upper, work and merged of one sample

*Parts* are pieces of lower content, made when a workload first asks for them, from this Python's own library and from
generated data, and the same for every run with the same Python.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
TOP_EVERY = 10
"""Each tenth file of the tree lies in the top layer."""
WHEN = 1_700_000_000
"""Modification time of all generated files."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    tree_files: int = 4500
    read_mib: int = 512
    huge_mib: int = 1024
    write_mib: int = 512
    random_mib: int = 256
    random_reads: int = 100_000
    random_writes: int = 50_000
    synced_writes: int = 2048
    commits: int = 200
    repository_files: int = 1200
    names: int = 100_000
    stats: int = 20_000
    walk_inodes: int = 500_000


QUICK = Sizes(
    tree_files=300,
    read_mib=16,
    huge_mib=32,
    write_mib=16,
    random_mib=8,
    random_reads=2000,
    random_writes=1000,
    synced_writes=64,
    commits=10,
    repository_files=100,
    names=2000,
    stats=1000,
    walk_inodes=5000,
)


@dataclass(frozen=True)
class Site:
    """Where one sample is mounted: its layers, all on one file system."""

    base: Path
    lowers: tuple[Path, ...]

    @property
    def upper(self) -> Path:
        """The upper layer, empty at first."""
        return self.base / "upper"

    @property
    def work(self) -> Path:
        """The work directory."""
        return self.base / "work"

    @property
    def merged(self) -> Path:
        """The mount point."""
        return self.base / "merged"


@dataclass
class Stage:
    """See the head of the module."""

    base: Path
    sizes: Sizes
    described: dict[str, dict[str, object]] = field(default_factory=dict)
    _plain: set[str] = field(default_factory=set)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        for path in (*self.lowers, self.bare, self.source, self.base / "home"):
            path.mkdir(parents=True)

    @property
    def lowers(self) -> tuple[Path, Path]:
        """The lower layers, the top one first."""
        return self.base / "layers/top", self.base / "layers/base"

    @property
    def bare(self) -> Path:
        """The plain copy of what the lower layers show together."""
        return self.base / "bare"

    @property
    def source(self) -> Path:
        """What workloads read that is in no layer."""
        return self.base / "source"

    def new_site(self) -> Site:
        """Make the directories of one sample."""
        site = Site(self.base / f"site-{next(self._numbers)}", self.lowers)
        for path in (site.upper, site.work, site.merged):
            path.mkdir(parents=True)
        return site

    def need(self, part: str) -> None:
        """Make `part` in the lower layers, or in `source`, if it is not there yet."""
        if part not in self.described:
            self.described[part] = _MAKERS[part](self)

    def need_bare(self, part: str) -> None:
        """Make `part` in the plain copy, if it is not there yet."""
        self.need(part)
        if part in IN_SOURCE or part in self._plain:
            return
        for lower in reversed(self.lowers):
            if (lower / part).exists():
                subprocess.run(["cp", "-a", "--reflink=never", str(lower / part), str(self.bare)], check=True)
        self._plain.add(part)

    def spoil_bare(self, part: str) -> None:
        """Remove `part` from the plain copy: a workload has changed it."""
        remove(self.bare / part)
        self._plain.discard(part)


def remove(path: Path) -> None:
    """Remove a file or a tree, whatever modes a workload left in it; nothing happens where there is none."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except PermissionError:
        subprocess.run(["chmod", "-R", "u+rwx", str(path)], check=False)
        shutil.rmtree(path)


def library_files() -> list[Path]:
    """The text files of this Python's own library, in a fixed order, relative to it."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - {"__pycache__", "site-packages", "dist-packages"})
        for name in sorted(names):
            path = Path(directory, name)
            if path.suffix in {".py", ".txt", ".pyi", ".decTest", ".xml", ".json"} and path.stat().st_size <= MIB // 4:
                found.append(path.relative_to(root))
    return found


def _copy_library(count: int, place: Callable[[int, Path], Path]) -> dict[str, object]:
    """Copy `count` library files, over and over if there are fewer, to where `place` says; describe what was copied."""
    root, files = Path(sysconfig.get_path("stdlib")), library_files()
    digest, size = hashlib.sha256(), 0
    for number in range(count):
        name = files[number % len(files)]
        data = (root / name).read_bytes()
        target = place(number, Path(f"copy{number // len(files)}") / name)
        _write(target, data)
        digest.update(os.fsencode(name) + b"\0" + data)
        size += len(data)
    return {"files": count, "bytes": size, "sha256": digest.hexdigest()}


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o644)
    os.utime(path, (WHEN, WHEN))


def _tree(stage: Stage) -> dict[str, object]:
    top, base = stage.lowers
    return _copy_library(
        stage.sizes.tree_files, lambda number, name: (base if number % TOP_EVERY else top) / "tree" / name
    )


def _pylib(stage: Stage) -> dict[str, object]:
    """The library as a program imports it: the modules that need no C code of their own, compiled."""
    root, base = Path(sysconfig.get_path("stdlib")), stage.lowers[-1] / "pylib"
    names = [name for name in library_files() if name.suffix == ".py" and not {"test", "tests"} & set(name.parts)]
    for name in names:
        _write(base / name, (root / name).read_bytes())
    command = [python(), "-I", "-m", "compileall", "-q", str(base)]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"files": 2 * len(names)}


def python() -> str:
    """The Python that workloads are written in: the one below any virtual environment."""
    return os.path.realpath(sys.executable)


def _data(path: Path, mib: int) -> dict[str, object]:
    """A file of real, incompressible data without holes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = random.Random(path.name)
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(source.randbytes(MIB))
    return {"bytes": mib * MIB}


def _names(directory: Path, count: int) -> None:
    directory.mkdir(parents=True)
    for number in range(count):
        os.close(os.open(directory / f"name-{number:07}", os.O_CREAT | os.O_WRONLY, 0o644))


def _many(stage: Stage) -> dict[str, object]:
    _names(stage.lowers[-1] / "many", stage.sizes.names)
    return {"files": stage.sizes.names}


def _walk(stage: Stage) -> dict[str, object]:
    each = 1000
    for number in range(stage.sizes.walk_inodes // each):
        _names(stage.lowers[-1] / f"walk/{number:04}", each)
    return {"files": stage.sizes.walk_inodes}


def _one(stage: Stage) -> dict[str, object]:
    _write(stage.lowers[-1] / "one", b"one\n")
    return {"files": 1}


def _archive(stage: Stage) -> dict[str, object]:
    """A tar of as many files as the tree has, owned by root."""
    unpacked = stage.base / "unpacked"
    described = _copy_library(stage.sizes.tree_files, lambda _, name: unpacked / name)
    with tarfile.open(stage.source / "tree.tar", "w") as tar:
        for path in sorted(unpacked.rglob("*")):
            tar.add(path, path.relative_to(unpacked), recursive=False)
    remove(unpacked)
    return described


def _volume(stage: Stage) -> dict[str, object]:
    """What a volume holds at first (`volumes`), as a directory of the lower layer."""
    stage.need("archive")
    volume = stage.lowers[-1] / "volume"
    described = _data(volume / "data", stage.sizes.random_mib)
    (volume / "tree").mkdir()
    subprocess.run(["tar", "-x", "-f", str(stage.source / "tree.tar"), "-C", str(volume / "tree")], check=True)
    return described


def _image(stage: Stage) -> dict[str, object]:
    """A tar of a root in which busybox works; it has the files of the archive, as a package that is installed."""
    stage.need("archive")
    root = stage.base / "image"
    for name in ("bin", "dev", "etc", "proc", "run", "source", "sys", "tmp", "usr/lib/package"):
        (root / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", root / "bin/busybox")
    for name in ("sh", "true", "cat", "cp", "echo", "mkdir", "mv", "rm", "seq", "tail", "tar"):
        (root / "bin" / name).symlink_to("busybox")
    _write(root / "usr/lib/database", b"".join(b"package %d\n" % number for number in range(5000)))
    owned = ("--numeric-owner", "--owner=0", "--group=0")
    for words in (
        ("-x", "-f", str(stage.source / "tree.tar"), "-C", str(root / "usr/lib/package")),
        ("-c", "-f", str(stage.source / "image.tar"), *owned, "-C", str(root), "."),
    ):
        subprocess.run(["tar", *words], check=True)
    remove(root)
    return stage.described["archive"]


def _repository(stage: Stage) -> dict[str, object]:
    """A bare git repository with two commits."""
    work = stage.base / "repository"
    described = _copy_library(stage.sizes.repository_files, lambda _, name: work / name)
    identity = ("-c", "user.name=compare", "-c", "user.email=compare@localhost")
    for words in (
        ("init", "-q", "-b", "main"),
        ("add", "-A"),
        (*identity, "commit", "-q", "-m", "library"),
        ("clone", "-q", "--bare", ".", str(stage.source / "repository.git")),
    ):
        subprocess.run(["git", *words], cwd=work, check=True, env=os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null"})
    remove(work)
    return described


_MAKERS: dict[str, Callable[[Stage], dict[str, object]]] = {
    "tree": _tree,
    "pylib": _pylib,
    "read": lambda stage: _data(stage.lowers[-1] / "read/data", stage.sizes.read_mib),
    "huge": lambda stage: _data(stage.lowers[-1] / "huge/data", stage.sizes.huge_mib),
    "many": _many,
    "walk": _walk,
    "one": _one,
    "volume": _volume,
    "archive": _archive,
    "image": _image,
    "repository": _repository,
}
IN_SOURCE: Set[str] = {"archive", "image", "repository"}
"""Parts that lie in no layer."""
