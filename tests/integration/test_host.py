"""scripts/integration.sh: what it reports, and that what is wrong fails. That it passes here is shown by .ci/run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.host.host import Host, LeftOut, Wrong
from tests.host.report import Report
from tests.host.run import Check, run_checks
from tests.support.mounts import mounted_below
from tests.support.people import REPOSITORY

SCRIPT = REPOSITORY / "scripts/integration.sh"


def passes(_host: Host, _room: Path) -> str:
    return "fine"


def fails(_host: Host, _room: Path) -> str:
    raise Wrong("two things differ\nleft\nright\x00")


def is_left_out(_host: Host, _room: Path) -> str:
    raise LeftOut("no such thing here")


def breaks(_host: Host, _room: Path) -> str:
    raise ZeroDivisionError


def leaves_a_mount(_host: Host, room: Path) -> str:
    (room / "left").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", room / "left"], check=True)
    return "nothing to see"


def reported(ground: Path, *checks: Check) -> Report:
    """Run checks on a host below `ground`."""
    report = Report({"kernel": "6.1"})
    run_checks(Host(ground, "python3"), checks, report)
    report.write(ground / "results")
    return report


def test_a_good_run(ground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = reported(ground, Check("one", "the first", passes), Check("two", "the second", is_left_out))
    assert report.good
    assert report.summary() == "1 passed, 0 failed, 1 left out"
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ok ")
    assert said[0].endswith(" s  the first: fine")
    assert said[1].startswith("left out ")
    assert said[1].endswith(" s  the second: no such thing here")


def test_what_fails(ground: Path) -> None:
    report = reported(
        ground,
        Check("one", "one", passes),
        Check("two", "two", fails),
        Check("three", "three", breaks),
        Check("four", "four", leaves_a_mount),
    )
    assert not report.good
    assert report.summary() == "1 passed, 3 failed, 0 left out"
    assert "ZeroDivisionError" in report.outcomes[2].text
    assert "left behind: mounts" in report.outcomes[3].text
    assert mounted_below(ground) == []
    suite = ElementTree.parse(ground / "results/junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "3", "0")
    assert [len(case.findall("failure")) for case in suite.iter("testcase")] == [0, 1, 1, 1]
    whole = json.loads((ground / "results/results.json").read_text())
    assert (whole["passed"], whole["failed"], whole["facts"]) == (1, 3, {"kernel": "6.1"})


def test_what_others_stand_on(ground: Path) -> None:
    report = reported(ground, Check("install", "install", fails, first=True), Check("two", "two", passes))
    assert not report.good
    assert report.outcomes[1].verdict == "left out"


def test_nothing_checked_is_not_good(ground: Path) -> None:
    assert not reported(ground, Check("one", "one", is_left_out)).good


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(SCRIPT), "--offline", *words],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ},
    )


def test_a_wheel_that_cannot_be_installed(ground: Path) -> None:
    wheel = ground / "unionfs-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"no wheel")
    done = run("--wheel", str(wheel), "--wheelhouse", str(ground), "--results", str(ground / "results"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout
    assert json.loads((ground / "results/results.json").read_text())["passed"] == 0


def test_calls(ground: Path) -> None:
    assert "--wheelhouse" in run("--help").stdout
    assert "fstab" in run("--list").stdout
    done = run("--only", "nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr
