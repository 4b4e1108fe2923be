"""Copy-up of big files that doesn't hold up whoever opens them: the data follows.

Where the native layer serves reads and writes, the first open for writing of a big lower file is answered as soon as
the room for its data is reserved. All handles of the file are then descriptors of the unpublished copy, and the native
layer (csrc/lazy.c) sees to it that what a request touches is copied first. Meanwhile a thread copies the rest; then the
copy is synced and published, once, as any other. So a crash leaves the old file, wholly; what was written since
the open is lost with it, as it may be before an fsync. Fsync therefore waits until the copy is published, as do all
operations but opening, reading, writing and stat. Close doesn't; the end of the mount does.

If the lower file can't be read, or upper has no room in spite of the reservation, the handles stay usable for what is
there. Who needs more, or waits for the end, has it tried again and gets the error. Once nobody has the file open
any more it is tried for the last time, then given up: the old file shows again, what was written is lost, and the log
says so.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Final

import trio

from unionfs.core.copyup import DataCopy
from unionfs.core.inodes import Node
from unionfs.core.union import Union
from unionfs.fuse import native
from unionfs.fuse.patience import Patience

log = logging.getLogger(__name__)

# What is smaller is copied while the opener waits, which takes some milliseconds.
LEAST_BYTES: Final = 16 << 20

# How many files are copied at a time; what is needed of others is copied when it is needed.
_COPIES: Final = 4

# Environment variable, for tests: the copies in the background wait as long as the file that it names exists.
HOLD: Final = "UNIONFS_HOLD_COPIES"


class _Attempt:
    """One try to complete and publish a copy."""

    def __init__(self, number: int, *, is_last: bool) -> None:
        self.number = number  # from 1 on
        self.is_last = is_last  # began when nobody had the file open any more
        self.ended = trio.Event()
        self.error: OSError | None = None  # once it has ended without success


class Following:
    """The copies of one mount whose data follows."""

    def __init__(
        self,
        union: Union,
        patience: Patience,
        *,
        invalidate_changed: Callable[[], None],
        invalidate_data: Callable[[Node], None],
        allowed: bool = True,
    ) -> None:
        """Start without any.

        Args:
            union: the union.
            patience: waits for its slow layers.
            invalidate_changed: tells the kernel of attributes that copy-up changed.
            invalidate_data: has the kernel forget all that it knows of a file; may wait, so it is called in a thread.
            allowed: whether data may follow at all.
        """
        self._allowed = allowed
        self._tree = union.tree
        self._patience = patience
        self._up = union.up
        self._invalidate_changed = invalidate_changed
        self._invalidate_data = invalidate_data
        self._limiter = trio.CapacityLimiter(_COPIES)
        self._nursery: trio.Nursery | None = None
        self._jobs: set[DataCopy] = set()

    def __len__(self) -> int:
        return len(self._jobs)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Copy, until cancelled; what has begun by then is ended first."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._up.follow_from = LEAST_BYTES if self._allowed and native.active() else None
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for job in list(self._jobs):
                self._lose(job)

    async def finish(self) -> None:
        """Let no more data follow, and wait until all is published, or has failed."""
        self._nursery = self._up.follow_from = None
        for job in list(self._jobs):
            await _attempt(job).ended.wait()

    # -- what the operations ask for --

    async def begin(self, job: DataCopy) -> bool:
        """Let the data of a copy follow if it may; False: it must be run. Raises OSError: ENOSPC, nothing was done."""
        nursery = self._nursery
        if nursery is None or not job.may_follow:
            return False
        if not await trio.to_thread.run_sync(native.lazy_reserve, job.source, job.target, job.size):
            return False
        if self._nursery is not nursery:
            return False
        node = job.node
        native.lazy_begin(node.id, job.source, job.target, job.size)
        try:
            job.follow(functools.partial(native.lazy_written, node.id))
        except BaseException:
            native.lazy_end(node.id)
            raise
        self._jobs.add(job)
        self._start(job, nursery, 1)
        return True

    async def end(self, job: DataCopy) -> None:
        """Wait until a copy is published; raises the OSError that keeps it from that."""
        self._try_again(job)
        attempt = _attempt(job)
        await attempt.ended.wait()
        if attempt.error is not None:
            raise OSError(attempt.error.errno, attempt.error.strerror)

    async def settle(self, node: Node) -> None:
        """Wait until a node's data, if it follows, is published; raises like `end`."""
        while isinstance(node.job, DataCopy) and node.job.follows:
            await self.end(node.job)

    def closed(self, node: Node) -> None:
        """A handle was closed: a copy that failed has its last chance with the last one."""
        job = node.job
        if isinstance(job, DataCopy) and job.follows and not node.handles:
            self._try_again(job)

    # -- the work --

    def _start(self, job: DataCopy, nursery: trio.Nursery, number: int) -> None:
        job.waiters = attempt = _Attempt(number, is_last=number > 1 and not job.node.handles)
        nursery.start_soon(self._run, job, attempt)

    def _try_again(self, job: DataCopy) -> None:
        attempt = _attempt(job)
        if attempt.error is not None and self._nursery is not None:
            self._start(job, self._nursery, attempt.number + 1)

    async def _run(self, job: DataCopy, attempt: _Attempt) -> None:
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_copy, job, limiter=self._limiter)
                await self._patience.call(self._publish, job)
        except OSError as exc:
            attempt.error = exc
        except Exception:
            log.exception("a copy-up failed")
            attempt.error = OSError(errno.EIO, os.strerror(errno.EIO))
        finally:
            attempt.ended.set()
        if attempt.error is None:
            return
        if attempt.number == 1:
            log.warning("%s: the copy-up has failed (%s), to be tried again", _name(job), attempt.error.strerror)
        if job.node.handles:
            return
        if attempt.is_last or self._nursery is None:
            await self._give_up(job)
        else:
            self._start(job, self._nursery, attempt.number + 1)

    def _publish(self, job: DataCopy) -> None:
        node = job.node
        node.job = None
        try:
            job.finish()
        except BaseException:
            node.job = job
            raise
        finally:
            self._invalidate_changed()
        self._jobs.discard(job)
        native.lazy_end(node.id)
        self._tree.forget(node, 0)

    async def _give_up(self, job: DataCopy) -> None:
        node = job.node
        self._lose(job)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._invalidate_data, node)
        self._tree.forget(node, 0)

    def _lose(self, job: DataCopy) -> None:
        error = _attempt(job).error or OSError(errno.EIO, os.strerror(errno.EIO))
        log.error("%s: can't be copied up (%s): what was written to it is lost", _name(job), error.strerror)
        self._jobs.discard(job)
        native.lazy_end(job.node.id)
        job.node.job = None
        job.abandon()


def _copy(job: DataCopy) -> None:
    while os.path.exists(os.environ.get(HOLD, "")):
        time.sleep(0.01)
    native.lazy_copy(job.node.id)
    job.sync()


def _attempt(job: DataCopy) -> _Attempt:
    assert isinstance(job.waiters, _Attempt)
    return job.waiters


def _name(job: DataCopy) -> str:
    return os.fsdecode(job.node.name)
