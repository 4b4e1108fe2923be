"""Exchange pairs of names as fast as it goes: whoever races somebody else's look at a name against its use.

    python -m tests.support.swapper ONE OTHER [ONE OTHER...] [< names, one a line]

It ends when its standard output is closed, or on SIGTERM, and prints how many exchanges it made. Names that are not there (for the
moment) are passed over.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.mounts import environment
from tests.support.people import REPOSITORY

_AT_FDCWD = -100
_EXCHANGE = 2


class Count:
    """How many exchanges a swapper made, once it has ended."""

    exchanges = 0


@contextmanager
def swapping(pairs: Iterable[tuple[Path, Path]]) -> Iterator[Count]:
    """Have a process exchange these pairs while the block runs."""
    count = Count()
    lines = "".join(f"{one}\n{other}\n" for one, other in pairs)
    command = [sys.executable, "-m", "tests.support.swapper"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment()
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(lines)
        process.stdin.close()
        assert process.stdout.readline() == "swapping\n"
        try:
            yield count
        finally:
            process.terminate()
            count.exchanges = int(process.stdout.read())


def main() -> int:
    """Exchange until told to end."""
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    names = [line.rstrip("\n").encode(errors="surrogateescape") for line in sys.stdin]
    pairs = list(zip(names[::2], names[1::2], strict=True))
    exchange = ctypes.CDLL(None).renameat2
    print("swapping", flush=True)
    done = 0
    while not ended:
        for one, other in pairs:
            done += exchange(_AT_FDCWD, one, _AT_FDCWD, other, _EXCHANGE) == 0
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
