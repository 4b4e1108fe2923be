"""Unmounting: only our own mounts, until the daemon is gone, and with a word on who keeps a mount busy.

The kernel alone decides whether a mount is busy. When it says so, the holders are looked for in /proc
without a single access to the mount itself, which may not answer: descriptors by the mount id in their
fdinfo, mapped files by device number, working and root directories and programs by their path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unionfs.core import sysio
from unionfs.errors import BusyError, EnvironmentUnfit, MountFailed, UsageError, VolumeError
from unionfs.host import control
from unionfs.host.control import Entry, Record, State
from unionfs.host.kernelbind import Undoing, mounts_below
from unionfs.host.mountinfo import FUSE_TYPE, Mount, mounted_at, read_mounts

if TYPE_CHECKING:
    from unionfs.store.volumes import MountRow, Store

# How long an unmounted daemon may take to finish, in seconds.
END_SECONDS = 120.0

# How long it may take before other mount namespaces are looked at for the reason.
NAMESPACE_SECONDS = 3.0

# How long a glance at a mount may keep it busy, in seconds.
GLANCE_SECONDS = 2.0

# How many holders a message names.
SHOWN_HOLDERS = 5


@dataclass(frozen=True, slots=True)
class Holder:
    """What keeps a mount busy: process `pid` by `how`, or, with pid 0, a mount on top of it."""

    pid: int
    name: str
    how: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}, {self.how})" if self.pid else self.how


def unmount(
    word: str, *, lazy: bool = False, forget: bool = False, anonymous: bool = False, store: str | None = None
) -> str | None:
    """Unmount a union, its volumes first, and wait until its daemon has ended.

    A dead mount is cleared with all that is mounted in it. With `lazy` the mount leaves the tree at once and ends when
    its last user lets go.

    Args:
        word: a mount point, or the name of a mount.
        lazy: see above.
        forget: forget the mount's name and volumes, also where it is not mounted any more.
        anonymous: remove its anonymous volumes with that.
        store: the volume store's directory; None for the mount's own or the user's default.

    Returns:
        A line to show, if there is something to say.

    Raises:
        UsageError: nothing of ours is mounted there; BusyError: it is in use; MountFailed: it can't be unmounted;
        VolumeError: nothing is remembered that could be forgotten.
    """
    path = _find(word)
    if not forget:
        return _unmount(path, lazy=lazy)
    from unionfs.store.volumes import Store

    opened = Store.open(store or _store_of(path))
    return _unmount_and_forget(opened, word, path, lazy=lazy, anonymous=anonymous)


def clear_dead(mountpoint: str) -> None:
    """Take off the union mounted there, with all that is mounted in it, if its daemon is gone.

    Raises EnvironmentUnfit where there is no program to do it.
    """
    mount = mounted_at(mountpoint)
    if mount is not None and mount.fstype == FUSE_TYPE and control.probe(mountpoint) is State.DEAD:
        _detach(mountpoint, lazy=True)


def take_off(mountpoint: str, dev: str) -> None:
    """Take a union off the tree, in use or not, if it is still the mount with device number `dev` that is there.

    For root it needs no program. Raises EnvironmentUnfit where another user's can't be found.
    """
    mount = mounted_at(mountpoint)
    if mount is None or mount.fstype != FUSE_TYPE or mount.dev != dev:
        return
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            sysio.unmount(os.fsencode(mountpoint), detach=True)
    else:
        _detach(mountpoint, lazy=True)


def _find(word: str) -> str:
    """Return the mount point that `word` means: a path, or else the name of a mount that runs."""
    if not word:
        raise UsageError("empty path")
    path = _resolve(os.path.abspath(word))
    if "/" not in word and mounted_at(path) is None:
        for record in control.all_records():
            if record.name == word:
                return record.mountpoint
    return path


def _store_of(path: str) -> str | None:
    return next((record.store for record in control.all_records() if record.mountpoint == path), None)


def _unmount_and_forget(store: Store, word: str, path: str, *, lazy: bool, anonymous: bool) -> str | None:
    known = _remembered(store, word, path)
    if known is not None:
        path = known.mountpoint
    mount = mounted_at(path)
    said = None
    if known is None or (mount is not None and mount.fstype == FUSE_TYPE):
        said = _unmount(path, lazy=lazy)
    if known is not None:
        store.forget(known.name or known.mountpoint, anonymous=anonymous)
    return said


def _remembered(store: Store, word: str, path: str) -> MountRow | None:
    for name in (word, path):
        with contextlib.suppress(VolumeError):
            return store.find_mount(name)
    return None


def _unmount(path: str, *, lazy: bool) -> str | None:
    os.chdir("/")  # where the command was called must not keep the mount busy
    mount = mounted_at(path)
    if mount is None:
        return _clear_record(path)
    if mount.fstype != FUSE_TYPE:
        raise UsageError(f"{path} is a mount of type {mount.fstype}, not a union: use umount(8)")
    entry = _entry_of(mount)
    dead = entry.state is State.DEAD
    if entry.record is None and not dead:
        raise UsageError(_unknown_line(mount))
    in_use = lazy and bool(holders(mount))
    _detach_all(mount, entry, lazy=lazy or dead)
    if dead:
        control.remove(entry.path)
        return f"cleared the dead mount on {path}"
    if entry.record is not None:
        return _await_end(entry.record, in_use)
    return None


def _resolve(mountpoint: str) -> str:
    """Return the mount point's real path without touching the mount itself, which may hang or be dead."""
    parent, name = os.path.split(os.path.abspath(mountpoint))
    path = os.path.join(os.path.realpath(parent), name)
    return path if mounted_at(path) else os.path.realpath(path)


