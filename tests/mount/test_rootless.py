"""Without privilege: root of a user namespace, and an ordinary user through fusermount3.

Each runs `python -m tests.support.rootless` there, which mounts ours (and, in the namespace, kernel overlayfs with userxattr beside
it), runs the table of behaviours, and tells each outcome. What overlayfs can do there, ours must do as well; what a plain
directory can do, a bind path must.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import user_namespaces
from tests.support.mounts import environment
from tests.support.people import ALICE, REPOSITORY, in_user_namespace, opened_interpreter
from tests.support.rootless import outcomes, worse_than

NAMESPACES = pytest.mark.skipif(not user_namespaces(), reason="no user namespaces here: a chroot, perhaps")
DRIVER = [sys.executable, "-m", "tests.support.rootless"]


@NAMESPACES
@pytest.mark.fault_seconds(200)
def test_root_of_a_user_namespace(ground: Path) -> None:
    done = in_user_namespace(
        [*DRIVER, "overlay", "union", "plain", "bind", str(ground)], cwd=REPOSITORY, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = outcomes(done.stdout)
    assert sum(not said for said in found["overlay"].values()) > 200, "the oracle itself worked"
    assert worse_than(found, "overlay") == []
    assert worse_than(found, "plain", "bind") == []


def as_ordinary_user(script: str, ground: Path, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Run a shell script as an ordinary user, in a mount namespace where that user can run this interpreter."""
    os.chown(ground, ALICE, ALICE)
    (ground / "script").write_text(script)
    # /dev/fuse is open to all where udev runs; a bare devtmpfs leaves it to root.
    prologue = opened_interpreter()
    user = f"setpriv --reuid={ALICE} --regid={ALICE} --clear-groups --inh-caps=-all --bounding-set=-all"
    if "fusermount3" in script:  # a setuid program has no use for an emptied bounding set
        user = f"setpriv --reuid={ALICE} --regid={ALICE} --clear-groups --inh-caps=-all"
    passwd = f"cp /etc/passwd '{ground}/passwd'; echo alice:x:{ALICE}:{ALICE}::{ground}:/bin/sh >> '{ground}/passwd'"
    passwd += f"; mount --bind '{ground}/passwd' /etc/passwd"
    device = f"mknod '{ground}/fuse' c 10 229; chmod 666 '{ground}/fuse'; mount --bind '{ground}/fuse' /dev/fuse"
    outer = f"set -e\n{passwd}\n{device}\n{prologue}\nexec {user} sh -eu '{ground}/script'\n"
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", outer],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={
            **environment(),
            "HOME": str(ground),
            "TMPDIR": str(ground),
            "USER": "alice",
            "UFS_PLACES": "lower touched",
        },
        timeout=timeout,
        check=False,
    )


@NAMESPACES
@pytest.mark.fault_seconds(200)
def test_ordinary_user_through_fusermount3(ground: Path) -> None:
    """The table again; what overlayfs can do for the same user in a namespace, ours can do outside of one."""
    driver = " ".join(DRIVER)
    namespace = "unshare -Ur --mount --propagation private"
    done = as_ordinary_user(
        f"# by fusermount3\n{namespace} {driver} overlay '{ground}'\nexec {driver} union plain bind '{ground}'", ground
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = outcomes(done.stdout)
    assert sum(not said for said in found["overlay"].values()) > 100, "the oracle itself worked"
    assert worse_than(found, "overlay") == []
    assert worse_than(found, "plain", "bind") == []


@NAMESPACES
@pytest.mark.fault_seconds(200)
def test_ordinary_user_in_a_namespace_of_its_own(ground: Path) -> None:
    driver = " ".join(DRIVER)
    script = f"exec unshare -Ur --mount --propagation private {driver} overlay union plain bind '{ground}'"
    done = as_ordinary_user(script, ground)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = outcomes(done.stdout)
    assert sum(not said for said in found["overlay"].values()) > 100, "the oracle itself worked"
    assert worse_than(found, "overlay") == []
    assert worse_than(found, "plain", "bind") == []


def test_others_have_no_way_into_a_users_mount(ground: Path) -> None:
    """No allow_other without user_allow_other: not even root may look in."""
    done = as_ordinary_user(
        f"""# by fusermount3
        cd '{ground}'
        mkdir lower upper mnt
        echo lower > lower/f
        {sys.executable} -m unionfs mount --log-file log lower upper mnt
        cat mnt/f
        echo more >> mnt/f
        cat mnt/f upper/f
        rm mnt/f
        stat -c '%F %t:%T' upper/f
        {sys.executable} -m unionfs umount mnt
        ls upper
        """.replace("cd '", f"cd '{REPOSITORY}' && cd '"),
        ground,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[:5] == ["lower", "lower", "more", "lower", "more"]


def test_suid_files_and_devices_of_a_layer_are_worth_nothing(ground: Path) -> None:
    """They show as they are, but a user's mount gives nobody another identity, and opens no device."""
    lower = ground / "lower"
    lower.mkdir()
    shutil.copy("/usr/bin/id", lower / "id")
    os.chmod(lower / "id", 0o6755)
    os.mknod(lower / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    os.chmod(lower / "zero", 0o666)
    commands = f"""
        {sys.executable} -m unionfs mount --log-file log lower upper mnt
        stat -c '%a %U %F' mnt/id mnt/zero
        mnt/id -u
        head -c 1 mnt/zero > /dev/null 2>&1 && echo opened || echo refused
        umount mnt 2>/dev/null || {sys.executable} -m unionfs umount mnt
    """
    script = f"""# by fusermount3
        cd '{REPOSITORY}' && cd '{ground}'
        mkdir upper mnt
        {commands}
        rm -rf upper; mkdir upper
        unshare -Ur --mount --propagation private sh -eu -c '{commands.replace("'", '"')}'
    """
    done = as_ordinary_user(script, ground)
    assert done.returncode == 0, done.stdout + done.stderr
    outside, inside = done.stdout.splitlines()[:4], done.stdout.splitlines()[4:]
    assert outside == ["6755 root regular file", "666 root character special file", str(ALICE), "refused"]
    assert inside == ["6755 nobody regular file", "666 nobody character special file", "0", "refused"]
