"""The daemon itself: `serve` opens the layers, mounts, and is there until the mount has ended.

The layers come first, because the mount may hide them. pyfuse3 and trio are imported only then. Whatever happens, the
union is closed and the record removed, unless another daemon is to go on (``--auto-restart``): then this one leaves
mount and record to it, and `_mount_and_run` goes on from where one before was ended.

How the process comes to be is said in `starting`, what happens while it serves in `session`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Final

from unionfs.config import MountConfig
from unionfs.core import sysio
from unionfs.errors import MountFailed, UnionError, UsageError
from unionfs.fuse import native
from unionfs.host import control
from unionfs.host.mountinfo import FUSE_TYPE, place_of, read_mounts
from unionfs.service import logs, process
from unionfs.service.session import SIGNALS, Ready, Session
from unionfs.store.mountvolumes import MountedVolumes
from unionfs.volumespec import MountVolumes

if TYPE_CHECKING:
    from unionfs.core.union import Union
    from unionfs.fuse.ledger import Ledger
    from unionfs.fuse.ops import UnionOperations
    from unionfs.fuse.restart import Keeper

log = logging.getLogger(__name__)

# File systems over others, whose files the kernel does not pass.
STACKED: Final = frozenset(("overlay", "ecryptfs", FUSE_TYPE))

# Environment variable, for tests: not empty lets the native layer work as on a kernel without all that is new.
OLD_KERNEL: Final = "UNIONFS_OLD_KERNEL"

NO_VOLUMES: Final = MountVolumes()


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
    with logs.open_log(config, owner, stays=lambda: keeper is not None and keeper.goes_on) as log_file:
        mounted = MountedVolumes(config, volumes)
        session = Session(config, ready, log_file, volumes.name, mounted, keeper)
        try:
            _open_and_run(config, session)
        except UnionError as error:
            log.error("%s", error)
            raise
        except Exception:
            log.critical("the daemon failed", exc_info=True)
            raise
        finally:
            log.info("%s: ended", config.mountpoint)
            mounted.close()
            if not session.goes_on:
                control.remove(session.record_path)  # from here on the layers are free
            _sync(session.to_sync)  # which may take its time


def _open_and_run(config: MountConfig, session: Session) -> None:
    process.prepare()
    native_loaded = _load_native(config, session.keeper)  # before pyfuse3, or it would not be found first
    process.import_pyfuse3()
    if config.native:
        from unionfs.fuse import dispatch

        dispatch.install()
    session.volumes.prepare()
    union = _open_union(config, session.keeper)
    try:
        log.info("layers open; native part %s", "loaded" if native_loaded else "not used")
        _mount_and_run(config, union, session)
    finally:
        if not session.goes_on:  # what is open is the next daemon's too
            union.close()


def _load_native(config: MountConfig, keeper: Keeper | None) -> bool:
    """Load the native layer, if it may be; tell whether it is there."""
    old_kernel = bool(os.environ.get(OLD_KERNEL))
    if old_kernel:
        sysio.pretend_old_kernel()
    if not config.native:
        return False
    if keeper is not None and keeper.resuming:
        passthrough = keeper.passthrough  # looking at the layers' paths might lead into the mount
    else:
        passthrough = _wants_passthrough(config)
        if keeper is not None:
            keeper.passthrough = passthrough
    return native.load(passthrough=passthrough, old_kernel=old_kernel)


def _open_union(config: MountConfig, keeper: Keeper | None) -> Union:
    if keeper is not None:
        from unionfs.fuse.once import KeptUnion

        return KeptUnion.of(config, keeper.past.layers, keeper.once)
    from unionfs.core.union import Union

    return Union.open(config)


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


def _mount_and_run(config: MountConfig, union: Union, session: Session) -> None:
    import pyfuse3
    import trio

    operations = _operations(config, union, session)
    to_sync = union.open_to_sync()  # at the end there may be no descriptor left for it
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a mount must not be left behind: see `session`
    place, device = config.mountpoint, -1
    if session.keeper is not None and session.keeper.resuming:
        device = os.dup(session.keeper.past.device)  # the other one stays, whatever becomes of this daemon
        place = f"/dev/fd/{device}"
    with process.stderr_captured() as said:
        try:
            pyfuse3.init(operations, place, libfuse_options(config, ro_possible=not session.volumes.needs_fuse))
        except RuntimeError as error:
            raise MountFailed(f"can't mount on {config.mountpoint}: {said() or error}") from None
    try:
        if device >= 0:
            _take_over(operations, device)
        trio.run(session.run, operations)
        session.ended()
    except BaseExceptionGroup as group:
        raise _only_error(group) from group
    finally:
        if not session.goes_on:
            pyfuse3.close(unmount=True)
            if device >= 0 and session.keeper is not None:
                from unionfs.service import unmount

                # libfuse does so only for the session that made the mount.
                unmount.take_off(config.mountpoint, session.keeper.ledger.dev)
        session.to_sync = to_sync


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


def _operations(config: MountConfig, union: Union, session: Session) -> UnionOperations:
    if session.volumes.needs_fuse:
        if config.ids.needed:
            raise UsageError("volumes that the daemon serves have owners of their own: leave out mapping and squashing")
        from unionfs.fuse.bind_ops import BindingOperations

        return BindingOperations(union, config)
    from unionfs.fuse.ops import UnionOperations

    return UnionOperations(union, config, session.keeper)


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
