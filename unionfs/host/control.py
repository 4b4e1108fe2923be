"""What is mounted, and by which daemon: one small JSON file for each live mount.

The daemon writes its `Record` once its mount answers and removes it as its last act. Records lie in a
directory that only their owner may enter: /run/unionfs for root, $XDG_RUNTIME_DIR/unionfs for others. A
daemon that was killed leaves its record, so nothing in one is believed without a look at the process (pid
and start time) and at the kernel's mount list; what turns out stale is removed by whoever notices.

Root reads the records of other users too, and these may write there what they like, and exchange their directory for
something else at any moment. So a directory is opened once, without following a link, and all in it goes by its
descriptor; a record must be a small plain file of that user that says what records say; and it counts only for mounts
that the kernel knows as this user's, and for a process of his.
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from unionfs.host.mountinfo import FUSE_TYPE, Mount, read_mounts

# How long a mount may take to answer a statfs before it counts as stuck, in seconds.
PROBE_SECONDS = 3.0

# More than any record takes.
_MOST_BYTES: Final = 1 << 20

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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


def _is_safe(status: os.stat_result, uid: int) -> bool:
    """Whether that is a directory that only `uid` may write to; nothing else is read or written."""
    return stat.S_ISDIR(status.st_mode) and status.st_uid == uid and not status.st_mode & 0o022


def state_directory() -> str | None:
    """Return this user's state directory, made if need be; None where no place for one can be found."""
    uid = os.geteuid()
    for path in _directories(uid):
        with contextlib.suppress(OSError):
            os.mkdir(path, 0o700)
        with contextlib.suppress(OSError):
            if _is_safe(os.lstat(path), uid) and os.access(path, os.W_OK | os.X_OK):
                return path
    return None


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[int, str]]:
    """Open the directory of a record's file; the value is its descriptor and the file's name.

    Raises OSError: EPERM where it is not safe.
    """
    directory, name = os.path.split(path)
    fd = os.open(directory, _DIRECTORY)
    try:
        status = os.fstat(fd)
        if not _is_safe(status, status.st_uid):
            raise PermissionError(errno.EPERM, "others may write there", directory)
        yield fd, name
    finally:
        os.close(fd)


def _record_files(uids: Iterable[int], mounts: Sequence[Mount] = ()) -> Iterator[tuple[int, str]]:
    """Yield whose record it is and its file, for all records of these users.

    What lies on a FUSE file system, of which `mounts` tell, is some user's program: it is left alone.
    """
    fuse = [mount.mountpoint for mount in mounts if mount.fstype.startswith("fuse")]
    for uid in dict.fromkeys(uids):
        for directory in _directories(uid):
            if any(directory == point or directory.startswith(f"{point}/") for point in fuse):
                continue
            with contextlib.suppress(OSError):
                fd = os.open(directory, _DIRECTORY)
                try:
                    names = sorted(os.listdir(fd)) if _is_safe(os.fstat(fd), uid) else []
                finally:
                    os.close(fd)
                yield from ((uid, os.path.join(directory, name)) for name in names if name.endswith(".json"))


# What the first version's records lack.
_ADDED_FIELDS: dict[str, Any] = {"name": None, "volumes": [], "store": None}


