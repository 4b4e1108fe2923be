"""A mount's life: from the command to a mount that answers, and from unmounting to a process that is gone.

`start` makes the daemon: it forks twice, and the command waits on a pipe for the daemon's word. That is
either that the mount answers, or the error that stopped it; so the command never returns before the outcome
is known.

`serve` is the daemon itself. It opens the layers first, then mounts, because the mount may hide them.
pyfuse3 and trio are imported only here. The mount ends when it is unmounted from outside (the kernel then
closes the session), or on SIGTERM, SIGINT or SIGHUP, which wait while the mount is made until somebody
listens; SIGUSR1 writes the counters and the trio tasks to the log. Whatever happens, the union is closed and
the record removed.

With `config.auto_restart` the process that would be the daemon becomes its supervisor (`supervise`), and `serve` runs
in a child of it, with a `Ledger`. A child that dies, or fails when the mount answers already, leaves mount and record
to the next one, which `_mount_and_run` lets go on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import logging.handlers
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import unionfs
from unionfs.config import MountConfig, as_json
from unionfs.core import sysio
from unionfs.errors import EnvironmentUnfit, MountFailed, UnionError, UsageError, from_exit_code
from unionfs.fuse import native
from unionfs.host import control
from unionfs.host.mountinfo import FUSE_TYPE, Mount, mounted_at, place_of, read_mounts
from unionfs.service import notify
from unionfs.store.mountvolumes import MountedVolumes
from unionfs.volumespec import MountVolumes

if TYPE_CHECKING:
    import trio

    from unionfs.core.bind import BindPoint
    from unionfs.core.union import Union
    from unionfs.fuse.ledger import Ledger
    from unionfs.fuse.ops import UnionOperations
    from unionfs.fuse.restart import Keeper

log = logging.getLogger(__name__)

# How long the mount may take to answer its first request, in seconds.
START_SECONDS = 30.0

# What the daemon listens to while it serves.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

# How many tasks wait for requests, so that none need be started when a handler awaits.
SESSION_TASKS = 10

# How many requests may wait at a time: for copies of data and the like, and for a layer whose server may be away. Each
# has a buffer of its own.
MOST_TASKS = 99
MOST_WAITING = 500

# File systems over others, whose files the kernel does not pass.
STACKED = frozenset(("overlay", "ecryptfs", FUSE_TYPE))

# Environment variable, for tests: not empty lets the native layer work as on a kernel without all that is new.
OLD_KERNEL = "UNIONFS_OLD_KERNEL"

LOG_BYTES = 1 << 20
LOG_MODE = 0o644
SYSTEM_LOG = "/dev/log"

Ready = Callable[[], None]

NO_VOLUMES = MountVolumes()


# --- starting -------------------------------------------------------------------------------------


def start(config: MountConfig, volumes: MountVolumes = NO_VOLUMES) -> None:
    """Mount in the background and return when the mount answers and its volumes are bound.

    Raises the UnionError that stopped the daemon; MountFailed if it ended without a word.
    """
    before = mounted_at(config.mountpoint)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _become_daemon(config, volumes, writer)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        word = pipe.read()
    if not word:
        _clear_up(config.mountpoint, before)
        raise MountFailed(f"the daemon for {config.mountpoint} ended without a word: try --foreground")
    code, message = json.loads(word)
    if code:
        raise from_exit_code(code, message)


def _clear_up(mountpoint: str, before: Mount | None) -> None:
    """Take off the mount that a daemon has left which was killed before it could say a word."""
    from unionfs.service.unmount import clear_dead

    if mounted_at(mountpoint) != before:
        clear_dead(mountpoint)


def _become_daemon(config: MountConfig, volumes: MountVolumes, writer: int) -> NoReturn:
    """Leave the caller's session and serve. Runs in a forked child and never returns."""
    status = 1
    try:
        os.setsid()
        if os.fork():  # a session leader could still be given a terminal
            os._exit(0)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        if null > 2:
            os.close(null)
        if config.auto_restart:
            status = _supervise(config, volumes, writer, lambda _: None)
        else:
            status = _serve_and_tell(config, volumes, writer)
    finally:
        os._exit(status)


def start_in_foreground(config: MountConfig, volumes: MountVolumes = NO_VOLUMES) -> None:
    """Mount and serve until unmounted, and tell the service manager, if there is one, when the mount answers.

    Raises the UnionError that kept the union from being mounted, or from being served on.
    """
    if not config.auto_restart:
        serve(config, lambda: notify.tell(notify.READY), volumes)
        return
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    status = _supervise(config, volumes, writer, notify.tell)
    try:
        word = os.read(reader, 65536)
    except BlockingIOError:
        word = b""
    os.close(reader)
    code, message = json.loads(word) if word else (0, "")
    if code:
        raise from_exit_code(code, message)
    if status:
        raise MountFailed(f"the daemon for {config.mountpoint} has died: the log says more")


