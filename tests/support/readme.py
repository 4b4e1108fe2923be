"""The README's commands, and a place to run them: a mount namespace with a /srv, a /mnt and a store of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.mounts import environment
from tests.support.people import REPOSITORY

PROLOGUE = """
mkdir -p /var/lib/unionfs /srv
for place in /var/lib/unionfs /srv /mnt /run; do mount -t tmpfs -o mode=755 tmpfs $place; done
unionfs() { "$PYTHON" -m unionfs "$@"; }
ssh() { shift; "$@"; }
clear() { for name in merged other third; do ! mountpoint -q $name || unionfs umount --rm $name; done; }
trap clear EXIT
set -x
"""


def section(title: str) -> str:
    """The text below a heading of the second level."""
    text = "\n" + (REPOSITORY / "README.md").read_text()
    assert f"\n## {title}\n" in text
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def tables(text: str) -> list[list[list[str]]]:
    """The tables in a text, each a list of rows without its head; cells as they stand there."""
    found = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        rows = [re.split(r" *(?<!\\)\| *", line.strip())[1:-1] for line in block.splitlines()]
        found.append([[cell.replace("\\|", "|") for cell in row] for row in rows[2:]])
    return found


def quoted(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


def indented(text: str) -> list[str]:
    """The lines of the code blocks in a text."""
    return [line.strip() for line in re.findall(r"^    (.*)$", text, re.MULTILINE) if line.strip()]


def run(script: str, where: Path) -> str:
    """Run a script in namespaces of its own, where `unionfs` is ours; return all it says."""
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-euo", "pipefail", "-c", PROLOGUE + script],
        cwd=where,
        env=environment() | {"PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout
