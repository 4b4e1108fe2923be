"""The process that stays while daemons come and go (``--auto-restart``; `restart` says what a new one needs).

It does as little as can be: start a daemon, wait for its end or for a signal, and, where that end was not meant, start
the next one. What the daemons have open is open here too, and so stays; nothing here uses it. When the supervisor ends
it all goes, and with the device the mount.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from unionfs.core import sysio
from unionfs.fuse import native
from unionfs.fuse.ledger import Ledger, State

log = logging.getLogger(__name__)

# So many crashes within so many seconds are too many.
MOST_CRASHES: Final = 5
CRASH_SECONDS: Final = 60.0

# What makes daemons fail may pass: so long for each one that has died within a second.
_PAUSE_SECONDS: Final = 0.05

# Environment variable, for tests: another number.
MOST: Final = "UNIONFS_MOST_CRASHES"

# From a daemon: it serves.
SERVES: Final = signal.SIGUSR2

_END: Final = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
_HEARD: Final = _END | {signal.SIGCHLD, signal.SIGUSR1, SERVES}

Run = Callable[[Ledger], int]


class Supervisor:
    """Keeps one mount served."""

    def __init__(
        self,
        run: Run,
        *,
        ready: Callable[[], None],
        ending: Callable[[], None],
        gone: Callable[[], None],
        say: Callable[[int, str], None],
    ) -> None:
        """Say what a daemon does.

        Args:
            run: serves in the new process and returns its exit status.
            ready: called when the mount is served for the first time.
            ending: called when it is about to end, or has ended.
            gone: takes off a mount that no daemon serves any more, and its record.
            say: writes a line to the log.
        """
        self._run = run
        self._ready = ready
        self._tell_ending = ending
        self._gone = gone
        self._say = say
        self.ledger = Ledger()
        self._most = int(os.environ.get(MOST, MOST_CRASHES))
        self._crashes: deque[float] = deque(maxlen=self._most + 1)
        self.serves = False  # whether it ever did
        self._ending = False

    def run(self) -> int:
        """Start daemons until one ends as it should; return the status to exit with. Raises OSError: none starts."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        try:
            while True:
                status = self._attend(self._start(before))
                if self.ledger.state in (State.STARTING, State.ENDED):
                    self._end()
                    return os.waitstatus_to_exitcode(status)
                if self._is_over(status):
                    self._gone()
                    return 0
                how = _how(status)
                if self._crashed():
                    self._say(logging.ERROR, f"a daemon has {how}, the {self._most + 1}th in a minute: giving up")
                    return 1
                self._say(logging.WARNING, f"the daemon has {how}: another one takes over")
                time.sleep(self._pause())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _is_over(self, status: int) -> bool:
        """Whether a daemon that didn't come to its end was to do so."""
        by_signal = os.WIFSIGNALED(status) and os.WTERMSIG(status) in _END
        return self._ending or by_signal or self.ledger.state is State.ENDING

    def _crashed(self) -> bool:
        """Note a crash; tell whether it was one too many."""
        now = time.monotonic()
        self._crashes.append(now)
        return len(self._crashes) > self._most and now - self._crashes[0] < CRASH_SECONDS

    def _end(self) -> None:
        """Start no daemon any more."""
        if self.serves and not self._ending:
            self._tell_ending()
        self._ending = True

    def _pause(self) -> float:
        """How long to wait before the next daemon, in seconds; not at all where the last crash was long ago."""
        now = time.monotonic()
        return _PAUSE_SECONDS * (sum(now - crash < 1 for crash in self._crashes) - 1)

    def _start(self, before: set[int]) -> int:
        pid = native.fork_sharing_files()
        if pid:
            return pid
        status = 1
        try:
            sysio.end_with_parent()
            os.setpgid(0, 0)  # a terminal's signals are the supervisor's
            if os.getppid() == self.ledger.supervisor:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                status = self._run(self.ledger)
        finally:
            os._exit(status)

    def _attend(self, pid: int) -> int:
        """Wait for a daemon's end, and pass on what it should hear; return its wait status."""
        if self._ending:
            _tell(pid, signal.SIGTERM)
        while True:
            number = signal.sigwait(_HEARD)
            if number == SERVES:
                if not self.serves:
                    self.serves = True
                    self._ready()
            elif number == signal.SIGUSR1:
                _tell(pid, number)
            elif number in _END:
                self._end()
                _tell(pid, signal.SIGTERM)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return status


def _tell(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _how(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"failed (exit status {os.WEXITSTATUS(status)})"
    try:
        return f"died of {signal.Signals(os.WTERMSIG(status)).name}"
    except ValueError:
        return f"died of signal {os.WTERMSIG(status)}"