def _supervise(config: MountConfig, volumes: MountVolumes, writer: int, tell: Callable[[str], None]) -> int:
    """Have one daemon after the other serve, and `tell` how the mount is; return the exit status of the last one."""
    from unionfs.fuse.ledger import State
    from unionfs.service.supervise import Supervisor

    if not native.load():  # before it is a daemon's: forking takes it
        _telling(writer)(EnvironmentUnfit.exit_code, "--auto-restart needs the native part, which is not built")
        return EnvironmentUnfit.exit_code

    _prepare_process()
    _import_pyfuse3()  # the next daemon is there the sooner, and this process shares the memory with it
    # What is imported later the mount may hide.
    from unionfs.fuse import dispatch, ops, restart  # noqa: F401
    from unionfs.service import unmount  # noqa: F401

    def run(ledger: Ledger) -> int:
        if ledger.state is State.STARTING:
            return _serve_and_tell(config, volumes, writer, ledger)
        ledger.base.discard(writer)  # closed by the first one, so the number may be another's
        return _serve_and_tell(config, volumes, -1, ledger)

    def gone() -> None:
        _unmount(config.mountpoint, supervisor.ledger.dev)
        directory = control.state_directory()
        if directory is not None:
            control.remove(control.record_path(directory, os.getpid()))

    def say(level: int, line: str) -> None:
        with _logging(config, os.getpid(), stays=lambda: True):
            log.log(level, "%s: %s", config.mountpoint, line)

    supervisor = Supervisor(
        run, ready=lambda: tell(notify.READY), ending=lambda: tell(notify.STOPPING), gone=gone, say=say
    )
    try:
        return supervisor.run()
    except OSError as error:
        line = f"can't start a daemon: {error.strerror}"
        if supervisor.serves:
            say(logging.ERROR, line)
        else:
            _telling(writer)(MountFailed.exit_code, line)
        return MountFailed.exit_code


def _telling(writer: int) -> Callable[[int, str], None]:
    """Return what writes the outcome of the start to a pipe, once; -1: there is none."""

    def tell(code: int, message: str) -> None:
        nonlocal writer
        if writer >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(writer, json.dumps([code, message]).encode("ascii"))
            os.close(writer)
            writer = -1

    return tell


def _serve_and_tell(config: MountConfig, volumes: MountVolumes, writer: int, ledger: Ledger | None = None) -> int:
    """Serve, and write the outcome of the start to `writer`; return the process's exit status."""
    tell = _telling(writer)
    try:
        serve(config, lambda: tell(0, ""), volumes, ledger)
    except UnionError as error:
        tell(error.exit_code, str(error))
        return error.exit_code
    except BaseException as error:
        tell(1, f"internal error: {type(error).__name__}: {error}")
        return 1
    return 0


# --- serving --------------------------------------------------------------------------------------


def serve(config: MountConfig, ready: Ready, volumes: MountVolumes = NO_VOLUMES, ledger: Ledger | None = None) -> None:
    """Mount and serve until unmounted; call `ready` once, when the mount answers and its volumes are bound.

    With a ledger that says so the mount is taken over from another daemon, and left to the next one where this fails.

    Raises a UnionError for what keeps the union from being mounted.
    """
    keeper = None
    if ledger is not None:
        from unionfs.fuse.restart import Keeper

        keeper = Keeper(ledger)  # before anything is opened
    owner = os.getpid() if keeper is None else keeper.ledger.supervisor
    with _logging(config, owner, stays=lambda: keeper is not None and keeper.goes_on) as log_file:
        mounted = MountedVolumes(config, volumes)
        life = _Life(config, ready, log_file, volumes.name, mounted, keeper)
        try:
            _open_and_run(config, life)
        except UnionError as error:
            log.error("%s", error)
            raise
        except Exception:
            log.critical("the daemon failed", exc_info=True)
            raise
        finally:
            log.info("%s: ended", config.mountpoint)
            mounted.close()
            if not life.goes_on:
                control.remove(life.record_path)  # from here on the layers are free
            _sync(life.to_sync)  # which may take its time


