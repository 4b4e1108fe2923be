"""A cheaper way through pyfuse3's session loop.

pyfuse3's session tasks share one lock; its holder waits for the device to become readable, leaves the lock, receives
one request and handles it. With trio's own primitives each request costs two trips through trio's scheduler and one
through epoll, more than all the rest of a small request. pyfuse3 finds these primitives through its module attribute
`trio` (so that `pyfuse3.asyncio` can replace it); `install` puts other ones there:

- `wait_readable` returns at once while the device has requests. It waits in epoll only when the device is drained, and
  lets trio run its other tasks at least every `SLICE` seconds. When the native layer is in force it reads the device
  without blocking, so that looking and reading are one system call, lingers a moment for the next request, and
  answers requests for the data of open files without coming back to Python.
- The lock is taken and left without a reschedule. It is handed over only when the task that left it really suspends
  in its handler (an `Instrument` sees this), since a handler that never awaits is back before anyone else could run.

So one task handles request after request, synchronously; when a handler awaits, the next session task goes on with the
device. Code of a handler between two awaits stays atomic, as under trio itself.
"""

from __future__ import annotations

import select
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import pyfuse3
import trio

from unionfs.fuse import native

SLICE = 0.002
"""Seconds for which requests may be handled without letting trio's other tasks run."""

SPIN = 0.0001
"""Seconds at most to look for the next request before sleeping: what waking two processors takes, our own and the
client's, which must wake up before it can ask again."""

LINGER = 0.002
"""Seconds to sleep until the next request before going through trio, which costs more than a request: a client that
computes between its requests should find us awake. What happens in trio meanwhile ends the sleep."""

LINGER_BLIND = 0.0001
"""The same where we can't see what happens in trio."""


class _Nothing:
    """An awaitable that is done."""

    def __await__(self) -> Any:  # an exhausted iterator is cheaper than a generator, and enough
        return iter(())


_NOTHING = _Nothing()


class _ReadLock(trio.abc.Instrument):
    """The lock around waiting for and receiving a request; passed on when the running task suspends."""

    def __init__(self) -> None:
        self._held = False
        self._waiters: list[trio.lowlevel.Task] = []
        trio.lowlevel.add_instrument(self)

    def __aenter__(self) -> Awaitable[None]:
        if self._held:
            return self._wait()
        self._held = True
        return _NOTHING

    def __aexit__(self, *exc_info: object) -> Awaitable[None]:
        self._held = False
        return _NOTHING

    async def _wait(self) -> None:
        task = trio.lowlevel.current_task()
        self._waiters.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiters.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Give the free lock to the task that came last: its buffer is the warmest."""
        if self._waiters and not self._held:
            self._held = True
            trio.lowlevel.reschedule(self._waiters.pop())


class _Readiness(Protocol):
    """When to receive, and how to wait until then."""

    def may_receive(self) -> bool:
        """Whether to go on receiving without waiting or yielding."""

    def drained(self) -> bool:
        """Whether the device had no request at the last look."""

    def new_slice(self) -> None:
        """Start the next stretch of receiving."""


class _Polling:
    """Readiness without the native layer: receiving blocks, so ask the device before."""

    def __init__(self, device: int) -> None:
        self._poll = select.poll()
        self._poll.register(device, select.POLLIN)
        self._slice_end = 0.0

    def may_receive(self) -> bool:
        return time.monotonic() < self._slice_end and not self.drained()

    def drained(self) -> bool:
        return not self._poll.poll(0)

    def new_slice(self) -> None:
        self._slice_end = time.monotonic() + SLICE


class _LowLevel:
    """Stands in for `trio.lowlevel`."""

    def __init__(self) -> None:
        self._readiness: _Readiness | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    def wait_readable(self, device: int) -> Awaitable[None]:
        if self._readiness is not None and self._readiness.may_receive():
            return _NOTHING
        return self._wait(device)

    async def _wait(self, device: int) -> None:
        if self._readiness is None:
            loop_fd = _loop_fd()
            linger = LINGER if loop_fd >= 0 else LINGER_BLIND
            self._readiness = native.readiness(SPIN, linger, SLICE, loop_fd) or _Polling(device)
        if self._readiness.drained():
            await trio.lowlevel.wait_readable(device)
        else:
            await trio.lowlevel.checkpoint()
        self._readiness.new_slice()


def _loop_fd() -> int:
    """Return trio's epoll descriptor, -1 if it isn't where it used to be: trio has no public way to it."""
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        return int(GLOBAL_RUN_CONTEXT.runner.io_manager._epoll.fileno())
    except (ImportError, AttributeError):
        return -1


class _Trio:
    """Stands in for the `trio` module inside pyfuse3."""

    Lock: Callable[[], _ReadLock] = _ReadLock

    def __init__(self) -> None:
        self.lowlevel = _LowLevel()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


def install() -> None:
    """Make pyfuse3's session loop use this module. Call it after `native.load`, before `pyfuse3.main`."""
    pyfuse3.trio = _Trio()  # type: ignore[attr-defined]
