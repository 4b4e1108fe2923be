"""Run the table of behaviours on stacks of the given kinds, without privilege; print the outcomes as one line of JSON.

    python -m tests.support.rootless KIND [KIND...] DIRECTORY

A process of its own, for namespaces and other users; see tests/mount/test_rootless.py. UFS_PRIVILEGED=1: it is run by root,
and tries what needs privilege, too. UFS_PLACES: where the seeds lie.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from tests.mount.posix import BEHAVIOURS, Behaviour
from tests.mount.posix.table import close_below, plant, touch_all
from tests.support.layers import build
from tests.support.mounts import Kind, Stack

PLACES = os.environ.get("UFS_PLACES", "lower upper touched").split()
PRIVILEGED = bool(os.environ.get("UFS_PRIVILEGED"))


def usable(line: Behaviour) -> bool:
    """Whether a behaviour can be tried with the privilege at hand."""
    return PRIVILEGED or not line.privileged


def attempt(line: Behaviour, place: str, directory: Path) -> str:
    """Run one behaviour; "" where it held, else the end of the story."""
    try:
        if place == "upper":
            build(directory, line.seed)
        elif place == "touched":
            touch_all(directory)
        line.check(directory)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        close_below(directory)
        return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno}: {where.line})"
    return ""


def can_be_planted(line: Behaviour, lower: Path) -> bool:
    """Plant one seed; False where that needs more privilege (ACLs naming users that the namespace doesn't map)."""
    try:
        plant(lower, [line])
    except OSError:
        return False
    return True


def run_kind(kind: Kind, base: Path) -> dict[str, str]:
    """Run the table from all three places on one kind of stack."""
    found: dict[str, str] = {}
    lines = [line for line in BEHAVIOURS.values() if usable(line)]
    for place in PLACES:
        stack = Stack.make(
            kind, base / f"{kind}-{place}", options="userxattr" if kind == "overlay" and not PRIVILEGED else ""
        )
        planted = [line for line in lines if place == "upper" or can_be_planted(line, stack.below)]
        stack.mount()
        try:
            for line in planted:
                if f"{kind}-{place}" in line.unlike:
                    continue
                found[f"{place} {line.name}"] = attempt(line, place, stack.inside / line.name)
        finally:
            umount(stack)
        bad = stack.bad_log_lines()
        if bad:
            found[f"{place} log"] = "\n".join(bad)
    return found


def outcomes(text: str) -> dict[str, dict[str, str]]:
    """The lines of output of one or several runs together: kind → behaviour → "" or what went wrong."""
    found: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


def worse_than(found: dict[str, dict[str, str]], oracle: str, ours: str = "union") -> list[str]:
    """What ours could not do and the oracle could."""
    return [f"{name}: {said}" for name, said in found[ours].items() if said and not found[oracle].get(name, "")]


def umount(stack: Stack) -> None:
    """Unmount as the user: umount(2) where that is allowed, else by fusermount3."""
    try:
        stack.umount()
    except PermissionError:
        os.spawnlp(os.P_WAIT, "fusermount3", "fusermount3", "-u", str(stack.mnt))


def main(arguments: list[str]) -> int:
    """Run all kinds and print the outcomes."""
    *kinds, directory = arguments
    os.umask(0o022)
    print(json.dumps({kind: run_kind(kind, Path(directory)) for kind in kinds}))  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
