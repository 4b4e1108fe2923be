"""The command line of the comparison."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.compare import machine, report
from tests.compare.bench import Bench
from tests.compare.chart import chart
from tests.compare.report import Comparison
from tests.compare.stage import QUICK, Sizes, Stage
from tests.compare.subjects import SUBJECTS, Subject, Unavailable, clear, named
from tests.compare.workloads import Workload, workloads

INSIDE = "UNIONFS_COMPARE_INSIDE"
"""Set in the process that --rootless starts in a user namespace."""
ROOM = 6 << 30
QUICK_ROOM = 1 << 30
FILE_WIDTH = 150

ABOUT = """\
Compare the speed of this union file system with kernel overlayfs, fuse-overlayfs, unionfs-fuse and the bare file system,
where they are installed: the same programs over the same files, one subject directly after the other, several rounds.
"""
MORE = """\
examples:
  scripts/compare --quick                       does everything work here? small data, one round: the times mean little
  scripts/compare --only find,tar,stat          three workloads
  scripts/compare --json now.json --chart now.svg
  scripts/compare --subjects overlayfs,unionfs,unionfs+native=off    options after a + are given to the mount
  scripts/compare --rootless                    as root of a user namespace: overlayfs with userxattr, no passthrough
  scripts/compare --fs xfs                      on a fresh file system of that type (a loop device), not on the disk itself

What is measured: each sample has a new, empty upper layer over the same two lower layers, and a fresh mount. "cold": the
kernel's caches were emptied just before; "warm": the same work again, directly afterwards. The time is that of the programs from
start to end; where a program's own start would be a good part of it (fio, SQLite, stat) it is what the program says. File systems
are synced before each timed run and not within it; a workload called "fsync" pays for that in its time.

The table shows medians, and the ratio of unionfs to others: below 1 unionfs is faster. Red: slower than this project's own goal.
Only root can empty caches: without, cold runs are left out. For numbers that count, leave the machine alone meanwhile.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "scripts/compare", description=ABOUT, epilog=MORE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--rounds", type=int, metavar="N", help="samples of each workload on each subject (default: 5; with --quick 1)")
    add("--only", type=_names, metavar="NAME,...", help="these workloads or groups; --list has their names")
    add("--subjects", type=_names, metavar="NAME,...", help="these subjects, options after +; default: all")
    add("--quick", action="store_true", help="small data and one round, to see that all works")
    add("--full", action="store_true", help="also the workloads that take long (memory of the daemon)")
    add("--json", type=Path, metavar="FILE", help="write every single value, versions and options")
    add("--chart", type=Path, metavar="FILE.svg", help="draw the ratios")
    add("--markdown", action="store_true", help="print the table in Markdown, on standard output")
    add(
        "--dir",
        type=Path,
        metavar="DIR",
        help="make the layers in a new directory there (default: /var/tmp; 6 GiB free)",
    )
    add("--fs", choices=("ext4", "xfs", "btrfs"), help="make them on a fresh file system in a file there")
    add("--rootless", action="store_true", help="in a user namespace, as an ordinary user has it")
    add("--list", action="store_true", help="list subjects and workloads")
    return made