def _load(path: str) -> Record | None:
    """Read one record; None if it is gone, half-written or none. What another version doesn't say is left empty."""
    try:
        values = json.loads(_read(path))
        for name, empty in _ADDED_FIELDS.items():
            values.setdefault(name, empty)
        record = Record(**{field.name: values[field.name] for field in dataclasses.fields(Record)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if _makes_sense(record) else None


def _read(path: str) -> bytes:
    with _opened(path) as (directory, name):
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.fstat(directory).st_uid:
                raise PermissionError(errno.EPERM, "no file of that user's", path)
            return file.read(_MOST_BYTES)


def _makes_sense(record: Record) -> bool:
    """Whether all that a record says is of the kind that it should be."""
    lists = (record.lowers, record.data_lowers, record.volumes)
    if not all(type(one) is list for one in lists):
        return False
    texts = (record.mountpoint, record.dev, record.version, *record.lowers, *record.data_lowers)
    maybe = (record.name, record.upper, record.work, record.store, record.log)
    return (
        all(type(number) is int and 0 <= number < 1 << 63 for number in (record.start, record.pidns))
        and type(record.pid) is int
        and 0 < record.pid < 1 << 31
        and all(type(text) is str for text in texts)
        and all(text is None or type(text) is str for text in maybe)
        and type(record.options) is dict
        and all(type(volume) is dict and type(volume.get("Destination")) is str for volume in record.volumes)
        and type(record.mounted_at) in (int, float)
        and 0 <= record.mounted_at < 1e11
    )


def record_path(directory: str, pid: int) -> str:
    """Return where a process's record belongs in `directory`; the start time tells reused pids apart."""
    return os.path.join(directory, f"{pid}.{process_start(pid)}.json")


def write(record: Record) -> str | None:
    """Store `record` for its process and return its file's path; None where there is no place for it."""
    directory = state_directory()
    if directory is None:
        return None
    path = record_path(directory, record.pid)
    _store(path, record)
    return path


def _store(path: str, record: Record) -> None:
    with _opened(path) as (directory, name):
        draft = name + ".new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft, dir_fd=directory)
        how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(draft, how, 0o600, dir_fd=directory), "w", encoding="ascii") as file:
            json.dump(dataclasses.asdict(record), file, indent=1)
        os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)


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
        log = log_path(path)
        _remove(path, log, log + ".1")


def remove_log(path: str) -> None:
    """Remove a log that lies beside a record, and its older part."""
    _remove(path, path + ".1")


def _remove(*paths: str) -> None:
    """Remove files of one state directory, as far as they are there."""
    with contextlib.suppress(OSError), _opened(paths[0]) as (directory, _):
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(os.path.basename(path), dir_fd=directory)


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
    mounts = read_mounts()
    for mount in mounts:
        if mount.fstype == FUSE_TYPE:
            by_dev.setdefault(mount.dev, []).append(mount)
            if os.geteuid() == 0 and mount.user_id is not None:
                owners.append(mount.user_id)
    found: list[Entry] = []
    # Device numbers are reused: the claim of a living daemon to one goes first, then that of the latest dead one.
    records = [(uid, path, _load(path)) for uid, path in _record_files(owners, mounts)]
    for uid, path, record in sorted(records, key=lambda item: _claim(item[2], item[0])):
        entry = _entry(uid, path, record, by_dev)
        if entry is None:
            _forget_stale(path)
        else:
            found.append(entry)
    found += [_unrecorded(mounts[0]) for mounts in by_dev.values()]
    return sorted(found, key=lambda entry: entry.mountpoint)


def _claim(record: Record | None, uid: int) -> tuple[bool, float]:
    return (record is None or not _runs(record, uid), -record.mounted_at if record else 0.0)


def _runs(record: Record, uid: int) -> bool:
    """Whether the daemon still runs, as a process of the user whose record it is."""
    if uid != os.geteuid():
        try:
            if os.stat(f"/proc/{record.pid}").st_uid != uid:
                return False
        except OSError:
            return False
    return record.alive()


def _entry(uid: int, path: str, record: Record | None, by_dev: dict[str, list[Mount]]) -> Entry | None:
    """Match a user's record with his mount, which is taken out of `by_dev`; None if the record is stale."""
    if record is None:
        return None
    mounts = by_dev.get(record.dev, [])
    if mounts and mounts[0].user_id not in (None, uid):
        mounts = []
    elif mounts:
        del by_dev[record.dev]
    dead = record.is_ours_to_judge() and not _runs(record, uid)
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
        with _opened(path) as (directory, name):
            written = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime
        if time.time() - written > 1 or _load(path) is not None:
            remove(path)


def live_records() -> list[Record]:
    """Return the records of this user's unions whose daemon runs, here or in another mount namespace."""
    return [record for record in all_records() if record.is_ours_to_judge() and record.alive()]


def all_records() -> list[Record]:
    """Return every record of this user, stale ones too."""
    records = [_load(path) for _, path in _record_files([os.geteuid()])]
    return [record for record in records if record is not None]
