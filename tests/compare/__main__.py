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

from tests.compare import machine, namespace, report
from tests.compare.bench import Bench
from tests.compare.chart import chart
from tests.compare.processes import last_line
from tests.compare.report import Comparison
from tests.compare.show import Show
from tests.compare.stage import QUICK, Sizes, Stage
from tests.compare.subjects import clear
from tests.compare.suites import SUITES, Chosen, Refused, choose

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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
  scripts/compare --only volumes                bind paths beside the host directory, and beside copy-up
  scripts/compare --only podman                 podman over unionfs-overlay, fuse-overlayfs and the kernel's overlayfs
  scripts/compare --fs xfs                      copies are reflinks there; overlayfs uses them too
  scripts/compare --dir /srv                    on that directory's own file system

What is measured: each sample has a new, empty upper layer over the same two lower layers, and a fresh mount. All lies on one
new file system (a loop device), so that nobody else's writes are waited for. "cold": the kernel's caches were emptied just
before; "warm": the same work again, directly afterwards. The time is that of the programs from start to end; where a program's
own start would be a good part of it (fio, SQLite, stat) it is what the program says. The file system is synced before each
timed run and not within it; a workload called "fsync" pays for that in its time.

The table shows medians, and the ratio of unionfs to others: below 1 unionfs is faster. Red: slower than this project's own goal.
Only root can empty caches: without, cold runs are left out. Memory is the daemon's; what the kernel caches for it is not in it.
For numbers that count, leave the machine alone meanwhile. All takes about half an hour, on a quiet machine with two cores.
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
    add("--full", action="store_true", help="also the workloads that take long (memory of the daemon, podman)")
    add("--json", type=Path, metavar="FILE", help="write every single value, versions and options")
    add("--chart", type=Path, metavar="FILE.svg", help="draw the ratios")
    add("--markdown", action="store_true", help="print the table in Markdown, on standard output")
    add(
        "--dir",
        type=Path,
        metavar="DIR",
        help="put everything in a new directory there; 6 GiB free (default: /var/tmp)",
    )
    add(
        "--fs",
        choices=("ext4", "xfs", "btrfs", "none"),
        help="on a fresh file system in a file there; none: on that directory's own (default: ext4, with --dir none)",
    )
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
    if os.geteuid() and not arguments.rootless:
        return _refuse("mounting overlayfs needs root: run this as root, or with --rootless")
    if arguments.rootless and arguments.fs not in {None, "none"}:
        return _refuse("--fs needs a loop device, which --rootless can't have: leave one of them out")
    if arguments.fs is None and not (arguments.rootless or arguments.dir):
        arguments.fs = "ext4"
    if arguments.fs == "none":
        arguments.fs = None
    if arguments.chart and arguments.chart.suffix != ".svg":
        return _refuse(f"--chart {arguments.chart}: the chart is an SVG file, its name must end in .svg")
    if not namespace.inside():
        namespace.enter(sys.argv[1:] if words is None else words, rootless=arguments.rootless)
    for number in INTERRUPTS:
        signal.signal(number, _interrupt)
    try:
        with _stage(arguments) as stage:
            return _compare(arguments, stage)
    except Refused as refused:
        return _refuse(str(refused))


def _refuse(why: str) -> int:
    print(f"compare: {why}", file=sys.stderr)
    return 2


def _interrupt(_number: int, _frame: object) -> None:
    """The first interrupt ends the rounds; a second one must not leave mounts behind."""
    _ignore_interrupts()
    raise KeyboardInterrupt


def _ignore_interrupts() -> None:
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


def _list() -> None:
    for suite in SUITES:
        print(f"{suite.title.lower()}, subjects:")
        for kind in suite.subjects:
            print(f"  {kind.kind:21} {(kind.__doc__ or '').splitlines()[0]}")
        print(f"{suite.title.lower()}, workloads (name, group):")
        for workload in suite.workloads(Sizes()):
            slow = "  (only with --full, or by name)" if workload.full or suite.full else ""
            print(f"  {workload.name:16} {workload.group:10} {workload.title}{slow}")


