"""A long run of fio on a union, in which every byte that is read is checked.

Each round has a fresh union. Its lower layer holds files that fio wrote with its own checksums in every block; copies of
them, hidden below other names, are only read. In the mount fio's jobs work on all of it at once: they read what is in
the lower layer, overwrite lower files (which are copied up in the middle of it) and new ones through plain system
calls, shared mappings, O_DIRECT and io_uring, and verify what they wrote. Beside them stand readers that opened and
mapped the files before, and the kernel's caches are dropped now and then. At the end of the round

- the old descriptors, the old mappings, new descriptors and upper must agree about each file,
- fio verifies all files again through kernel overlayfs on the same layers, once the union is unmounted,
- the lower layer must be what it was.

The modes (passthrough, the daemon's own data path, an old kernel, plain pyfuse3) take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.support.filesystems import have_own_mounts
from tests.support.repeating import repeating

MIB = 1 << 20
COMMAND_SECONDS = 600.0
MODES = ("passthrough=on", "passthrough=off", "old kernel", "native=off")

# Of the lower files, by name: size in MiB, and how they are overwritten: (engine, direct, block size).
FILES = {
    "small": (0.25, None),
    "plain": (6.0, ("psync", 0, "4k")),
    "mapped": (4.0, ("mmap", 0, "4k")),
    "direct": (6.0, ("libaio", 1, "4k")),
    "big": (40.0, ("psync", 0, "16k")),
    "big-mapped": (24.0, ("mmap", 0, "8k")),
    "big-direct": (40.0, ("libaio", 1, "16k")),
    "ring": (8.0, ("io_uring", 0, "4k")),
}
NEW = {
    "new": (8.0, ("psync", 0, "32k")),
    "new-direct": (8.0, ("libaio", 1, "8k")),
    "new-mapped": (4.0, ("mmap", 0, "4k")),
}


class Wrong(Exception):
    """A byte was wrong, or something did not work; the text says what."""


@dataclass
class Tally:
    """What a mode has gone through."""

    rounds: int = 0
    verified: int = 0  # bytes that fio read and compared
    compared: int = 0  # bytes that old and new readers were compared by
    copied_up: int = 0
    seconds: float = 0.0


@dataclass
class Site:
    """The directories of a run."""

    base: Path
    scale: float
    lower: Path = field(init=False)
    upper: Path = field(init=False)
    work: Path = field(init=False)
    merged: Path = field(init=False)

    def __post_init__(self) -> None:
        self.lower, self.upper = self.base / "lower", self.base / "upper"
        self.work, self.merged = self.base / "work", self.base / "merged"
        for directory in (self.lower, self.merged):
            directory.mkdir()
        self.renew()

    def renew(self) -> None:
        """An empty upper layer."""
        for directory in (self.upper, self.work):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()

    def size(self, mebibytes: float) -> int:
        return max(256 << 10, int(mebibytes * self.scale * MIB) // (64 << 10) * (64 << 10))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if every byte was right, 1 if not, 2 where it can't be run."""
    options = _parse(arguments)
    console = Console(stderr=True)
    if missing := [program for program in ("fio", "mount") if not shutil.which(program)]:
        console.print(f"verify: {missing[0]} is missing: apt install {missing[0]}")
        return 2
    if os.geteuid() != 0:
        console.print("verify: it mounts file systems and drops caches: run it as root")
        return 2
    have_own_mounts()
    tallies = {mode: Tally() for mode in options.modes}
    error = ""
    with tempfile.TemporaryDirectory(prefix="unionfs-verify-", dir=options.dir) as base:
        site = Site(Path(base), options.scale)
        try:
            with console.status("writing the lower layer") as status:
                _fill_lower(site)
                end = time.monotonic() + options.minutes * 60
                while not all(tally.rounds for tally in tallies.values()) or time.monotonic() < end:
                    for mode, tally in tallies.items():
                        left = max(0.0, end - time.monotonic())
                        status.update(f"{mode}, round {tally.rounds + 1}; {left / 60:.1f} minutes left")
                        _round(site, mode, tally)
        except Wrong as wrong:
            error = str(wrong)
        finally:
            _detach(site.merged)
    _report(tallies, error, as_json=options.json)
    return 1 if error else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make verify", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10); at least a round per mode")
    parser.add_argument("--dir", default="/var/tmp", help="where the layers lie; 1 GiB free (default: /var/tmp)")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the files, as a factor (default: 1)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(arguments)


# -- fio --


