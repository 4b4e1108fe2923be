"""Where a daemon's log goes: standard error, the user's file, the system log, or a small file beside the record."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from typing import Final

from unionfs.config import MountConfig
from unionfs.errors import UsageError
from unionfs.host import control

LOG_BYTES: Final = 1 << 20
LOG_MODE: Final = 0o644
SYSTEM_LOG: Final = "/dev/log"


@contextlib.contextmanager
def open_log(config: MountConfig, owner: int, *, stays: Callable[[], bool]) -> Iterator[str | None]:
    """Send the log where it belongs while the daemon runs; the value is the log file's name, if it is one.

    With --foreground that is standard error, else --log-file, else the system log, else a small file beside the record,
    which is that of process `owner`. `stays` tells at the end whether that file is still needed.

    Raises UsageError for a log file of the user's that can't be written.
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
