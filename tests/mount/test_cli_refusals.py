"""What `mount` refuses: each by one clear line and the documented exit status, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.test_cli import Place, become_alice
from tests.support.cli import Said, in_private_mounts, refused, unionfs
from tests.support.filesystems import run
from tests.support.mounts import wait_gone

USAGE, LAYERS, BUSY, UNFIT, FAILED = 2, 3, 4, 5, 6


@pytest.fixture
def place(ground: Path) -> Iterator[Place]:
    made = Place(ground)
    yield made
    made.clear()
    assert os.listdir(made.mnt) == []


def mount(*words: str | Path) -> Said:
    return unionfs("mount", *words)


# --- usage ----------------------------------------------------------------------------------------


def test_usage(place: Place) -> None:
    refused(mount(place.lower), USAGE, "MOUNTPOINT")
    refused(mount(place.lower, place.upper, place.mnt, place.mnt), USAGE, "MOUNTPOINT")
    refused(place.mount("-o", "redirectdir=on"), USAGE, "redirectdir", "redirect_dir")
    refused(place.mount("-o", "userxattr,metacopy=on"), USAGE, "metacopy", "userxattr")
    refused(place.mount("--log-level", "loud"), USAGE, "loud")
    refused(place.mount("--log-file", place.base / "no" / "log"), USAGE, "log file")
    refused(mount(f"{place.lower}:", place.upper, place.mnt), USAGE, "empty lower")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("mont", "'mont'|'mount'"),
        ("no-such-command", "'no-such-command'|unionfs --help"),
        ("--root /", "command|unionfs --help"),
        ("mount --xyz", "'--xyz'|unionfs mount --help"),
        ("mount --wrk x", "'--wrk'|'--work'"),
        ("mount --work", "'--work'|argument|unionfs mount --help"),
        ("mount --foreground=yes", "'--foreground'|value|unionfs mount --help"),
        ("umount", "MOUNTPOINT|unionfs umount --help"),
        ("ls x", "x|unionfs ls --help"),
        ("volume lst", "'lst'|'ls'"),
        ("volume rename web", "'NEW'|unionfs volume rename --help"),
    ],
)
def test_words_that_make_no_sense(words: str, parts: str) -> None:
    refused(unionfs(*words.split()), USAGE, *parts.split("|"))


# --- layers ---------------------------------------------------------------------------------------


def test_missing_layers(place: Place) -> None:
    missing = place.base / "missing"
    refused(mount(missing, place.upper, place.mnt), LAYERS, "lower", str(missing), "does not exist")
    refused(mount(f"{place.lower}::{missing}", place.upper, place.mnt), LAYERS, "data-only lower", str(missing))
    refused(mount(place.lower, missing, place.mnt), LAYERS, "upper", str(missing), "does not exist")
    refused(place.mount("--work", missing), LAYERS, "work", str(missing), "does not exist")
    refused(mount(place.lower, place.upper, missing), LAYERS, "mount point", str(missing), "mkdir")


def test_layers_that_are_no_directories(place: Place) -> None:
    file = place.base / "file"
    file.touch()
    refused(mount(file, place.upper, place.mnt), LAYERS, "lower", str(file), "not a directory")
    refused(mount(place.lower, file, place.mnt), LAYERS, "upper", str(file), "not a directory")
    refused(place.mount("--work", file), LAYERS, "work", str(file), "not a directory")
    refused(mount(place.lower, place.upper, file), LAYERS, "mount point", str(file), "not a directory")


def test_overlapping_layers(place: Place) -> None:
    """Those that overlayfs refuses with ELOOP, and an upper inside a lower, which it lets pass."""
    inner = place.lower / "inner"
    inner.mkdir()
    other = place.base / "other"
    other.mkdir()
    for lowers, upper, part in [
        ([place.lower], place.lower, "same directory"),
        ([place.lower], inner, "inside"),
        ([inner], place.lower, "inside"),
        ([place.lower, place.lower], place.upper, "same directory"),
        ([place.lower, inner], place.upper, "inside"),
        ([inner, place.lower], place.upper, "inside"),
    ]:
        said = mount("--work", other, ":".join(map(str, lowers)), upper, place.mnt)
        refused(said, LAYERS, part)
        assert overlay_refuses(lowers, upper, other, place.mnt) or upper == inner
    refused(mount(f"{place.lower}::{place.lower}", place.upper, place.mnt), LAYERS, "same directory")


def overlay_refuses(lowers: list[Path], upper: Path, work: Path, mnt: Path) -> bool:
    options = f"lowerdir={':'.join(map(str, lowers))},upperdir={upper},workdir={work}"
    done = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, mnt], capture_output=True, check=False)
    if done.returncode == 0:
        run("umount", str(mnt))
    return done.returncode != 0


def test_overlaps_are_seen_through_bind_mounts(place: Place) -> None:
    inner = place.lower / "inner"
    inner.mkdir()
    bound = place.base / "bound"
    bound.mkdir()
    script = f"mount --bind {inner} {bound}"
    refused(in_private_mounts(script, "mount", bound, place.lower, place.mnt), LAYERS, "inside")
    (bound / "m").mkdir()
    (inner / "m").mkdir()
    refused(in_private_mounts(script, "mount", place.lower, place.upper, bound / "m"), LAYERS, "inside")


def test_work_and_upper_in_one_another(place: Place) -> None:
    (place.upper / "w").mkdir()
    refused(place.mount("--work", place.upper / "w"), LAYERS, "work", "inside", "upper")
    refused(place.mount("--work", place.upper), LAYERS, "same directory")
    refused(place.mount("--work", place.base), LAYERS, "upper", "inside", "work")
    nest = place.base / "nest"
    (nest / "work").mkdir(parents=True)
    refused(mount("--work", nest, place.lower, nest / "work", place.mnt), LAYERS, "upper", "inside", "work")


def test_work_in_a_lower(place: Place) -> None:
    (place.lower / "w").mkdir()
    refused(place.mount("--work", place.lower / "w"), LAYERS, "work", "inside", "lower")


def test_work_that_holds_other_things(place: Place) -> None:
    work = place.base / "w"
    work.mkdir()
    (work / "letters").touch()
    refused(place.mount("--work", work), LAYERS, "'letters'", "not ours", "--work")
    assert os.listdir(work) == ["letters"]


def test_work_on_another_file_system(place: Place) -> None:
    work = place.base / "w"
    work.mkdir()
    said = in_private_mounts(
        f"mount -t tmpfs tmpfs {work}", *("mount", "--work", work, place.lower, place.upper, place.mnt)
    )
    refused(said, LAYERS, "another file system", "--work")
    said = in_private_mounts(
        f"mkdir {work}/w; mount --bind {work}/w {work}",
        *("mount", "--work", work, place.lower, place.upper, place.mnt),
    )
    refused(said, LAYERS, "another mount", "--work")


def test_upper_that_is_a_mount_point_needs_work(place: Place) -> None:
    script = f"mount -t tmpfs tmpfs {place.upper}"
    refused(in_private_mounts(script, "mount", place.lower, place.upper, place.mnt), LAYERS, "mount point", "--work")
    assert not (place.base / ".upper.unionfs-work").exists()


def test_upper_without_xattrs(place: Place) -> None:
    script = f"mount -t ramfs ramfs {place.upper}; mkdir {place.upper}/u"
    said = in_private_mounts(script, "mount", place.lower, place.upper / "u", place.mnt)
    refused(said, LAYERS, str(place.upper), "attributes")


def test_upper_on_a_read_only_file_system(place: Place) -> None:
    script = f"mount -t tmpfs tmpfs {place.upper}; mkdir {place.upper}/u; mount -o remount,ro {place.upper}"
    said = in_private_mounts(script, "mount", place.lower, place.upper / "u", place.mnt)
    refused(said, LAYERS, "read-only", "lower")


# --- the mount point ------------------------------------------------------------------------------


def test_a_mount_point_inside_a_layer(place: Place) -> None:
    for layer, what in ((place.lower, "lower"), (place.upper, "upper")):
        (layer / "m").mkdir()
        refused(mount(place.lower, place.upper, layer / "m"), LAYERS, "mount point", "inside", what)
    work = place.base / "w"
    (work / "work").mkdir(parents=True)
    refused(mount("--work", work, place.lower, place.upper, work / "work"), LAYERS, "mount point", "inside", "work")
    refused(mount("--work", work, place.lower, place.upper, work), LAYERS, "is the work directory")


def test_a_mount_point_inside_a_lower_on_another_file_system(place: Place) -> None:
    (place.lower / "disk").mkdir()
    script = f"mount -t tmpfs tmpfs {place.lower}/disk; mkdir {place.lower}/disk/m"
    said = in_private_mounts(script, "mount", place.lower, place.upper, place.lower / "disk" / "m")
    refused(said, LAYERS, "mount point", "inside", "lower")


# --- in use ---------------------------------------------------------------------------------------


def test_layers_in_use_by_another_union(place: Place) -> None:
    place.mounted()
    work = place.base / "w"
    second = place.base / "mnt2"
    upper2 = place.base / "upper2"
    for directory in (work, second, upper2):
        directory.mkdir()
    used_work = place.base / ".upper.unionfs-work"
    (place.upper / "inner").mkdir()
    refused(mount("--work", work, place.lower, place.upper, second), BUSY, str(place.upper), str(place.mnt))
    refused(mount("--work", used_work, place.lower, upper2, second), BUSY, str(used_work), str(place.mnt))
    refused(mount(place.upper, upper2, second), BUSY, "lower", str(place.upper), str(place.mnt))
    refused(mount(place.upper / "inner", upper2, second), BUSY, "lower", "inside", "upper")
    refused(mount("-o", "ro", place.lower, place.upper, second), BUSY, str(place.upper))
    # As overlayfs: without index, and so without upper, lowers have no exclusive protection.
    assert mount("-o", "index=off", place.upper, upper2, second) == Said(0, "", "")
    assert unionfs("umount", second).status == 0
    assert mount(place.upper, second) == Said(0, "", "")
    assert unionfs("umount", second).status == 0
    assert mount(place.lower, second) == Said(0, "", "")  # a lower may be shared
    assert unionfs("umount", second).status == 0
    assert place.umount().status == 0


def test_the_lock_holds_without_a_record(place: Place) -> None:
    """A daemon in another place whose record isn't seen still keeps the layers by its lock."""
    place.mounted()
    second = place.base / "mnt2"
    second.mkdir()
    hidden = "mount -t tmpfs tmpfs /run"
    said = in_private_mounts(hidden, "mount", place.lower, place.upper, second)
    refused(said, BUSY, str(place.upper), "in use")
    assert place.umount().status == 0


