"""`mount`, `umount`, `ls` and the daemon's life, by the command line and on real mounts."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.cli import Said, in_private_mounts, listed, program, refused, unionfs, user_namespaces
from tests.support.mounts import daemons, environment, wait_gone
from tests.support.people import ALICE, opened_interpreter
from unionfs.host.control import process_start, state_directory
from unionfs.host.mountinfo import mounted_at


class Place:
    """Directories for one union and the commands on it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.lower, self.upper, self.mnt = base / "lower", base / "upper", base / "mnt"
        for directory in (self.lower, self.upper, self.mnt):
            directory.mkdir()
        (self.lower / "file").write_text("from lower\n")

    def mount(self, *words: str | Path) -> Said:
        """`unionfs mount WORDS... LOWER UPPER MOUNTPOINT`."""
        return unionfs("mount", *words, self.lower, self.upper, self.mnt)

    def mounted(self, *words: str | Path) -> Path:
        """Mount, which must work in silence."""
        assert self.mount(*words) == Said(0, "", "")
        return self.mnt

    def umount(self, *words: str | Path) -> Said:
        return unionfs("umount", *words, self.mnt)

    def daemon(self) -> int:
        (pid,) = daemons(self.mnt)
        return pid

    def clear(self) -> None:
        """Detach whatever a failed test left."""
        for pid in daemons(self.base):
            os.kill(pid, signal.SIGKILL)
        while mounted_at(str(self.mnt)):
            raw.umount2(self.mnt, raw.MNT_DETACH)


@pytest.fixture
def place(ground: Path) -> Iterator[Place]:
    made = Place(ground)
    yield made
    made.clear()


def with_work(ground: Path) -> Iterator[Place]:
    """A fixture: a place for which a work directory is made, as for those who name it."""
    made = Place(ground)
    (made.base / "work").mkdir()
    yield made
    made.clear()


def records_of(pid: int) -> list[Path]:
    directory = state_directory()
    assert directory is not None
    return sorted(Path(directory).glob(f"{pid}.*"))


# --- mount ----------------------------------------------------------------------------------------


def test_mount_returns_when_the_mount_answers(place: Place) -> None:
    mnt = place.mounted()
    assert (mnt / "file").read_text() == "from lower\n"
    (mnt / "new").write_text("mine")
    assert (place.upper / "new").read_text() == "mine"
    assert (place.base / ".upper.unionfs-work").is_dir()
    assert (place.base / ".upper.unionfs-work").stat().st_mode & 0o777 == 0o700
    assert place.umount() == Said(0, "", "")
    assert not daemons(place.base)
    assert list(mnt.iterdir()) == []


def test_how_the_kernel_shows_the_mount(place: Place) -> None:
    mnt = place.mounted("-o", r"fsname=my\,data,noexec,noatime")
    mount = mounted_at(str(mnt))
    assert mount is not None
    assert (mount.fstype, mount.source) == ("fuse.unionfs", "my,data")
    assert {"noexec", "noatime"} <= set(mount.options.split(","))
    assert not {"nosuid", "nodev"} & set(mount.options.split(","))
    assert {"default_permissions", "allow_other"} <= set(mount.super_options.split(","))
    assert place.umount().status == 0


def test_mount_options_reach_the_kernel(place: Place) -> None:
    mnt = place.mounted("-o", "nosuid,nodev", "-o", "noallow_other")
    mount = mounted_at(str(mnt))
    assert mount is not None
    assert {"nosuid", "nodev"} <= set(mount.options.split(","))
    assert "allow_other" not in mount.super_options
    assert place.umount().status == 0


def test_two_positionals_give_a_read_only_union(place: Place) -> None:
    (place.upper / "file").write_text("on top\n")
    assert unionfs("mount", f"{place.upper}:{place.lower}", place.mnt) == Said(0, "", "")
    assert (place.mnt / "file").read_text() == "on top\n"
    with pytest.raises(OSError, match="Read-only") as caught:
        (place.mnt / "new").touch()
    assert caught.value.errno == errno.EROFS
    assert place.umount().status == 0


def test_ro_makes_a_union_with_upper_read_only(place: Place) -> None:
    (place.upper / "changed").write_text("kept")
    mnt = place.mounted("-o", "ro")
    assert (mnt / "changed").read_text() == "kept"
    with pytest.raises(OSError, match="Read-only"):
        (mnt / "file").write_text("no")
    assert place.umount().status == 0


def test_layers_as_options(place: Place) -> None:
    work = place.base / "w"
    work.mkdir()
    options = f"lowerdir={place.lower},upperdir={place.upper},workdir={work}"
    assert unionfs("mount", "-o", options, place.mnt) == Said(0, "", "")
    assert (place.mnt / "file").exists()
    assert place.umount().status == 0
    assert os.listdir(work)


def test_names_with_colons_commas_and_odd_bytes(place: Place) -> None:
    odd = place.base / os.fsdecode(b"a:b,c \xff\n")
    odd.mkdir()
    (odd / "x").touch()
    mnt = place.base / os.fsdecode(b"mnt \xfe")
    mnt.mkdir()
    escaped = str(odd).replace(":", "\\:")
    assert unionfs("mount", f"{escaped}:{place.lower}", mnt).status == 0
    try:
        assert sorted(os.listdir(mnt)) == ["file", "x"]
        (entry,) = listed(mnt)
        assert entry["lowers"] == [str(odd), str(place.lower)]
        assert unionfs("ls").status == 0
    finally:
        assert unionfs("umount", mnt).status == 0
    mnt.rmdir()


def test_relative_paths(place: Place) -> None:
    assert unionfs("mount", "lower", "./upper/", "mnt/", cwd=place.base) == Said(0, "", "")
    assert (place.mnt / "file").exists()
    assert unionfs("umount", "mnt", cwd=place.base) == Said(0, "", "")


def test_a_mount_point_by_symbolic_link(place: Place) -> None:
    (place.base / "link").symlink_to("mnt")
    assert unionfs("mount", place.lower, place.upper, place.base / "link") == Said(0, "", "")
    assert mounted_at(str(place.mnt))
    assert unionfs("umount", place.base / "link") == Said(0, "", "")


def test_a_mount_point_that_is_not_empty_is_covered(place: Place) -> None:
    (place.mnt / "below").touch()
    mnt = place.mounted()
    assert os.listdir(mnt) == ["file"]
    assert place.umount().status == 0
    assert os.listdir(mnt) == ["below"]


@pytest.mark.parametrize("layer", ["lower", "upper"])
def test_mounting_on_a_layer(place: Place, layer: str) -> None:
    """The layers are opened before the mount hides one of them."""
    target = place.base / layer
    assert unionfs("mount", place.lower, place.upper, target) == Said(0, "", "")
    try:
        (target / "new").write_text("mine")
        assert (target / "file").read_text() == "from lower\n"
        assert sorted(os.listdir(target)) == ["file", "new"]
    finally:
        assert unionfs("umount", target) == Said(0, "", "")
    assert (place.upper / "new").read_text() == "mine"


def test_layers_below_the_mount_point(place: Place) -> None:
    assert unionfs("mount", place.lower, place.upper, place.base) == Said(0, "", "")
    try:
        assert os.listdir(place.base) == ["file"]
        (place.base / "new").write_text("mine")
    finally:
        assert unionfs("umount", place.base) == Said(0, "", "")
    assert (place.upper / "new").read_text() == "mine"


def test_remounting_at_once_after_umount8(place: Place) -> None:
    """umount(8) returns before the daemon has ended; mounting then waits for it."""
    for number in range(5):
        mnt = place.mounted()
        (mnt / f"n{number}").touch()
        subprocess.run(["umount", mnt], check=True)
    assert len(os.listdir(place.upper)) == 5


