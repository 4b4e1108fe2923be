"""scripts/compare works: it measures, says what fails, and leaves nothing behind. What it measures is not looked at."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.compare.stage import QUICK, Stage
from tests.compare.subjects import UnionfsFuse
from tests.compare.suites import Refused, choose
from tests.support.cli import Said, program
from tests.support.mounts import environment, mounted_below
from tests.support.people import REPOSITORY

COMPARE = REPOSITORY / "scripts/compare"
ENVIRONMENT = {"PYTHON": sys.executable, "VENV": "/nonexistent"}


def compare(*words: str | Path) -> Said:
    """Run the comparison with this Python and this checkout."""
    return program([str(COMPARE), *map(str, words)], env=ENVIRONMENT)


@pytest.fixture
def room(ground: Path) -> Path:
    """Where the comparison works; nothing is left there."""
    path = ground / "room"
    path.mkdir()
    return path


def measurements(whole: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What was measured, by workload and phase."""
    return {(each["workload"], each["phase"]): each for one in whole["comparisons"] for each in one["measurements"]}


def test_measures(ground: Path, room: Path) -> None:
    """All values in JSON, a table, a chart, and nothing left."""
    files = ("--json", ground / "result.json", "--chart", ground / "chart.svg")
    said = compare("--quick", "--rounds", "2", "--only", "find,append,mount", "--dir", room, *files)
    assert said.status == 0, said.err
    assert "find and stat, warm" in said.out
    assert os.listdir(room) == []
    assert mounted_below(ground) == []

    whole = json.loads((ground / "result.json").read_text())
    assert whole["complete"]
    assert whole["rounds"] == len(whole["load"]) == 2
    assert whole["machine"]["kernel"] == os.uname().release
    assert {"bare", "overlayfs", "unionfs"} <= set(whole["versions"])
    assert whole["content"]["tree"]["files"] == whole["sizes"]["tree_files"]
    found = measurements(whole)
    assert set(found) == {("find", "cold"), ("find", "warm"), ("append", ""), ("mount", "")}
    for key, each in found.items():
        assert each["fails"] == {}
        expected = set(whole["versions"]) - ({"bare"} if key[0] == "mount" else set())
        assert set(each["values"]) == set(each["medians"]) == expected
        assert all(len(values) == 2 and min(values) > 0 for values in each["values"].values())
        assert each["ratios"]["unionfs/overlayfs"] > 0
    titles = [
        element.text for element in ElementTree.parse(ground / "chart.svg").iter() if element.tag.endswith("text")
    ]
    assert "find and stat, cold" in titles


def test_subject_that_fails(ground: Path, room: Path) -> None:
    """The reason is told, the others are measured."""
    wrong = "unionfs+nonsense=1"
    words = (
        "--quick",
        "--only",
        "fstat",
        "--subjects",
        f"bare,{wrong}",
        "--dir",
        room,
        "--json",
        ground / "result.json",
    )
    said = compare(*words)
    assert said.status == 0, said.err
    [each] = measurements(json.loads((ground / "result.json").read_text())).values()
    assert list(each["fails"]) == [wrong]
    assert "nonsense" in each["fails"][wrong]
    assert list(each["medians"]) == ["bare"]
    assert f"fails: one fstat, kernel caches off: {wrong}: mount: " in said.out
    assert os.listdir(room) == []


def test_volumes_on_a_file_system_of_its_own(ground: Path, room: Path) -> None:
    """Bind paths of both modes are measured; the file system is gone afterwards."""
    words = ("--quick", "--only", "volume-tar", "--dir", room, "--fs", "ext4", "--json", ground / "result.json")
    said = compare(*words, "--markdown")
    assert said.status == 0, said.err
    assert said.out.startswith("| workload | host | bind-kernel | bind-fuse | bind-cached | upper |")
    whole = json.loads((ground / "result.json").read_text())
    [each] = measurements(whole).values()
    assert each["fails"] == {}
    assert set(each["medians"]) == {"host", "bind-kernel", "bind-fuse", "bind-cached", "upper"}
    assert whole["machine"]["file_system"] == "ext4"
    assert os.listdir(room) == []


