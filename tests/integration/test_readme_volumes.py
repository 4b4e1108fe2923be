"""The README's section on volumes, command by command, in a mount namespace with a /srv and a store of its own."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import environment
from tests.support.people import REPOSITORY

NAMES = ("base", "changes", "merged", "other-base", "other-changes", "other", "third-base", "third-changes", "third")

PROLOGUE = """
mkdir -p /var/lib/unionfs /srv
mount -t tmpfs -o mode=755 tmpfs /var/lib/unionfs
mount -t tmpfs -o mode=755 tmpfs /srv
mount -t tmpfs -o mode=755 tmpfs /run
unionfs() { "$PYTHON" -m unionfs "$@"; }
ssh() { shift; "$@"; }
clear() { for name in merged other third; do ! mountpoint -q $name || unionfs umount --rm $name; done; }
trap clear EXIT
set -x
"""


def blocks() -> dict[str, list[str]]:
    """Heading → lines of the commands below it, of the section on volumes."""
    text = (REPOSITORY / "README.md").read_text()
    section = text.partition("\n## Volumes\n")[2].partition("\n## ")[0]
    found: dict[str, list[str]] = {}
    for part in section.split("\n### ")[1:]:
        heading, _, body = part.partition("\n")
        lines = [line.strip() for line in re.findall(r"^    (.*)$", body, re.MULTILINE)]
        found[heading] = [line for line in lines if re.match(r"(unionfs|echo|cat|tar|touch) ", line)]
    return {heading: lines for heading, lines in found.items() if lines}


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
        timeout=100,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture
def where(ground: Path) -> Path:
    for name in NAMES:
        (ground / name).mkdir()
    (ground / "base/app").mkdir()
    (ground / "base/app/program").write_text("from the image")
    return ground


def test_the_section_has_what_is_tested() -> None:
    assert list(blocks()) == [
        "Choose the -v or the --mount flag",
        "Create and manage volumes",
        "Start a union with a volume",
        "Share volumes between unions",
        "Use a read-only volume",
        "Back up, restore, or migrate volumes",
    ]


@pytest.mark.parametrize("line", blocks()["Choose the -v or the --mount flag"])
def test_choose(where: Path, line: str) -> None:
    # What other than -v makes a missing directory?
    before = "mkdir -p /srv/data; " if "--mount" in line else ""
    run(f"{before}{line}\nunionfs inspect merged\n", where)


def test_create_and_manage(where: Path) -> None:
    said = run("\n".join(blocks()["Create and manage volumes"]), where)
    asked = (
        (REPOSITORY / "README.md").read_text().partition("`inspect` prints what `docker volume inspect` does:\n\n")[2]
    )
    printed = "\n".join(line[4:] for line in asked.partition("\n\n")[0].splitlines())
    same = r'"CreatedAt": "[0-9T:+-]+Z?"'
    assert re.sub(same, "", printed).strip() in re.sub(same, "", said)


def test_start(where: Path) -> None:
    said = run("\n".join(blocks()["Start a union with a volume"]), where)
    assert said.rstrip().splitlines().count("kept") == 1
    assert not (where / "changes/app/file").exists()


def test_share(where: Path) -> None:
    said = run("\n".join(blocks()["Share volumes between unions"]) + "\ncat other/app/program\n", where)
    assert said.splitlines().count("hello") == 2
    assert "from the image" in said


def test_read_only(where: Path) -> None:
    said = run("\n".join(blocks()["Use a read-only volume"]), where)
    assert '"RW": false' in said
    assert "Read-only file system" in said


def test_back_up_and_restore(where: Path) -> None:
    lines = blocks()["Back up, restore, or migrate volumes"]
    seed = "unionfs volume create my-vol; echo precious > /var/lib/unionfs/volumes/my-vol/_data/file"
    check = "; ".join(
        f"grep precious /var/lib/unionfs/volumes/{shlex.quote(name)}/_data/file"
        for name in ("new-vol", "other-vol", "my-vol")
    )
    said = run("\n".join([seed, *lines, check]), where)
    assert "app/file" in said
    assert "var/log/" in said
