"""The README's commands outside of its section on volumes (test_readme_volumes.py): they do what the README says."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compare.__main__ import parser
from tests.compare.stage import Sizes
from tests.compare.suites import SUITES, subject_names
from tests.support.mounts import environment
from tests.support.people import REPOSITORY
from tests.support.readme import indented, quoted, run, section, tables

RUN = ("A first union in a minute", "Volumes", "mount(8), fstab and systemd")
"""Sections whose commands are run, here and in test_readme_volumes.py."""

ELSEWHERE = {
    "cp share/unionfs@.service": "test_mount8.py runs the service's command as systemd does",
    "systemctl enable": "the same",
    "scripts/integration.sh": "tests/integration/test_host.py, and .ci/run",
    "podman ": "scripts/podman-check runs podman on it, and tests/mount/test_podman_cli.py the program",
}
"""Commands that need more than a test machine has, and what stands in for them."""

INSTALLED = r"""
    for place in /sbin /usr/local/bin; do
        mkdir -p /srv/over$place/upper /srv/over$place/work
        mount -t overlay -o lowerdir=$(realpath $place),upperdir=/srv/over$place/upper,workdir=/srv/over$place/work \
            overlay $(realpath $place)
    done
"""
"""Lays overlays over a /sbin and a /usr/local/bin, in which links can be made."""

COMMAND = re.compile(
    r"(unionfs|unionfs-overlay|fusermount3|make|mkdir|echo|cat|ls|rm|touch|tar|ln|mount|umount|cp|systemctl|podman|apt|pip|scripts/\S+|\w+=\S+ make)\s"
)


def commands(text: str) -> list[str]:
    """The commands of a text's code blocks; lines that end in a backslash are joined."""
    lines = "\n".join(indented(text)).replace("\\\n", "").splitlines()
    return [line for line in lines if COMMAND.match(line)]


def make_commands() -> list[str]:
    """Every command of the README that calls make."""
    return [line for line in commands((REPOSITORY / "README.md").read_text()) if re.match(r"(\w+=\S+ )?make ", line)]


def test_every_command_is_tested() -> None:
    tested = {line for title in RUN for line in commands(section(title))} | set(make_commands())
    for line in commands((REPOSITORY / "README.md").read_text()):
        assert line in tested or line.startswith((*ELSEWHERE, "scripts/compare ")), line


def test_a_first_union_in_a_minute(ground: Path) -> None:
    said = run("\n".join(commands(section("A first union in a minute"))), ground)
    shown = re.split(r"^\++ ", said, flags=re.MULTILINE)
    promised = [line for line in commands(section("A first union in a minute")) if re.match(r"(cat|ls) .*#", line)]
    assert len(promised) == 3
    for line in promised:
        command, _, comment = line.partition("#")
        output = next(part.split("\n", 1)[1] for part in shown if part.startswith(command.strip() + "\n"))
        assert output.split() == comment.partition(":")[0].split(), line


def test_a_whole_mount_in_a_file(ground: Path) -> None:
    text = section("Volumes").partition("### A whole mount in a file\n")[2]
    (ground / "work.toml").write_text("\n".join(indented(text)))
    said = run(
        """
        mkdir -p app changes /srv/base/data /srv/data /mnt/work; echo mine > /srv/data/file
        unionfs mount --config work.toml; cat /mnt/work/data/file; findmnt -n -o OPTIONS /mnt/work
        ! touch /mnt/work/var/cache/file; unionfs umount --rm work; unionfs volume ls -q
        """,
        ground,
    )
    lines = said.splitlines()
    assert "mine" in lines
    assert "my-vol" in lines
    assert any("noatime" in line for line in lines if line.startswith("rw,"))
    assert "Read-only file system" in said


