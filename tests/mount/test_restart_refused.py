"""What `--auto-restart` does not work with, or on: one clear line each."""

from __future__ import annotations

import os

import pytest

from tests.support.cli import refused, unionfs
from tests.support.mounts import Stack


@pytest.mark.expected_log("needs Linux 6.9")
def test_an_old_kernel(ours: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIONFS_OLD_KERNEL", "1")
    said = unionfs("mount", "--auto-restart", "--work", ours.work, ours.lower, ours.up, ours.mnt)
    refused(said, 5, "--auto-restart needs Linux 6.9")
    said = unionfs("mount", "--auto-restart", "-f", "--work", ours.work, ours.lower, ours.up, ours.mnt)
    assert said.status == 5
    assert "--auto-restart needs Linux 6.9" in said.err
    assert not os.path.ismount(ours.mnt)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["-o", "volatile"], "volatile"),
        (["-o", "lower=watch"], "lower=watch"),
        (["-o", "native=off"], "native=off"),
        (["--name", "some"], "--name"),
        (["-v", "/usr:/usr"], "volumes"),
    ],
)
def test_options(ours: Stack, words: list[str], what: str) -> None:
    said = unionfs("mount", "--auto-restart", *words, "--work", ours.work, ours.lower, ours.up, ours.mnt)
    refused(said, 2, what)


@pytest.mark.expected_log("slow or remote")
def test_a_slow_lower(ours: Stack) -> None:
    words = ["-o", "slow_lower=on", "--work", ours.work, ours.lower, ours.up, ours.mnt]
    refused(unionfs("mount", "--auto-restart", *words), 5, "--auto-restart", "slow or remote")
    assert not os.path.ismount(ours.mnt)
