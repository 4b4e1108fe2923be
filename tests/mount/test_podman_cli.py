"""`unionfs-overlay`, called as podman and buildah call their mount_program."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.mount.test_cli import Place, with_work
from tests.support import raw
from tests.support.cli import Said, listed, program, user_namespaces
from tests.support.mounts import environment
from tests.support.people import in_user_namespace
from unionfs.host.mountinfo import mounted_at

WORDS = [sys.executable, "-c", "from unionfs.__main__ import overlay; overlay()"]


place = pytest.fixture(with_work)


def overlay(place: Place, *words: str) -> Said:
    """Run the program where podman does: in the directory of the store, to which layers may be relative."""
    return program([*WORDS, *words], cwd=place.base)


def mounted(place: Place, more: str = "") -> Said:
    return overlay(place, "-o", f"lowerdir=lower,upperdir=upper,workdir=work{more}", str(place.mnt))


def umount(place: Place) -> None:
    assert program(["fusermount3", "-u", str(place.mnt)]) == Said(0, "", "")


def test_podmans_call(place: Place) -> None:
    assert mounted(place) == Said(0, "", "")
    (place.mnt / "new").write_text("mine")
    umount(place)
    assert (place.upper / "new").read_text() == "mine"


def test_read_only(place: Place) -> None:
    """What podman does to look at an image: its topmost layer is a lower, too."""
    assert overlay(place, "-o", "lowerdir=upper:lower", str(place.mnt)) == Said(0, "", "")
    assert (place.mnt / "file").read_text() == "from lower\n"
    assert os.statvfs(place.mnt).f_flag & os.ST_RDONLY
    umount(place)


def test_all_of_its_options(place: Place) -> None:
    more = ",uidmapping=0:1000:1:1:110000:65536,gidmapping=0:1000:1:1:110000:65536,nodev,volatile,fsync=0,threaded=1"
    more += (
        ",noacl,static_nlink,xino=auto,timeout=2,fast_ino=1,writeback=0,plugins=,xattr_permissions=0,redirect_dir=on"
    )
    assert mounted(place, more) == Said(0, "", "")
    assert (place.mnt / "file").stat().st_uid == 1000
    (entry,) = listed(place.mnt)
    shown = entry["options"]
    assert (shown["volatile"], shown["static_nlink"], shown["acl"], shown["timeout"]) == (True, True, False, 2.0)
    umount(place)


def test_defaults_that_differ(place: Place) -> None:
    """Who mounts these layers next may not read metacopy."""
    assert mounted(place) == Said(0, "", "")
    (entry,) = listed(place.mnt)
    assert (entry["options"]["metacopy"], entry["options"]["redirect_dir"]) == (False, "on")
    umount(place)
    assert mounted(place, ",metacopy=on") == Said(0, "", "")
    (entry,) = listed(place.mnt)
    assert entry["options"]["metacopy"] is True
    umount(place)


@pytest.mark.skipif(not user_namespaces(), reason="no user namespaces here")
def test_what_needs_privilege_adapts(place: Place) -> None:
    """A store's configuration is the same for root and in a user namespace, where user.* attributes are used."""
    options = "lowerdir=lower,upperdir=upper,workdir=work,metacopy=on,redirect_dir=on,noallow_other"
    script = 'export XDG_RUNTIME_DIR=$PWD; "$@" && ls mnt && umount mnt'
    words = ["bash", "-c", script, "bash", *WORDS, "-o", options, "mnt"]
    done = in_user_namespace(words, cwd=place.base, env=environment(), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "file\n", "")


@pytest.mark.skipif(not user_namespaces(), reason="no user namespaces here")
def test_idmapped_layers_are_not_mapped_twice(place: Place) -> None:
    """podman lays such mounts under the layers where the kernel can, and passes the mapping as well."""
    os.chown(place.lower / "file", 3, 4)
    bound = place.base / "bound"
    bound.mkdir()
    raw.idmapped_bind(place.lower, bound, "0 1000 5000\n")
    try:
        assert (bound / "file").stat().st_uid == 1003
        options = "lowerdir=bound,upperdir=upper,workdir=work,uidmapping=:0:1000:5000,gidmapping=:0:2000:5000"
        assert overlay(place, "-o", options, "mnt") == Said(0, "", "")
        status = (place.mnt / "file").stat()
        assert (status.st_uid, status.st_gid) == (1003, 2004)
        (place.mnt / "file").write_text("changed")
        assert (place.upper / "file").stat().st_uid == 3
        umount(place)
    finally:
        raw.umount2(bound, raw.MNT_DETACH)


def test_unknown_options_are_named_and_ignored(place: Place) -> None:
    said = mounted(place, ",lazytime,no_such=1\f")
    assert said == Said(0, "", "unionfs-overlay: unknown option ignored: no_such=1\\x0c\n")
    umount(place)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "mount point"),
        (["a", "b", "c"], "mount point"),
        (["-z", "mnt"], "-z"),
        (["-o", "lowerdir=no", "mnt"], "does not exist"),
        (["-o", "lowerdir=lower,plugins=a.so", "mnt"], "plugins"),
        (["-o", "lowerdir=lower,xattr_permissions=2", "mnt"], "xattr_permissions"),
        (["-o", "lowerdir=lower,uidmapping=1", "mnt"], "uidmapping"),
    ],
)
def test_refusals(place: Place, words: list[str], part: str) -> None:
    said = overlay(place, *words)
    assert said.status
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert part in said.err


@pytest.mark.parametrize("flag", ["-f", "-d", "--debug"])
def test_foreground(place: Place, flag: str) -> None:
    words = [*WORDS, flag, "-o", "lowerdir=lower,upperdir=upper,workdir=work", "mnt"]
    daemon = subprocess.Popen(words, cwd=place.base, env=environment(), stderr=subprocess.PIPE, text=True)
    while mounted_at(str(place.mnt)) is None:
        assert daemon.poll() is None
    assert (place.mnt / "file").exists()
    daemon.send_signal(signal.SIGTERM)
    said = daemon.communicate(timeout=30)[1]
    assert daemon.returncode == 0
    assert bool(said) == (flag != "-f")


def test_version_and_help(place: Place) -> None:
    said = overlay(place, "--version")
    assert re.match(r"unionfs-overlay: version \d+\.\d+\.\d+\n", said.out)
    assert (said.status, said.err) == (0, "")
    assert overlay(place, "-V") == said
    said = overlay(place, "--help")
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith("Usage: unionfs-overlay ")
    assert max(map(len, said.out.splitlines())) <= 90


def test_a_source_by_name(place: Place) -> None:
    """As /sbin/mount.fuse calls it for the type fuse.unionfs-overlay."""
    assert overlay(place, "name", "mnt", "-o", "lowerdir=lower") == Said(0, "", "")
    mount = mounted_at(str(place.mnt))
    assert mount is not None
    assert mount.source == "name"
    umount(place)
