"""The volume store's database, ROOT/unionfs.db: which volumes there are, and which mounts use them.

SQLite from the standard library. `opened` gives the tables for the time of one step, which the store's lock keeps
others out of; each change is a transaction of its own unless `Tables.together` says otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from unionfs.errors import BusyError, VolumeError
from unionfs.host import control
from unionfs.host.mountinfo import FUSE_TYPE, mounted_at
from unionfs.store.volumedirs import DATA
from unionfs.store.volumemodel import Acquired, MountRow, Volume
from unionfs.volumespec import VOLUME_NAME, VolumeSpec

_SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE volumes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    labels TEXT NOT NULL,         -- JSON
    options TEXT NOT NULL,        -- JSON
    anonymous INTEGER NOT NULL,
    created_at TEXT NOT NULL,
    state TEXT NOT NULL,
    detail TEXT NOT NULL          -- what belongs to the state: a directory's or a volume's name
);
CREATE TABLE mounts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT,
    mountpoint BLOB NOT NULL,
    pid INTEGER,                  -- of its daemon; NULL after its end
    start INTEGER,
    pidns INTEGER,
    boot TEXT,
    created_at TEXT NOT NULL
);
CREATE TABLE specs (
    mount INTEGER NOT NULL REFERENCES mounts ON DELETE CASCADE,
    position INTEGER NOT NULL,
    spec TEXT NOT NULL,           -- JSON
    volume INTEGER REFERENCES volumes ON DELETE SET NULL
);
"""

# States of a volume, with what `detail` says there. All but READY are those of a step that isn't done.
READY = "ready"
MAKING = "making"  # detail: the stage that becomes it
REMOVING = "removing"  # detail: its name in the trash
RENAMING = "renaming"  # detail: the new name
FILLING = "filling"  # detail: where its first content is built
RESTORING = "restoring"  # detail: where its new content is built, or what is left of the old one
CLEARING = "clearing"  # detail: as before; the new content is complete, the old one is moved out
PUBLISHING = "publishing"  # detail: as before; the new content is moved in
UNDONE: Final = (MAKING, REMOVING, RENAMING, FILLING, RESTORING, CLEARING, PUBLISHING)


@dataclass(frozen=True, slots=True)
class Row:
    """A volume and what is being done to it."""

    volume: Volume
    state: str
    detail: str


@contextlib.contextmanager
def opened(root: str, volumes: str) -> Iterator[Tables]:
    """Open the database in `root`, made if need be, and close it afterwards.

    Raises VolumeError where it can't be used.
    """
    path = os.path.join(root, "unionfs.db")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as db:
            db.execute("PRAGMA foreign_keys = ON")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > _SCHEMA_VERSION:
                raise VolumeError(f"{path} was made by a newer unionfs: use that one")
            if version == 0:
                db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")
            yield Tables(db, volumes)
    except sqlite3.Error as exc:
        raise VolumeError(f"the volume database {path} can't be used: {exc}") from exc


