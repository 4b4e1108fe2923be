"""Running checks one after the other, and the gate behind each: nothing may stay mounted, no daemon may stay."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.host.host import Host, LeftOut, Wrong
from tests.host.report import Outcome, Report, Verdict
from tests.support.mounts import mounted_below, wait_gone

END_SECONDS = 60.0
"""How long a daemon may take to end behind its unmount."""

Function = Callable[[Host, Path], str]


@dataclass(frozen=True)
class Check:
    """A check: `name` for the command line and JUnit, `title` for people; `first`: without it no other can run."""

    name: str
    title: str
    function: Function
    first: bool = False


def run_checks(host: Host, checks: Sequence[Check], report: Report) -> None:
    """Run `checks` in their order. After a failure of one that others stand on, those are left out."""
    broken = ""
    for check in checks:
        if broken:
            report.add(Outcome(check.name, check.title, "left out", 0.0, f"{broken} failed"))
            continue
        outcome = _run(host, check)
        report.add(outcome)
        if check.first and outcome.verdict == "FAILED":
            broken = check.name


def _run(host: Host, check: Check) -> Outcome:
    room = host.room(f"room-{check.name}")
    start = time.monotonic()
    verdict: Verdict = "ok"
    try:
        text = check.function(host, room)
    except LeftOut as reason:
        verdict, text = "left out", str(reason)
    except (Wrong, AssertionError) as error:
        verdict, text = "FAILED", _said(error)
    except Exception:
        verdict, text = "FAILED", traceback.format_exc()
        text = f"{text.strip().splitlines()[-1]}\n{text}"
    left = _left_behind(room)
    if left and verdict != "FAILED":
        verdict, text = "FAILED", left
    subprocess.run(["rm", "-rf", "--one-file-system", str(room)], check=False)
    return Outcome(check.name, check.title, verdict, time.monotonic() - start, text.strip())


def _said(error: BaseException) -> str:
    """What failed first: cleaning up after it may have failed, too."""
    while isinstance(error.__context__, Wrong | AssertionError):
        error = error.__context__
    return str(error)


def _left_behind(room: Path) -> str:
    """Take away what a check left mounted or running, and say what it was; empty if it left nothing."""
    mounts = mounted_below(room)
    for point in reversed(mounts):
        subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False)
    daemons = [pid for pid in _naming(room) if not wait_gone(pid, END_SECONDS)]
    for pid in daemons:
        os.kill(pid, signal.SIGKILL)
    if mounts or daemons:
        return f"left behind: mounts {[str(point) for point in mounts]}, processes {daemons}"
    return ""


def _naming(room: Path) -> list[int]:
    """Processes that were given `room` or something below it."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(room) + b"/" in words:
                found.append(int(entry))
    return found


def copy_checks(host: Host, tests: Path) -> None:
    """Copy our tests to where the installed Python finds them, and no unionfs beside them."""
    shutil.copytree(tests, host.checks / "tests", ignore=shutil.ignore_patterns("__pycache__"))
