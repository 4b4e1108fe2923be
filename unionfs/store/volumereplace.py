"""Replacing the whole content of a volume, so that a kill at any instant leaves the old or the new one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from typing import Final

from unionfs.core import sysio
from unionfs.store import volumedirs
from unionfs.store.volumedb import CLEARING, FILLING, PUBLISHING, RESTORING, Tables
from unionfs.store.volumedirs import DATA
from unionfs.store.volumemodel import Volume

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def begin(db: Tables, volume: Volume, state: str, held: int) -> Replacing:
    """Note what is going to be done to a volume (FILLING or RESTORING), then make the directory for it.

    `held` is the lock on the volume, which the result gives back in the end.
    """
    what = "fill" if state == FILLING else "restore"
    detail = f".unionfs-{what}-{secrets.token_hex(8)}" if volume.device else f"_{what}"
    work = Replacing(volume, detail, held)
    try:
        db.set_state(volume, state, detail)
        work.make()
    except BaseException:
        work.close()
        raise
    return work


class Replacing:
    """New content for one locked volume: where it is built, and how it takes the place of what is there.

    In the store it is built beside `_data`. For a device it is built in the device itself, the one place that is
    sure to be on the same file system; its parent may be another one, or forbidden ground. It is reached by
    descriptors then, because others may write there.
    """

    def __init__(self, volume: Volume, detail: str, held: int) -> None:
        self.volume = volume
        self.moving = False
        self._held = held
        self._new, self._old = detail, f"{detail}.old"
        self._fd: int | None = None
        try:
            self._base = os.open(volume.device or os.path.dirname(volume.mountpoint), _DIRECTORY)
        except BaseException:
            volumedirs.unlock(held)
            raise

    def make(self) -> None:
        """Make the directory to build in: empty, with the owner and mode of the present one."""
        self.discard()
        self._fd = volumedirs.make_private(self._base, self._new)
        with self._target() as target:
            volumedirs.copy_root(target, self._fd)

    @property
    def path(self) -> str:
        """The directory to build in."""
        if self.volume.device:
            return f"/proc/self/fd/{self._fd}/."
        return os.path.join(os.path.dirname(self.volume.mountpoint), self._new)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._base)
        try:
            yield fd
        finally:
            os.close(fd)

    def _target(self) -> contextlib.AbstractContextManager[int]:
        return self._opened("." if self.volume.device else DATA)

    def publish_fill(self, db: Tables, *, shared: bool) -> None:
        """Make the new directory the content if there is none yet.

        Where others may have the volume open (`shared`) its directory stays and the entries are moved into it.
        """
        if not self.volume.device and not shared:
            try:
                # Over an empty directory a plain rename is the exchange, and the kernel checks that it is empty.
                os.rename(self._new, DATA, src_dir_fd=self._base, dst_dir_fd=self._base)
            except OSError as exc:
                if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            os.fsync(self._base)
            return
        with self._target() as target:
            there = [name for name in os.listdir(target) if name != self._new]
        if not there:
            self._note(db, PUBLISHING)
            self.move(db, clear=False)

    def publish_restored(self, db: Tables) -> None:
        """Put the new directory in the place of the old content."""
        if not self.volume.device:
            name = os.fsencode(self._new)
            try:
                sysio.rename(self._base, name, self._base, DATA.encode(), sysio.RENAME_EXCHANGE)
                os.fsync(self._base)
                return
            except OSError as exc:
                if exc.errno not in (errno.EINVAL, errno.ENOSYS):  # not every file system can
                    raise
        self._note(db, CLEARING)
        self.move(db, clear=True)

    def _note(self, db: Tables, state: str) -> None:
        db.set_state(self.volume, state, self._new)
        self.moving = state != RESTORING

    def move(self, db: Tables, *, clear: bool) -> None:
        """Move the old entries out (`clear`) and the new ones in; a second try goes on where the first one stopped."""
        with self._target() as target, self._opened(self._new) as new:
            if clear:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self._old, 0o700, dir_fd=self._base)
                with self._opened(self._old) as old:
                    self._clear(db, target, old)
                self._note(db, PUBLISHING)
            volumedirs.move_entries(new, target, replace="restore" in self._new)
            volumedirs.copy_root(new, target)
            os.fsync(target)
        self._note(db, RESTORING)

    def _clear(self, db: Tables, target: int, old: int) -> None:
        """Move the old entries out; if one can't be moved (immutable, a mount point) all go back."""
        try:
            volumedirs.move_entries(target, old, keep=(self._new, self._old))
        except OSError:
            volumedirs.move_entries(old, target)
            os.rmdir(self._old, dir_fd=self._base)
            self._note(db, RESTORING)
            raise

    def discard(self) -> None:
        """Remove what was built in vain and what was replaced; in the store it goes to the trash."""
        directory = os.path.dirname(self.volume.mountpoint)
        for name in (self._new, self._old):
            if self.volume.device:
                with contextlib.suppress(FileNotFoundError):
                    volumedirs.remove_directory(self._base, name)
            else:
                volumedirs.to_trash(os.path.join(directory, name), os.path.dirname(directory))

    def close(self) -> None:
        """Give back the lock and the descriptors."""
        for fd in (self._fd, self._base):
            if fd is not None:
                os.close(fd)
        volumedirs.unlock(self._held)
