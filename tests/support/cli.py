"""Running the command line as a person does: a process, its exit status, and the one line it says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.mounts import environment

COMMAND_SECONDS = 60.0


@dataclass(frozen=True)
class Said:
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str


def unionfs(*words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> Said:
    """Run `unionfs WORDS...` and wait for it."""
    return program([sys.executable, "-m", "unionfs", *map(str, words)], cwd=cwd, env=env)


def program(words: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> Said:
    """Run any program in the environment of `unionfs`, plus `env`."""
    return ended(words, cwd=cwd, env=environment() | (env or {}), seconds=COMMAND_SECONDS)


def ended(
    words: list[str], *, cwd: Path | None, env: dict[str, str], seconds: float, errors: str = "surrogateescape"
) -> Said:
    """Run a program, which gets nothing to read; how it ended.

    Args:
        words: the program and its arguments.
        cwd: where it runs.
        env: its whole environment.
        seconds: how long it may take.
        errors: what becomes of what it says that is no UTF-8.

    Raises:
        FileNotFoundError: there is no such program.
        subprocess.TimeoutExpired: it took longer; it was killed.
    """
    done = subprocess.run(
        words,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors=errors,
        timeout=seconds,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr)


def in_private_mounts(script: str, *words: str | Path, env: dict[str, str] | None = None) -> Said:
    """Run `unionfs WORDS...` after shell commands in a mount namespace of its own, which ends with it."""
    command = [sys.executable, "-m", "unionfs", *map(str, words)]
    shell = ["unshare", "--mount", "--propagation", "private", "bash", "-e", "-c", f'{script}\nexec "$@"', "sh"]
    return program([*shell, *command], env=env)


def user_namespaces() -> bool:
    """Whether user namespaces can be made here: the kernel refuses them in a chroot (current_chrooted)."""
    return subprocess.run(["unshare", "-U", "true"], capture_output=True, check=False).returncode == 0


def refused(said: Said, status: int, *parts: str) -> None:
    """Assert that a command ended with `status` and one clear line that has all `parts`."""
    assert said.status == status, said
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("unionfs: ")
    for part in parts:
        assert part in lines[0], f"{part!r} is missing in {lines[0]!r}"


def listed(mountpoint: Path) -> list[dict[str, Any]]:
    """What `unionfs ls --json` says of one mount point."""
    said = unionfs("ls", "--json")
    assert said.status == 0, said
    return [entry for entry in json.loads(said.out) if entry["mountpoint"] == str(mountpoint)]
