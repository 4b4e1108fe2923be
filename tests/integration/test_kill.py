"""The daemon killed in the midst of work: nothing that was finished is lost, nothing is seen half done."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.crashing import allowed, found, lower_tree
from tests.support.cli import Said, unionfs
from tests.support.mounts import Stack, environment, wait_gone
from tests.support.snapshot import assert_same, snapshot

ROUNDS = 8
LONGEST_WORK_SECONDS = 2.0


def killed_at_work(stack: Stack, journal: Path, seed: int) -> None:
    """Start the workload in the mount, and kill the daemon at a random moment."""
    words = [sys.executable, "-m", "tests.integration.crashing", str(stack.mnt), str(journal), str(seed)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment()) as worker:
        while not (journal.exists() and journal.stat().st_size):
            assert worker.poll() is None
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, LONGEST_WORK_SECONDS))
        daemon = stack.daemon()
        os.kill(daemon, signal.SIGKILL)
        assert wait_gone(daemon)
        said, _ = worker.communicate(timeout=30)
    assert "[Errno 107]" in said or "[Errno 103]" in said, said


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_daemon_killed(ours: Stack, check_by_overlay: Callable[[Stack], Path], seed: int) -> None:
    """After `umount` and a new mount each file is wholly old or new, and overlayfs agrees."""
    for name, data in lower_tree().items():
        path = ours.lower / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    ours.mount()
    journal = ours.base / "journal"
    killed_at_work(ours, journal, seed)
    assert unionfs("umount", ours.mnt) == Said(0, "", f"unionfs: cleared the dead mount on {ours.mnt}\n")
    ours.mounted = False

    root = ours.mount()
    assert os.listdir(ours.work / "work") == []
    assert found(root) in allowed(journal), explained(found(root), allowed(journal))
    view = snapshot(root)
    ours.umount()
    assert os.listdir(ours.work / "work") == []
    assert_same(view, snapshot(check_by_overlay(ours)))


def explained(tree: dict[str, str], states: list[dict[str, str]]) -> str:
    """Where a tree differs from each of the states that it might be in."""
    unlike = [{name for name in tree.keys() | state.keys() if tree.get(name) != state.get(name)} for state in states]
    return f"unlike before: {sorted(unlike[0])}, unlike after: {sorted(unlike[1])}"
