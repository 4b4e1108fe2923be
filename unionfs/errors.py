"""Errors that a person sees, and the exit status that belongs to each.

A `UnionError` stops a command before or while a union is set up. Its message is one line that names the bad
thing and says what to do about it. Errors of a single file operation are no business of this module: those
are plain `OSError`.
"""

from __future__ import annotations

from typing import ClassVar


class UnionError(Exception):
    """Something keeps a command from doing what was asked.

    Its text is one clear line without a trailing full stop; `exit_code` is the status the command ends with.
    """

    exit_code: ClassVar[int] = 1


class UsageError(UnionError):
    """The command line, an option or a combination of options makes no sense."""

    exit_code = 2


class LayerError(UnionError):
    """A layer can't be used: missing, no directory, overlapping another one, or on an unfit file system."""

    exit_code = 3


class BusyError(UnionError):
    """A layer, work directory or mount point is in use by somebody else."""

    exit_code = 4


class EnvironmentUnfit(UnionError):
    """This machine lacks what every mount needs: the FUSE device, libfuse, or pyfuse3."""

    exit_code = 5


class MountFailed(UnionError):
    """The kernel refused the mount or the unmount, or the daemon ended before the mount answered."""

    exit_code = 6


class VolumeError(UnionError):
    """A volume command can't be done: no such volume, the name is taken, or a bad archive."""

    exit_code = 7


# What `--help` and the README print; the tests compare them with the classes above.
EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "internal error, please report it",
    2: "usage: the command line or an option makes no sense",
    3: "layers: missing, no directory, overlapping, or on a file system that can't hold them",
    4: "busy: upper, work or mount point is in use",
    5: "environment: no /dev/fuse, libfuse or pyfuse3",
    6: "the mount or unmount failed",
    7: "volumes: no such volume, the name is taken, or a bad archive",
}

_BY_CODE: dict[int, type[UnionError]] = {
    cls.exit_code: cls
    for cls in (UnionError, UsageError, LayerError, BusyError, EnvironmentUnfit, MountFailed, VolumeError)
}


def one_line(text: str) -> str:
    """Return `text` fit for one line of a terminal: names may hold line breaks and other control characters."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def from_exit_code(code: int, message: str) -> UnionError:
    """Return the error whose class has exit status `code`, so that one can cross a process border."""
    return _BY_CODE.get(code, UnionError)(message)
