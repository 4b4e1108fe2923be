"""How mount(8) calls this program: for `mount -t fuse.unionfs`, lines of fstab, and systemd's .mount units.

mount(8) leaves a type that it doesn't know to a helper, /sbin/mount.TYPE:

    mount.fuse.unionfs NAME MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]

Where there is none for a type `fuse.X`, /sbin/mount.fuse runs the command X, with nothing of all that but

    unionfs NAME MOUNTPOINT -o OPTIONS

In both NAME is no layer but what /proc/mounts shows as source; the layers are options (lowerdir=, upperdir=, workdir=).
The exit status is of mount(8)'s kind.

`remount` changes what the kernel itself keeps of a mount: whether it is read-only, and flags like noexec. mount(8)
hands over all that shall be in force, what it was asked for added to what fstab or the kernel says of the mount. So a
flag that isn't there is off, and an option that says what is already so is fine; any other is refused.
"""

from __future__ import annotations

import getopt
import os
from collections.abc import Sequence
from dataclasses import dataclass

from unionfs.config import as_json, fsname_option, given_settings, parse_mount, split_options
from unionfs.core import sysio
from unionfs.errors import EnvironmentUnfit, LayerError, MountFailed, UnionError, UsageError
from unionfs.host import control
from unionfs.host.mountinfo import FUSE_TYPE, mounted_at

USAGE = "NAME MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS]"

# Exit statuses of mount(8).
BAD_CALL = 1
SYSTEM_ERROR = 2
INTERNAL_ERROR = 4
INTERRUPTED = 8
MOUNT_FAILURE = 32

# What a remount can change: which bit of mount(2) an option sets or clears.
_FLAGS: dict[str, tuple[int, bool]] = {
    name: (bit, is_set)
    for bit, setter, clearer in (
        (sysio.MS_RDONLY, "ro", "rw"),
        (sysio.MS_NOSUID, "nosuid", "suid"),
        (sysio.MS_NODEV, "nodev", "dev"),
        (sysio.MS_NOEXEC, "noexec", "exec"),
        (sysio.MS_SYNCHRONOUS, "sync", "async"),
        (sysio.MS_DIRSYNC, "dirsync", ""),
        (sysio.MS_NOATIME, "noatime", "atime"),
        (sysio.MS_NODIRATIME, "nodiratime", "diratime"),
        (sysio.MS_RELATIME, "relatime", "norelatime"),
        (sysio.MS_STRICTATIME, "strictatime", "nostrictatime"),
    )
    for name, is_set in ((setter, True), (clearer, False))
    if name
}

# What the kernel shows of any FUSE mount, and mount(8) hands back.
_SHOWN_BY_KERNEL = ("user_id=", "group_id=", "rootmode=", "fd=", "blksize=", "max_read=")


@dataclass(frozen=True, slots=True)
class Call:
    """One call by mount(8): `options` are the texts of all -o."""

    source: str
    mountpoint: str
    options: tuple[str, ...] = ()
    sloppy: bool = False
    fake: bool = False
    verbose: bool = False
    namespace: str | None = None


def read_call(words: Sequence[str]) -> Call:
    """Read the command line of a mount helper.

    Raises UsageError.
    """
    try:
        pairs, rest = getopt.gnu_getopt(list(words), "sfnvN:o:t:")
    except getopt.GetoptError as error:
        raise UsageError(f"{error}: the helper is called with {USAGE}") from None
    if len(rest) != 2:
        raise UsageError(f"the helper is called with {USAGE}, by mount(8)")
    given = dict(pairs)
    return Call(
        rest[0],
        rest[1],
        tuple(value for name, value in pairs if name == "-o"),
        sloppy="-s" in given,
        fake="-f" in given,
        verbose="-v" in given,
        namespace=given.get("-N"),
    )


def status_of(error: UnionError) -> int:
    """Return the status of mount(8) for an error of ours."""
    if isinstance(error, UsageError):
        return BAD_CALL
    if isinstance(error, EnvironmentUnfit):
        return SYSTEM_ERROR
    return INTERNAL_ERROR if type(error) is UnionError else MOUNT_FAILURE


def run(call: Call) -> None:
    """Do what mount(8) asks for, and return when the mount answers.

    Raises a UnionError that says what keeps it from being done.
    """
    if call.namespace is not None:
        _enter(call.namespace)
    words = [word for text in call.options for word in split_options(text)]
    if "remount" in words:
        _remount(call, [word for word in words if word != "remount"])
    else:
        _mount(call)


def _mount(call: Call) -> None:
    from unionfs.host import preflight
    from unionfs.service import starting

    if not given_settings(call.options, sloppy=call.sloppy).get("lowers"):
        raise UsageError("name the layers: -o lowerdir=LOWER[:LOWER...][,upperdir=UPPER,workdir=WORK]")
    privileged = os.geteuid() == 0
    config = parse_mount(
        [call.mountpoint],
        [fsname_option(call.source), *call.options],
        allow_other_default=privileged or preflight.user_allow_other(),
        privileged=privileged,
        sloppy=call.sloppy,
    )
    if call.fake:
        return
    preflight.check(config)
    starting.start(config)
    if call.verbose:
        layers = ", ".join(f"{what} {path}" for what, path in config.layer_names())
        print(f"unionfs: {call.source} mounted on {config.mountpoint}: {layers}")


def _enter(namespace: str) -> None:
    """Go to another mount namespace; all that the daemon is made of is loaded before, that may not be there."""
    import unionfs.fuse.bind_ops
    import unionfs.host.preflight
    import unionfs.service.starting  # noqa: F401

    try:
        sysio.enter_mount_namespace(namespace)
    except OSError as error:
        raise EnvironmentUnfit(f"can't enter the mount namespace {namespace}: {error.strerror}") from None


# --- remount --------------------------------------------------------------------------------------


def _remount(call: Call, words: Sequence[str]) -> None:
    path = os.path.realpath(call.mountpoint)
    mount = mounted_at(path)
    if mount is None or mount.fstype != FUSE_TYPE:
        raise LayerError(f"no union is mounted on {path}, so it can't be remounted")
    flags = 0
    others = []
    for word in words:
        if word in _FLAGS:
            bit, is_set = _FLAGS[word]
            flags = flags | bit if is_set else flags & ~bit
        elif not word.startswith(_SHOWN_BY_KERNEL):
            others.append(word)
    record = next((entry.record for entry in control.entries() if entry.mount == mount), None)
    if record is None:
        raise MountFailed(f"{path} has no state file, so nothing is known of it: unmount it, and mount it anew")
    _refuse_changes(record, others, sloppy=call.sloppy)
    if record.options.get("read_only") and not flags & sysio.MS_RDONLY:
        raise MountFailed(f"{path} was mounted read-only and stays so: unmount it, and mount it without ro")
    if call.fake:
        return
    try:
        sysio.remount(path, flags)
    except OSError as error:
        raise MountFailed(f"can't remount {path}: {error.strerror}") from None


def _refuse_changes(record: control.Record, words: list[str], *, sloppy: bool) -> None:
    """Refuse options that are not in force: layers and the way they are read stay as long as the daemon lives."""
    in_force = record.options | {
        "lowers": record.lowers,
        "data_lowers": record.data_lowers,
        "upper": record.upper,
        "work": record.work,
    }
    for name, value in given_settings(words, sloppy=sloppy).items():
        if name not in ("fsname", "read_only") and in_force.get(name) != as_json(value):
            raise UsageError(f"remount can't change {name}: unmount the union, and mount it anew")
