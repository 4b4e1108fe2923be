"""What a file has beside its content: owner, mode, times, extended attributes and ACLs, read and set as one.

The order of setting is what matters: the owner first (``chown`` clears suid bits and file capabilities), then
attributes and ACLs (an ACL sets the group bits of the mode), then the mode, and the times last. Everything is done to
an object behind a descriptor, ``O_PATH`` ones included, so that no name can be exchanged meanwhile.

Without privilege (:func:`privileged`) what only root may do is left out without a word, as ``cp -a`` and ``tar`` do:
other owners, and with them the suid and sgid bits that would now stand for somebody else; file capabilities; attributes
in ``trusted.``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from unionfs.core import acl, sysio

_ABSENT: Final = frozenset((errno.ENODATA, errno.EOPNOTSUPP))
_REFUSED: Final = frozenset((errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP))

# Labels of security modules and the like belong to the machine: they are kept where that works.
_OF_THE_MACHINE: Final = ("security.", "system.")
_CAPABILITY: Final = "security.capability"
_ALWAYS: Final = (_CAPABILITY, acl.ACCESS, acl.DEFAULT)
# How xfs shows root the ACLs a second time, as it stores them; on another file system they would mean nothing.
_STORED_ACLS: Final = frozenset(("trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT"))


@dataclass(slots=True)
class Attributes:
    """Owner, permission bits, times in nanoseconds (None: leave), extended attributes (ACLs are two of them)."""

    uid: int
    gid: int
    mode: int
    atime_ns: int | None
    mtime_ns: int | None
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


def privileged() -> bool:
    """Whether this thread is root, and not of a user namespace that lacks most users."""
    return os.geteuid() == 0 and sysio.in_initial_user_namespace()


def read(fd: int, st: os.stat_result | None = None) -> Attributes:
    """Return the attributes of the object behind *fd*, whose stat result may be given. Raises OSError."""
    st = st or os.fstat(fd)
    return Attributes(
        st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode), st.st_atime_ns, st.st_mtime_ns, read_xattrs(sysio.fd_path(fd))
    )


def read_xattrs(path: bytes) -> dict[str, bytes]:
    """Return all extended attributes that this process may see; *path* is followed. Raises OSError."""
    try:
        names = os.listxattr(path)
    except OSError as exc:
        if exc.errno in _ABSENT:
            return {}
        raise
    found: dict[str, bytes] = {}
    for name in names:
        if name in _STORED_ACLS:
            continue
        try:
            found[name] = os.getxattr(path, name)
        except OSError as exc:
            if exc.errno not in _ABSENT and not (exc.errno in _REFUSED and name.startswith(_OF_THE_MACHINE)):
                raise
    return found


def clear_inherited(fd: int) -> None:
    """Take the ACLs off a directory, so that what is made in it inherits none."""
    for name in (acl.ACCESS, acl.DEFAULT):
        with contextlib.suppress(OSError):
            os.removexattr(sysio.fd_path(fd), name)


def apply(fd: int, wanted: Attributes, *, root: bool) -> None:
    """Give the object behind *fd*, which this process has just made, the attributes *wanted*.

    *root* is what :func:`privileged` says. Raises OSError: whatever fails that this process may do, and attributes that
    the file system can't hold.
    """
    path = sysio.fd_path(fd)
    st = os.fstat(fd)
    mode = wanted.mode
    if not _set_owner(path, st, wanted, root=root):
        mode &= ~(stat.S_ISUID | stat.S_ISGID)
    for name, value in wanted.xattrs.items():
        if name not in _STORED_ACLS:
            _set_xattr(path, name, value, root=root)
    if not stat.S_ISLNK(st.st_mode):
        os.chmod(path, mode)
    sysio.utimens_fd(fd, wanted.atime_ns, wanted.mtime_ns)


def _set_owner(path: bytes, st: os.stat_result, wanted: Attributes, *, root: bool) -> bool:
    """Set owner and group; False where that was not allowed and so only partly done."""
    if (st.st_uid, st.st_gid) == (wanted.uid, wanted.gid):
        return True
    try:
        os.chown(path, wanted.uid, wanted.gid)
    except OSError as exc:
        if root or exc.errno not in _REFUSED:
            raise
        # One of one's own groups may still be given.
        with contextlib.suppress(OSError):
            os.chown(path, -1, wanted.gid)
        return False
    return True


def _set_xattr(path: bytes, name: str, value: bytes, *, root: bool) -> None:
    try:
        os.setxattr(path, name, value)
    except OSError as exc:
        of_the_machine = name.startswith(_OF_THE_MACHINE) and name not in _ALWAYS and exc.errno in _REFUSED
        not_allowed = not root and exc.errno in (errno.EPERM, errno.EACCES)
        if not of_the_machine and not not_allowed:
            raise OSError(exc.errno, f"{exc.strerror} (extended attribute {name})") from exc
