"""Little memory for a process: a control group of its own, of either version."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
GONE_SECONDS = 20


def _parent() -> tuple[Path, str, str] | None:
    """Where a group that limits memory can be made, the names of its limit and of the one that swap counts for.

    None where there is no such place.
    """
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    old = [line.split(":", 2)[2] for line in lines if ":memory:" in line]
    if old:
        return Path(f"{GROUPS}/memory{old[0]}"), "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
    with_children = GROUPS / "cgroup.subtree_control"
    if with_children.exists() and "memory" in with_children.read_text().split():
        return GROUPS, "memory.max", "memory.swap.max"
    return None


def can_limit() -> bool:
    """Whether there is a place for such groups."""
    parent = _parent()
    return parent is not None and os.access(parent[0], os.W_OK)


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A group whose processes may use so many bytes more than they do when they come into it.

    A process is put into it by writing its number to the file `cgroup.procs`. It must have ended at the end.
    """
    parent = _parent()
    assert parent is not None
    place, *limits = parent
    group = place / f"unionfs-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    try:
        (group / limits[0]).write_text(str(limit))
        if (group / limits[1]).exists():  # else there is no swap, or it is not counted
            (group / limits[1]).write_text("0" if limits[1] == "memory.swap.max" else str(limit))
        yield group
    finally:
        end = time.monotonic() + GONE_SECONDS
        while (group / "cgroup.procs").read_text() and time.monotonic() < end:
            time.sleep(0.02)
        group.rmdir()
