"""`python -m unionfs` and the `unionfs` command: errors become one line and an exit status."""

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
    """Run the command line; exits with a status from `errors.EXIT_CODES`."""
    _open_standard_streams()
    from unionfs.cli import run

    try:
        status = run()
    except UnionError as error:
        print(f"unionfs: {one_line(str(error))}", file=sys.stderr)
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    _leave(status)


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
