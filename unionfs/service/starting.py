"""From the command to a mount that answers: the daemon is made, and its word is waited for.

`start` forks twice, and the command waits on a pipe for the daemon's word. That is either that the mount answers, or
the error that stopped it; so the command never returns before the outcome is known.

With `config.auto_restart` the process that would be the daemon becomes its supervisor (`supervise`), and `serve` runs
in a child of it, with a `Ledger`. A child that dies, or fails when the mount answers already, leaves mount and record
to the next one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from unionfs.config import MountConfig
from unionfs.errors import EnvironmentUnfit, MountFailed, UnionError, from_exit_code
from unionfs.fuse import native
from unionfs.host import control
from unionfs.host.mountinfo import Mount, mounted_at
from unionfs.service import logs, notify, process
from unionfs.service.daemon import NO_VOLUMES, serve
from unionfs.volumespec import MountVolumes

if TYPE_CHECKING:
    from unionfs.fuse.ledger import Ledger

log = logging.getLogger(__name__)


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

    process.prepare()
    _import_all()
    from unionfs.service import unmount

    def run(ledger: Ledger) -> int:
        if ledger.state is State.STARTING:
            return _serve_and_tell(config, volumes, writer, ledger)
        ledger.base.discard(writer)  # closed by the first one, so the number may be another's
        return _serve_and_tell(config, volumes, -1, ledger)

    def gone() -> None:
        unmount.take_off(config.mountpoint, supervisor.ledger.dev)
        directory = control.state_directory()
        if directory is not None:
            control.remove(control.record_path(directory, os.getpid()))

    def say(level: int, line: str) -> None:
        with logs.open_log(config, os.getpid(), stays=lambda: True):
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


def _import_all() -> None:
    """Import what daemons need: the next one is there the sooner and shares the memory, and the mount may hide it."""
    process.import_pyfuse3()
    from unionfs.fuse import dispatch, ops, restart  # noqa: F401
    from unionfs.service import unmount  # noqa: F401


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
