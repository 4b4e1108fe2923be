"""What is checked before a union is mounted: does this machine serve FUSE, and do the layers fit together?

Each refusal is one line that says what to do. The overlaps that are refused are those of overlayfs
(ovl_check_overlapping_layers and ovl_workdir_ok in fs/overlayfs/super.c): a layer twice, a layer inside
another, work and upper inside one another, an upper or work that another live mount uses. Two more come
with serving from user space: a mount point *inside* a layer, where the daemon would walk into its own mount
and wait for itself, and one that another union is mounted on already. A mount point that *is* a layer, or
lies above one, is fine: layers are opened before the mount hides them.

These checks give early and clear errors; they hold no locks. What must not race is done again by
`Union.open`, which locks upper and work.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from unionfs.config import MountConfig, default_work
from unionfs.errors import BusyError, EnvironmentUnfit, LayerError
from unionfs.host import control
from unionfs.host.mountinfo import FUSE_TYPE, Mount, Place, mounted_at, place_of, read_mounts

FUSE_DEVICE = "/dev/fuse"
FUSE_CONF = "/etc/fuse.conf"
MTAB = "/etc/mtab"

# How long to wait for the daemon of a union that was just unmounted, in seconds.
LEAVING_SECONDS = 5.0

# What overlayfs keeps in a work directory.
_WORK_ENTRIES = frozenset({"work", "index"})


def check(config: MountConfig) -> None:
    """Refuse a mount that can't work, and make the default work directory where it is missing.

    Raises EnvironmentUnfit, LayerError or BusyError.
    """
    check_environment(config)
    mounts = read_mounts()
    places = _layer_places(config, mounts)
    if config.upper is not None and config.work is not None:
        upper = places[0][2]
        _check_work(config, upper, mounts)
        places.append(("work", config.work, place_of(config.work, mounts)))
    _check_overlaps(places)
    if config.upper is not None and config.work is not None:
        _check_work_content(config.work)
    _check_mountpoint(config, places, mounts)
    _check_in_use(config, places, mounts)


# --- the machine ----------------------------------------------------------------------------------


def check_environment(config: MountConfig) -> None:
    """Raise EnvironmentUnfit where this machine or user can't mount anything by FUSE."""
    try:
        is_device = stat.S_ISCHR(os.stat(FUSE_DEVICE).st_mode)
    except OSError:
        is_device = False
    if not is_device:
        raise EnvironmentUnfit(
            f"no {FUSE_DEVICE}: load the kernel module (modprobe fuse), "
            f"or give the container the device (--device {FUSE_DEVICE})"
        )
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise EnvironmentUnfit(
            f"{FUSE_DEVICE} is closed to this user: root can open it to all (chmod 666 {FUSE_DEVICE})"
        )
    if os.geteuid() == 0:
        return
    import shutil

    if shutil.which("fusermount3") is None:
        raise EnvironmentUnfit("no fusermount3, which ordinary users mount with: install the package fuse3")
    if not os.path.exists(MTAB):
        raise EnvironmentUnfit(f"no {MTAB}, which fusermount3 reads: ln -s /proc/self/mounts {MTAB}")
    if config.allow_other and not user_allow_other():
        raise EnvironmentUnfit(
            f"allow_other needs the line user_allow_other in {FUSE_CONF}: have it added, or leave the option out"
        )


def user_allow_other() -> bool:
    """Whether /etc/fuse.conf lets ordinary users give others access to their mounts."""
    try:
        with open(FUSE_CONF, encoding="utf-8", errors="replace") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False


# --- layers ---------------------------------------------------------------------------------------


def _layer_places(config: MountConfig, mounts: list[Mount]) -> list[tuple[str, str, Place]]:
    """Return (what, path, place) of upper, if there is one, and all lowers, top to bottom."""
    return [(what, path, _directory_place(what, path, mounts)) for what, path in config.layer_names() if what != "work"]


def _directory_place(what: str, path: str, mounts: list[Mount]) -> Place:
    try:
        return place_of(path, mounts)
    except NotADirectoryError:
        raise LayerError(f"{what} {path} is not a directory") from None
    except FileNotFoundError:
        raise LayerError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise LayerError(f"{what} {path} can't be opened: {error.strerror}") from None


def _check_work(config: MountConfig, upper: Place, mounts: list[Mount]) -> None:
    """Make sure that there is a work directory, on upper's mount."""
    assert config.upper is not None
    assert config.work is not None
    if os.statvfs(config.upper).f_flag & os.ST_RDONLY:
        raise LayerError(f"upper {config.upper} is on a read-only file system: give it as a lower instead")
    if "work" not in config.explicit:
        _make_default_work(config, upper, mounts)
    work = _directory_place("work", config.work, mounts)
    if work.mount_id != upper.mount_id:
        where = "file system" if work.dev != upper.dev else "mount"
        raise LayerError(
            f"work {config.work} is on another {where} than upper {config.upper}: pass a --work on upper's"
        )
    if os.stat(config.work).st_dev != os.stat(config.upper).st_dev:  # btrfs subvolumes
        raise LayerError(
            f"work {config.work} is in another subvolume than upper {config.upper}: pass a --work in upper's"
        )


def _check_work_content(work: str) -> None:
    """Refuse a work directory that serves something else too; what overlayfs keeps there is fine."""
    try:
        strangers = sorted(set(os.listdir(work)) - _WORK_ENTRIES)
    except OSError as error:
        raise LayerError(f"work {work} can't be read: {error.strerror}") from None
    if strangers:
        raise LayerError(f"work {work} holds {strangers[0]!r}, not ours: pass --work with an empty directory")