def _open_and_run(config: MountConfig, life: _Life) -> None:
    _prepare_process()
    old_kernel = bool(os.environ.get(OLD_KERNEL))
    if old_kernel:
        sysio.pretend_old_kernel()
    if life.keeper is not None and life.keeper.resuming:
        passthrough = life.keeper.passthrough  # looking at the layers' paths might lead into the mount
    else:
        passthrough = config.native and _wants_passthrough(config)
        if life.keeper is not None:
            life.keeper.passthrough = passthrough
    native_loaded = config.native and native.load(  # before pyfuse3, or it would not be found first
        passthrough=passthrough, old_kernel=old_kernel
    )
    _import_pyfuse3()
    if config.native:
        from unionfs.fuse import dispatch

        dispatch.install()
    from unionfs.core.union import Union

    life.volumes.prepare()
    if life.keeper is not None:
        from unionfs.fuse.once import KeptUnion

        union: Union = KeptUnion.of(config, life.keeper.past.layers, life.keeper.once)
    else:
        union = Union.open(config)
    try:
        log.info("layers open; native part %s", "loaded" if native_loaded else "not used")
        _mount_and_run(config, union, life)
    finally:
        if not life.goes_on:  # what is open is the next daemon's too
            union.close()


def _sync(fd: int) -> None:
    """Make all durable that is on the file system of upper, as the unmount of an overlay does (``ovl_sync_fs``)."""
    if fd < 0:
        return
    try:
        sysio.sync_file_system(fd)
    except OSError as error:
        log.error("upper can't be synced (%s): what was written last may not be there after a crash", error.strerror)
    os.close(fd)


def _wants_passthrough(config: MountConfig) -> bool:
    """Whether to ask the kernel for passthrough. It makes the mount count as a stacked file system, as kernel
    overlayfs does; on layers that are stacked themselves no file could be passed, so that would be for nothing.
    """
    if config.passthrough != "auto":
        return config.passthrough == "on"
    mounts = read_mounts()
    try:
        place = place_of(config.upper or config.lowers[0], mounts)
    except OSError:
        return False  # it will be said when the layers are opened
    return not any(mount.mount_id == place.mount_id and mount.fstype in STACKED for mount in mounts)


def _mount_and_run(config: MountConfig, union: Union, life: _Life) -> None:
    import pyfuse3
    import trio

    operations = _operations(config, union, life)
    to_sync = union.open_to_sync()  # at the end there may be no descriptor left for it
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a mount must not be left behind: see `_handle_signals`
    place, device = config.mountpoint, -1
    if life.keeper is not None and life.keeper.resuming:
        device = os.dup(life.keeper.past.device)  # the other one stays, whatever becomes of this daemon
        place = f"/dev/fd/{device}"
    with _stderr_captured() as said:
        try:
            pyfuse3.init(operations, place, libfuse_options(config, ro_possible=not life.volumes.needs_fuse))
        except RuntimeError as error:
            raise MountFailed(f"can't mount on {config.mountpoint}: {said() or error}") from None
    try:
        if device >= 0:
            _take_over(operations, device)
        trio.run(life.run, operations)
        life.ended()
    except BaseExceptionGroup as group:
        raise _only_error(group) from group
    finally:
        if not life.goes_on:
            pyfuse3.close(unmount=True)
            if device >= 0 and life.keeper is not None:
                _unmount(config.mountpoint, life.keeper.ledger.dev)
        life.to_sync = to_sync


def _take_over(operations: UnionOperations, device: int) -> None:
    """Go on where another daemon was ended. What the kernel asks comes only after that."""
    assert operations.keeper is not None
    started = time.monotonic()
    native.resume(operations.keeper.past.init)
    gc.disable()  # many objects are made, and none of them is to go
    operations.take_over()
    gc.enable()
    with contextlib.suppress(OSError):  # unmounted meanwhile, as the session will find out
        operations.keeper.have_resent(device)
    log.info("took over %d nodes in %.3f s", operations.counters()["nodes"], time.monotonic() - started)


def _unmount(mountpoint: str, dev: str) -> None:
    """Take the mount off, which libfuse does only for the session that made it."""
    mount = mounted_at(mountpoint)
    if mount is None or mount.fstype != FUSE_TYPE or mount.dev != dev:
        return
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            sysio.unmount(os.fsencode(mountpoint), detach=True)
    else:
        from unionfs.service import unmount

        unmount.detach(mountpoint)


def _operations(config: MountConfig, union: Union, life: _Life) -> UnionOperations:
    if life.volumes.needs_fuse:
        if config.ids.needed:
            raise UsageError("volumes that the daemon serves have owners of their own: leave out mapping and squashing")
        from unionfs.fuse.bind_ops import BindingOperations

        return BindingOperations(union, config)
    from unionfs.fuse.ops import UnionOperations

    return UnionOperations(union, config, life.keeper)


