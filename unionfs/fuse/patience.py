"""Gets questions to slow layers answered while other requests go on (see `slow`).

Each question takes a thread for as long as the layer takes to answer, of at most `_THREADS`. Who asks what somebody
else is asking already waits for that answer. A thread that doesn't come back, since the layer's server is away, holds
up only who wants its answer; the end of the mount doesn't wait for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, ParamSpec, TypeVar

import trio

from unionfs.core.slow import Answers, Attempt, Door, Key, Question, WouldBlock, attempting, close_anyway

P = ParamSpec("P")
R = TypeVar("R")

_THREADS: Final = 64
_CLOSING: Final = 16


class _Asked:
    """A question that is being answered."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.answers: Answers = {}


class Patience:
    """Waits for the slow layers of one mount."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._closing = trio.CapacityLimiter(_CLOSING)
        self._asked: dict[Key, _Asked] = {}
        self._nursery: trio.Nursery | None = None
        self.answered = 0  # how many questions

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Close what takes its time to close, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._door.aside = self._close
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            self._door.aside = close_anyway

    def begin(self) -> None:
        """From now on the core may leave questions to be answered."""
        self._door.waits = True

    @property
    def needed(self) -> bool:
        """Tell whether any layer is slow."""
        return self._door.is_slow

    async def attempt(self, operation: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call an operation again and again until nothing blocks it."""
        with attempting() as attempt:
            while True:
                try:
                    return await operation(*args, **kwargs)
                except WouldBlock as blocked:
                    question = blocked.question
                await self._answer(question, attempt)

    async def call(self, operation: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The same for a plain function."""
        with attempting() as attempt:
            while True:
                try:
                    return operation(*args, **kwargs)
                except WouldBlock as blocked:
                    question = blocked.question
                await self._answer(question, attempt)

    async def _answer(self, question: Question, attempt: Attempt) -> None:
        asked = self._asked.get(question.key)
        if asked is not None:
            await asked.done.wait()
            attempt.take({key: answer for key, answer in asked.answers.items() if answer.shareable})
            return
        asked = self._asked[question.key] = _Asked()
        try:
            asked.answers = await trio.to_thread.run_sync(question.find, limiter=self._limiter, abandon_on_cancel=True)
        finally:
            del self._asked[question.key]
            asked.done.set()
        self.answered += 1
        self._door.learn(question, asked.answers)
        attempt.take(asked.answers)

    async def copy(self, run: Callable[[], None]) -> None:
        """Run a copy of a file's data in a thread; one that takes long must not keep fsync from having its own."""
        await trio.to_thread.run_sync(run, limiter=self._limiter if self.needed else None)

    def _close(self, fd: int) -> None:
        nursery = self._nursery
        if nursery is None:
            close_anyway(fd)
        else:
            nursery.start_soon(self._close_in_thread, fd)

    async def _close_in_thread(self, fd: int) -> None:
        await trio.to_thread.run_sync(close_anyway, fd, limiter=self._closing, abandon_on_cancel=True)
