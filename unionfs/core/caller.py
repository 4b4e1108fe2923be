"""Who asks for something, and what their changes of a file's data or owner clear of it: set-user-id, set-group-id."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from typing import NamedTuple

from unionfs.core import sysio
from unionfs.idmap import IdMap


class Caller(NamedTuple):
    """Who asks: effective ids and umask of the process, and the groups that count for set-group-id.

    Where the mount shows other owners than it stores, the ids are those to store, `ids` translates, and `asked` is the
    user in the request.
    """

    uid: int
    gid: int
    umask: int = 0
    pid: int = 0
    ids: IdMap | None = None
    asked: int | None = None

    @property
    def is_root(self) -> bool:
        """Whether that is root: of the machine, or of those whose files are stored as root's."""
        return self.uid == 0 or self.asked == 0


def caller(ids: IdMap | None, uid: int, gid: int, umask: int, pid: int) -> Caller:
    """Return who asks, given the ids, umask and process of a request; *ids* is None where none are translated."""
    return Caller(uid, gid, umask, pid) if ids is None else Caller(*ids.creator(uid, gid), umask, pid, ids, uid)


def clear_suidgid(fd: int, who: Caller | None) -> None:
    """Clear what a change of data by an ordinary user clears: set-user-id, and set-group-id of a group-executable file.

    Without group execution set-group-id only goes if *who* is not in the file's group (``setattr_should_drop_sgid``);
    it stays where nobody knows who that is. Raises OSError.
    """
    st = os.fstat(fd)
    drop = _suidgid_to_clear(st, who)
    if drop:
        os.fchmod(fd, stat.S_IMODE(st.st_mode) & ~drop)


def check_clearing(st: os.stat_result, who: Caller, handles: Iterable[int]) -> None:
    """Raise EPERM for a chown(path, -1, -1) that would clear set-user-id or set-group-id of another's file.

    The kernel checks that right only where it clears them itself (``may_setattr``); of all but directories
    (``chown_common``). A write announces itself by the same request (``file_remove_privs``), and may: it is let
    through while one of the open *handles* can write.
    """
    if stat.S_ISDIR(st.st_mode) or who.is_root or who.uid == st.st_uid or not _suidgid_to_clear(st, who):
        return
    if not any(map(sysio.may_write, handles)):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def mode_without_suidgid(st: os.stat_result, who: Caller) -> int:
    """Return the mode that a file is left with by a write or chown of *who*'s; 0 where it stays as it is."""
    drop = 0 if who.is_root or stat.S_ISDIR(st.st_mode) else _suidgid_to_clear(st, who)
    return st.st_mode & ~drop if drop else 0


def _suidgid_to_clear(st: os.stat_result, who: Caller | None) -> int:
    drop = st.st_mode & stat.S_ISUID
    if st.st_mode & stat.S_ISGID and (st.st_mode & stat.S_IXGRP or (who is not None and not in_group(who, st.st_gid))):
        drop |= stat.S_ISGID
    return drop


def in_group(who: Caller, gid: int) -> bool:
    """Whether a process is in the group that a layer's file has; its other groups are in /proc only."""
    if who.gid == gid:
        return True
    shown = gid if who.ids is None else who.ids.shown_gid(gid)
    try:
        with open(f"/proc/{who.pid}/status", encoding="ascii", errors="replace") as lines:
            groups = next((line for line in lines if line.startswith("Groups:")), "")
    except OSError:
        return False
    return str(shown) in groups.split()[1:]
