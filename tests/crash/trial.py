"""One trial: the daemon is killed while a chapter is done, or one of its system calls fails, and all is looked at.

After a kill the dead mount is detached and the union mounted anew, which must show a state that the chapter allows at the
point that it had reached. Then the rest of the chapter is done and the last state must come out: either in that mount,
and kernel overlayfs must show the same afterwards, or by kernel overlayfs, which must have shown the same before.

With `--auto-restart` nobody may notice a kill: each step is done, and the chapter comes to its end.

After a fault: the step that met it fails with its error and has changed nothing, or is done in spite of it. The mount
goes on: the step is tried again, and the chapter comes to its end.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from tests.crash.gate import Gate, Warden, start
from tests.crash.site import (
    Site,
    State,
    fits,
    half_written,
    has,
    layer_faults,
    leftovers,
    restarts,
    seen,
    touched,
    without,
)
from tests.crash.workload import CHAPTERS, Hand, Step, reopen, work
from tests.support import raw
from tests.support.mounts import BAD_LOG, MountRefused, daemons, mounted_below, parent_of, supervised, wait_gone
from tests.support.snapshot import Snapshot, differences

SECONDS = 60.0
"""How long anything may take."""
DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
LEAST_SECONDS = 0.3
"""Between two kills of daemons that take over."""


class Wrong(Exception):
    """Something was lost, half done or left over; the text says what."""


@dataclass(frozen=True)
class Strike:
    """What is done to the daemon, and when.

    Attributes:
        at: before which of its changing system calls, from 1 on; 0: at none.
        after: how many seconds after the work has begun, where `at` is 0; negative: never. Who takes over is killed so many
            seconds later.
        fault: the error that the call gets; 0: the daemon is killed.
        remount_at: before which call the daemon of the mount that follows is killed, too; 0: at none.
        rest_by_overlay: whether kernel overlayfs does what remains to be done.
    """

    at: int = 0
    after: float = -1.0
    fault: int = 0
    remount_at: int = 0
    rest_by_overlay: bool = False

    @property
    def gated(self) -> bool:
        """Whether the daemon has to run under the gate."""
        return self.at > 0 or self.after < 0


@dataclass
class Outcome:
    """What a trial has come to.

    Attributes:
        calls: the changing system calls up to the strike.
        kills: how often a daemon was killed.
        failed: whether a fault made a step fail.
        seconds: how long the work took.
    """

    calls: list[str] = field(default_factory=list)
    kills: int = 0
    failed: bool = False
    seconds: float = 0.0


@dataclass
class _Progress:
    """What the journal says."""

    begun: int = 0  # steps
    finished: int = 0
    failed: int = -1  # the step that has failed
    error: int = 0
    rest: bytes = b""

    def read(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            word, *numbers = line.split()
            if word == b"b":
                self.begun = int(numbers[0]) + 1
            elif word == b"f":
                self.finished = int(numbers[0]) + 1
            else:
                self.failed, self.error = int(numbers[0]), int(numbers[1])


class Trial:
    """A chapter done in a fresh union with some options, and a strike."""

    def __init__(self, site: Site, chapter: str, options: str, strike: Strike) -> None:
        self.site, self.chapter, self.options, self.strike = site, chapter, options, strike
        self.steps = CHAPTERS[chapter]
        self.states = site.states(chapter)
        self.restarts = restarts(options)
        self.outcome = Outcome()
        self._progress = _Progress()
        self._warden = Warden(None, -1)
        self._gate: Gate | None = None

    def run(self) -> Outcome:
        """Do it. Raises Wrong."""
        self.site.renew()
        try:
            self._mount_and_work()
            if self._is_dead():
                self._check_after_kill()
            else:
                self._check_after_end()
        except (AssertionError, MountRefused, OSError, subprocess.SubprocessError) as error:
            self._wrong(f"{type(error).__name__}: {error}")
        finally:
            self._clear()
        return self.outcome

    def _wrong(self, text: str) -> NoReturn:
        at = self._progress
        step = self.steps[at.begun - 1].text if at.begun else "mount"
        call = f", at `{self._struck()}`" if self._struck() else ""
        raise Wrong(f"{at.finished} steps done, the last begun `{step}`{call}: {text}")

    def _struck(self) -> str:
        """The call that was struck at, "" if none was."""
        return self._warden.calls[self.strike.at - 1] if 0 < self.strike.at <= len(self._warden.calls) else ""

    def _clear(self) -> None:
        with suppress(OSError):
            raw.umount2(self.site.mnt, raw.MNT_FORCE | raw.MNT_DETACH)
        for pid in daemons(self.site.mnt):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_gone(pid)
        if self._gate is not None:
            self._gate.close()
            self._gate = None

    # -- up to the kill, or the end --

    def _mount_and_work(self) -> None:
        daemon = self._mount(self.strike)
        if daemon < 0:
            return
        try:
            self._work(daemon)
            self.outcome.calls = self._warden.calls
            if not self._is_dead():
                self._unmount(daemon)
        finally:
            os.close(daemon)

    def _is_dead(self) -> bool:
        """Count a kill, and tell whether the mount is dead."""
        if self._warden.struck and not self.strike.fault:
            self.outcome.kills = max(1, self.outcome.kills)
        return self.outcome.kills > 0 and not self.restarts

    def _mount(self, strike: Strike) -> int:
        """Mount and return a pidfd of the daemon; -1 if it was killed while it started, or could not for a fault."""
        command = self.site.mount_command(self.chapter, self.options)
        with tempfile.TemporaryFile() as said:
            if strike.gated:
                process, self._gate = start(command, stderr=said.fileno(), environment=self.site.environment())
            else:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=said, env=self.site.environment())
            self._warden = Warden(self._gate, self.site.device, strike.at, strike.fault)
            self._wait_for(process)
            said.seek(0)
            message = said.read().decode()
        self.outcome.calls = self._warden.calls
        if process.returncode or (self._warden.struck and not strike.fault and not self.restarts):
            return self._not_mounted(message)
        return os.pidfd_open(self._daemon())

    def _wait_for(self, process: subprocess.Popen[bytes]) -> None:
        exited = os.pidfd_open(process.pid)
        try:
            if not self._warden.attend(exited, seconds=SECONDS):
                process.kill()
                self._wrong("the mount command hangs")
        finally:
            os.close(exited)
            process.wait()

    def _not_mounted(self, message: str) -> int:
        self._is_dead()
        if not self._warden.struck:
            self._wrong(f"not mounted: {message}")
        if message and (len(message.splitlines()) != 1 or "Traceback" in message):
            self._wrong(f"killed while it mounted, the command says: {message}")
        if message and self._is_mounted():
            self._wrong("a mount is left by a mount that has failed")
        return -1

    def _is_mounted(self) -> bool:
        return self.site.mnt in mounted_below(self.site.base)

    def _daemon(self) -> int:
        """The daemon, or its supervisor."""
        found = daemons(self.site.mnt)
        found = {pid: line for pid, line in found.items() if parent_of(pid) not in found}
        if len(found) != 1:
            self._wrong(f"not one daemon: {found}")
        return next(iter(found))

    def _work(self, daemon: int) -> None:
        reader, journal = os.pipe()
        order, orders = os.pipe()
        began = time.monotonic()
        worker = os.fork()
        if worker == 0:
            _be_worker(self.site.mnt, self.chapter, journal, order)
        os.close(journal)
        os.close(order)
        try:
            self._attend_work(reader, orders, daemon, began)
        finally:
            os.close(reader)
            os.close(orders)
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
        self.outcome.seconds = time.monotonic() - began

    def _attend_work(self, reader: int, orders: int, daemon: int, began: float) -> None:
        """Let the worker work until its end, and strike."""
        end = began + SECONDS
        strike_at = began + self.strike.after if self.strike.after >= 0 else end
        while True:
            now = time.monotonic()
            ready = self._warden.attend(reader, seconds=max(0.0, min(strike_at, end) - now))
            if not ready and time.monotonic() >= end:
                self._wrong("hangs")
            if not ready:
                self._kill(daemon)
                strike_at = time.monotonic() + max(self.strike.after, LEAST_SECONDS) if self.restarts else end
                continue
            data = os.read(reader, 1 << 16)
            if not data:
                return
            self._progress.read(data)
            if self._progress.error:
                self._step_failed(orders)

    def _kill(self, daemon: int) -> None:
        """Kill the daemon; of one with a supervisor who serves now, if anybody does."""
        if not self.restarts:
            signal.pidfd_send_signal(daemon, signal.SIGKILL)
            self.outcome.kills = 1
            return
        for pid in supervised(self.site.mnt):
            os.kill(pid, signal.SIGKILL)
            self.outcome.kills += 1

    def _step_failed(self, orders: int) -> None:
        error, self._progress.error = self._progress.error, 0
        if self.strike.fault and self._warden.struck:
            # Without the redirect of a directory a rename is left to user space (ovl_set_redirect).
            known = {self.strike.fault, errno.EXDEV if "setxattr" in self._struck() else 0}
            if self.outcome.failed or error not in known:
                self._wrong(f"the step fails with {errno.errorcode.get(error, error)}")
            self.outcome.failed = True
            finished = self._progress.finished
            self._must_be(self._view(), finished, finished, "after the fault", under_way=True)
            os.write(orders, b"t")
            return
        if error not in DEAD or not self._is_dead():
            self._wrong(f"the step fails with {errno.errorcode.get(error, error)}")
        os.write(orders, b"e")

    def _view(self) -> Snapshot:
        """What the mount shows, taken by another process while this one attends to the gate."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _be_viewer(self.site.mnt, writer)
        os.close(writer)
        data = b""
        try:
            while self._warden.attend(reader, seconds=SECONDS):
                more = os.read(reader, 1 << 16)
                if not more:
                    break
                data += more
        finally:
            os.close(reader)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return _unpacked(data)

    def _unmount(self, daemon: int) -> None:
        for _ in range(50):
            try:
                raw.umount2(self.site.mnt, 0)
                break
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            self._warden.attend(seconds=0.02)
        if not self._warden.attend(daemon, seconds=SECONDS):
            self._wrong("the daemon does not end")
        self._is_dead()

    # -- what is left --

    def _check_after_kill(self) -> None:
        if not wait_gone_all(self.site.mnt):
            self._wrong("the killed daemon is still there")
        if self._is_mounted():
            raw.umount2(self.site.mnt, raw.MNT_DETACH)
        if self.strike.remount_at:
            self._kill_remount()
        if self.strike.rest_by_overlay and self._overlay_can:
            self._check_and_let_overlay_go_on()
        else:
            self._check_and_go_on()

    def _check_and_let_overlay_go_on(self) -> None:
        with self._ours():
            tree = seen(self.site.mnt)
            exact = self._must_be_allowed(tree)
        self._check_layers()
        with self._overlay():
            self._must_be_alike(tree)
            self._go_on(exact)

    def _check_and_go_on(self) -> None:
        with self._ours():
            self._check_layers(leftovers_only=True)
            exact = self._must_be_allowed(seen(self.site.mnt))
            self._go_on(exact)
            tree = seen(self.site.mnt)
        self._check_layers()
        self._compare_by_overlay(tree)

    def _check_after_end(self) -> None:
        with self._ours():
            tree = seen(self.site.mnt)
        last = len(self.steps) if self._progress.begun else 0  # a fault may have kept it from being mounted
        self._must_be(tree, last, last, "at the end")
        self._check_layers()
        self._compare_by_overlay(tree)

    def _kill_remount(self) -> None:
        """Kill the next daemon while it clears up after the first."""
        daemon = self._mount(Strike(at=self.strike.remount_at))
        if daemon >= 0:
            self._unmount(daemon)
            os.close(daemon)
        self.outcome.kills += self._warden.struck
        wait_gone_all(self.site.mnt)

    @contextmanager
    def _ours(self) -> Iterator[None]:
        ours = self.site.union(self.chapter, self.options)
        ours.mount()
        try:
            yield
        finally:
            ours.umount()
        if bad := [line for line in ours.log.read_text().splitlines() if BAD_LOG.search(line)]:
            self._wrong(f"the mount after it says: {bad[:3]}")

    def _comes_apart(self, step: Step, before: State) -> bool:
        """Whether it renames over something and puts a whiteout in a step of its own, for only a device comes with it."""
        return bool(step.leaves) and "whiteout=xattr" in self.options and has(before, step.covers)

    @property
    def _overlay_can(self) -> bool:
        """Whether kernel overlayfs can take the upper layer as its own: it lists xattr whiteouts that are there."""
        return "whiteout=" not in self.options

    @contextmanager
    def _overlay(self) -> Iterator[None]:
        overlay = self.site.overlay(self.chapter, self.options)
        overlay.mount()
        try:
            yield
        finally:
            overlay.umount()

    def _check_layers(self, *, leftovers_only: bool = False) -> None:
        faults = leftovers(self.site.work) + ([] if leftovers_only else layer_faults(self.site.upper, self.site.work))
        if faults:
            self._wrong("; ".join(faults))

    def _must_be_allowed(self, tree: Snapshot) -> int | None:
        at = self._progress
        return self._must_be(tree, at.finished, at.begun, "after the kill", under_way=at.begun > at.finished)

    def _compare_by_overlay(self, tree: Snapshot) -> None:
        if self._overlay_can:
            with self._overlay():
                self._must_be_alike(tree)

    def _must_be_alike(self, tree: Snapshot) -> None:
        if lines := differences(tree, seen(self.site.mnt)):
            self._wrong(f"kernel overlayfs shows {len(lines)} differences (ours / overlayfs): {lines[:6]}")

    def _must_be(self, tree: Snapshot, first: int, last: int, when: str, *, under_way: bool = False) -> int | None:
        """Check that a tree is in one of some states, or, *under_way*, between the first of them and the next.

        Returns the number of the state if it is exactly that one.
        """
        states = self.states[first : last + 1]
        for number, state in enumerate(states, first):
            if tree == state.tree:
                return number
        if not any(fits(tree, state) for state in states) and not (under_way and self._is_between(tree, first)):
            lines = [differences(tree, state.tree) for state in states]
            self._wrong(f"{when}: " + "; ".join(f"{len(some)} differences from a state: {some[:6]}" for some in lines))
        return None

    def _is_between(self, tree: Snapshot, number: int) -> bool:
        """Whether a tree shows what a step may show before it is done, or when it has failed."""
        step, before, after = self.steps[number], self.states[number], self.states[number + 1]
        path = step.completes or step.writes
        if path and fits(tree, touched(before, path)):
            return True
        if self._comes_apart(step, before) and fits(without(tree, step.leaves), after):
            return True
        return bool(step.writes) and half_written(self.site.mnt, tree, before, after, step.writes)

    def _go_on(self, first: int | None) -> None:
        """Do the rest of the chapter, after so many steps; None: it is in between."""
        if first is None:
            return
        hand = Hand(self.site.mnt)
        step = None
        try:
            reopen(self.steps, first, hand)
            for step in self.steps[first:]:
                step.act(hand)
        except OSError as error:
            self._wrong(f"after the kill `{step.text if step else 'open'}` fails: {error}")
        finally:
            hand.close_all()
        self._must_be(seen(self.site.mnt), len(self.steps), len(self.steps), "when the rest was done")


def wait_gone_all(mnt: Path) -> bool:
    """Wait until no daemon of a mount point is left."""
    return all(wait_gone(pid) for pid in daemons(mnt))


def _be_worker(root: Path, chapter: str, journal: int, order: int) -> NoReturn:
    try:
        os.umask(0o022)
        work(CHAPTERS[chapter], Hand(root), journal, order)
    finally:
        os._exit(0)


def _be_viewer(root: Path, writer: int) -> NoReturn:
    try:
        with open(writer, "wb") as stream:
            pickle.dump(seen(root), stream)
    finally:
        os._exit(0)


def _unpacked(data: bytes) -> Snapshot:
    tree: Snapshot = pickle.loads(data)
    return tree