def test_layers_in_use_by_a_kernel_overlay(place: Place) -> None:
    work = place.base / "w"
    work.mkdir()
    second = place.base / "mnt2"
    second.mkdir()
    upper2 = place.base / "upper2"
    upper2.mkdir()
    options = f"lowerdir={place.lower},upperdir={place.upper},workdir={work}"
    run("mount", "-t", "overlay", "overlay", "-o", options, str(place.mnt))
    try:
        refused(mount(place.lower, place.upper, second), BUSY, str(place.upper), str(place.mnt))
        refused(mount("--work", work, place.lower, upper2, second), BUSY, str(work), str(place.mnt))
        refused(mount(place.upper, upper2, second), BUSY, "lower", str(place.upper))
    finally:
        run("umount", str(place.mnt))


def test_mounting_twice_on_one_point(place: Place) -> None:
    place.mounted()
    refused(mount(place.base / "upper", place.mnt), BUSY, "already", "unionfs umount")
    assert place.umount().status == 0


def test_mounting_on_a_dead_mount(place: Place) -> None:
    place.mounted()
    pid = place.daemon()
    os.kill(pid, signal.SIGKILL)
    assert wait_gone(pid)
    refused(place.mount(), BUSY, "dead", "unionfs umount")
    assert place.umount().status == 0


# --- the machine ----------------------------------------------------------------------------------


def test_no_fuse_device(place: Place) -> None:
    said = in_private_mounts("mount --bind /etc/passwd /dev/fuse", *("mount", place.lower, place.upper, place.mnt))
    refused(said, UNFIT, "/dev/fuse", "modprobe")


def test_libfuse_missing(place: Place) -> None:
    """An empty file over libfuse: to the loader that is as good as none."""
    (library,) = {
        line.split()[-1] for line in run("ldconfig", "-p").splitlines() if line.strip().startswith("libfuse3.so.")
    }
    script = f"mount --bind /dev/null {library}"
    said = in_private_mounts(script, "mount", place.lower, place.upper, place.mnt)
    refused(said, UNFIT, "libfuse", "install")


def test_pyfuse3_missing(place: Place) -> None:
    fake = place.base / "fake"
    fake.mkdir()
    (fake / "pyfuse3.py").write_text("raise ImportError('no such thing')\n")
    path = f"{fake}:{Path(__file__).parents[2]}"
    said = unionfs("mount", place.lower, place.upper, place.mnt, env={"PYTHONPATH": path})
    refused(said, UNFIT, "pyfuse3")


def as_alice(script: str, place: Place, *words: str | Path) -> Said:
    """Run `unionfs WORDS...` as an ordinary user after shell commands in a private mount namespace."""
    return in_private_mounts(f"{become_alice(place)}\n{script}", *words)