def test_the_daemons_process(place: Place) -> None:
    place.mounted()
    pid = place.daemon()
    proc = Path(f"/proc/{pid}")
    assert os.readlink(proc / "cwd") == "/"
    assert os.getsid(pid) != os.getsid(0)
    assert {os.readlink(proc / "fd" / fd) for fd in "012"} == {"/dev/null"}
    status = (proc / "status").read_text()
    assert re.search(r"^Umask:\s+0000$", status, re.MULTILINE)
    (limit,) = re.findall(r"^Max open files\s+(\d+)\s+(\d+)", (proc / "limits").read_text(), re.MULTILINE)
    assert limit[0] == limit[1]
    assert place.umount().status == 0


def test_the_command_holds_no_pipe_open(place: Place) -> None:
    """A caller that reads the command's output to the end must not wait for the daemon."""
    done = subprocess.run(
        f"{sys.executable} -m unionfs mount {place.lower} {place.upper} {place.mnt} 2>&1 | cat",
        shell=True,
        env=environment(),
        capture_output=True,
        timeout=20,
        check=True,
    )
    assert done.stdout == b""
    assert place.umount().status == 0


def test_a_caller_without_standard_descriptors(place: Place) -> None:
    script = 'exec "$@" <&- >&- 2>&-'
    command = [sys.executable, "-m", "unionfs", "mount", place.lower, place.upper, place.mnt]
    assert program(["bash", "-c", script, "bash", *map(str, command)]) == Said(0, "", "")
    assert place.umount() == Said(0, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(place: Place, number: signal.Signals) -> None:
    place.mounted()
    pid = place.daemon()
    os.kill(pid, number)
    assert wait_gone(pid)
    assert mounted_at(str(place.mnt)) is None
    assert records_of(pid) == []


def test_sigusr1_dumps_counters_and_tasks(place: Place) -> None:
    log = place.base / "log"
    mnt = place.mounted("--log-file", log)
    (mnt / "file").read_text()
    os.kill(place.daemon(), signal.SIGUSR1)
    deadline = time.monotonic() + 20
    while "task " not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    text = log.read_text()
    assert re.search(r"^  nodes \d+$", text, re.MULTILINE)
    assert "_handle_signals" in text
    assert (mnt / "file").read_text() == "from lower\n"
    assert place.umount().status == 0


def test_foreground(place: Place) -> None:
    command = [sys.executable, "-m", "unionfs", "mount", "--foreground", "--log-level", "info"]
    process = subprocess.Popen(
        [*command, place.lower, place.upper, place.mnt], env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with process, process.stderr:
        while "mounted" not in process.stderr.readline():
            assert process.poll() is None
        assert (place.mnt / "file").exists()
        assert listed(place.mnt)[0]["pid"] == process.pid
        assert place.umount().status == 0
        assert "ended" in process.stderr.read()
    assert process.returncode == 0


def test_log_level_and_file(place: Place) -> None:
    log = place.base / "log"
    place.mounted("--log-file", log, "--log-level", "info")
    assert place.umount().status == 0
    assert "mounted" in log.read_text()


# --- the daemon's errors --------------------------------------------------------------------------


def test_an_error_of_the_daemon_is_returned(place: Place) -> None:
    """Opening the layers happens in the daemon; its refusal reaches the command with its exit status."""
    said = in_private_mounts(
        f"mount -t ramfs ramfs {place.upper}; mkdir {place.upper}/u {place.upper}/w",
        *("mount", "--work", place.upper / "w", place.lower, place.upper / "u", place.mnt),
    )
    refused(said, 3, str(place.upper), "attributes")


def test_a_failed_mount_is_returned_with_libfuses_words(place: Place) -> None:
    said = in_private_mounts(
        f"mount --bind {place.mnt} {place.mnt}; exec 9<>/dev/fuse; mount -t tmpfs -o nr_inodes=1 tmpfs {place.mnt}\n"
        "mount --bind /dev/null /dev/fuse",
        *("mount", place.lower, place.upper, place.mnt),
    )
    refused(said, 6, str(place.mnt))


def test_a_failed_start_leaves_nothing(place: Place) -> None:
    state = state_directory()
    assert state is not None
    before = set(os.listdir(state))
    test_a_failed_mount_is_returned_with_libfuses_words(place)
    # Other daemons of this machine may come and go meanwhile.
    left = {name for name in os.listdir(state) if not Path("/proc", name.split(".")[0]).exists()}
    assert left <= before
    assert mounted_at(str(place.mnt)) is None
    place.mounted()  # the locks are free
    assert place.umount().status == 0


# --- umount ---------------------------------------------------------------------------------------


def test_umount_of_a_busy_mount_names_who_holds_it(place: Place) -> None:
    mnt = place.mounted()
    (mnt / "dir").mkdir()
    with subprocess.Popen(["sleep", "100"], cwd=mnt / "dir") as sleeper, open(mnt / "file") as _:
        try:
            said = place.umount()
            refused(said, 4, str(mnt), f"sleep (pid {sleeper.pid}, working directory {mnt}/dir)", "--lazy")
            assert f"(pid {os.getpid()}, open file {mnt}/file)" in said.err
        finally:
            sleeper.kill()
    assert place.umount() == Said(0, "", "")


def test_umount_names_a_mount_on_top(place: Place) -> None:
    mnt = place.mounted()
    (mnt / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mnt / "sub"], check=True)
    try:
        refused(place.umount(), 4, f"the mount on {mnt}/sub")
    finally:
        subprocess.run(["umount", mnt / "sub"], check=True)
    assert place.umount().status == 0


def test_umount_called_from_inside(place: Place) -> None:
    mnt = place.mounted()
    assert unionfs("umount", ".", cwd=mnt) == Said(0, "", "")


def test_lazy_umount_of_a_busy_mount(place: Place) -> None:
    mnt = place.mounted()
    pid = place.daemon()
    with open(mnt / "file") as file:
        said = place.umount("--lazy")
        assert said.status == 0
        assert f"daemon {pid}" in said.err
        assert mounted_at(str(mnt)) is None
        assert process_start(pid) is not None
        assert listed(mnt)[0]["state"] == "elsewhere"
        assert file.read() == "from lower\n"
        refused(place.mount(), 4, str(place.upper))
    assert wait_gone(pid)
    assert listed(mnt) == []


def test_lazy_umount_of_an_idle_mount_waits_for_the_daemon(place: Place) -> None:
    place.mounted()
    pid = place.daemon()
    assert place.umount("--lazy") == Said(0, "", "")
    assert process_start(pid) is None


@pytest.mark.parametrize("held", [False, True], ids=["idle", "held"])
def test_a_killed_daemon_leaves_a_dead_mount_that_umount_clears(place: Place, held: bool) -> None:
    mnt = place.mounted()
    pid = place.daemon()
    assert records_of(pid)
    descriptor = os.open(mnt, os.O_RDONLY) if held else -1
    os.kill(pid, signal.SIGKILL)
    assert wait_gone(pid)
    with pytest.raises(OSError, match="not connected"):
        os.listdir(mnt)
    (entry,) = listed(mnt)
    assert (entry["state"], entry["pid"]) == ("dead", pid)
    refused(place.mount(), 4, "dead", "unionfs umount")
    said = place.umount()
    assert said.status == 0
    assert "dead" in said.err
    if held:
        os.close(descriptor)
    assert mounted_at(str(mnt)) is None
    assert records_of(pid) == []
    assert listed(mnt) == []
    place.mounted()
    assert place.umount() == Said(0, "", "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("volume", [False, True], ids=["plain", "volume"])
def test_a_daemon_ended_while_it_starts_is_gone(place: Place, volume: bool, number: signal.Signals) -> None:
    """At whatever moment: it never waits for itself, so nothing keeps it alive, and no mount is left without it."""
    words = ["-v", f"{place.base / 'host'}:/v", "--bind-mode", "fuse"] if volume else []
    command = [sys.executable, "-m", "unionfs", "mount", *words, place.lower, place.upper, place.mnt]
    before = time.monotonic()
    subprocess.run(command, env=environment(), check=True)
    usual = time.monotonic() - before
    assert place.umount() == Said(0, "", "")
    failed = 0
    for moment in range(24):
        with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE) as started:
            time.sleep(usual * (0.4 + moment * 0.05))
            alive = daemons(place.mnt).keys() - {started.pid}
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            assert all(wait_gone(pid, 5) for pid in alive), "a daemon outlives the signal"
            started.communicate(timeout=20)
        if started.returncode:
            failed += 1
            assert mounted_at(str(place.mnt)) is None, "the command left a dead mount"
        for pid in daemons(place.mnt):  # forked meanwhile
            os.kill(pid, signal.SIGKILL)
            assert wait_gone(pid, 5)
        while mounted_at(str(place.mnt)):
            raw.umount2(place.mnt, raw.MNT_DETACH)
    assert failed, "no moment was early enough"
    place.mounted()
    assert place.umount() == Said(0, "", "")


def test_umount_clears_what_a_dead_daemon_left(place: Place) -> None:
    mnt = place.mounted()
    pid = place.daemon()
    os.kill(pid, signal.SIGKILL)
    assert wait_gone(pid)
    raw.umount2(mnt, 0)
    said = place.umount()
    if said.status:  # any other `unionfs ls` on this machine may have been faster
        refused(said, 2, "nothing is mounted")
    else:
        assert "dead daemon" in said.err
    assert records_of(pid) == []


def test_umount_touches_only_our_mounts(place: Place) -> None:
    refused(place.umount(), 2, "nothing is mounted", str(place.mnt))
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place.mnt], check=True)
    try:
        refused(place.umount(), 2, "tmpfs", "umount(8)")
    finally:
        subprocess.run(["umount", place.mnt], check=True)


def test_umount_leaves_a_mount_without_a_record_alone(place: Place) -> None:
    """unionfs-fuse mounts have the same type; only its record tells a mount of ours."""
    mnt = place.mounted()
    (record,) = records_of(place.daemon())
    hidden = place.base / "record"
    hidden.write_bytes(record.read_bytes())
    record.unlink()
    refused(place.umount(), 2, "no state file")
    assert listed(mnt)[0]["state"] == "unknown"
    record.write_bytes(hidden.read_bytes())
    assert place.umount().status == 0


def test_umount_while_another_mount_namespace_has_a_copy(place: Place) -> None:
    mnt = place.mounted()
    pid = place.daemon()
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as sleeper:
        try:
            assert sleeper.stdout is not None
            sleeper.stdout.readline()
            said = place.umount()
            assert said.status == 0
            assert f"daemon {pid}" in said.err
            assert "mount namespace" in said.err
            assert mounted_at(str(mnt)) is None
            assert listed(mnt)[0]["state"] == "elsewhere"
        finally:
            sleeper.kill()
    assert wait_gone(pid)


def test_umount_of_several(place: Place, ground: Path) -> None:
    place.mounted()
    second = ground / "mnt2"
    second.mkdir()
    assert unionfs("mount", place.lower, second).status == 0
    assert unionfs("umount", place.mnt, second) == Said(0, "", "")


