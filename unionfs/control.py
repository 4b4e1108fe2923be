"""What is mounted, and by which daemon: one small JSON file for each live mount.

The daemon writes its `Record` once its mount answers and removes it as its last act. Records lie in a
directory that only their owner may enter: /run/unionfs for root, $XDG_RUNTIME_DIR/unionfs for others. A
daemon that was killed leaves its record, so nothing in one is believed without a look at the process (pid
and start time) and at the kernel's mount list; what turns out stale is removed by whoever notices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import select
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from unionfs.mountinfo import FUSE_TYPE, Mount, read_mounts

# How long a mount may take to answer a statfs before it counts as stuck, in seconds.
PROBE_SECONDS = 3.0


class State(Enum):
    """How a mount is: what `ls` shows."""

    MOUNTED = "mounted"
    DEAD = "dead"  # the daemon is gone, every access gives ENOTCONN
    STUCK = "stuck"  # the daemon runs but doesn't answer
    ELSEWHERE = "elsewhere"  # mounted in another mount namespace, or detached but still in use
    UNKNOWN = "unknown"  # a fuse.unionfs mount without a record: another user's or program's


@dataclass(frozen=True, slots=True)
class Record:
    """One mount as its daemon describes it.

    `start` is the process's start time in clock ticks since boot, `pidns` the inode number of its pid
    namespace, `dev` the mount's `major:minor`, `volumes` what `inspect` shows of them, `store` the volume store's
    directory where the mount has to do with one, `mounted_at` a Unix time in seconds.
    """

    pid: int
    start: int
    pidns: int
    mountpoint: str
    dev: str
    name: str | None
    lowers: list[str]
    data_lowers: list[str]
    upper: str | None
    work: str | None
    options: dict[str, object]
    volumes: list[dict[str, object]]
    store: str | None
    log: str | None
    version: str
    mounted_at: float

    def alive(self) -> bool:
        """Whether the daemon still runs; a zombie doesn't count."""
        return process_start(self.pid) == self.start

    def is_ours_to_judge(self) -> bool:
        """Whether `pid` means anything here: a pid from another pid namespace doesn't."""
        return self.pidns == pid_namespace()


@dataclass(frozen=True, slots=True)
class Entry:
    """What `ls` shows: a record, a mount in the kernel's list, or the two together."""

    state: State
    mountpoint: str
    record: Record | None
    mount: Mount | None
    path: str | None = None  # of the record's file


# --- processes ------------------------------------------------------------------------------------


def process_start(pid: int) -> int | None:
    """Return when process `pid` started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def pid_namespace() -> int:
    """Return the number of this process's pid namespace."""
    return os.stat("/proc/self/ns/pid").st_ino


def wait_gone(record: Record, seconds: float) -> bool:
    """Wait until the daemon of `record` has ended; False when it still runs after `seconds`."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except OSError:
        return not record.alive()
    try:
        if not record.alive():  # the pid was reused before it was opened
            return True
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(pidfd)


# --- the state directory --------------------------------------------------------------------------


def _directories(uid: int) -> list[str]:
    """Return where user `uid` keeps records, the preferred place first."""
    places = ["/run/unionfs"] if uid == 0 else []
    if uid == os.geteuid() and (runtime := os.environ.get("XDG_RUNTIME_DIR", "")).startswith("/"):
        places.append(os.path.join(runtime, "unionfs"))
    places += [f"/run/user/{uid}/unionfs", f"/tmp/.unionfs-{uid}"]
    return list(dict.fromkeys(places))


def _is_safe(path: str, uid: int) -> bool:
    """Whether `path` is a directory that only `uid` may write to; nothing else is read or written."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == uid and not status.st_mode & 0o022


def state_directory() -> str | None:
    """Return this user's state directory, made if need be; None where no place for one can be found."""
    uid = os.geteuid()
    for path in _directories(uid):
        with contextlib.suppress(OSError):
            os.mkdir(path, 0o700)
        if _is_safe(path, uid) and os.access(path, os.W_OK | os.X_OK):
            return path
    return None


def _record_files(uids: Iterable[int]) -> Iterator[str]:
    for uid in dict.fromkeys(uids):
        for directory in _directories(uid):
            if not _is_safe(directory, uid):
                continue
            with contextlib.suppress(OSError):
                for name in sorted(os.listdir(directory)):
                    if name.endswith(".json"):
                        yield os.path.join(directory, name)


# What the first version's records lack.
_ADDED_FIELDS: dict[str, Any] = {"name": None, "volumes": [], "store": None}