def test_ordinary_user_without_fusermount3(place: Place) -> None:
    script = "mount --bind /dev/null $(command -v fusermount3)"
    said = as_alice(script, place, "mount", place.lower, place.upper, place.mnt)
    refused(said, UNFIT, "fusermount3", "install")


def test_ordinary_user_without_mtab(place: Place) -> None:
    script = "mount -t tmpfs tmpfs /etc; cp $0 /etc/passwd"
    said = as_alice(script.replace("$0", str(place.base / "passwd")), place, "mount", place.lower, place.mnt)
    refused(said, UNFIT, "/etc/mtab", "ln -s")


def test_ordinary_user_and_allow_other(place: Place) -> None:
    script = "mount --bind /dev/null /etc/fuse.conf"
    said = as_alice(script, place, "mount", "-o", "allow_other", place.lower, place.upper, place.mnt)
    refused(said, UNFIT, "allow_other", "/etc/fuse.conf")


def test_ordinary_user_on_a_mount_point_of_others(place: Place) -> None:
    other = place.base / "other"
    other.mkdir()
    said = as_alice(f"chown 0:0 {other}", place, "mount", place.lower, place.upper, other)
    refused(said, FAILED, str(other), "fusermount3")


def test_ordinary_user_without_access_to_the_device(place: Place) -> None:
    script = "chown 0:0 /dev/fuse; chmod 600 /dev/fuse"
    refused(as_alice(script, place, "mount", place.lower, place.upper, place.mnt), UNFIT, "/dev/fuse", "chmod 666")


def test_nothing_is_left_after_refusals(place: Place) -> None:
    before = stat.S_IMODE(place.upper.stat().st_mode)
    refused(mount(place.lower, place.upper, place.upper / "none"), LAYERS, "mount point")
    assert os.listdir(place.upper) == []
    assert stat.S_IMODE(place.upper.stat().st_mode) == before