def _job(name: str, size: int, how: tuple[str, int, str], *options: str) -> list[str]:
    engine, direct, block = how
    return [
        *(f"--name={name}", f"--filename={name}", f"--size={size}", f"--ioengine={engine}", f"--direct={direct}"),
        *(f"--bs={block}", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randrepeat=0", *options),
    ]


def _fio(directory: Path, jobs: Sequence[Sequence[str]]) -> int:
    """Run jobs at once; return how many bytes they read and verified. Raises Wrong."""
    command = ["fio", "--output-format=json", "--thread=0", *(word for job in jobs for word in job)]
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise Wrong(f"fio did not end within {COMMAND_SECONDS:.0f} s") from None
    if done.returncode:
        said = [
            line for line in (done.stderr + done.stdout).splitlines() if "verify" in line or "error" in line.lower()
        ]
        raise Wrong(f"fio: exit {done.returncode}: {' / '.join(said[:6])}")
    report = json.loads(done.stdout[done.stdout.index("{") :])
    failed = [job["jobname"] for job in report["jobs"] if job["error"]]
    if failed:
        raise Wrong(f"fio: errors in {', '.join(failed)}")
    return sum(int(job["read"]["io_bytes"]) for job in report["jobs"])


def _fill_lower(site: Site) -> None:
    for name, (mebibytes, _) in FILES.items():
        for file in (name, f"{name}.read"):
            _fio(site.lower, [_job(file, site.size(mebibytes), ("psync", 0, "4k"), "--rw=write", "--do_verify=0")])


def _work(site: Site) -> int:
    jobs = [
        _job(f"{name}.read", site.size(mebibytes), ("psync", 0, "4k"), "--rw=read")
        for name, (mebibytes, _) in FILES.items()
    ]
    for name, (mebibytes, how) in {**FILES, **NEW}.items():
        if how is not None:
            more = ("--fsync=64",) if name in ("plain", "new") else ()
            jobs.append(_job(name, site.size(mebibytes), how, "--rw=randwrite", *more))
    return _fio(site.merged, jobs)


def _verify_all(site: Site) -> int:
    """Have fio read what the round left, wherever it is mounted."""
    jobs = []
    for name, (mebibytes, how) in {**FILES, **NEW}.items():
        block = how[2] if how else "4k"
        jobs.append(_job(name, site.size(mebibytes), ("psync", 0, block), "--rw=read"))
    return _fio(site.merged, jobs)


# -- a round --


def _round(site: Site, mode: str, tally: Tally) -> None:
    start = time.monotonic()
    site.renew()
    before = _digests(site.lower)
    with _union(site, mode):
        with _old_readers(site) as readers, repeating(_drop_caches, 1.5):
            tally.verified += _work(site)
            tally.verified += _verify_all(site)
            for reader in readers:
                tally.compared += reader.compare(site)
        tally.copied_up += sum((site.upper / name).exists() for name in FILES)
    _compare_by_overlayfs(site, tally)
    if _digests(site.lower) != before:
        raise Wrong(f"{mode}: the lower layer has changed")
    tally.rounds += 1
    tally.seconds += time.monotonic() - start


@contextlib.contextmanager
def _union(site: Site, mode: str) -> Iterator[None]:
    environment = {**os.environ, "UNIONFS_OLD_KERNEL": "1" if mode == "old kernel" else ""}
    options = [] if mode == "old kernel" else ["-o", mode]
    layers = (str(site.lower), str(site.upper), str(site.merged))
    _ours(["mount", *options, "--work", str(site.work), *layers], environment)
    yield
    _ours(["umount", str(site.merged)], environment)


def _ours(words: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unionfs", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=180,
        check=False,
    )
    if done.returncode:
        raise Wrong(f"unionfs {words[0]}: {done.stderr.strip()}")


def _compare_by_overlayfs(site: Site, tally: Tally) -> None:
    options = f"lowerdir={site.lower},upperdir={site.upper},workdir={site.work},metacopy=on,redirect_dir=on,index=on"
    done = subprocess.run(
        ["mount", "-t", "overlay", "-o", options, "overlay", str(site.merged)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Wrong(f"kernel overlayfs doesn't mount the layers: {done.stderr.strip()}")
    try:
        tally.verified += _verify_all(site)
    finally:
        subprocess.run(["umount", str(site.merged)], check=True)


def _detach(point: Path) -> None:
    if os.path.ismount(point):
        subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False)


def _digests(directory: Path) -> dict[str, str]:
    found = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found


# -- readers from before --


@dataclass
class _Reader:
    """A descriptor and a mapping of a lower file from before its copy-up."""

    name: str
    descriptor: int
    view: mmap.mmap

    def compare(self, site: Site) -> int:
        """Compare them with a new descriptor and with upper; return the bytes compared. Raises Wrong."""
        size = os.fstat(self.descriptor).st_size
        now = (site.merged / self.name).read_bytes()
        for what, data in (
            ("an old descriptor", os.pread(self.descriptor, size + 1, 0)),
            ("an old mapping", self.view[:]),
            ("upper", (site.upper / self.name).read_bytes() if (site.upper / self.name).exists() else now),
        ):
            if data != now:
                at = next(at for at in range(min(len(data), len(now)) + 1) if data[at : at + 1] != now[at : at + 1])
                raise Wrong(f"{self.name}: {what} differs from a new descriptor at byte {at}")
        return 3 * len(now)

    def close(self) -> None:
        self.view.close()
        os.close(self.descriptor)


@contextlib.contextmanager
def _old_readers(site: Site) -> Iterator[list[_Reader]]:
    """Readers of every other file: a file that nobody reads may change to passthrough, one that is read may not."""
    readers: list[_Reader] = []
    try:
        for name in list(FILES)[1::2]:
            descriptor = os.open(site.merged / name, os.O_RDONLY)
            readers.append(_Reader(name, descriptor, mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)))
            os.pread(descriptor, MIB, 0)
        yield readers
    finally:
        for reader in readers:
            reader.close()


def _drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


# -- the result --


def _report(tallies: dict[str, Tally], error: str, *, as_json: bool) -> None:
    if as_json:
        result = {mode: vars(tally) for mode, tally in tallies.items()}
        print(json.dumps({"modes": result, "wrong": error or None}, indent=2))
        return
    table = Table(title="fio verify on a union")
    for heading in ("mode", "rounds", "minutes", "copy-ups", "GiB verified by fio", "GiB compared", "wrong bytes"):
        table.add_column(heading, justify="left" if heading == "mode" else "right", no_wrap=heading == "mode")
    for mode, tally in tallies.items():
        table.add_row(
            mode,
            *(str(tally.rounds), f"{tally.seconds / 60:.1f}", str(tally.copied_up)),
            *(
                f"{tally.verified / (1 << 30):.2f}",
                f"{tally.compared / (1 << 30):.2f}",
                "0" if not error else "see below",
            ),
        )
    console = Console()
    console.print(table)
    if error:
        console.print(f"wrong: {error}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