class Tables:
    """The tables, open. `volumes` is the directory that has the volumes' own."""

    def __init__(self, db: sqlite3.Connection, volumes: str) -> None:
        self._db = db
        self._volumes = volumes

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make several changes one transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # --- volumes ---

    def in_state(self, *states: str) -> list[Row]:
        """Return the volumes in these states, by name."""
        return self._rows(f"state IN ({', '.join('?' * len(states))})", *states)

    def all(self) -> list[Row]:
        """Return all volumes that are made, by name."""
        return self._rows("state != ?", MAKING)

    def get(self, key: str | int) -> Row | None:
        """Return a volume by its name or number, also one that is being made."""
        if isinstance(key, str) and not VOLUME_NAME.fullmatch(key):
            return None
        found = self._rows("name = ?" if isinstance(key, str) else "id = ?", key)
        return found[0] if found else None

    def find(self, name: str) -> Row:
        """Return a volume by name.

        Raises VolumeError; BusyError while it is being made.
        """
        row = self.get(name)
        if row is None:
            raise VolumeError(f"no such volume: {name}")
        if row.state == MAKING:
            raise BusyError(f"volume {name} is being made by another command: wait for it")
        return row

    def _rows(self, where: str, *values: object) -> list[Row]:
        columns = "id, name, labels, options, anonymous, created_at, state, detail"
        found = self._db.execute(f"SELECT {columns} FROM volumes WHERE {where} ORDER BY name", values)
        return [self._row(*fields) for fields in found.fetchall()]

    def _row(
        self, number: int, name: str, labels: str, options: str, anonymous: int, created: str, state: str, detail: str
    ) -> Row:
        mountpoint = os.path.join(self._volumes, name, DATA)
        volume = Volume(number, name, json.loads(labels), json.loads(options), bool(anonymous), created, mountpoint)
        return Row(volume, state, detail)

    def insert(
        self,
        name: str,
        labels: Mapping[str, str],
        options: Mapping[str, str],
        *,
        anonymous: bool,
        state: str,
        detail: str = "",
    ) -> None:
        """Add a volume in one of the states above; *detail* is what it says of that state."""
        self._db.execute(
            "INSERT INTO volumes (name, labels, options, anonymous, created_at, state, detail) VALUES (?,?,?,?,?,?,?)",
            (name, json.dumps(dict(labels)), json.dumps(dict(options)), anonymous, _now(), state, detail),
        )

    def set_state(self, volume: Volume, state: str, detail: str = "") -> None:
        """Note what is being done to a volume."""
        self._db.execute("UPDATE volumes SET state = ?, detail = ? WHERE id = ?", (state, detail, volume.id))

    def renamed(self, volume: Volume, name: str) -> None:
        """Give a volume its new name; it is ready then."""
        self._db.execute("UPDATE volumes SET name = ?, state = ?, detail = '' WHERE id = ?", (name, READY, volume.id))

    def delete(self, volume: Volume) -> None:
        """Forget a volume; mounts that are remembered keep its name."""
        self._db.execute("DELETE FROM volumes WHERE id = ?", (volume.id,))

    def referred(self) -> set[int]:
        """Return the numbers of the volumes that any mount refers to, running or remembered."""
        return {number for (number,) in self._db.execute("SELECT volume FROM specs WHERE volume IS NOT NULL")}

    def users(self, volume: Volume) -> list[MountRow]:
        """Return the running mounts of a volume."""
        users = {mount for (mount,) in self._db.execute("SELECT mount FROM specs WHERE volume = ?", (volume.id,))}
        return [mount for mount in self.mounts() if mount.id in users and mount.running] if users else []

    def uses(self, volume: Volume) -> int:
        """Return at how many targets running mounts have a volume."""
        mounts = [mount for (mount,) in self._db.execute("SELECT mount FROM specs WHERE volume = ?", (volume.id,))]
        running = {mount.id for mount in self.users(volume)}
        return sum(mount in running for mount in mounts)

    # --- mounts ---

    def mounts(self) -> list[MountRow]:
        """Return all mounts, running or remembered, the oldest first."""
        specs: dict[int, list[VolumeSpec]] = {}
        for mount, text, volume in self._db.execute(
            "SELECT mount, spec, volumes.name FROM specs LEFT JOIN volumes ON volumes.id = volume ORDER BY position"
        ):
            spec = VolumeSpec(**json.loads(text))
            specs.setdefault(mount, []).append(dataclasses.replace(spec, source=volume) if volume else spec)
        query = "SELECT id, name, mountpoint, pid, start, pidns, boot, created_at FROM mounts ORDER BY id"
        return [
            MountRow(number, name, path, _running(path, pid, start, pidns, boot), created, specs.get(number, []))
            for number, name, raw, pid, start, pidns, boot, created in self._db.execute(query)
            for path in (os.fsdecode(raw),)
        ]

    def find_mount(self, name_or_mountpoint: str) -> MountRow:
        """Return the mount of that name or on that mount point: a running one first, else the latest.

        Raises VolumeError.
        """
        mounts = self.mounts()
        found = [mount for mount in mounts if mount.name == name_or_mountpoint]
        found = found or [mount for mount in mounts if mount.mountpoint == os.path.abspath(name_or_mountpoint)]
        if not found:
            raise VolumeError(
                f"no mount with volumes or a name is known as {name_or_mountpoint}: give its --name or mount point"
            )
        return max(found, key=lambda mount: (mount.running is not None, mount.id))

    def insert_mount(
        self, name: str | None, mountpoint: str, daemon: tuple[int, int, int], acquired: Sequence[Acquired]
    ) -> int:
        """Add a running mount, whose daemon is (pid, start, pidns), and return its number."""
        number = self._db.execute(
            "INSERT INTO mounts (name, mountpoint, pid, start, pidns, boot, created_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (name, os.fsencode(mountpoint), *daemon, _boot_id(), _now()),
        ).lastrowid
        assert number is not None
        for position, one in enumerate(acquired):
            # An anonymous volume is kept by its number alone: once it is removed, the next one is a fresh one.
            anonymous = one.volume is not None and one.volume.anonymous
            spec = dataclasses.asdict(dataclasses.replace(one.spec, source="") if anonymous else one.spec)
            self._db.execute(
                "INSERT INTO specs (mount, position, spec, volume) VALUES (?, ?, ?, ?)",
                (number, position, json.dumps(spec), one.volume.id if one.volume else None),
            )
        return number

    def end_mount(self, number: int) -> None:
        """Note that a mount has ended; one without a name and volumes is forgotten."""
        with self.together():
            self._db.execute("UPDATE mounts SET pid = NULL WHERE id = ?", (number,))
            self._db.execute(
                "DELETE FROM mounts WHERE id = ? AND name IS NULL AND id NOT IN (SELECT mount FROM specs)", (number,)
            )

    def delete_mount(self, mount: MountRow) -> None:
        """Forget a mount."""
        self._db.execute("DELETE FROM mounts WHERE id = ?", (mount.id,))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _running(mountpoint: str, pid: int | None, start: int, pidns: int, boot: str) -> tuple[int, int, int] | None:
    """Return a daemon that lives. One in another pid namespace is taken to, while its mount is seen here."""
    if pid is None or boot != _boot_id():
        return None
    if pidns == control.pid_namespace():
        alive = control.process_start(pid) == start
    else:
        mount = mounted_at(mountpoint)
        alive = mount is not None and mount.fstype == FUSE_TYPE
    return (pid, start, pidns) if alive else None