def _load(path: str) -> Record | None:
    """Read one record; None if it is gone or half-written. What another version doesn't say is left empty."""
    try:
        with open(path, encoding="ascii") as file:
            values = json.load(file)
        for name, empty in _ADDED_FIELDS.items():
            values.setdefault(name, empty)
        return Record(**{field.name: values[field.name] for field in dataclasses.fields(Record)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def record_path(directory: str) -> str:
    """Return where this process's record belongs in `directory`; the start time tells reused pids apart."""
    pid = os.getpid()
    return os.path.join(directory, f"{pid}.{process_start(pid)}.json")


def write(record: Record) -> str | None:
    """Store `record` for this process and return its file's path; None where there is no place for it."""
    directory = state_directory()
    if directory is None:
        return None
    path = record_path(directory)
    _store(path, record)
    return path


def _store(path: str, record: Record) -> None:
    draft = path + ".new"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="ascii") as file:
        json.dump(dataclasses.asdict(record), file, indent=1)
    os.rename(draft, path)


def note_mounts(entry: Entry, numbers: dict[int, int]) -> None:
    """Note that the kernel's binds of an entry's volumes have got other mount numbers: old → new."""
    if not numbers or entry.record is None or entry.path is None:
        return
    for volume in entry.record.volumes:
        known = volume.get("MountId")
        if isinstance(known, int):
            volume["MountId"] = numbers.get(known, known)
    _store(entry.path, entry.record)


def remove(path: str | None) -> None:
    """Remove a record and the log beside it; missing ones are no error."""
    if path is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)
        remove_log(log_path(path))


def remove_log(path: str) -> None:
    """Remove a log that lies beside a record, and its older part."""
    for name in (path, path + ".1"):
        with contextlib.suppress(OSError):
            os.unlink(name)


def log_path(record_path: str) -> str:
    """Return the log that goes with a record when the user named none and there is no system log."""
    return record_path.removesuffix(".json") + ".log"


# --- what is mounted ------------------------------------------------------------------------------


def probe(mountpoint: str, seconds: float = PROBE_SECONDS) -> State:
    """Ask a mount for its statfs: MOUNTED, DEAD (ENOTCONN), or STUCK when it takes longer than `seconds`.

    It is dead, too, if its daemon goes while this asks (ECONNABORTED).

    The call runs in a thread of its own: one that hangs can't be called back, but ends with this process.
    """
    answer: list[State] = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)
        except OSError as error:
            gone = error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
            answer.append(State.DEAD if gone else State.MOUNTED)
        else:
            answer.append(State.MOUNTED)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else State.STUCK


def entries() -> list[Entry]:
    """Return every union that this user may know of, sorted by mount point; stale records are removed."""
    by_dev: dict[str, list[Mount]] = {}
    owners = [os.geteuid()]
    for mount in read_mounts():
        if mount.fstype == FUSE_TYPE:
            by_dev.setdefault(mount.dev, []).append(mount)
            if os.geteuid() == 0 and mount.user_id is not None:
                owners.append(mount.user_id)
    found: list[Entry] = []
    # Device numbers are reused: the claim of a living daemon to one goes first, then that of the latest dead one.
    records = [(path, _load(path)) for path in _record_files(owners)]
    for path, record in sorted(records, key=lambda item: _claim(item[1])):
        entry = _entry(path, record, by_dev)
        if entry is None:
            _forget_stale(path)
        else:
            found.append(entry)
    found += [_unrecorded(mounts[0]) for mounts in by_dev.values()]
    return sorted(found, key=lambda entry: entry.mountpoint)


def _claim(record: Record | None) -> tuple[bool, float]:
    return (record is None or not record.alive(), -record.mounted_at if record else 0.0)


def _entry(path: str, record: Record | None, by_dev: dict[str, list[Mount]]) -> Entry | None:
    """Match a record with its mount, which is taken out of `by_dev`; None if the record is stale."""
    if record is None:
        return None
    mounts = by_dev.pop(record.dev, [])
    dead = record.is_ours_to_judge() and not record.alive()
    if not mounts:
        return None if dead else Entry(State.ELSEWHERE, record.mountpoint, record, None, path)
    mount = next((mount for mount in mounts if mount.mountpoint == record.mountpoint), mounts[0])
    state = State.DEAD if dead else probe(mount.mountpoint)
    return Entry(state, mount.mountpoint, record, mount, path)


def _unrecorded(mount: Mount) -> Entry:
    state = probe(mount.mountpoint)
    return Entry(state if state is State.DEAD else State.UNKNOWN, mount.mountpoint, None, mount)


def _forget_stale(path: str) -> None:
    """Remove a record that describes nothing any more, unless it is still being written."""
    with contextlib.suppress(OSError):
        if time.time() - os.stat(path).st_mtime > 1 or _load(path) is not None:
            remove(path)


def live_records() -> list[Record]:
    """Return the records of this user's unions whose daemon runs, here or in another mount namespace."""
    return [record for record in all_records() if record.is_ours_to_judge() and record.alive()]


def all_records() -> list[Record]:
    """Return every record of this user, stale ones too."""
    records = [_load(path) for path in _record_files([os.geteuid()])]
    return [record for record in records if record is not None]
