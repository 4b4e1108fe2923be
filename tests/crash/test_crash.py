"""`make crash` in short, the cases that it once found, and that it sees what it is there to see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.crash.site import State, fits, layer_faults, touched
from tests.crash.workload import CHAPTERS
from tests.support.cli import Said
from tests.support.mounts import can_restart, environment
from tests.support.people import REPOSITORY
from tests.support.snapshot import snapshot

SECONDS = 280.0


def crash(ground: Path, *words: str) -> dict[str, Any]:
    """Run it and return its result; nothing may be wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash", "--json", "--dir", str(ground), "--seed", "1", *words],
        cwd=REPOSITORY,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, Said(done.returncode, done.stdout, done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["wrong"] == []
    return result


@pytest.mark.fault_seconds(SECONDS)
def test_a_round(ground: Path) -> None:
    """Each chapter as it is, with a kill, and with a fault."""
    found = crash(ground, "--minutes", "0", "--modes", "default", "--kinds", "calls", "faults")["modes"]["default"]
    assert found["calls"] > 800
    assert found["kills"] >= found["killed before"] == found["faults"] == len(CHAPTERS)


@pytest.mark.skipif(not can_restart(), reason="refused on this kernel")
def test_nobody_notices_where_another_takes_over(ground: Path) -> None:
    words = ("--minutes", "0", "--modes", "auto-restart", "--chapters", "plain", "--kinds", "calls", "moments")
    found = crash(ground, *words)["modes"]["auto-restart"]
    assert found["kills"] >= found["killed before"] == 1


@pytest.mark.fault_seconds(SECONDS)
@pytest.mark.parametrize(
    ("kind", "chapter", "before"),
    [
        pytest.param("calls", "links", "^linkat /work/index/|^linkat /upper/links/l1", id="link count in the index"),
        pytest.param("faults", "links", "^lsetxattr /work/index/", id="a name that can't be given"),
        pytest.param("faults", "rename", "^lsetxattr /upper/d[12]$", id="a directory without its mark"),
        pytest.param("faults", "rename", "^renameat2 /upper/gone", id="a rename over what held whiteouts"),
        pytest.param("faults", "rename", "^unlinkat /upper/(d2|branch)", id="a whiteout that is left behind"),
        pytest.param("faults", "links", "^unlinkat /work/index/", id="an index entry that is left behind"),
        pytest.param("faults", "attributes", "^copy_file_range /upper/plain/", id="a metacopy that stays one"),
        pytest.param("faults", "overwrite", "^truncate /upper/plain/d", id="a file that is cut by its copy-up"),
        pytest.param("calls", "attributes", "^(removexattr|renameat2?) .*plain/a$", id="a metacopy that is cut"),
        pytest.param("faults", "big", "^linkat /work/work/#", id="data that follows and fails once"),
    ],
)
def test_found_before(ground: Path, kind: str, chapter: str, before: str) -> None:
    words = ("--chapters", chapter, "--kinds", kind, "--before", before, "--first", "2")
    found = crash(ground, "--all", "--modes", "default", *words)["modes"]["default"]
    assert found["killed before" if kind == "calls" else "faults"] > 0


@pytest.mark.fault_seconds(SECONDS)
def test_an_open_that_fails_has_not_cut_the_file(ground: Path) -> None:
    words = ("--chapters", "overwrite", "--kinds", "faults", "--before", "^(openat /upper|ftruncate)")
    assert crash(ground, "--all", "--modes", "default", *words)["modes"]["default"]["faults"] > 4


def test_a_difference_is_seen(ground: Path) -> None:
    (ground / "f").write_bytes(b"content")
    (ground / "g").write_bytes(b"other")
    before = State(snapshot(ground))
    assert fits(snapshot(ground), before)
    (ground / "f").write_bytes(b"c0ntent")
    now = snapshot(ground)
    assert not fits(now, before)
    assert not fits(now, touched(before, "f"))
    assert fits(now, State(before.tree, {b"/f": now[b"/f"]}))
    (ground / "g").unlink()
    assert not fits(snapshot(ground), State(now))


def test_a_leftover_is_seen(ground: Path) -> None:
    for name in ("upper", "work"):
        (ground / name).mkdir()
    assert layer_faults(ground / "upper", ground / "work") == []
    (ground / "upper/#1").touch()
    assert layer_faults(ground / "upper", ground / "work") == ["#1: a temporary object"]
