"""What no test may leave behind: another umask, mounts, daemons, descriptors, unexpected log lines; and the fault timeout."""

from __future__ import annotations

import faulthandler
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support import raw
from tests.support.mounts import daemons, mounted_below

HARD_EXIT_SECONDS = 120.0
UMASK = 0o022
SHARED_SUFFIX = "-shared"
"""How the names of mount points end that stay for the whole session."""


def descriptors() -> Counter[str]:
    """The open descriptors of this process by what they point to."""
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found[os.readlink(f"/proc/self/fd/{number}")] += 1
    return found


def _transient(target: str) -> bool:
    return target.startswith(("/proc/", "/dev/"))


class Gate:
    """The state before a test, and `leaks()`, which names what was added since."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._mounts = mounted_below(base)
        self._daemons = daemons(base)
        self._descriptors = descriptors()

    def leaks(self) -> list[str]:
        """One line for each leaked mount, daemon and descriptor; daemons get a moment to end."""
        umask = os.umask(UMASK)
        lines = [f"umask left: {umask:#o}"] if umask != UMASK else []
        lines += [f"mount left: {path}" for path in self._left_mounts()]
        lines += [f"daemon left: {pid} {command}" for pid, command in self._left_daemons().items()]
        lines += [f"descriptor left: {target}" for target in self._left_descriptors()]
        return lines

    def _left_mounts(self) -> list[Path]:
        found = mounted_below(self._base)
        return [path for path in found if path not in self._mounts and not path.name.endswith(SHARED_SUFFIX)]

    def _left_daemons(self) -> dict[int, str]:
        for _ in range(50):
            left = {pid: line for pid, line in daemons(self._base).items() if pid not in self._daemons}
            if not left:
                return {}
            time.sleep(0.1)
        return left

    def _left_descriptors(self) -> list[str]:
        left = descriptors() - self._descriptors
        if left:
            gc.collect()
            left = descriptors() - self._descriptors
        return [target for target in left if not _transient(target)]

    def clear(self) -> None:
        """Close and detach what was left, so that one fault does not fail all tests after it."""
        left = self._left_descriptors()
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{number}")
                if target in left and target.startswith(str(self._base)):
                    os.close(int(number))
        for path in reversed(self._left_mounts()):
            with suppress(OSError):
                raw.umount2(path, raw.MNT_FORCE | raw.MNT_DETACH)


@contextmanager
def fault_timeout(seconds: float, base: Path) -> Iterator[None]:
    """Free a test that hangs in a FUSE mount below `base` after `seconds` by aborting the mount's connection, so that it
    fails; if that doesn't help, dump all stacks and end the whole run some minutes later."""

    def abort() -> None:
        faulthandler.dump_traceback()
        for path in reversed(mounted_below(base)):
            with suppress(OSError):
                raw.umount2(path, raw.MNT_FORCE)

    timer = threading.Timer(seconds, abort)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + HARD_EXIT_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()
        timer.join()
