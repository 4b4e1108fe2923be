"""Runs a sequence that a failed test printed: ``python -m tests.differential.replay FILE [--trace]``, as root."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from .machine import Difference, Machine
from .operations import parse


def main() -> int:
    """Replay the sequence in a file; status 1 when the sides differ."""
    options = argparse.ArgumentParser(prog="python -m tests.differential.replay", description=__doc__)
    options.add_argument("file", type=Path, help="text that contains a printed sequence")
    options.add_argument("--trace", action="store_true", help="print every operation with both outcomes")
    options.add_argument("--subject", default="ours", choices=("ours", "kernel", "fuse-overlayfs"))
    options.add_argument("--fs", default="tmpfs", choices=("tmpfs", "ext4", "xfs", "btrfs"))
    options.add_argument("--split", action="store_true", help="every lower layer on its own file system")
    args = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="unionfs-replay-") as directory:
        machine = Machine(Path(directory), args.subject, kind=args.fs, split=args.split, pool=4)
        try:
            machine.start()
            machine.run(parse(args.file.read_text()), trace=args.trace)
        except Difference as difference:
            print(difference.what)
            return 1
        finally:
            machine.stop()
        for late in machine.late:
            print(late.what)
        return 1 if machine.late else 0


if __name__ == "__main__":
    sys.exit(main())
