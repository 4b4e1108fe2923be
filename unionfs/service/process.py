"""What a daemon makes of its own process before it serves, and what it hears of the libraries that it loads."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator

from unionfs.errors import EnvironmentUnfit

log = logging.getLogger(__name__)


def prepare() -> None:
    """Take what the daemon needs: all descriptors it may have, no umask, no directory kept busy."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.set_threshold(10_000, 20, 50)  # nodes and listings are many, and in no cycles: looking for those takes its time
    os.umask(0)
    os.chdir("/")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def import_pyfuse3() -> None:
    """Import pyfuse3, and libfuse with it. Raises EnvironmentUnfit where one of them is missing."""
    try:
        import pyfuse3  # noqa: F401
    except ImportError as error:
        if "libfuse3" in str(error):
            raise EnvironmentUnfit("libfuse 3 is missing: install it (Debian: apt install fuse3)") from None
        raise EnvironmentUnfit(f"pyfuse3 can't be loaded ({error}): reinstall it with pip") from None


@contextlib.contextmanager
def stderr_captured() -> Iterator[Callable[[], str]]:
    """Collect what libfuse and fusermount3 write to descriptor 2; the value returns its last line."""
    sys.stderr.flush()
    kept = os.dup(2)
    with os.fdopen(os.memfd_create("libfuse"), "w+b") as file:
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            lines = file.read().decode("utf-8", "backslashreplace").strip().splitlines()
            return lines[-1] if lines else ""

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            for line in said().splitlines():
                log.debug("libfuse: %s", line)
