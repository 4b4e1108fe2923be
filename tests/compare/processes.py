"""Running programs, timed or not, and the processes that stay behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

ACTION_SECONDS = 600.0
"""Longest time that a timed action may take."""


class Failed(Exception):
    """A program ended badly or took too long; the text is the reason in one line."""


def run(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None, seconds: float = ACTION_SECONDS
) -> tuple[float, str]:
    """Run `command` to its end as a process group of its own.

    Returns:
        Its wall-clock time in seconds, and what it printed.

    Raises:
        Failed: it ended with another status than 0, or not within `seconds`; then the whole group is killed.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            # Not Popen.wait: given a timeout, it looks now and then, and would round the times.
            left = wait_gone([process.pid], seconds)
            taken = time.perf_counter() - start
            if left:
                raise Failed(f"took longer than {seconds:.0f} s")
        except BaseException:
            _kill_group(process)
            raise
        if status := process.wait():
            raise Failed(last_line(_text(err)) or f"exit status {status}")
        return taken, _text(out)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and its children; one that hangs in a dead mount is left to end when that is unmounted."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def last_line(text: str) -> str:
    """The last line of `text` that is not empty: where programs put their error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def naming(path: Path) -> list[int]:
    """The processes of this mount namespace that were given `path`, or something below it: the daemons of a mount there."""
    found = []
    own = os.readlink("/proc/self/ns/mnt")
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with suppress(OSError):
                given = os.fsencode(path) in Path(f"/proc/{entry}/cmdline").read_bytes()
                if given and os.readlink(f"/proc/{entry}/ns/mnt") == own:
                    found.append(int(entry))
    return found


def wait_gone(pids: Sequence[int], seconds: float) -> list[int]:
    """Wait until all of `pids` have ended, together at most `seconds`; return those that have not."""
    deadline = time.monotonic() + seconds
    left = []
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                left.append(pid)
        finally:
            os.close(descriptor)
    return left


def end(pids: Sequence[int]) -> None:
    """End processes that should have ended by themselves: ask, then kill."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        pids = wait_gone(pids, 5)
        if not pids:
            return
