"""`unionfs doctor`: every line says good or what to do, on good and on poor ground."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import FileSystemMaker
from tests.support.cli import Said, in_private_mounts, unionfs

SUBJECTS = (
    *("kernel", "fuse device", "libfuse", "pyfuse3", "native part", "fusermount3", "allow_other", "privilege"),
    *("passthrough", "user namespaces", "file system", "xattrs", "whiteouts", "O_TMPFILE", "reflink"),
    *("file handles", "d_type"),
)


def verdicts(said: Said) -> dict[str, tuple[str, str]]:
    return {entry["subject"]: (entry["verdict"], entry["text"]) for entry in json.loads(said.out)}


def test_every_subject_has_a_line(ground: Path) -> None:
    said = unionfs("doctor", ground)
    assert (said.status, said.err) == (0, "")
    lines = said.out.splitlines()
    assert [line.split()[0] in ("good", "limited") for line in lines] == [True] * len(SUBJECTS)
    assert [line.split(":")[0].split(None, 1)[1] for line in lines] == list(SUBJECTS)
    assert list(ground.iterdir()) == []


@pytest.mark.parametrize(("kind", "reflink"), [("ext4", "limited"), ("xfs", "good"), ("btrfs", "good")])
def test_file_systems(on_file_system: FileSystemMaker, kind: str, reflink: str) -> None:
    found = verdicts(unionfs("doctor", "--json", on_file_system(kind)))  # type: ignore[arg-type]
    assert found["file system"][1].endswith(f"is on {kind}")
    assert found["reflink"][0] == reflink
    for subject in ("xattrs", "whiteouts", "O_TMPFILE", "file handles", "d_type"):
        assert found[subject][0] == "good", subject


def test_poor_ground(ground: Path) -> None:
    found = verdicts(in_private_mounts(f"mount -t ramfs ramfs {ground}", "doctor", "--json", ground))
    assert found["xattrs"][0] == "limited"
    assert "ext4" in found["xattrs"][1]


def test_a_directory_that_cannot_be_written(ground: Path) -> None:
    script = f"mount -t tmpfs -o ro tmpfs {ground}"
    found = verdicts(in_private_mounts(script, "doctor", "--json", ground))
    assert found["write"][0] == "limited"
    assert "lower" in found["write"][1]


def test_without_the_fuse_device() -> None:
    said = in_private_mounts("mount -t tmpfs tmpfs /dev; mknod /dev/null c 1 3", "doctor", "--json", "/")
    assert said.status == 5
    assert verdicts(said)["fuse device"] == (
        "bad",
        "no /dev/fuse: modprobe fuse, or give the container --device /dev/fuse",
    )
