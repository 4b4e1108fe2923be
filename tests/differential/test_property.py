"""Random sequences on this union and on kernel overlayfs: every outcome, tree and upper layer must be equal.

Environment: ``UNIONFS_FUZZ_SEQUENCES`` how many sequences a layout gets (the default is a short profile);
``UNIONFS_FUZZ_SEED`` where they start; ``UNIONFS_FUZZ_FS`` what the layers lie on: tmpfs, ext4, xfs or btrfs;
``UNIONFS_FUZZ_OPTIONS`` further options of this union; ``UNIONFS_FUZZ_SECONDS`` after how long no further sequence begins.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from . import deviations
from .machine import Machine
from .operations import Sequence, sequences

SEQUENCES = int(os.environ.get("UNIONFS_FUZZ_SEQUENCES", "60"))
MOST_SECONDS = float(os.environ.get("UNIONFS_FUZZ_SECONDS", "inf"))
SEED = int(os.environ.get("UNIONFS_FUZZ_SEED", "1"))

#: After its first ten examples hypothesis fills most of its budget with slight mutations of what it had. Many short runs
#: with seeds of their own give sequences that have nothing in common.
CHUNK = 10

FILE_SYSTEM = os.environ.get("UNIONFS_FUZZ_FS", "tmpfs")


#: A sequence takes less than a second; the rest is making and unmounting the file systems.
SECONDS = 300 + 2 * SEQUENCES


@pytest.mark.fault_seconds(SECONDS)
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("split", [False, True], ids=["one file system", "lowers on others"])
def test_equals_overlayfs(tmp_path: Path, split: bool) -> None:
    """Sequences drawn by hypothesis; a failing one is shrunk and printed in the form that ``replay`` reads."""
    print(f"UNIONFS_FUZZ_SEED={SEED} UNIONFS_FUZZ_SEQUENCES={SEQUENCES} UNIONFS_FUZZ_FS={FILE_SYSTEM}")
    machine = Machine(tmp_path, "ours", kind=FILE_SYSTEM, split=split)

    def run_some(first: int) -> None:
        @seed(first)
        @settings(
            max_examples=CHUNK,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(sequences(without=deviations.LEFT_OUT))
        def run(sequence: Sequence) -> None:
            machine.run(sequence)

        run()

    # The drivers change both in this very process.
    done = 0
    umask, directory = os.umask(0o022), os.open(".", os.O_PATH)
    began = time.monotonic()
    try:
        machine.start()
        began = time.monotonic()
        for first in range(SEED, SEED + SEQUENCES, CHUNK):
            if time.monotonic() - began > MOST_SECONDS:
                break
            run_some(first)
            done = first + CHUNK - SEED
    finally:
        machine.stop()
        os.umask(umask)
        os.fchdir(directory)
        os.close(directory)
    print(f"{done} sequences in {time.monotonic() - began:.0f} s")
    assert not machine.late, "\n".join(str(late) for late in machine.late)