# --- without privilege ----------------------------------------------------------------------------


# What `ls --json` says of the mount in the current directory: state and daemon.
OWN = """import json, os, sys
for entry in json.load(sys.stdin):
    if entry["mountpoint"] == os.path.join(os.getcwd(), "mnt"):
        print(entry["state"], entry["pid"])
"""
LIFE = """
set -e
unionfs() { "$PYTHON" -m unionfs "$@"; }
own() { unionfs ls --json | "$PYTHON" -c "$OWN"; }
unionfs mount lower upper mnt
grep -c "$PWD/mnt .* fuse.unionfs " /proc/self/mountinfo
cat mnt/file
echo mine > mnt/new
read state pid <<< "$(own)"
echo $state
unionfs umount mnt
own
unionfs mount lower upper mnt
read state pid <<< "$(own)"
kill -9 $pid
while [ -d /proc/$pid ] && ! grep -q '^State:.Z' /proc/$pid/status; do sleep 0.05; done
read state pid <<< "$(own)"
echo $state
unionfs umount mnt 2>&1
own
cat upper/new
"""
LIVED = "1\nfrom lower\nmounted\ndead\nunionfs: cleared the dead mount on MNT\nmine\n"


@pytest.mark.skipif(not user_namespaces(), reason="no user namespaces here: a chroot, perhaps")
def test_life_in_a_user_namespace(place: Place) -> None:
    words = ["unshare", "-Ur", "--mount", "--propagation", "private", "bash", "-c", LIFE]
    env = {"PYTHON": sys.executable, "XDG_RUNTIME_DIR": str(place.base), "OWN": OWN}
    said = program(words, cwd=place.base, env=env)
    assert said == Said(0, LIVED.replace("MNT", str(place.mnt)), "")


