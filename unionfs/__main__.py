"""The programs' entry points, `python -m unionfs` among them: errors become one line and an exit status."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

from unionfs.errors import UnionError, one_line


def _open_standard_streams() -> None:
    """Open what the caller has closed of descriptors 0 to 2, lest a pipe or a layer gets one of these numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")  # names need not be UTF-8


def main() -> NoReturn:
    """Run the command line; exits with a status from `errors.EXIT_CODES`, or mount(8)'s if that is who calls."""
    _open_standard_streams()
    from unionfs.commands import cli

    if _is_mount8(sys.argv[1:]) and not cli.is_command(sys.argv[1]):
        _help_mount(sys.argv[1:])
    try:
        status = cli.run()
    except UnionError as error:
        status = _said(error)
    except KeyboardInterrupt:
        status = 130
    _leave(status)


def mount_helper() -> NoReturn:
    """Mount as /sbin/mount.fuse.unionfs, called by mount(8); exits with one of its statuses."""
    _open_standard_streams()
    _help_mount(sys.argv[1:])


def overlay() -> NoReturn:
    """Mount for podman and buildah, in place of fuse-overlayfs; exits with a status from `errors.EXIT_CODES`."""
    _open_standard_streams()
    from unionfs.commands import podman_cli

    status = 0
    try:
        podman_cli.run(sys.argv[1:])
    except UnionError as error:
        status = _said(error)
    except KeyboardInterrupt:
        status = 130
    _leave(status)


def _is_mount8(words: list[str]) -> bool:
    """Whether a command line has the form in which /sbin/mount.fuse calls the program that a type names."""
    return len(words) == 4 and words[2] == "-o" and not words[0].startswith("-")


def _help_mount(words: list[str]) -> NoReturn:
    from unionfs.commands import mount8

    status = 0
    try:
        mount8.run(mount8.read_call(words))
    except UnionError as error:
        _said(error)
        status = mount8.status_of(error)
    except KeyboardInterrupt:
        status = mount8.INTERRUPTED
    _leave(status)


def _said(error: UnionError) -> int:
    """Say what is wrong in one line, and return the exit status."""
    print(f"unionfs: {one_line(str(error))}", file=sys.stderr)
    return error.exit_code


def _leave(status: int) -> NoReturn:
    """End at once: Python's own end takes down module by module, a tenth of the time that `mount` takes."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # Python says so, and ends with a status of its own
        sys.exit(status)
    os._exit(status)


if __name__ == "__main__":
    main()
