"""A volume command that is killed leaves the old state or the new one, and nothing half-made."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import FileSystemMaker
from tests.support.mounts import environment
from tests.support.people import REPOSITORY
from tests.support.volume_kills import FILES, STEPS, Ground

MODULE = [sys.executable, "-m", "tests.support.volume_kills"]
SECONDS = 6.0


@pytest.mark.parametrize("step", STEPS)
def test_kill_at_every_instant(step: str, on_file_system: FileSystemMaker) -> None:
    done = subprocess.run(
        [*MODULE, step, str(on_file_system("tmpfs"))],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 10


def test_kills_at_random_among_concurrent_commands(ground: Path) -> None:
    place = Ground(ground)
    chance = random.Random(7)

    def start(seed: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*MODULE, "random", place.store.root, str(seed)], cwd=REPOSITORY, env=environment())

    workers = [start(seed) for seed in range(3)]
    end = time.monotonic() + SECONDS
    kills = 0
    try:
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.3, 0.6))
            victim = chance.randrange(len(workers))
            assert workers[victim].poll() is None, "a worker ended by itself"
            workers[victim].send_signal(signal.SIGKILL)
            workers[victim].wait()
            kills += 1
            workers[victim] = start(100 + kills)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert kills > 3
    for name, content in place.state().items():
        assert name in ("aa", "bb", "cc")
        assert content in ({}, FILES)
