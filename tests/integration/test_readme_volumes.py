"""The README's section on volumes, command by command, in a mount namespace with a /srv and a store of its own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support.people import REPOSITORY
from tests.support.readme import indented, run, section

NAMES = ("base", "changes", "merged", "other-base", "other-changes", "other", "third-base", "third-changes", "third")


def blocks() -> dict[str, list[str]]:
    """Heading → lines of the commands below it, of the section on volumes."""
    found: dict[str, list[str]] = {}
    for part in section("Volumes").split("\n### ")[1:]:
        heading, _, body = part.partition("\n")
        found[heading] = [line for line in indented(body) if re.match(r"(unionfs|echo|cat|tar|touch) ", line)]
    return {heading: lines for heading, lines in found.items() if lines}


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