def _entry_of(mount: Mount) -> Entry:
    for entry in control.entries():
        if entry.mount is not None and entry.mount.dev == mount.dev:
            return entry
    return Entry(State.UNKNOWN, mount.mountpoint, None, mount)


def _clear_record(path: str) -> str:
    """Nothing is mounted there; reading the entries has removed a record that a killed daemon left."""
    before = {record.mountpoint for record in control.all_records()}
    remaining = {entry.mountpoint: entry for entry in control.entries()}
    if path in remaining:
        raise MountFailed(f"the union on {path} is mounted in another mount namespace, or detached and still in use")
    if path in before:
        return f"cleared what a dead daemon left of {path}"
    raise UsageError(f"nothing is mounted on {path}")


def _unknown_line(mount: Mount) -> str:
    if mount.user_id not in (None, os.geteuid()):
        return f"{mount.mountpoint} was mounted by user {mount.user_id}: only that user or root can unmount it"
    return f"{mount.mountpoint} has no state file, it may be another program's (unionfs-fuse): use umount(8)"


def _detach_all(mount: Mount, entry: Entry, *, lazy: bool) -> None:
    """Unmount the union, and before it, the last first, the volumes that the kernel has bound in it.

    With `lazy` the kernel takes off the whole tree at once. Else all of it goes or, if something is in use, nothing.
    """
    binds = [] if lazy else _volume_mounts(mount, entry.record)
    undoing = Undoing()
    try:
        for bind in binds:
            try:
                undoing.unmount(bind, detach=False)
            except OSError as exc:
                raise _explain(bind, "busy" if exc.errno == errno.EBUSY else exc.strerror or str(exc)) from None
        error = _detach_when_free(mount, lazy=lazy)
        if error is not None:
            raise _explain(mount, error)
    except BaseException:
        control.note_mounts(entry, undoing.put_back())
        raise
    undoing.close()


def _detach_when_free(mount: Mount, *, lazy: bool) -> str | None:
    """Unmount; a mount that nobody holds is busy while somebody looks at it (`unionfs ls`, df), so try again."""
    end = time.monotonic() + GLANCE_SECONDS
    while True:
        error = _detach(mount.mountpoint, lazy=lazy)
        if error is None or "busy" not in error or time.monotonic() > end or holders(mount):
            return error
        time.sleep(0.05)


def _volume_mounts(mount: Mount, record: Record | None) -> list[Mount]:
    """Return the mounts of the union's volumes and what is mounted in these, the last first.

    Raises BusyError before anything is undone where the union itself is in use, or holds a mount that is not of ours.
    """
    below = mounts_below(mount, read_mounts())
    if record is None or not below:
        return []
    ours = {volume.get("MountId") for volume in record.volumes}
    for other in below:
        if other.parent_id in ours:
            ours.add(other.mount_id)
    keepers = [holder for holder in holders(mount) if holder.pid]
    if keepers or any(other.mount_id not in ours for other in below):
        raise _explain(mount, "busy", keepers or [holder for holder in holders(mount) if not holder.pid])
    return below[::-1]