def _make_default_work(config: MountConfig, upper: Place, mounts: list[Mount]) -> None:
    assert config.upper is not None
    work = default_work(config.upper)
    parent = os.path.dirname(work)
    beside = _directory_place("upper's parent", parent, mounts)
    other = beside.mount_id != upper.mount_id or os.stat(parent).st_dev != os.stat(config.upper).st_dev
    if other:
        raise LayerError(
            f"upper {config.upper} is a mount point, so the work directory can't lie beside it: "
            "use a directory in it as upper, or pass --work DIR on the same mount"
        )
    try:
        os.mkdir(work, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise LayerError(
            f"can't make the work directory {work}: {error.strerror}; pass --work DIR on the file system of upper"
        ) from None


def _check_overlaps(places: list[tuple[str, str, Place]]) -> None:
    """Refuse a layer given twice and one inside another (ovl_setup_trap, ovl_check_layer; ELOOP there)."""
    for number, (what, path, place) in enumerate(places):
        for other_what, other_path, other in places[number + 1 :]:
            if place == other or (place.dev, place.path) == (other.dev, other.path):
                raise LayerError(f"{what} {path} and {other_what} {other_path} are the same directory")
            if place.is_within(other):
                raise LayerError(f"{what} {path} lies inside {other_what} {other_path}: layers must not overlap")
            if other.is_within(place):
                raise LayerError(f"{other_what} {other_path} lies inside {what} {path}: layers must not overlap")


# --- the mount point ------------------------------------------------------------------------------


def _check_mountpoint(config: MountConfig, places: list[tuple[str, str, Place]], mounts: list[Mount]) -> None:
    existing = mounted_at(config.mountpoint, mounts)
    if existing is not None and existing.fstype == FUSE_TYPE:
        if control.probe(config.mountpoint) is control.State.DEAD:
            raise BusyError(_dead_line(config.mountpoint))
        raise BusyError(f"a union is mounted on {config.mountpoint} already: unionfs umount {config.mountpoint}")
    here = _mountpoint_place(config.mountpoint, mounts)
    ancestors = _ancestors(config.mountpoint)
    for what, path, place in places:
        same = (here.dev, here.path) == (place.dev, place.path)
        if same and what != "work":
            continue
        if same:
            raise LayerError(f"mount point {config.mountpoint} is the work directory")
        status = os.stat(path)
        if here.is_within(place) or (status.st_dev, status.st_ino) in ancestors:
            raise LayerError(
                f"mount point {config.mountpoint} lies inside {what} {path}: the union would contain itself; "
                "use one outside the layers"
            )


def _mountpoint_place(path: str, mounts: list[Mount]) -> Place:
    try:
        return place_of(path, mounts)
    except FileNotFoundError:
        raise LayerError(f"mount point {path} does not exist: make it with mkdir") from None
    except NotADirectoryError:
        raise LayerError(f"mount point {path} is not a directory") from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise BusyError(f"mount point {path} holds a dead mount: clear it with unionfs umount {path}") from None
        raise LayerError(f"mount point {path} can't be opened: {error.strerror}") from None


def _dead_line(path: str) -> str:
    return f"mount point {path} holds a dead mount: clear it with unionfs umount {path}"


def _ancestors(path: str) -> set[tuple[int, int]]:
    """Return (device, inode) of every directory above `path`, across mounts."""
    found: set[tuple[int, int]] = set()
    while path != "/":
        path = os.path.dirname(path)
        status = os.stat(path)
        found.add((status.st_dev, status.st_ino))
    return found


# --- other mounts ---------------------------------------------------------------------------------


def _check_in_use(config: MountConfig, places: list[tuple[str, str, Place]], mounts: list[Mount]) -> None:
    """Refuse layers that a live union or kernel overlay writes to.

    With index=off a lower may be another mount's upper, as in overlayfs (ovl_report_in_use).
    """
    for used_what, used_path, mountpoint, record in [*_union_layers(), *_overlay_layers(mounts)]:
        try:
            used = place_of(used_path, mounts)
        except OSError:
            continue
        for what, path, place in places:
            if ("lower" in what and not config.index) or not place.is_within(used):
                continue
            if record is not None and _is_leaving(record, mounts):
                break
            relation = "is" if (place.dev, place.path) == (used.dev, used.path) else "lies inside"
            raise BusyError(f"{what} {path} {relation} the {used_what} of the union on {mountpoint}")


def _is_leaving(record: control.Record, mounts: list[Mount]) -> bool:
    """Whether a union was just unmounted with umount(8), which returns before the daemon has ended."""
    if any(mount.dev == record.dev for mount in mounts):
        return False
    return control.wait_gone(record, LEAVING_SECONDS)


def _union_layers() -> Iterator[tuple[str, str, str, control.Record | None]]:
    """Yield (what, directory, mount point, record) of the upper and work of every live union of this user."""
    for record in control.live_records():
        for what, path in (("upper", record.upper), ("work", record.work)):
            if path is not None:
                yield what, path, record.mountpoint, record


def _overlay_layers(mounts: list[Mount]) -> Iterator[tuple[str, str, str, control.Record | None]]:
    """Yield (what, directory, mount point, None) of the upper and work of every kernel overlay mount."""
    for mount in mounts:
        if mount.fstype == "overlay":
            options = dict(option.partition("=")[::2] for option in mount.super_options.split(","))
            for name, what in (("upperdir", "upper"), ("workdir", "work")):
                if options.get(name, "").startswith("/"):
                    yield what, options[name], mount.mountpoint, None
