"""CPython's own tests of files, with TMPDIR in the mount: the same results, test by test, as on upper's file system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.integration.conftest import PlacesMaker
from tests.support.filesystems import FsKind

ALL = [
    "test_os",
    "test_posix",
    "test_shutil",
    "test_tarfile",
    "test_zipfile",
    "test_mailbox",
    "test_dbm",
    "test_sqlite3",
]
SOME = ["test_shutil", "test_mailbox", "test_dbm", "test_posix"]
UNSTEADY = {
    # Depend on the load of the machine or on the clock, not on where their files are.
    "test_timerfd",
}
SECONDS = 280


def interpreter() -> str:
    """An interpreter whose standard library has its `test` package; the one running this, where it has."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        found = subprocess.run([candidate, "-c", "import test.test_os"], capture_output=True, check=False)
        if found.returncode == 0:
            return candidate
    raise AssertionError("no Python with its test package: scripts/packages installs Debian's libpython3.X-testsuite")


def has_test(python: str, test: str) -> bool:
    """Whether this Python comes with a test; distributions leave some out."""
    return subprocess.run([python, "-c", f"import test.{test}"], capture_output=True, check=False).returncode == 0


def outcomes(report: Path) -> dict[str, str]:
    """Test → passed, failed, error or skipped, from a JUnit report."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[name] = kinds.pop() if kinds else "passed"
    return {name: outcome for name, outcome in found.items() if not any(part in name for part in UNSTEADY)}


def run_tests(python: str, tests: list[str], where: Path, ground: Path) -> dict[str, str]:
    """Run CPython's regression tests with all temporary files below `where`."""
    report = ground / f"report-{where.name}.xml"
    command = [python, "-m", "test", "--tempdir", str(where), "--junit-xml", str(report), *tests]
    environment = {**os.environ, "TMPDIR": str(where), "HOME": str(where), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    log = ground / f"log-{where.name}.txt"
    with open(log, "wb") as output:
        subprocess.run(
            command,
            cwd=where,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=SECONDS,
            check=False,
        )
    assert report.exists(), log.read_text(errors="replace")[-3000:]
    return outcomes(report)


def compare(places: PlacesMaker, upper_on: FsKind, tests: list[str], ground: Path) -> None:
    """Run on both places; no test may end differently."""
    place = places(upper_on)
    python = interpreter()
    tests = [test for test in tests if has_test(python, test)]
    results = {name: run_tests(python, tests, where, ground) for name, where in place.both()}
    assert results["bare"], "no test has run"
    differing = [
        f"{test}: bare {results['bare'].get(test)}, union {results['union'].get(test)}"
        for test in sorted(results["bare"].keys() | results["union"].keys())
        if results["bare"].get(test) != results["union"].get(test)
    ]
    assert differing == []


@pytest.mark.parametrize("test", ALL)
@pytest.mark.fault_seconds(290)
def test_on_ext4(places: PlacesMaker, ground: Path, test: str) -> None:
    if not has_test(interpreter(), test):
        pytest.skip(f"this Python comes without {test}")
    compare(places, "ext4", [test], ground) if test != "test_dbm" else compare(
        places, "ext4", ["test_dbm", "test_dbm_dumb", "test_dbm_gnu", "test_dbm_ndbm"], ground
    )


@pytest.mark.parametrize("upper_on", ["xfs", "btrfs", "tmpfs"])
@pytest.mark.fault_seconds(290)
def test_some_on(places: PlacesMaker, ground: Path, upper_on: FsKind) -> None:
    compare(places, upper_on, SOME, ground)
