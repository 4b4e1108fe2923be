"""The volume store: named directories that outlive mounts, and the mounts that use them.

Content lies in ROOT/volumes/NAME/_data (or in a directory of the user's, the volume's `device`), what is known of it
in ROOT/unionfs.db. `volumedirs` owns the directories, this module the database and the rules.

Each step happens under one lock on ROOT, and a kill at any instant leaves old or new:

* What a step is about to do is committed first, as the volume's state; then comes one rename; then the state is
  "ready" again. The lock ends with its holder, so whoever takes it and finds a state that is not "ready" knows that
  the step was cut off, and finishes or undoes it (`_settle`) before doing anything of its own.
* What takes long (copying content) happens without that lock, in a directory aside, whose own lock says that its
  maker lives.

A directory below volumes/ that has no row is never removed: making a volume of that name takes it over.

A mount is remembered after its end if it has a name or volumes, until `forget`. It uses its volumes while its daemon
lives: the process with that pid and start time, since the same boot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from unionfs.errors import BusyError, LayerError, UsageError, VolumeError
from unionfs.host.mountinfo import read_mounts
from unionfs.store import volumedb, volumedirs, volumereplace
from unionfs.store.volumedb import (
    CLEARING,
    FILLING,
    MAKING,
    PUBLISHING,
    READY,
    REMOVING,
    RENAMING,
    RESTORING,
    UNDONE,
    Row,
    Tables,
)
from unionfs.store.volumedirs import DATA
from unionfs.store.volumemodel import Acquired, MountRow, Volume, check_name, parse_options
from unionfs.store.volumereplace import Replacing
from unionfs.volumespec import VOLUME_NAME, VolumeSpec, check_targets

__all__ = ["Acquired", "MountRow", "Store", "Volume", "check_name", "parse_options"]

# How often an acquire looks whether another mount has filled a volume, in seconds.
_FILL_POLL = 0.05


class Store:
    """A volume store. Holds no database connection and no lock between calls, so a process that has one may fork.

    Every method may raise VolumeError where the store itself can't be used.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._volumes = os.path.join(root, "volumes")
        self._replacing: dict[int, Replacing] = {}

    @classmethod
    def open(cls, root: str | None = None) -> Store:
        """Open the store in `root`, made if need be; None stands for this user's own.

        Raises VolumeError.
        """
        path = volumedirs.default_root() if root is None else os.path.abspath(root)
        volumedirs.prepare_root(path)
        return cls(os.path.realpath(path))

    def close(self) -> None:
        """Abort the fills that were begun and not ended; nothing else is held."""
        for work in list(self._replacing.values()):
            self.abort_fill(work.volume)

    # --- lock and database ---

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Tables]:
        """Take the store's lock and settle what dead processes left undone."""
        try:
            held = volumedirs.lock(self.root, wait=True)
            assert held is not None
            try:
                with volumedb.opened(self.root, self._volumes) as db:
                    for row in db.in_state(*UNDONE):
                        with contextlib.suppress(OSError):  # the next command tries again
                            self._settle(db, row)
                    yield db
            finally:
                volumedirs.unlock(held)
        except OSError as exc:
            where = os.fsdecode(exc.filename) if exc.filename is not None else self.root
            raise VolumeError(f"the volume store {self.root}: {where}: {exc.strerror}") from exc

    def directory(self, name: str) -> str:
        """Return where volume `name`, a stage or a piece of trash lies."""
        return os.path.join(self._volumes, name)

    # --- after a kill ---

    def _settle(self, db: Tables, row: Row) -> None:
        """Finish or undo the step that a dead process left; leave alone what a living one is doing."""
        if row.state == MAKING:
            self._settle_making(db, row)
        elif row.state == REMOVING:
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.directory(row.volume.name), self.directory(row.detail))
            db.delete(row.volume)
        elif row.state == RENAMING:
            self._settle_renaming(db, row)
        else:
            self._settle_replacing(db, row)

    def _settle_making(self, db: Tables, row: Row) -> None:
        stage = self.directory(row.detail)
        try:
            held = volumedirs.lock(stage)
        except FileNotFoundError:
            if os.path.isdir(row.volume.mountpoint):
                db.set_state(row.volume, READY)
            else:
                db.delete(row.volume)
            return
        if held is not None:
            db.delete(row.volume)
            volumedirs.to_trash(stage, self._volumes)
            volumedirs.unlock(held)

    def _settle_renaming(self, db: Tables, row: Row) -> None:
        old, new = self.directory(row.volume.name), self.directory(row.detail)
        if os.path.lexists(new) and not os.path.lexists(old):
            db.renamed(row.volume, row.detail)
        else:
            db.set_state(row.volume, READY)

    def _settle_replacing(self, db: Tables, row: Row) -> None:
        held = volumedirs.lock(self.directory(row.volume.name))
        if held is None:
            return
        work = Replacing(row.volume, row.detail, held)
        try:
            if row.state in (CLEARING, PUBLISHING):
                work.move(db, clear=row.state == CLEARING)
            work.discard()
            db.set_state(row.volume, READY)
        finally:
            work.close()

    def clean(self) -> None:
        """Remove what dead processes left. It may be much, so commands that only look don't do it.

        What can't be removed stays in the trash: that was told to whoever wanted it gone.
        """
        with self._locked() as db:
            stages = {row.detail for row in db.in_state(MAKING)}
            found = volumedirs.leftovers(self._volumes, stages)
        for path, held in found:
            with contextlib.suppress(VolumeError):
                self._empty(path, held)

    def _empty(self, path: str, held: int) -> int:
        """Remove a directory of the trash, with its lock; return the bytes of files that gave back."""
        try:
            return volumedirs.remove_directory(None, path)
        except OSError as exc:
            where = os.fsdecode(exc.filename) if exc.filename is not None else path
            raise VolumeError(f"what is left in {path} could not be removed: {where}: {exc.strerror}") from exc
        finally:
            volumedirs.unlock(held)

    # --- volumes ---

    def volumes(self, *, dangling: bool | None = None) -> list[Volume]:
        """Return all volumes by name; with `dangling` those that no mount refers to (or only the others).

        A remembered mount refers to its volumes too.
        """
        with self._locked() as db:
            found = [row.volume for row in db.all()]
            if dangling is None:
                return found
            referred = db.referred()
            return [volume for volume in found if (volume.id not in referred) == dangling]

    def find(self, name: str) -> Volume:
        """Return the volume of that name.

        Raises VolumeError; BusyError while it is being made.
        """
        with self._locked() as db:
            return db.find(name).volume

    def exists(self, name: str) -> bool:
        """Whether there is a volume of that name."""
        with self._locked() as db:
            return db.get(name) is not None

    def create(
        self,
        name: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Volume:
        """Make a volume, an anonymous one without `name`; one that exists is returned as it is.

        Raises UsageError for a bad name; VolumeError if one exists with other labels or options than these.
        """
        with self._locked() as db:
            if name is None:
                return self._make(db, secrets.token_hex(32), labels or {}, options or {}, anonymous=True)
            check_name(name)
            if db.get(name) is None:
                return self._make(db, name, labels or {}, options or {})
            volume = db.find(name).volume
        for what, asked, there in (("options", options, volume.options), ("labels", labels, volume.labels)):
            if asked and dict(asked) != there:
                raise VolumeError(f"volume {name} exists with other {what}: remove it first, or choose another name")
        return volume

    def _make(
        self,
        db: Tables,
        name: str,
        labels: Mapping[str, str],
        options: Mapping[str, str],
        *,
        anonymous: bool = False,
    ) -> Volume:
        if os.path.lexists(self.directory(name)):
            if not os.path.isdir(os.path.join(self.directory(name), DATA)):
                raise VolumeError(f"{self.directory(name)} is in the way and holds no volume: move it elsewhere")
            db.insert(name, labels, options, anonymous=anonymous, state=READY)  # its row was lost, not its content
            return db.find(name).volume
        stage, held = volumedirs.new_stage(self._volumes)
        try:
            db.insert(name, labels, options, anonymous=anonymous, state=MAKING, detail=stage)
            return self._publish(db, name, stage)
        finally:
            volumedirs.unlock(held)

    def _publish(self, db: Tables, name: str, stage: str) -> Volume:
        os.rename(self.directory(stage), self.directory(name))
        volumedirs.sync(self._volumes)
        row = db.get(name)
        assert row is not None
        db.set_state(row.volume, READY)
        return row.volume

    def remove(self, name: str) -> int:
        """Remove a volume that no running mount uses; return the bytes of files that gave back.

        A device's own content stays. Raises VolumeError; BusyError naming the mounts that use it.
        """
        with self._locked() as db:
            thrown = self._throw_away(db, db.find(name).volume)
        freed = self._empty(*thrown) if thrown else 0
        self.clean()
        return freed

    def _throw_away(self, db: Tables, volume: Volume) -> tuple[str, int] | None:
        """Take a volume out of the store; return its directory in the trash and the lock on it."""
        held = self._idle(db, volume)
        if held is None:
            db.delete(volume)
            return None
        trash = volumedirs.trash_name()
        db.set_state(volume, REMOVING, trash)
        try:
            os.rename(self.directory(volume.name), self.directory(trash))
        except OSError:
            volumedirs.unlock(held)
            db.set_state(volume, READY)
            raise
        volumedirs.sync(self._volumes)
        db.delete(volume)
        return self.directory(trash), held

    def _idle(self, db: Tables, volume: Volume) -> int | None:
        """Lock a volume that nobody uses; None if its directory is gone.

        Raises BusyError naming who uses it.
        """
        if any(row.volume.id == volume.id for row in db.in_state(*UNDONE)):
            raise self._being_copied(volume)
        if users := db.users(volume):
            names = ", ".join(map(str, users))
            raise BusyError(f"volume {volume.name} is in use by {names}: unmount that first")
        directory = self.directory(volume.name)
        for mount in read_mounts():
            if mount.mountpoint.startswith(directory + "/"):
                raise BusyError(f"volume {volume.name} is busy: unmount {mount.mountpoint} first")
        try:
            held = volumedirs.lock(directory)
        except FileNotFoundError:
            return None
        if held is None:
            raise self._being_copied(volume)
        return held

    @staticmethod
    def _being_copied(volume: Volume) -> BusyError:
        return BusyError(f"volume {volume.name} is being copied, filled or restored: wait for that to end")

    def prune(self, wanted: Callable[[Volume], bool]) -> tuple[list[str], int, list[VolumeError]]:
        """Remove the volumes that no mount refers to and that are `wanted`.

        Returns their names, the bytes of files that gave back, and why content could not be removed.
        """
        names: list[str] = []
        errors: list[VolumeError] = []
        freed = 0
        for volume in filter(wanted, self.volumes(dangling=True)):
            with self._locked() as db:
                if volume.id in db.referred() or db.get(volume.id) is None:
                    continue
                try:
                    thrown = self._throw_away(db, volume)
                except BusyError:
                    continue
            names.append(volume.name)
            try:
                freed += self._empty(*thrown) if thrown else 0
            except VolumeError as error:
                errors.append(error)
        self.clean()
        return names, freed, errors

    def rename(self, old: str, new: str) -> None:
        """Give a volume that no running mount uses another name; remembered mounts follow.

        Raises UsageError, VolumeError or BusyError.
        """
        check_name(new)
        with self._locked() as db:
            volume = db.find(old).volume
            if old == new:
                return
            self._refuse_taken(db, new)
            held = self._idle(db, volume)
            if held is None:
                raise VolumeError(f"volume {old} has lost its directory {self.directory(old)}: remove the volume")
            try:
                db.set_state(volume, RENAMING, new)
                os.rename(self.directory(old), self.directory(new))
            finally:
                volumedirs.unlock(held)
                self._settle_renaming(db, Row(volume, RENAMING, new))
            volumedirs.sync(self._volumes)

    def _refuse_taken(self, db: Tables, name: str) -> None:
        if db.get(name) is not None:
            raise VolumeError(f"volume {name} exists: remove it first, or choose another name")
        if os.path.lexists(self.directory(name)):
            raise VolumeError(f"{self.directory(name)} is in the way: move it elsewhere, or choose another name")

    # --- content as a whole ---

    def clone(self, source: str, name: str, copy: Callable[[str, str], None]) -> Volume:
        """Make volume `name` with the content and the labels of `source`; it appears when it is complete.

        `copy` is given the directory to read and an empty one. Raises UsageError, VolumeError or BusyError.
        """
        with self.reading([source]) as (origin,), self.making(name, origin.labels) as directory:
            copy(origin.path, directory)
        return self.find(name)

    @contextlib.contextmanager
    def making(self, name: str, labels: Mapping[str, str] | None = None) -> Iterator[str]:
        """Make a volume whose content the caller builds in the directory that this yields; a failure leaves none.

        Raises UsageError, VolumeError where the name is taken.
        """
        check_name(name)
        with self._locked() as db:
            self._refuse_taken(db, name)
            stage, held = volumedirs.new_stage(self._volumes)
            db.insert(name, labels or {}, {}, anonymous=False, state=MAKING, detail=stage)
        try:
            yield os.path.join(self.directory(stage), DATA)
            with self._locked() as db:
                self._publish(db, name, stage)
        finally:
            volumedirs.unlock(held)
            self.clean()

    @contextlib.contextmanager
    def reading(self, names: Sequence[str]) -> Iterator[list[Volume]]:
        """Keep volumes from being removed, renamed or replaced while their content is read.

        Raises VolumeError or BusyError.
        """
        with contextlib.ExitStack() as locks:
            with self._locked() as db:
                rows = [db.find(name) for name in names]
                for row in rows:
                    self._require_device(row.volume)
                    held = volumedirs.lock(self.directory(row.volume.name), shared=True)
                    if held is not None:
                        locks.callback(volumedirs.unlock, held)
                    if held is None or row.state != READY:
                        raise self._being_copied(row.volume)
            yield [row.volume for row in rows]

    @contextlib.contextmanager
    def replacing(self, names: Sequence[str], *, force: bool) -> Iterator[list[str]]:
        """Replace the content of volumes by what the caller builds in the directories that this yields.

        All are built before the first is published; if the caller fails, all stay as they were. One that doesn't
        exist is made. Raises VolumeError, without `force` for one that isn't empty; BusyError.
        """
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(self._replacing_one(name, force=force)) for name in names]

    def _replacing_one(self, name: str, *, force: bool) -> contextlib.AbstractContextManager[str]:
        return self._replacing_there(name, force=force) if self.exists(name) else self.making(name)

    @contextlib.contextmanager
    def _replacing_there(self, name: str, *, force: bool) -> Iterator[str]:
        """`_data` changes places with the new directory in one rename.

        A device's entries are moved, one by one; a kill in the middle is made good by the next command.
        """
        with self._locked() as db:
            work = self._begin_replacing(db, name, force=force)
        try:
            yield work.path
            with self._locked() as db:
                work.publish_restored(db)
        finally:
            self._end_replacing(work)
            self.clean()

    def _begin_replacing(self, db: Tables, name: str, *, force: bool) -> Replacing:
        volume = db.find(name).volume
        self._require_device(volume)
        held = self._idle(db, volume)
        if held is None:
            raise VolumeError(f"volume {name} has lost its directory {self.directory(name)}: remove the volume")
        try:
            if not force and not volumedirs.is_empty(volume.path):
                raise VolumeError(f"volume {name} is not empty: use --force to replace its content")
            if device := volume.device:
                for mount in read_mounts():
                    if mount.mountpoint.startswith(device.rstrip("/") + "/"):
                        raise BusyError(f"volume {name} is busy: unmount {mount.mountpoint} first")
        except BaseException:
            volumedirs.unlock(held)
            raise
        return self._begin(db, volume, RESTORING, held)

    def _begin(self, db: Tables, volume: Volume, state: str, held: int) -> Replacing:
        work = volumereplace.begin(db, volume, state, held)
        self._replacing[volume.id] = work
        return work

    def _end_replacing(self, work: Replacing) -> None:
        """Remove what isn't content: what was built in vain, or what was replaced.

        Where the move of entries has failed in the middle, nothing is: the next command tries to go on with it.
        """
        try:
            if not work.moving:
                work.discard()
                with self._locked() as db:
                    db.set_state(work.volume, READY)
        finally:
            self._let_go(work)

    def _let_go(self, work: Replacing) -> None:
        self._replacing.pop(work.volume.id, None)
        work.close()

    @staticmethod
    def _require_device(volume: Volume) -> None:
        if volume.device and not os.path.isdir(volume.device):
            raise VolumeError(
                f"volume {volume.name}: its device {volume.device} is no directory here: make or mount it first"
            )

    # --- the first content ---

    def begin_fill(self, volume: Volume) -> str | None:
        """Return an empty directory for the first content of an empty volume; None if it has got some meanwhile.

        Waits while another command reads or fills the volume. `end_fill` or `abort_fill` must follow, before the
        next `begin_fill`. Raises VolumeError.
        """
        while True:
            with self._locked() as db:
                row = db.find(volume.name)
                volume = row.volume
                held = volumedirs.lock(self.directory(volume.name))
                if held is not None:
                    if row.state != READY:
                        volumedirs.unlock(held)
                        raise self._being_copied(volume)
                    if not volumedirs.is_empty(volume.path):
                        volumedirs.unlock(held)
                        return None
                    return self._begin(db, volume, FILLING, held).path
            time.sleep(_FILL_POLL)

    def end_fill(self, volume: Volume) -> None:
        """Make what was built the content of the volume, unless somebody else has put something there meanwhile.

        The directory at the volume's path may be another one afterwards: open it then.
        """
        work = self._replacing[volume.id]
        try:
            with self._locked() as db:  # whoever waits to acquire it sees nothing of the states between
                work.publish_fill(db, shared=db.uses(volume) > 1)
                work.discard()
                db.set_state(volume, READY)
        except BaseException:
            self._end_replacing(work)
            raise
        self._let_go(work)

    def abort_fill(self, volume: Volume) -> None:
        """Throw away what was built since `begin_fill`; without one nothing happens."""
        if work := self._replacing.get(volume.id):
            self._end_replacing(work)
            self.clean()

    # --- mounts ---

    def acquire(
        self, *, name: str | None, mountpoint: str, specs: Sequence[VolumeSpec], pid: int, start: int, pidns: int
    ) -> tuple[int, list[Acquired]]:
        """Record a mount with its volumes, made where missing, and return its number and where they are.

        It takes the place of a remembered mount of that name (without a name: of a nameless one on that mount
        point), and gets that one's anonymous volumes at the same targets. Waits while another mount fills one of
        its volumes.

        Raises BusyError if a running mount has the name or the mount point, or a volume is being restored;
        LayerError for a host path that can't be bound; VolumeError; UsageError for a bad name.
        """
        check_targets(specs)
        if name is not None and not VOLUME_NAME.fullmatch(name):
            raise UsageError(f"--name {name}: use two or more letters, digits, '_', '.' or '-'")
        daemon = (pid, start, pidns)
        while True:
            with self._locked() as db:
                sources = {spec.source for spec in specs if spec.kind == "volume"}
                filling = [row.volume for row in db.in_state(FILLING) if row.volume.name in sources]
                if not any(map(self._is_locked, filling)):
                    return self._acquire(db, name, mountpoint, specs, daemon)
            time.sleep(_FILL_POLL)

    def _is_locked(self, volume: Volume) -> bool:
        held = volumedirs.lock(self.directory(volume.name))
        if held is not None:
            volumedirs.unlock(held)
        return held is None

    def _acquire(
        self,
        db: Tables,
        name: str | None,
        mountpoint: str,
        specs: Sequence[VolumeSpec],
        daemon: tuple[int, int, int],
    ) -> tuple[int, list[Acquired]]:
        replaced: list[MountRow] = []
        for mount in db.mounts():
            if mount.running and mount.mountpoint == mountpoint:
                raise BusyError(f"{mountpoint} is mounted already: unmount it first")
            if mount.running and name is not None and mount.name == name:
                raise BusyError(f"the name {name} is taken by the mount on {mount.mountpoint}: choose another --name")
            if mount.name == name and (name is not None or mount.mountpoint == mountpoint):
                replaced.append(mount)
        specs = self._with_kept(db, specs, replaced)
        self._check_sources(db, specs)
        acquired = [self._acquire_one(db, spec) for spec in specs]
        with db.together():
            for mount in replaced:
                db.delete_mount(mount)
            number = db.insert_mount(name, mountpoint, daemon, acquired)
        return number, acquired

    def _with_kept(self, db: Tables, specs: Sequence[VolumeSpec], replaced: Sequence[MountRow]) -> list[VolumeSpec]:
        """Name the anonymous volumes that a replaced mount had at the same targets."""
        anonymous = {row.volume.name for row in db.all() if row.volume.anonymous}
        kept = {spec.target: spec.source for mount in replaced for spec in mount.specs if spec.source in anonymous}
        return [
            dataclasses.replace(spec, source=kept[spec.target])
            if spec.kind == "volume" and not spec.source and spec.target in kept
            else spec
            for spec in specs
        ]

    def _check_sources(self, db: Tables, specs: Sequence[VolumeSpec]) -> None:
        """Raise the error of the first source that can't be used, before anything is made."""
        for spec in specs:
            if spec.kind == "bind":
                _check_host_path(spec)
            elif spec.source and db.get(check_name(spec.source)) is not None:
                row = db.find(spec.source)
                self._require_device(row.volume)
                if row.state != READY:
                    raise self._being_copied(row.volume)

    def _acquire_one(self, db: Tables, spec: VolumeSpec) -> Acquired:
        if spec.kind == "bind":
            if spec.create:
                _make_host_directory(spec.source)
            return Acquired(spec, None, spec.source, fill=False)
        if not spec.source:
            volume = self._make(db, secrets.token_hex(32), {}, {}, anonymous=True)
        elif row := db.get(spec.source):
            volume = row.volume
        else:
            volume = self._make(db, spec.source, {}, {})
        spec = dataclasses.replace(spec, source=volume.name, read_only=spec.read_only or volume.read_only)
        fill = not spec.nocopy and not volume.read_only and volumedirs.is_empty(volume.path)
        return Acquired(spec, volume, volume.path, fill)

    def release(self, mount_id: int) -> None:
        """Note that a mount has ended; it is remembered if it has a name or volumes, else forgotten."""
        with self._locked() as db:
            db.end_mount(mount_id)

    def mounts(self) -> list[MountRow]:
        """Return all mounts, running or remembered, in the order they were made."""
        with self._locked() as db:
            return db.mounts()

    def find_mount(self, name_or_mountpoint: str) -> MountRow:
        """Return the mount of that name or on that mount point: a running one first, else the latest.

        Raises VolumeError.
        """
        with self._locked() as db:
            return db.find_mount(name_or_mountpoint)

    def volumes_from(self, word: str) -> list[VolumeSpec]:
        """Return what the mount in `NAME_OR_MOUNTPOINT[:ro|:rw]` has for volumes; with `:ro` all read-only.

        Raises VolumeError for an unknown mount.
        """
        which, _, mode = word.rpartition(":")
        if mode not in ("ro", "rw") or not which:
            which, mode = word, ""
        specs = self.find_mount(which).specs
        return [dataclasses.replace(spec, read_only=True) for spec in specs] if mode == "ro" else specs

    def forget(self, name_or_mountpoint: str, *, anonymous: bool) -> None:
        """Forget a mount that doesn't run; with `anonymous` remove its anonymous volumes that no other refers to.

        Raises VolumeError for an unknown mount, BusyError for one that runs.
        """
        with self._locked() as db:
            mount = db.find_mount(name_or_mountpoint)
            if mount.running:
                raise BusyError(f"{mount} is mounted: unmount it first")
            names = {spec.source for spec in mount.specs if spec.kind == "volume"}
            db.delete_mount(mount)
        if anonymous:
            _, _, errors = self.prune(lambda volume: volume.anonymous and volume.name in names)
            if errors:
                raise errors[0]


def _check_host_path(spec: VolumeSpec) -> None:
    try:
        os.stat(spec.source)
    except FileNotFoundError:
        if os.path.lexists(spec.source):
            raise LayerError(f"bind source {spec.source} is a symbolic link to nothing") from None
        if not spec.create:
            raise LayerError(f"bind source {spec.source} does not exist: make it first") from None
    except OSError as exc:
        raise LayerError(f"bind source {spec.source}: {exc.strerror}") from exc


def _make_host_directory(path: str) -> None:
    try:
        if not os.path.lexists(path):
            os.makedirs(path, 0o755, exist_ok=True)
    except OSError as exc:
        raise LayerError(f"bind source {path} can't be made: {exc.strerror}") from exc