def _names(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main(words: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    arguments = parser().parse_args(words)
    if arguments.list:
        _list()
        return 0
    if arguments.rootless and not os.environ.get(INSIDE):
        return _in_user_namespace(words)
    if os.geteuid() and not arguments.rootless:
        return _refuse("mounting overlayfs needs root: run this as root, or with --rootless")
    if arguments.rootless and arguments.fs:
        return _refuse("--fs needs a loop device, which --rootless can't have: leave one of them out")
    if arguments.chart and arguments.chart.suffix != ".svg":
        return _refuse(f"--chart {arguments.chart}: the chart is an SVG file, its name must end in .svg")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with _stage(arguments) as stage:
            return _compare(arguments, stage)
    except Refused as refused:
        return _refuse(str(refused))


class Refused(Exception):
    """The comparison can't be run as it was asked for; one line says why."""


def _refuse(why: str) -> int:
    print(f"compare: {why}", file=sys.stderr)
    return 2


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _list() -> None:
    print("subjects:")
    for kind in SUBJECTS:
        print(f"  {kind.kind:16} {(kind.__doc__ or '').splitlines()[0]}")
    print("workloads:")
    for workload in workloads(Sizes()):
        slow = "  (only with --full, or by name)" if workload.full else ""
        print(f"  {workload.name:16} {workload.group:10} {workload.title}{slow}")


def _in_user_namespace(words: Sequence[str] | None) -> int:
    command = ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"]
    command += [sys.executable, "-m", "tests.compare", *(sys.argv[1:] if words is None else words)]
    # The signals of the terminal go to both; this process waits for the other to clean up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return subprocess.run(
        command, env=os.environ | {INSIDE: "1"}, check=False, preexec_fn=_default_interrupt
    ).returncode


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _stage(arguments: argparse.Namespace) -> Iterator[Stage]:
    """The directory of this run, on a file system of its own with --fs; gone afterwards, with all mounts in it."""
    parent = (arguments.dir or Path("/var/tmp")).resolve()
    if not parent.is_dir():
        raise Refused(f"--dir {parent}: no such directory")
    room = QUICK_ROOM if arguments.quick else ROOM
    if shutil.disk_usage(parent).free < room:
        raise Refused(f"{parent} has less than {room >> 30} GiB free: name another place with --dir")
    base = Path(tempfile.mkdtemp(prefix="unionfs-compare-", dir=parent))
    try:
        if arguments.fs:
            _new_file_system(base, arguments.fs, room)
        yield Stage(base / "stage", QUICK if arguments.quick else Sizes())
    finally:
        # A second interrupt must not leave mounts behind.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        clear(base)


def _new_file_system(base: Path, kind: str, size: int) -> None:
    image = base / "image"
    image.touch()
    os.truncate(image, 2 * size)
    (base / "stage").mkdir()
    for command in ([f"mkfs.{kind}", "-q", str(image)], ["mount", "-o", "loop", str(image), str(base / "stage")]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Refused(f"--fs {kind}: {command[0]}: {done.stderr.strip().splitlines()[-1]}")


def _subjects(arguments: argparse.Namespace, stage: Stage, console: Console) -> dict[Subject, str]:
    """The subjects to measure with their versions; those that are not to be had are named and left out."""
    found: dict[Subject, str] = {}
    for name in arguments.subjects or [kind.kind for kind in SUBJECTS]:
        try:
            subject = named(name, stage, rootless=arguments.rootless)
            found[subject] = subject.version()
        except KeyError:
            raise Refused(f"no subject is called {name!r}; --list has their names") from None
        except Unavailable as why:
            console.print(f"{name}: left out: {why}", highlight=False)
    if not found:
        raise Refused("none of the subjects is to be had")
    return found


def _workloads(arguments: argparse.Namespace, sizes: Sizes, console: Console) -> list[Workload]:
    everything = workloads(sizes)
    wanted = arguments.only or [each.name for each in everything if arguments.full or not each.full]
    if unknown := set(wanted) - {each.name for each in everything} - {each.group for each in everything}:
        raise Refused(f"no workload or group is called {min(unknown)!r}; --list has their names")
    chosen = []
    for each in everything:
        if each.name in wanted or (each.group in wanted and not each.full):
            if each.missing():
                console.print(f"{each.name}: left out: {each.missing()}", highlight=False)
            else:
                chosen.append(each)
    return chosen


def _compare(arguments: argparse.Namespace, stage: Stage) -> int:
    console = Console(stderr=True)
    subjects = _subjects(arguments, stage, console)
    chosen = _workloads(arguments, stage.sizes, console)
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    cold = machine.can_drop_caches()
    if not cold:
        console.print("cold runs are left out: only root may empty the kernel's caches", highlight=False)
    started = datetime.datetime.now(datetime.UTC)
    names = [subject.name for subject in subjects]
    with _progress(console) as progress:
        task = progress.add_task("", total=None)
        bench = Bench(stage, list(subjects), chosen, cold=cold, advance=lambda text: _advance(progress, task, text))
        progress.update(task, total=rounds * bench.samples())
        finished = _rounds(bench, rounds, progress, task)
    comparison = Comparison(
        f"medians of {finished} rounds" if finished > 1 else "one round",
        names,
        next((name for name in names if name.startswith("unionfs") and not name.startswith("unionfs-fuse")), None),
        [name for name in ("overlayfs", "fuse-overlayfs") if name in names],
        list(bench.results.values()),
    )
    about = {
        "format": 1,
        "date": started.isoformat(timespec="seconds"),
        "rounds": rounds,
        "complete": finished == rounds,
        "machine": machine.facts(stage.base),
        "versions": {subject.name: version for subject, version in subjects.items()},
        "options": {"rootless": arguments.rootless, "quick": arguments.quick, "fs": arguments.fs},
        "sizes": vars(stage.sizes),
        "content": stage.described,
        "load": bench.loads,
    }
    _write(arguments, about, comparison, console)
    return 0 if finished == rounds else 130


def _rounds(bench: Bench, rounds: int, progress: Progress, task: object) -> int:
    """Run the rounds; an interrupt ends them, and what was measured until then counts. Returns how many were complete."""
    for number in range(rounds):
        try:
            bench.round(number)
        except KeyboardInterrupt:
            progress.console.print("interrupted: what follows is what was measured until now")
            return number
    return rounds


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.description}"), console=console, disable=not console.is_terminal)


def _advance(progress: Progress, task: object, text: str) -> None:
    progress.update(task, description=text)  # type: ignore[arg-type]


def _wide(console: Console) -> Console:
    """A console for the table: as wide as the terminal; where there is none, as wide as the table."""
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def _write(arguments: argparse.Namespace, about: dict[str, object], comparison: Comparison, console: Console) -> None:
    if arguments.json:
        whole = {**about, "comparisons": [report.as_json(comparison)]}
        arguments.json.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    if arguments.chart:
        arguments.chart.write_text(chart(comparison))
    if arguments.markdown:
        print(report.markdown(comparison), end="")
    else:
        report.terminal(comparison, _wide(Console()))


if __name__ == "__main__":
    sys.exit(main())
