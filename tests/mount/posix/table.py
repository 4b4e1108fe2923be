"""The registry of behaviours, and what runs one at a place.

A behaviour is a function of a directory that already holds its seed. Where the seed lies decides what is tested:

- `lower`: written into the lower layer before the mount (on a plain directory: just written);
- `upper`: made through the mount;
- `touched`: in the lower, then every node's times set through the mount, so that all were copied up (big files as metacopy).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.support.layers import Tree, build

Check = Callable[[Path], None]
Place = Literal["lower", "upper", "touched"]


@dataclass(frozen=True)
class Behaviour:
    """One line of the table.

    privileged: needs real root. unlike: kinds and places (`overlay-lower`) that are known to behave otherwise.
    """

    name: str
    seed: Tree
    check: Check
    privileged: bool = False
    unlike: frozenset[str] = frozenset()


BEHAVIOURS: dict[str, Behaviour] = {}


def behaviour(seed: Tree | None = None, *, privileged: bool = False, unlike: str = "") -> Callable[[Check], Check]:
    """Enter the decorated function into the table, with the tree it wants to find."""

    def enter(check: Check) -> Check:
        name = check.__name__
        assert name not in BEHAVIOURS, f"two behaviours named {name}"
        BEHAVIOURS[name] = Behaviour(name, seed or {}, check, privileged, frozenset(unlike.split()))
        return check

    return enter


@contextmanager
def fails(*codes: int) -> Iterator[None]:
    """The block must raise OSError with one of the errno `codes`."""
    names = " or ".join(errno.errorcode[code] for code in codes)
    try:
        yield
    except OSError as error:
        assert error.errno in codes, f"{errno.errorcode.get(error.errno or 0)} where {names} was due: {error}"
        return
    raise AssertionError(f"no error where {names} was due")


def touch_all(directory: Path) -> None:
    """Set every node's times to what they are: a copy-up of metadata wherever it was not done yet."""
    for base, directories, names in os.walk(directory):
        for name in [*names, *directories, "."]:
            path = os.path.join(base, name)
            status = os.lstat(path)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def plant(directory: Path, behaviours: list[Behaviour]) -> None:
    """Write the seeds of all `behaviours`, each into a directory of its name."""
    for line in behaviours:
        build(directory / line.name, line.seed)


def close_below(directory: Path) -> None:
    """Close the descriptors that a failed behaviour left open, which keep a mount busy."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith(str(directory)):
                os.close(int(number))
