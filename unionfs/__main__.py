"""`python -m unionfs` and the `unionfs` command: errors become one line and an exit status."""

from __future__ import annotations

import sys

from unionfs.errors import UnionError, one_line


def main() -> None:
    """Run the command line; exits with a status from `errors.EXIT_CODES`."""
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    from unionfs.cli import app

    try:
        app(prog_name="unionfs")
    except UnionError as error:
        print(f"unionfs: {one_line(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
