"""What a request wants of an object's attributes."""

from __future__ import annotations

from typing import Final, NamedTuple

from unionfs.idmap import IdMap


class Changes(NamedTuple):
    """What `Union.setattr` is to change; None leaves a thing as it is. Times are in nanoseconds.

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
