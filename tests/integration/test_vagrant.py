"""The Vagrantfile is one that Vagrant and its libvirt plugin accept, and has the machines that the README promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.people import REPOSITORY

MACHINES = {"debian12", "debian13", "ubuntu2404", "fedora43"}


@pytest.fixture
def vagrant() -> str:
    """Vagrant's path. `scripts/packages test` installs it where the distribution has it."""
    found = shutil.which("vagrant")
    if found is None:
        pytest.skip("Vagrant is missing, and this distribution has no package of it")
    return found


def run(vagrant: str, where: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run Vagrant on the Vagrantfile in `where`, with a home of its own there."""
    environment = {
        **os.environ,
        "HOME": str(where),
        "VAGRANT_HOME": str(where / "home"),
        "VAGRANT_CHECKPOINT_DISABLE": "1",
    }
    environment |= {"VAGRANT_DEFAULT_PROVIDER": "libvirt", **settings}
    return subprocess.run([vagrant, *words], cwd=where, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def where(tmp_path: Path) -> Path:
    shutil.copy(REPOSITORY / "Vagrantfile", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("emulated", "setting"), [("", "machine.cpus"), ("1", "machine.cpu_mode")])
def test_it_is_valid(vagrant: str, where: Path, emulated: str, setting: str) -> None:
    done = run(vagrant, where, "validate", EMULATED=emulated)
    assert done.returncode == 0, done.stdout + done.stderr
    file = where / "Vagrantfile"
    file.write_text(file.read_text().replace(setting, "machine.no_such_setting"))
    done = run(vagrant, where, "validate", EMULATED=emulated)
    assert done.returncode != 0, "settings of libvirt are not looked at"
    assert "no_such_setting" in done.stdout + done.stderr


def test_the_machines(vagrant: str, where: Path) -> None:
    done = run(vagrant, where, "status", "--machine-readable", UNIONFS_BOX="mine=/srv/own.box")
    assert done.returncode == 0, done.stdout + done.stderr
    found = set(re.findall(r"^\d+,([^,]+),provider-name,libvirt$", done.stdout, re.MULTILINE))
    assert found == MACHINES | {"mine"}
    # The words that scripts/vagrant-test picks out.
    assert set(re.findall(r"^\d+,([^,]*),state,", done.stdout, re.MULTILINE)) == found