def _detach(path: str, *, lazy: bool) -> str | None:
    """Unmount by umount(8), or fusermount3 for an ordinary user; return the error's text, None when done."""
    if os.geteuid() == 0:
        command = ["umount", "-i", "-c", *(["-l"] if lazy else []), "--", path]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", path]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"LC_ALL": "C"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        raise EnvironmentUnfit(f"no {command[0]}: install the package that has it") from None
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"{command[0]} failed"])[-1]


def _explain(mount: Mount, error: str, found: list[Holder] | None = None) -> BusyError | MountFailed:
    if "busy" not in error:
        return MountFailed(f"can't unmount {mount.mountpoint}: {error}")
    found = holders(mount) if found is None else found
    shown = ", ".join(str(holder) for holder in found[:SHOWN_HOLDERS])
    more = f" and {len(found) - SHOWN_HOLDERS} more" if len(found) > SHOWN_HOLDERS else ""
    by = f"used by {shown}{more}" if found else "by a process that this user may not see"
    return BusyError(f"{mount.mountpoint} is busy, {by}: end them, or use --lazy")


def _await_end(record: Record, in_use: bool) -> str | None:
    if in_use:
        return f"detached; daemon {record.pid} ends when the last user lets go"
    if not record.is_ours_to_judge() or control.wait_gone(record, NAMESPACE_SECONDS):
        return None
    other = _other_namespace(record.dev)
    if other is not None:
        return f"unmounted here; {other} has a mount namespace that still holds it, daemon {record.pid} ends with that"
    if not control.wait_gone(record, END_SECONDS):
        raise MountFailed(f"unmounted, but daemon {record.pid} still runs after {END_SECONDS:.0f} seconds")
    return None


def _other_namespace(dev: str) -> str | None:
    """Return a process in whose mount namespace a file system is still mounted, None if there is none."""
    seen = {os.stat("/proc/self/ns/mnt").st_ino}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            namespace = os.stat(f"/proc/{pid}/ns/mnt").st_ino
            if namespace not in seen:
                seen.add(namespace)
                with open(f"/proc/{pid}/mountinfo", "rb") as lines:
                    if any(line.split(None, 3)[2] == dev.encode() for line in lines):
                        return f"{_process_name(pid)} (pid {pid})"
    return None


# --- holders --------------------------------------------------------------------------------------


def holders(mount: Mount) -> list[Holder]:
    """Return who keeps `mount` busy, as far as this user may see: mounts on it first, then processes."""
    found = [
        Holder(0, "", f"the mount on {other.mountpoint}")
        for other in read_mounts()
        if other.parent_id == mount.mount_id
    ]
    for name in os.listdir("/proc"):
        if name.isdecimal():
            # The process may end while it is looked at, and other users' are closed to us.
            with contextlib.suppress(OSError):
                how = _how_held(name, mount)
                if how is not None:
                    found.append(Holder(int(name), _process_name(name), how))
    return found


def _process_name(pid: str) -> str:
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def _how_held(pid: str, mount: Mount) -> str | None:
    """Return how process `pid` uses `mount`, None if it doesn't."""
    for link, what in (("cwd", "working directory"), ("root", "root directory"), ("exe", "program")):
        target = os.readlink(f"/proc/{pid}/{link}")
        if _is_below(target, mount.mountpoint):
            return f"{what} {target}"
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if _fd_mount(pid, fd) == mount.mount_id:
                return f"open file {os.readlink(f'/proc/{pid}/fd/{fd}')}"
    return _mapped_file(pid, mount)


def _is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")


def _fd_mount(pid: str, fd: str) -> int | None:
    with open(f"/proc/{pid}/fdinfo/{fd}", "rb") as file:
        for line in file:
            if line.startswith(b"mnt_id:"):
                return int(line[7:])
    return None


def _mapped_file(pid: str, mount: Mount) -> str | None:
    """Return a file of the mount that a process has mapped; by its path where the device has other mounts, too."""
    major, minor = map(int, mount.dev.split(":"))
    anywhere = mount.fstype == FUSE_TYPE
    device = b"%02x:%02x" % (major, minor)
    with open(f"/proc/{pid}/maps", "rb") as file:
        for line in file:
            fields = line.split(None, 5)
            if fields[3] == device:
                path = os.fsdecode(fields[5].strip())
                if anywhere or _is_below(path, mount.mountpoint):
                    return f"mapped file {path}"
    return None