@contextmanager
def _stage(arguments: argparse.Namespace) -> Iterator[Stage]:
    """The directory of this run, on a file system of its own where that was asked for; gone afterwards, with all mounts."""
    parent = (arguments.dir or Path("/var/tmp")).resolve()
    if not parent.is_dir():
        raise Refused(f"--dir {parent}: no such directory")
    if namespace.inside():
        namespace.let_go([parent, Path.cwd(), Path(__file__).resolve(), Path(sys.executable).resolve()])
    room = QUICK_ROOM if arguments.quick else ROOM
    if shutil.disk_usage(parent).free < room:
        raise Refused(f"{parent} has less than {room >> 30} GiB free: name another place with --dir")
    base = Path(tempfile.mkdtemp(prefix="unionfs-compare-", dir=parent))
    try:
        if arguments.fs:
            _new_file_system(base, arguments.fs, 2 * room)
        yield Stage(base / "stage", QUICK if arguments.quick else Sizes())
    finally:
        _ignore_interrupts()
        clear(base)


def _new_file_system(base: Path, kind: str, size: int) -> None:
    """Make a file system in a file and mount it as the stage."""
    image, stage = base / "image", base / "stage"
    image.touch()
    os.truncate(image, size)
    stage.mkdir()
    # ext4 otherwise goes on initialising itself in the background.
    options = "loop,noinit_itable" if kind == "ext4" else "loop"
    make = [f"mkfs.{kind}", "-q", *(["-i", "8192"] if kind == "ext4" else []), str(image)]
    for command in (make, ["mount", "-o", options, str(image), str(stage)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Refused(f"--fs {kind}: {command[0]}: {last_line(done.stderr)}; --fs none does without")


def _compare(arguments: argparse.Namespace, stage: Stage) -> int:
    """Measure what was asked for and report it; returns the exit status."""
    console = Console(stderr=True, highlight=False)
    chosen = choose(stage, arguments.subjects, arguments.only, full=arguments.full, rootless=arguments.rootless)
    cold = machine.can_drop_caches()
    notes = [f"left out: {line}" for each in chosen for line in each.left_out]
    chosen = [each for each in chosen if each.is_left]
    notes += [] if cold else ["left out: cold runs; only root may empty the kernel's caches"]
    for line in notes:
        console.print(line)
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    started = datetime.datetime.now(datetime.UTC)
    with Show(console) as show:
        benches = [Bench(stage, [*each.subjects], each.workloads, cold=cold, advance=show.advance) for each in chosen]
        show.total(rounds * sum(bench.samples() for bench in benches))
        loads = _rounds(benches, rounds, show)
    comparisons = [_comparison(each, bench, len(loads)) for each, bench in zip(chosen, benches, strict=True)]
    about = {
        "format": 1,
        "date": started.isoformat(timespec="seconds"),
        "rounds": rounds,
        "complete": len(loads) == rounds,
        "machine": machine.facts(stage.base),
        "versions": {subject.name: version for each in chosen for subject, version in each.subjects.items()},
        "commands": {subject.name: subject.shown() for each in chosen for subject in each.subjects},
        "programs": machine.programs(),
        "options": {name: getattr(arguments, name) for name in ("rootless", "quick", "full", "fs", "only")},
        "left_out": notes,
        "sizes": vars(stage.sizes),
        "content": stage.described,
        "load": loads,
    }
    _write(arguments, about, comparisons)
    return 0 if len(loads) == rounds else 130


def _rounds(benches: Sequence[Bench], rounds: int, show: Show) -> list[float]:
    """Run the rounds; an interrupt ends them, and what was measured until then counts.

    Returns:
        The machine's load after each complete round.
    """
    loads: list[float] = []
    try:
        for number in range(rounds):
            for bench in benches:
                bench.round(number)
            loads.append(machine.load())
    except KeyboardInterrupt:
        show.say("interrupted; what follows is what was measured until now")
    return loads


def _comparison(chosen: Chosen, bench: Bench, rounds: int) -> Comparison:
    names = [subject.name for subject in chosen.subjects]
    title = f"{chosen.suite.title}: {'one round' if rounds == 1 else f'medians of {rounds} complete rounds'}"
    results = [result for result in bench.results.values() if result.values or result.failures]
    return Comparison(title, names, chosen.suite.pairs(names), results)


def _wide(console: Console) -> Console:
    """A console for the table: as wide as the terminal; where there is none, as wide as the table."""
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def _write(arguments: argparse.Namespace, about: dict[str, object], comparisons: Sequence[Comparison]) -> None:
    if arguments.json:
        whole = {**about, "comparisons": [report.as_json(each) for each in comparisons]}
        arguments.json.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    if arguments.chart:
        arguments.chart.write_text(chart(comparisons[0]))
    for each in comparisons:
        if arguments.markdown:
            print(report.markdown(each))
        else:
            report.terminal(each, _wide(Console()))


if __name__ == "__main__":
    sys.exit(main())