def test_podman(ground: Path, room: Path) -> None:
    """A container runs on a new store of each kind; what isn't installed is told in one line."""
    words = ("--quick", "--only", "podman-run", "--subjects", "podman-overlayfs,podman-unionfs", "--dir", room)
    said = compare(*words, "--json", ground / "result.json")
    assert os.listdir(room) == []
    if missing := [name for name in ("podman", "runc", "busybox") if not shutil.which(name)]:
        why = f"podman-run: {' and '.join(missing)} not installed"
        assert said == Said(2, "", f"compare: nothing is left to measure; {why}\n")
        return
    assert said.status == 0, said.err
    [each] = measurements(json.loads((ground / "result.json").read_text())).values()
    assert each["fails"] == {}
    assert set(each["medians"]) == {"podman-overlayfs", "podman-unionfs"}
    assert not list(Path("/run").glob("unionfs-compare-*"))


def test_what_is_left_out_for_one_reason_is_one_line(ground: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a suite of which nothing can be measured keeps no other from it."""
    monkeypatch.setenv("PATH", str(room))
    stage = Stage(ground / "stage", QUICK)
    with pytest.raises(Refused, match=r"podman-run, podman-build, podman-update, podman-commit: podman and runc and"):
        choose(stage, None, ["podman"], full=False, rootless=False)
    unions, podman = choose(stage, ["bare"], ["find", "podman"], full=False, rootless=False)
    assert (unions.is_left, podman.is_left) == (True, False)
    assert len(podman.left_out) == 1
    assert choose(stage, ["bare"], None, full=False, rootless=False)[-1].suite.title != "Podman"


def test_interrupted(ground: Path, room: Path) -> None:
    """What was measured until then is reported, and nothing is left."""
    words = ["--quick", "--rounds", "1000", "--only", "fstat", "--subjects", "unionfs", "--dir", str(room)]
    command = [str(COMPARE), *words, "--json", str(ground / "result.json")]
    with subprocess.Popen(
        command, env=environment() | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        sites = set[str]()
        while len(sites) < 2:
            assert process.poll() is None
            sites |= {path.name for path in room.glob("*/stage/site-*")}
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert not json.loads((ground / "result.json").read_text())["complete"]
    assert os.listdir(room) == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--only", "nonsense"], "no workload or group is called 'nonsense'"),
        (["--subjects", "nonsense+metacopy=on"], "no subject is called 'nonsense'"),
        (["--dir", "/nonexistent"], "/nonexistent: no such directory"),
        (["--chart", "chart.png"], "must end in .svg"),
        (["--rootless", "--fs", "xfs"], "--fs needs a loop device"),
    ],
)
def test_refuses(room: Path, words: list[str], part: str) -> None:
    """One line that names what is wrong."""
    where = [] if "--dir" in words or "--rootless" in words else ["--dir", str(room)]
    said = compare("--quick", *where, *words)
    assert said.status == 2
    assert said.err.startswith("compare: ")
    assert said.err.count("\n") == 1
    assert part in said.err
    assert os.listdir(room) == []


def test_lists_and_explains() -> None:
    """What --list names is what --only and --subjects take."""
    said = compare("--list")
    assert said.status == 0
    for name in ("overlayfs", "unionfs-fuse", "bind-kernel", "rm-lower", "volume-tar", "podman-build"):
        assert f"  {name} " in said.out
    assert "cold" in compare("--help").out


def test_ours_is_not_taken_for_unionfs_fuse() -> None:
    """A program called `unionfs` counts only if it says that it is unionfs-fuse."""
    assert UnionfsFuse.asked(sys.executable, "-m", "unionfs") == ""
    said = "FUSE library version: 2.9.9\nunionfs-fuse version: 1.0\n"
    assert UnionfsFuse.asked("/bin/sh", "-c", f"echo '{said}'") == "1.0"
