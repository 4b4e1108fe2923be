"""mount(8), fstab and service managers: the program as others call it, in a mount namespace of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest

from tests.mount.test_cli import Place, become_alice, with_work
from tests.support.cli import Said, program
from tests.support.mounts import environment, wait_gone
from tests.support.people import ALICE, REPOSITORY
from unionfs.host.mountinfo import mounted_at

BAD_CALL, SYSTEM_ERROR, MOUNT_FAILURE = 1, 2, 32
HELPER, PROGRAM = "helper", "program"
CODE = {HELPER: "from unionfs.__main__ import mount_helper as run", PROGRAM: "from unionfs.__main__ import main as run"}


place = pytest.fixture(with_work)


def options(place: Place, *more: str) -> str:
    return ",".join([f"lowerdir={place.lower},upperdir={place.upper},workdir={place.base / 'work'}", *more])


def installed(place: Place, way: str) -> str:
    """Shell commands that install the program for mount(8): as the helper of a type, or as what mount.fuse runs."""
    if way == HELPER:
        target, names = "/usr/sbin", ["mount.fuse.unionfs", "mount.unionfs"]
    else:
        target, names = "/usr/local/bin", ["unionfs", "pyunionfs"]
    scripts = place.base / way
    scripts.mkdir()
    for name in names:
        words = ["exec", sys.executable, "-c", f"{CODE[way]}; run()"]
        (scripts / name).write_text(f'#!/bin/sh\nexport PYTHONPATH={REPOSITORY}\n{shlex.join(words)} "$@"\n')
        (scripts / name).chmod(0o755)
    return f"mount -t overlay -o lowerdir={scripts}:{target} overlay {target}"


def shell(place: Place, way: str, script: str, *, before: str = "") -> Said:
    """Run shell commands in a private mount namespace where the program is installed; $OPTS, $MNT say what and where."""
    show = 'show() { grep -F " $MNT " /proc/mounts | cut -d" " -f1,3,4; }'
    whole = f"set -eo pipefail\n{installed(place, way)}\n{before}\n{show}\n{script}"
    words = ["unshare", "--mount", "--propagation", "private", "bash", "-c", whole, "bash"]
    return program(words, env={"OPTS": options(place), "MNT": str(place.mnt), "BASE": str(place.base)})


# --- mount ----------------------------------------------------------------------------------------

FUSE = "relatime,user_id=0,group_id=0,default_permissions,allow_other"
FSTAB_ONLY = "defaults,noauto,nofail,_netdev,x-systemd.automount,x-systemd.requires=/,comment=ours,X-mine=1"


@pytest.mark.parametrize("way", [HELPER, PROGRAM])
def test_mount_and_umount(place: Place, way: str) -> None:
    said = shell(place, way, "mount -t fuse.unionfs data $MNT -o $OPTS; show; cat $MNT/file; umount $MNT; show || true")
    assert said == Said(0, f"data fuse.unionfs rw,{FUSE}\nfrom lower\n", "")


@pytest.mark.parametrize("way", [HELPER, PROGRAM])
def test_options_of_mount_and_fstab(place: Place, way: str) -> None:
    more = f"rw,noexec,nosuid,nodev,strictatime,lazytime,{FSTAB_ONLY}"
    said = shell(place, way, f"mount -t fuse.unionfs 'my data' $MNT -o $OPTS,{more}; show; umount $MNT")
    assert (said.status, said.err) == (0, "")
    kind, shown = said.out.split()[1:]
    assert said.out.startswith("my\\040data ")
    assert kind == "fuse.unionfs"
    assert {"rw", "noexec", "nosuid", "nodev"} <= set(shown.split(","))


def test_the_other_name_avoids_a_clash(place: Place) -> None:
    """Another program may be called unionfs; the type of the mount is the same."""
    script = "mount -t fuse.pyunionfs data $MNT -o $OPTS; show; umount $MNT"
    assert shell(place, PROGRAM, script) == Said(0, f"data fuse.unionfs rw,{FUSE}\n", "")


def test_a_type_without_fuse(place: Place) -> None:
    script = "mount -t unionfs data $MNT -o $OPTS; show; umount $MNT"
    assert shell(place, HELPER, script) == Said(0, f"data fuse.unionfs rw,{FUSE}\n", "")


@pytest.mark.parametrize("way", [HELPER, PROGRAM])
def test_fstab(place: Place, way: str) -> None:
    """A second `mount -a` sees that it is mounted."""
    (place.base / "fstab").write_text(f"data {place.mnt} fuse.unionfs {options(place, 'nofail', 'x-mine')} 0 0\n")
    script = (
        "mount -T $BASE/fstab -a; mount -T $BASE/fstab -a; show; umount $MNT; mount -T $BASE/fstab $MNT; umount data"
    )
    assert shell(place, way, script) == Said(0, f"data fuse.unionfs rw,{FUSE}\n", "")


def test_fstab_with_user(place: Place) -> None:
    """An ordinary user mounts and unmounts what fstab allows, through fusermount3."""
    os.chown(place.base / "work", ALICE, ALICE)
    fstab = place.base / "fstab"
    fstab.write_text(f"data {place.mnt} fuse.unionfs {options(place, 'user', 'noauto')} 0 0\n")
    before = f"{become_alice(place)}\nmount --bind {fstab} /etc/fstab"
    script = '"$@" mount $MNT; show; "$@" touch $MNT/new; "$@" umount $MNT; show || true'
    shown = f"nosuid,nodev,noexec,relatime,user_id={ALICE},group_id={ALICE},default_permissions"
    assert shell(place, HELPER, script, before=before) == Said(0, f"data fuse.unionfs rw,{shown}\n", "")
    assert (place.upper / "new").stat().st_uid == ALICE


# --- flags of the helper --------------------------------------------------------------------------


def test_fake_sloppy_verbose(place: Place) -> None:
    script = "mount -f -t fuse.unionfs data $MNT -o $OPTS; show || echo nothing\n"
    script += "mount -nsv -t fuse.unionfs data $MNT -o $OPTS,no_such_option=1; show; umount $MNT"
    said = shell(place, HELPER, script)
    assert (said.status, said.err) == (0, "")
    nothing, verbose, shown = said.out.splitlines()
    assert nothing == "nothing"
    assert verbose.startswith(f"unionfs: data mounted on {place.mnt}: upper {place.upper}, lower {place.lower}, ")
    assert shown.startswith("data fuse.unionfs")


def test_another_namespace(place: Place) -> None:
    script = """
        unshare --mount --propagation private sleep 60 & other=$!
        until [ "$(readlink /proc/$other/ns/mnt)" != "$(readlink /proc/self/ns/mnt)" ]; do sleep 0.01; done
        mount -N $other -t fuse.unionfs data $MNT -o $OPTS
        show || echo not here
        nsenter -m -t $other cat $MNT/file
        nsenter -m -t $other umount $MNT
        kill $other"""
    assert shell(place, HELPER, script) == Said(0, "not here\nfrom lower\n", "")


@pytest.mark.parametrize("way", [HELPER, PROGRAM])
@pytest.mark.parametrize(
    ("words", "status", "part"),
    [
        ("$MNT -o $OPTS,no_such_option", BAD_CALL, "no_such_option"),
        ("$MNT -o noexec", BAD_CALL, "lowerdir="),
        ("$MNT -o lowerdir=/no/such", MOUNT_FAILURE, "lower /no/such does not exist"),
        ("$MNT/no -o $OPTS", MOUNT_FAILURE, "mkdir"),
        ("$MNT -o remount,ro", MOUNT_FAILURE, "no union is mounted"),
    ],
)
def test_errors(place: Place, way: str, words: str, status: int, part: str) -> None:
    said = shell(place, way, f"mount -t fuse.unionfs data {words}")
    lines = said.err.splitlines()
    if "remount" in words:  # which mount(8) itself refuses
        assert said.status == MOUNT_FAILURE
        return
    assert (said.status, said.out, len(lines)) == (status, "", 1), said
    assert lines[0].startswith("unionfs: ")
    assert part in lines[0]


def test_no_device(place: Place) -> None:
    said = shell(
        place,
        HELPER,
        "mount -t fuse.unionfs data $MNT -o $OPTS",
        before="touch $BASE/plain; mount --bind $BASE/plain /dev/fuse",
    )
    assert (said.status, len(said.err.splitlines())) == (SYSTEM_ERROR, 1)


@pytest.mark.parametrize("words", ["", "only-one", "a b c", "-z a b", "a b -o"])
def test_bad_calls(place: Place, words: str) -> None:
    said = shell(place, HELPER, f"mount.fuse.unionfs {words}")
    assert (said.status, said.out, len(said.err.splitlines())) == (BAD_CALL, "", 1)
    assert "NAME MOUNTPOINT" in said.err


# --- remount --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [HELPER, PROGRAM])
def test_remount(place: Place, way: str) -> None:
    script = """
        mount -t fuse.unionfs data $MNT -o $OPTS,noexec
        mount -o remount,ro $MNT; show; touch $MNT/no 2>/dev/null || echo refused
        mount -o remount,rw,exec,nosuid $MNT; show; touch $MNT/yes
        umount $MNT"""
    said = shell(place, way, script)
    rest = "user_id=0,group_id=0,default_permissions,allow_other"
    first, second = f"ro,noexec,relatime,{rest}", f"rw,nosuid,relatime,{rest}"
    assert said == Said(0, f"data fuse.unionfs {first}\nrefused\ndata fuse.unionfs {second}\n", "")
    assert (place.upper / "yes").exists()


def test_remount_by_fstab(place: Place) -> None:
    """mount(8) then hands over what fstab says, too."""
    (place.base / "fstab").write_text(
        f"data {place.mnt} fuse.unionfs {options(place, 'metacopy=off', 'timeout=1')} 0 0\n"
    )
    script = "mount -T $BASE/fstab $MNT; mount -T $BASE/fstab -o remount,ro $MNT; show; umount $MNT"
    assert shell(place, HELPER, script) == Said(0, f"data fuse.unionfs ro,{FUSE}\n", "")


@pytest.mark.parametrize(
    ("mounted", "remounted", "status", "part"),
    [
        ("rw", "rw,metacopy=off", BAD_CALL, "metacopy"),
        ("rw", "rw,timeout=3", BAD_CALL, "timeout"),
        ("rw", "rw,lowerdir=/", BAD_CALL, "lowers"),
        ("ro", "rw", MOUNT_FAILURE, "read-only"),
    ],
)
def test_remount_refused(place: Place, mounted: str, remounted: str, status: int, part: str) -> None:
    script = f"""
        mount -t fuse.unionfs data $MNT -o $OPTS,{mounted}
        mount -o remount,{remounted} $MNT || status=$?
        cat $MNT/file; umount $MNT; exit $status"""
    said = shell(place, HELPER, script)
    assert (said.status, said.out, len(said.err.splitlines())) == (status, "from lower\n", 1), said
    assert part in said.err


def test_remount_read_only_while_written_to(place: Place) -> None:
    script = """
        mount -t fuse.unionfs data $MNT -o $OPTS
        exec 9>$MNT/new; mount -o remount,ro $MNT || echo $?; exec 9>&-
        mount -o remount,ro $MNT; umount $MNT"""
    said = shell(place, HELPER, script)
    assert (said.status, said.out) == (0, f"{MOUNT_FAILURE}\n")
    assert "busy" in said.err


# --- service managers -----------------------------------------------------------------------------


@contextmanager
def service(place: Place, address: str) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """The daemon in the foreground, and the socket on which it tells how it is."""
    config = place.base / "work.toml"
    config.write_text(f'lower = "{place.lower}"\nupper = "{place.upper}"\nmountpoint = "{place.mnt}"\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + address[1:] if address.startswith("@") else address)
        manager.settimeout(30)
        words = [sys.executable, "-m", "unionfs", "mount", "--foreground", "--config", str(config)]
        daemon = subprocess.Popen(
            words, env=environment() | {"NOTIFY_SOCKET": address}, text=True, stderr=subprocess.PIPE
        )
        try:
            yield daemon, manager
        finally:
            daemon.terminate()
            assert daemon.communicate(timeout=30)[1] == ""


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_is_told(place: Place, abstract: bool) -> None:
    address = f"@unionfs-{os.getpid()}" if abstract else str(place.base / "notify")
    with service(place, address) as (daemon, manager):
        assert manager.recv(100) == b"READY=1"
        assert (place.mnt / "file").read_text() == "from lower\n"
        daemon.terminate()
        assert manager.recv(100) == b"STOPPING=1"
        assert daemon.wait(30) == 0
    assert mounted_at(str(place.mnt)) is None


def test_the_manager_is_told_of_an_unmount(place: Place) -> None:
    with service(place, str(place.base / "notify")) as (daemon, manager):
        assert manager.recv(100) == b"READY=1"
        assert program(["umount", str(place.mnt)]) == Said(0, "", "")
        assert manager.recv(100) == b"STOPPING=1"
        assert daemon.wait(30) == 0


def test_a_manager_that_is_gone_is_no_error(place: Place) -> None:
    with service(place, str(place.base / "notify")) as (daemon, manager):
        manager.recv(100)
        manager.close()
        assert program(["umount", str(place.mnt)]) == Said(0, "", "")
        assert daemon.wait(30) == 0


def test_a_background_daemon_tells_nobody(place: Place) -> None:
    """What mounts a union may be a service itself; its manager is not to be told of ours."""
    address = str(place.base / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        words = [sys.executable, "-m", "unionfs", "mount", str(place.lower), str(place.upper), str(place.mnt)]
        assert program(words, env={"NOTIFY_SOCKET": address}) == Said(0, "", "")
        pid = place.daemon()
        assert place.umount() == Said(0, "", "")
        assert wait_gone(pid)
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(100)


def test_the_service_template(place: Place) -> None:
    """systemd finds nothing to say about it."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is missing")
    instance = place.base / "unionfs@work.service"
    shutil.copy(REPOSITORY / "share" / "unionfs@.service", instance)
    said = shell(place, PROGRAM, f"{analyze} verify --man=no {instance} 2>&1")
    assert said == Said(0, "", "")


def test_the_scripts_that_are_installed() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    scripts = project["project"]["scripts"]
    assert {"unionfs", "pyunionfs", "unionfs-overlay", "mount.unionfs", "mount.fuse.unionfs"} <= set(scripts)
    for entry in scripts.values():
        module, _, name = entry.partition(":")
        assert callable(getattr(import_module(module), name))
    for files in project["tool"]["setuptools"]["data-files"].values():
        assert all((REPOSITORY / file).exists() for file in files)
