"""What a request wants of an object's attributes."""

from __future__ import annotations

import os
import stat
from typing import Final, NamedTuple

from unionfs.core import sysio
from unionfs.idmap import IdMap


class Changes(NamedTuple):
    """What `Union.setattr` is to change; None leaves a thing as it is. Times are in nanoseconds, or `sysio.NOW`.

    *touched* says that both times are to be now, which takes other rights than setting them.
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime: int | None = None
    mtime: int | None = None
    touched: bool = False


NOTHING: Final = Changes()


def stored(ids: IdMap | None, changes: Changes) -> Changes:
    """Return changes with the owner to store, given the one to show. Raises OSError, EOVERFLOW."""
    if ids is None or changes.uid is changes.gid is None:
        return changes
    uid = None if changes.uid is None else ids.stored_uid(changes.uid)
    gid = None if changes.gid is None else ids.stored_gid(changes.gid)
    return changes._replace(uid=uid, gid=gid)


def make_changes(changes: Changes, target: int | bytes, fd: int) -> None:
    """Give an object its owner, mode and times, in this order: a new owner clears bits of the mode.

    Args:
        changes: what to set. The size is another matter, and so is a change of nothing.
        target: a descriptor or a path of the object; symbolic links in a path are followed.
        fd: a descriptor for the times, which may be ``O_PATH``.

    Raises:
        OSError: what the file system says; what was set before stays.
    """
    if changes.uid is not None or changes.gid is not None:
        os.chown(target, -1 if changes.uid is None else changes.uid, -1 if changes.gid is None else changes.gid)
    if changes.mode is not None:
        os.chmod(target, stat.S_IMODE(changes.mode))
    if changes.atime is not None or changes.mtime is not None:
        sysio.utimens_fd(fd, changes.atime, changes.mtime)