class _Life:
    """The trio side of one mount: its session, its signals, its readiness."""

    def __init__(
        self,
        config: MountConfig,
        ready: Ready,
        log_file: str | None,
        name: str | None,
        volumes: MountedVolumes,
        keeper: Keeper | None = None,
    ) -> None:
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
        """Serve until the session ends."""
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


def libfuse_options(config: MountConfig, *, ro_possible: bool = True) -> set[str]:
    """Return the -o options for libfuse: the mount shows as type fuse.unionfs and source `config.fsname`.

    `ro_possible` is False where the kernel must let changes through, for bind paths that the daemon serves.
    """
    name = config.fsname.replace("\\", "\\\\").replace(",", "\\,")
    options = {f"fsname={name}", f"subtype={FUSE_TYPE.removeprefix('fuse.')}", "default_permissions"}
    options |= set(config.mount_options)
    if config.allow_other:
        options.add("allow_other")
    if config.read_only and ro_possible:
        options.add("ro")
    return options


def _only_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one exception in a group of one; the group itself if there are more."""
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
        inner = inner.exceptions[0]
    return inner


# --- the process ----------------------------------------------------------------------------------


def _prepare_process() -> None:
    """Take what the daemon needs: all descriptors it may have, no umask, no directory kept busy."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.umask(0)
    os.chdir("/")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _import_pyfuse3() -> None:
    try:
        import pyfuse3  # noqa: F401
    except ImportError as error:
        if "libfuse3" in str(error):
            raise EnvironmentUnfit("libfuse 3 is missing: install it (Debian: apt install fuse3)") from None
        raise EnvironmentUnfit(f"pyfuse3 can't be loaded ({error}): reinstall it with pip") from None


@contextlib.contextmanager
def _stderr_captured() -> Iterator[Callable[[], str]]:
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


# --- log and record -------------------------------------------------------------------------------


@contextlib.contextmanager
def _logging(config: MountConfig, owner: int, *, stays: Callable[[], bool]) -> Iterator[str | None]:
    """Send the log where it belongs while the daemon runs; the value is the log file's name, if it is one.

    With --foreground that is standard error, else --log-file, else the system log, else a small file beside the record,
    which is that of process `owner`. `stays` tells at the end whether that file is still needed.
    """
    handler, path = _log_handler(config, owner)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(config.log_level.upper())
    logging.getLogger("pyfuse3").setLevel(max(logging.INFO, root.level))  # its debug lines are about its own tasks
    try:
        yield path
    finally:
        root.removeHandler(handler)
        handler.close()
        if path is not None and path != config.log_file and not stays():
            control.remove_log(path)


def _log_handler(config: MountConfig, owner: int) -> tuple[logging.Handler, str | None]:
    """Return the handler and, if it writes to a file, the file's name."""
    layout = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler: logging.Handler
    path = config.log_file
    if path is not None:
        handler = _file_handler(path)
    elif config.foreground:
        handler = logging.StreamHandler()
    elif os.path.exists(SYSTEM_LOG):
        handler = logging.handlers.SysLogHandler(SYSTEM_LOG)
        handler.ident = f"unionfs[{os.getpid()}]: "
        layout = "%(levelname)s %(name)s: %(message)s"
    elif (path := _default_log(owner)) is not None:
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1, delay=True)
    else:
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter(layout))
    handler.addFilter(_is_news)
    return handler, path


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a record is worth keeping: not that the kernel took back a request that was being answered.

    An interrupted request, or one aborted by the unmount, makes the reply fail with ENOENT; pyfuse3 reports that.
    """
    return record.name != "pyfuse3" or not record.getMessage().endswith("failed with No such file or directory")


def _file_handler(path: str) -> logging.Handler:
    """Return a handler for a file of the user's; it follows when the file is renamed, as logrotate does."""
    try:
        return _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"can't write the log file {path}: {error.strerror}") from None


class _LogFile(logging.handlers.WatchedFileHandler):
    """Makes a new file, also when the umask is the daemon's, one that only its owner may write to."""

    def _open(self) -> TextIOWrapper:
        return TextIOWrapper(
            open(self.baseFilename, "ab", opener=_for_log),
            encoding=self.encoding,
            errors=self.errors,
            write_through=True,
        )


def _for_log(path: str, flags: int) -> int:
    return os.open(path, flags, LOG_MODE)


def _default_log(owner: int) -> str | None:
    directory = control.state_directory()
    if directory is None:
        return None
    return control.log_path(control.record_path(directory, owner))


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