def test_mount8_and_fstab(ground: Path) -> None:
    (ground / ".venv").mkdir()
    (ground / ".venv/bin").symlink_to(Path(sys.executable).parent)
    lines = [
        line for line in commands(section("mount(8), fstab and systemd")) if line.startswith(("ln", "mount", "umount"))
    ]
    assert [line.split()[0] for line in lines] == ["ln", "ln", "mount", "umount"]
    fstab = next(line for line in indented(section("mount(8), fstab and systemd")) if line.startswith("work "))
    (ground / "fstab").write_text(fstab + "\n")
    own = """
        mkdir -p /srv/app /srv/base /srv/changes /srv/.work; echo below > /srv/base/file
    """
    mount, umount = lines[2:]
    look = "findmnt -n -o SOURCE,FSTYPE /mnt; cat /mnt/file; echo more >> /mnt/file"
    fstab_mount = "mount -T fstab /mnt; cat /mnt/file; findmnt -n -o SOURCE,FSTYPE /mnt; umount /mnt"
    said = run("\n".join([INSTALLED, own, *lines[:2], mount, look, umount, fstab_mount, "pyunionfs --version"]), ground)
    assert [line.split() for line in said.splitlines() if line.endswith(" fuse.unionfs")] == [
        ["NAME", "fuse.unionfs"],
        ["work", "fuse.unionfs"],
    ]
    assert said.splitlines().count("more") == 1
    assert (REPOSITORY / "share/unionfs@.service").is_file()


COMING = section("Coming from overlayfs, fuse-overlayfs or Docker").split("\n### ")[1:]


@pytest.mark.parametrize("text", COMING, ids=[text.partition("\n")[0] for text in COMING])
def test_coming_from_elsewhere(ground: Path, text: str) -> None:
    """The middle column, from top to bottom."""
    own = f"""
        mkdir -p /srv/data app base/app changes work merged mine own other-changes other third-changes third new
        ln -s {shlex.quote(str(Path(sys.executable).parent / "mount.fuse.unionfs"))} /sbin/
        unionfs-overlay() {{ "$PYTHON" -c "from unionfs.__main__ import overlay; overlay()" "$@"; }}
        leave() {{ ! mountpoint -q own || unionfs umount own; clear; }}
        trap leave EXIT
    """
    (table,) = tables(text)
    lines = [command for row in table for command in quoted(row[1]) if COMMAND.match(command)]
    assert len(lines) >= len(table) - 3
    run("\n".join([INSTALLED, own, *lines]), ground)


@pytest.fixture
def checkout(ground: Path) -> Path:
    """A copy of what `make mount` needs, with an environment in which everything is installed."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, ground)
    for name in ("scripts", "share", "unionfs"):
        shutil.copytree(REPOSITORY / name, ground / name)
    (ground / ".venv").mkdir()
    (ground / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (ground / ".venv/.installed").touch()
    (ground / ".venv/.installed-test").touch()
    return ground


@pytest.mark.fault_seconds(200)
def test_two_commands(checkout: Path) -> None:
    demonstrate, undo, own = commands(section("Two commands"))
    for line, after in ((demonstrate, undo), (own, f"{undo.partition('#')[0]} MERGED=/mnt/work")):
        said = run(
            f"mkdir -p /srv/app /srv/base; touch /srv/base/from-base\n{line}\nls demo/merged /mnt/work || true\n{after}\n",
            checkout,
        )
        assert "A union is mounted on " in said
        assert ("settings.conf" if line is demonstrate else "from-base") in said.splitlines()
        assert "unmounted " in said


@pytest.mark.parametrize("line", make_commands())
def test_a_target_of_make(checkout: Path, line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if word != "make"]
    done = subprocess.run(
        ["make", "--dry-run", *words], cwd=checkout, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_comparison() -> None:
    """Its options, and the names that it chooses from: what it does is for test_compare.py."""
    lines = [line for line in commands((REPOSITORY / "README.md").read_text()) if line.startswith("scripts/compare ")]
    assert len(lines) == 3
    known = {name for suite in SUITES for each in suite.workloads(Sizes()) for name in (each.name, each.group)}
    for line in lines:
        arguments = parser().parse_args(shlex.split(line)[1:])
        assert set(arguments.only or ()) <= known
        assert set(arguments.subjects or ()) <= set(subject_names())
