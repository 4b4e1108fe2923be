"""The command line of scripts/integration.sh, and the order of the checks."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.host import install, oracle, people, speed, system, volumes, work
from tests.host.host import REPOSITORY, Host
from tests.host.report import Report
from tests.host.run import Check, copy_checks, run_checks
from tests.support.filesystems import disk_ground, remove_tree

CHECKS = (
    Check("build", "wheel and sdist built", install.build, first=True),
    Check("install", "wheel installed in a clean environment", install.install, first=True),
    Check("sdist", "sdist installed in a clean environment", install.sdist),
    Check("doctor", "unionfs doctor", work.doctor),
    Check("first-union", "a first union", work.first_union),
    Check("tar", "tar, in place of nothing and of lower files", work.tar),
    Check("git", "git on a lower repository", work.git),
    Check("make", "a build by make and gcc", work.compile_program),
    Check("sqlite", "SQLite on a lower database", work.sqlite),
    Check("big-file", "a big file changed while it is read", work.large_file),
    Check("file-systems", "layers on other file systems", work.on_file_systems),
    Check("table", "POSIX behaviours beside this kernel's overlayfs", oracle.table),
    Check("exchange", "layers exchanged with this kernel's overlayfs", oracle.exchange),
    Check("upper-moves", "an upper moved, mounted by overlayfs", oracle.upper_moves),
    Check("binds", "host directories as volumes", volumes.binds),
    Check("volumes", "named volumes", volumes.named),
    Check("user", "an ordinary user through fusermount3", people.by_fusermount),
    Check("namespace", "root of a user namespace", people.in_a_namespace),
    Check("fstab", "mount(8) by an fstab", system.fstab),
    Check("errors", "errors and exit statuses", system.errors),
    Check("real-fstab", "/etc/fstab and systemd", system.real_fstab),
    Check("service", "systemd service template", system.service),
    Check("speed", "speed beside overlayfs", speed.speed),
)
QUICK_LEAVES_OUT = {"sdist", "upper-moves", "namespace", "file-systems"}

ABOUT = """\
Check unionfs on this host: build and install it, work in its mounts, compare with the host's own overlayfs. Needs root and
changes nothing outside of its own directory. Each check gives a line; the exit status is 0 if none failed.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("scripts/integration.sh", description=ABOUT)
    add = made.add_argument
    add(
        "--results",
        type=Path,
        metavar="DIR",
        help="write junit.xml and results.json there (default: build/integration)",
    )
    add("--wheel", type=Path, metavar="FILE", help="check this wheel; default: build wheel and sdist")
    add("--wheelhouse", type=Path, metavar="DIR", help="take what unionfs needs from there, not from a package index")
    add("--offline", action="store_true", help="install no system packages")
    add("--only", type=lambda text: text.split(","), metavar="NAME,...", help="these checks; --list has their names")
    add("--quick", action="store_true", help="a short run: some checks are left out, the others do less")
    add("--system", action="store_true", help="use the host's own fstab and systemd too, for a moment")
    add("--emulated", action="store_true", help="this processor is emulated: the speed table is that of --quick")
    add("--dir", type=Path, metavar="DIR", help="work there; a disk that takes trusted xattrs (default: /var/tmp)")
    add("--list", action="store_true", help="list the checks")
    return made


def chosen(only: Sequence[str] | None, *, quick: bool) -> list[Check]:
    """The checks to run; those that others stand on always are. Raises SystemExit for an unknown name."""
    unknown = set(only or ()) - {check.name for check in CHECKS}
    if unknown:
        parser().error(f"no check is called {', '.join(sorted(unknown))}; --list has their names")
    if only:
        return [check for check in CHECKS if check.first or check.name in only]
    return [check for check in CHECKS if not (quick and check.name in QUICK_LEAVES_OUT)]


def main(words: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit status."""
    arguments = parser().parse_args(words)
    if arguments.list:
        print("\n".join(f"{check.name:14} {check.title}" for check in CHECKS))
        return 0
    if os.geteuid():
        parser().error("mounting needs root")
    checks = chosen(arguments.only, quick=arguments.quick)
    if arguments.dir:
        os.environ["UNIONFS_TEST_DIR"] = str(arguments.dir.resolve())
    os.umask(0o022)
    os.environ.pop("PYTHONPATH", None)  # it leads to the checkout; what is installed is what counts
    found = facts()
    print(f"unionfs integration on {found['system']}, Linux {found['kernel']}", flush=True)
    report = Report(found)
    with disk_ground() as ground:
        try:
            run_checks(_host(arguments, ground, found), checks, report)
        finally:
            _take_away(ground)
    results = arguments.results or REPOSITORY / "build/integration"
    report.write(results)
    print(f"{report.summary()}; {results / 'junit.xml'}, {results / 'results.json'}")
    return 0 if report.good else 1


def _host(arguments: argparse.Namespace, ground: Path, found: dict[str, object]) -> Host:
    wheel = arguments.wheel.resolve() if arguments.wheel else None
    wheelhouse = arguments.wheelhouse.resolve() if arguments.wheelhouse else None
    host = Host(
        *(ground, sys.executable, wheel, wheelhouse),
        quick=arguments.quick,
        system=arguments.system,
        emulated=arguments.emulated,
        facts=found,
    )
    copy_checks(host, REPOSITORY / "tests")
    return host


def _take_away(ground: Path) -> None:
    for path in ground.iterdir():
        remove_tree(path)


def facts() -> dict[str, object]:
    """What is known of this host before anything is installed."""
    system = "unknown system"
    with suppress(OSError):
        system = platform.freedesktop_os_release().get("PRETTY_NAME", system)
    return {
        "system": system,
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    sys.exit(main())
