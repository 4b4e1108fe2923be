"""The trio side of a mount: its session, from when it answers to its end, with its signals and its record.

The session ends when the mount is unmounted from outside (the kernel then closes it), or on SIGTERM, SIGINT or SIGHUP,
which wait while the mount is made until somebody listens; SIGUSR1 writes the counters and the trio tasks to the log.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Final

import unionfs
from unionfs.config import MountConfig, as_json
from unionfs.errors import EnvironmentUnfit, MountFailed
from unionfs.fuse import native
from unionfs.host import control
from unionfs.host.mountinfo import mounted_at
from unionfs.service import notify
from unionfs.store.mountvolumes import MountedVolumes

if TYPE_CHECKING:
    import trio

    from unionfs.core.bind import BindPoint
    from unionfs.fuse.ops import UnionOperations
    from unionfs.fuse.restart import Keeper

log = logging.getLogger(__name__)

# How long the mount may take to answer its first request, in seconds.
START_SECONDS: Final = 30.0

# What the daemon listens to while it serves.
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

# How many tasks wait for requests, so that none need be started when a handler awaits.
SESSION_TASKS: Final = 10

# How many requests may wait at a time: for copies of data and the like, and for a layer whose server may be away. Each
# has a buffer of its own.
MOST_TASKS: Final = 99
MOST_WAITING: Final = 500

Ready = Callable[[], None]


class Session:
    """What one mount is while it is served."""

    def __init__(
        self,
        config: MountConfig,
        ready: Ready,
        log_file: str | None,
        name: str | None,
        volumes: MountedVolumes,
        keeper: Keeper | None = None,
    ) -> None:
        """Take what is known before there is a mount.

        Args:
            config: what is mounted, and how.
            ready: called once, when the mount answers and its volumes are bound.
            log_file: where the log goes, if that is a file.
            name: the mount's, if it has one.
            volumes: what is bound in it.
            keeper: is told where the mount is between start and end; None without --auto-restart.
        """
        self.config = config
        self.ready = ready
        self.log_file = log_file
        self.name = name
        self.volumes = volumes
        self.keeper = keeper
        self.record_path: str | None = None
        self.to_sync = -1  # a descriptor on the file system of upper, once the session has ended

    @property
    def goes_on(self) -> bool:
        """Whether another daemon is to serve the mount when this one has failed."""
        return self.keeper is not None and self.keeper.goes_on

    def ended(self) -> None:
        """Note that the mount has ended."""
        if self.keeper is not None:
            from unionfs.fuse.ledger import State

            self.keeper.ledger.state = State.ENDED

    async def run(self, operations: UnionOperations) -> None:
        """Serve until the session ends.

        Raises MountFailed where the mount does not answer, EnvironmentUnfit where the kernel can't do what was asked
        for, and what keeps volumes from being bound.
        """
        import pyfuse3
        import trio

        async with trio.open_nursery() as nursery:
            await nursery.start(self._handle_signals, operations)
            await nursery.start(operations.run)
            nursery.start_soon(self._announce, operations)
            most = MOST_WAITING if operations.patience.needed else MOST_TASKS
            await pyfuse3.main(min_tasks=SESSION_TASKS, max_tasks=most)
            self._ending()
            nursery.cancel_scope.cancel()

    async def _announce(self, operations: UnionOperations) -> None:
        """Say that the mount is ready as soon as it answers, that is when the kernel's first request was answered.

        Nothing here may ask the mount itself: a thread of ours that waits for us can't be killed.
        """
        import trio

        mountpoint = self.config.mountpoint
        try:
            with trio.fail_after(START_SECONDS):
                await operations.answering.wait()
        except trio.TooSlowError:
            raise MountFailed(f"the mount on {mountpoint} does not answer") from None
        if self.volumes:
            await self._bind_volumes(operations)
        operations.patience.begin()
        self._check_resending()
        self.record_path = self._write_record()
        self._serving()
        self.ready()
        log.info("%s: mounted", mountpoint)

    def _check_resending(self) -> None:
        if self.keeper is not None and not native.resends():
            raise EnvironmentUnfit(
                "--auto-restart needs Linux 6.9: an older kernel never answers what a daemon was asked before it died"
            )

    def _serving(self) -> None:
        if self.keeper is not None:
            from unionfs.fuse.ledger import State
            from unionfs.service.supervise import SERVES

            self.keeper.ledger.state = State.SERVING
            os.kill(self.keeper.ledger.supervisor, SERVES)

    async def _bind_volumes(self, operations: UnionOperations) -> None:
        import trio

        def attach(point: BindPoint) -> None:
            from unionfs.fuse.bind_ops import BindingOperations

            assert isinstance(operations, BindingOperations)
            trio.from_thread.run(operations.attach, point)

        try:
            await trio.to_thread.run_sync(self.volumes.establish, attach)
        except BaseException:
            await self._take_down_volumes()
            raise

    async def _take_down_volumes(self) -> None:
        if not self.volumes:
            return
        import trio

        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self.volumes.take_down)

    async def _handle_signals(self, operations: UnionOperations, task_status: trio.TaskStatus[None]) -> None:
        import pyfuse3
        import trio

        for heard in SIGNALS:  # when trio listens no more the end must not be cut short by another one
            signal.signal(heard, _heed_not)
        with trio.open_signal_receiver(*SIGNALS) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            task_status.started()
            async for number in signals:
                if number == signal.SIGUSR1:
                    dump(operations)
                else:
                    log.info("ending on %s", signal.Signals(number).name)
                    self._ending()
                    await self._take_down_volumes()
                    await operations.finish()
                    pyfuse3.terminate()

    def _ending(self) -> None:
        if self.keeper is not None:
            from unionfs.fuse.ledger import State

            self.keeper.ledger.state = State.ENDING  # the supervisor tells
        elif self.config.foreground:
            notify.tell(notify.STOPPING)

    def _write_record(self) -> str | None:
        config = self.config
        mount = mounted_at(config.mountpoint)
        dev = mount.dev if mount else ""
        if self.keeper is not None:
            # A daemon that took the mount over may find another one on top of it, or not find it.
            dev = self.keeper.ledger.dev = self.keeper.ledger.dev or dev
        pid = os.getpid() if self.keeper is None else self.keeper.ledger.supervisor
        record = control.Record(
            pid=pid,
            start=control.process_start(pid) or 0,
            pidns=control.pid_namespace(),
            mountpoint=config.mountpoint,
            dev=dev,
            name=self.name,
            lowers=list(config.lowers),
            data_lowers=list(config.data_lowers),
            upper=config.upper,
            work=config.work,
            options=shown_options(config),
            volumes=self.volumes.shown(),
            store=self.volumes.store_root,
            log=self.log_file,
            version=unionfs.__version__,
            mounted_at=time.time(),
        )
        path = control.write(record)
        if path is None:
            log.warning("no place for the state file: unionfs ls and umount won't know this mount")
        return path


def _heed_not(number: int, frame: FrameType | None) -> None:
    """Take a signal that comes when the daemon is ending already."""


def shown_options(config: MountConfig) -> dict[str, object]:
    """Return the options in force, as `ls --json` shows them."""
    places = {"lowers", "data_lowers", "upper", "work", "mountpoint", "explicit"}
    process = {"foreground", "log_level", "log_file"}
    return {
        field.name: as_json(value)
        for field in dataclasses.fields(config)
        if field.name not in places | process
        for value in [getattr(config, field.name)]
    }


def dump(operations: UnionOperations) -> None:
    """Write the counters and the trio tasks to the log, whatever its level (SIGUSR1)."""
    import trio

    lines = [f"{name} {value}" for name, value in sorted(operations.counters().items())]
    lines.append(f"threads {threading.active_count()}")
    root = trio.lowlevel.current_root_task()
    if root is not None:
        lines += _task_lines(root, 0)
    log.log(logging.CRITICAL, "dump on SIGUSR1:\n  %s", "\n  ".join(lines))


def _task_lines(task: trio.lowlevel.Task, depth: int) -> list[str]:
    frames = [f"{frame.f_code.co_name}:{line}" for frame, line in task.iter_await_frames()]
    lines = [f"task {'. ' * depth}{task.name} at {' > '.join(frames) or 'native code'}"]
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            lines += _task_lines(child, depth + 1)
    return lines