def become_alice(place: Place) -> str:
    """Give the layers to an ordinary user; shell commands that let her mount, and end with running "$@" as her.

    She gets a name, which fusermount3 asks for, a FUSE device that is open to all, as udev makes it, and an
    interpreter that she can reach; all in a private mount namespace.
    """
    device = place.base / "fuse"
    os.mknod(device, stat.S_IFCHR, os.makedev(10, 229))
    device.chmod(0o666)
    users = place.base / "passwd"
    users.write_text(Path("/etc/passwd").read_text() + f"alice:x:{ALICE}:{ALICE}::/:/bin/sh\n")
    for path in (place.base, place.lower, place.lower / "file", place.upper, place.mnt):
        os.chown(path, ALICE, ALICE)
    return "\n".join(
        [
            opened_interpreter(),
            f"mount --bind {device} /dev/fuse",
            f"mount --bind {users} /etc/passwd",
            f"export XDG_RUNTIME_DIR={place.base}",
            f'set -- setpriv --reuid {ALICE} --regid {ALICE} --clear-groups -- "$@"',
        ]
    )


def test_life_of_an_ordinary_user(place: Place) -> None:
    """Through fusermount3."""
    script = f'set -e\n{become_alice(place)}\ncd {place.base}\nexec "$@"'
    words = ["unshare", "--mount", "--propagation", "private", "bash", "-c", script, "bash"]
    said = program([*words, "bash", "-c", LIFE], env={"PYTHON": sys.executable, "OWN": OWN})
    assert said == Said(0, LIVED.replace("MNT", str(place.mnt)), "")
    assert (place.upper / "new").stat().st_uid == ALICE


# --- ls, versions ---------------------------------------------------------------------------------


def test_ls(place: Place) -> None:
    data = place.base / "data"
    data.mkdir()
    assert unionfs("mount", "-o", "noatime", f"{place.lower}::{data}", place.upper, place.mnt).status == 0
    (entry,) = listed(place.mnt)
    assert entry["state"] == "mounted"
    assert entry["pid"] == place.daemon()
    assert (entry["lowers"], entry["data_lowers"]) == ([str(place.lower)], [str(data)])
    assert (entry["upper"], entry["work"]) == (str(place.upper), str(place.base / ".upper.unionfs-work"))
    assert entry["options"]["metacopy"] is True
    assert "noatime" in entry["options"]["mount_options"]
    said = unionfs("ls")
    (line,) = [line for line in said.out.splitlines() if line.startswith(str(place.mnt))]
    assert ["-", "mounted", str(entry["pid"]), str(place.upper), str(place.lower), "-"] == line.split()[1:]
    assert place.umount().status == 0
    assert listed(place.mnt) == []


def test_ls_does_not_hang_on_a_stuck_daemon(place: Place) -> None:
    place.mounted()
    pid = place.daemon()
    os.kill(pid, signal.SIGSTOP)
    try:
        assert listed(place.mnt)[0]["state"] == "stuck"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert place.umount().status == 0


def test_a_damaged_record_is_no_trouble(place: Place) -> None:
    directory = state_directory()
    assert directory is not None
    damaged = Path(directory, "1.1.json")
    damaged.write_text("{not json")
    os.utime(damaged, (0, 0))
    assert unionfs("ls", "--json").status == 0
    assert not damaged.exists()


def test_version() -> None:
    said = unionfs("--version")
    assert re.fullmatch(r"unionfs \S+ \(kernel .+, libfuse 3\.\S+, pyfuse3 \S+, Python 3\.\S+\)\n", said.out)
