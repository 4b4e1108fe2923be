"""Sole owner of the on-disk formats: kernel overlayfs's own, so that a layer moves freely between the two.

Everything overlayfs keeps about a file beside the file itself is an extended attribute with the prefix
``trusted.overlay.`` (``user.overlay.`` on a userxattr mount):

========  ======================  ===========================================================================
opaque    directories             ``y``: nothing below shows through; ``x``: may hold xattr whiteouts
redirect  directories, metacopy   where to go on in the layers below: a sibling's name, or a path from the root
metacopy  regular files           only metadata is here, the data is below
origin    copied-up objects       file handle of the lower object: it gives the inode number
impure    upper directories       ``y``: may hold entries with an origin
nlink     index entries           links of the union relative to those of the upper (``U+1``) or lower (``L-1``)
upper     the index directory     file handle of the upper root
protattr  regular, directories    ``a``/``i``: append-only and immutable, kept here instead of on the upper file
whiteout  empty regular files     a whiteout where no device node can be made
========  ======================  ===========================================================================

A whiteout is a 0:0 character device. ``.wh.NAME`` files of image layers are understood in lower layers too.
Users who set such attributes through the union (a nested overlay does) get them stored *escaped*, with a second
``overlay.`` after the prefix (fs/overlayfs/xattrs.c). Format details: ``struct ovl_fb`` in fs/overlayfs/overlayfs.h.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import sys
from typing import Final, NamedTuple

from unionfs.core.sysio import FS_APPEND, FS_IMMUTABLE

WH_PREFIX: Final = b".wh."
WH_OPAQUE: Final = b".wh..wh..opq"
REDIRECT_MAX: Final = 256
METACOPY_LEAST: Final = 4  # bytes of struct ovl_metacopy, if there are any
XATTR_ABSENT: Final = frozenset((errno.ENODATA, errno.EOPNOTSUPP))

_FB_MAGIC: Final = 0xFB
_FB_BIG_ENDIAN: Final = 0x01
_FB_ANY_ENDIAN: Final = 0x02
_FB_PATH_UPPER: Final = 0x04
_FB_HEAD: Final = struct.Struct("BBBBB16s")
# What ovl_get_nlink takes: at most 12 bytes, and an int.
_NLINK_DIFFERENCE: Final = re.compile(rb"[+-][0-9]{1,10}")
_NLINK_MOST: Final = (1 << 31) - 1
_PROTECTIONS: Final = {ord("a"): FS_APPEND, ord("i"): FS_IMMUTABLE}
_CPU_ENDIAN: Final = 0 if sys.byteorder == "little" else _FB_BIG_ENDIAN


def is_whiteout_device(st: os.stat_result) -> bool:
    """Tell whether a stat result is that of the usual whiteout, a 0:0 character device."""
    return st.st_rdev == 0 and stat.S_ISCHR(st.st_mode)


class Handle(NamedTuple):
    """A decoded origin: file-handle type and bytes, and the UUID of its file system."""

    kind: int
    handle: bytes
    uuid: bytes


def encode_handle(kind: int, handle: bytes, uuid: bytes, *, is_upper: bool = False) -> bytes:
    """Return the value of an origin or upper attribute (``struct ovl_fb``)."""
    flags = _CPU_ENDIAN | (_FB_PATH_UPPER if is_upper else 0)
    return _FB_HEAD.pack(0, _FB_MAGIC, _FB_HEAD.size + len(handle), flags, kind, uuid) + handle


def decode_handle(value: bytes) -> Handle | None:
    """Decode an origin; None for "unknown": empty, malformed, or of another version or byte order."""
    if len(value) < _FB_HEAD.size:
        return None
    version, magic, length, flags, kind, uuid = _FB_HEAD.unpack_from(value)
    if magic != _FB_MAGIC or version or not _FB_HEAD.size <= length <= len(value) or flags & ~7:
        return None
    if not flags & _FB_ANY_ENDIAN and flags & _FB_BIG_ENDIAN != _CPU_ENDIAN:
        return None
    return Handle(kind, value[_FB_HEAD.size : length], uuid)


def parse_redirect(value: bytes) -> bytes:
    """Return a valid redirect value.

    Raises EINVAL for a malformed one and EACCES for one with a ``.`` or ``..``, as the kernel's lookup does.
    """
    relative = not value.startswith(b"/")
    parts = value.split(b"/") if relative else value[1:].split(b"/")
    if b"\0" in value or (relative and len(parts) != 1) or not all(parts):
        raise OSError(errno.EINVAL, "invalid redirect", value)
    if b"." in parts or b".." in parts:
        raise OSError(errno.EACCES, "redirect may not lead upwards", value)
    return value


def encode_nlink(base: str, difference: int) -> bytes:
    """Return the value of an nlink attribute; *base* is ``U`` or ``L`` (``ovl_set_nlink_common``)."""
    return b"%s%+d" % (base.encode(), difference)


def decode_nlink(value: bytes, upper_nlink: int, lower_nlink: int) -> int | None:
    """Return the link count of the union, or None for a malformed value (``ovl_get_nlink``)."""
    base = {b"U": upper_nlink, b"L": lower_nlink}.get(value[:1])
    if base is None or not _NLINK_DIFFERENCE.fullmatch(value, 1):
        return None
    total = base + int(value[1:])
    return total if 0 < total <= _NLINK_MOST else None


def encode_protattr(flags: int) -> bytes:
    """Return the value of a protattr attribute for FS_APPEND and FS_IMMUTABLE (``ovl_set_protattr``)."""
    return (b"a" if flags & FS_APPEND else b"") + (b"i" if flags & FS_IMMUTABLE else b"")


def decode_protattr(value: bytes) -> int:
    """Return FS_APPEND and FS_IMMUTABLE as a protattr attribute has them; 0 for a malformed one."""
    flags = 0
    for letter in value:
        flag = _PROTECTIONS.get(letter)
        if flag is None:
            return 0
        flags |= flag
    return flags


class Format:
    """Attribute names of one mount: with ``trusted.`` as root, ``user.`` on a userxattr mount."""

    __slots__ = (
        "escaped",
        "impure",
        "metacopy",
        "nlink",
        "opaque",
        "origin",
        "prefix",
        "protattr",
        "redirect",
        "upper",
        "uuid",
        "whiteout",
    )

    def __init__(self, *, userxattr: bool) -> None:
        self.prefix = "user.overlay." if userxattr else "trusted.overlay."
        self.escaped = self.prefix + "overlay."
        for field in (
            "opaque",
            "redirect",
            "metacopy",
            "origin",
            "impure",
            "nlink",
            "upper",
            "uuid",
            "protattr",
        ):
            setattr(self, field, self.prefix + field)
        self.whiteout = self.prefix + "whiteout"

    opaque: str
    redirect: str
    metacopy: str
    origin: str
    impure: str
    nlink: str
    upper: str
    uuid: str
    protattr: str
    whiteout: str

    def is_private(self, name: str) -> bool:
        """Tell whether an attribute is the union's own; a user's escaped one is not (``ovl_is_private_xattr``)."""
        return name.startswith(self.prefix) and not name.startswith(self.escaped)

    def to_disk(self, name: str) -> str:
        """Return the stored name of an attribute that a user names (``ovl_own_xattr_set``)."""
        if name.startswith(self.prefix):
            return self.escaped + name[len(self.prefix) :]
        return name

    def to_user(self, name: str) -> str | None:
        """Return how a stored attribute is shown, None when it is hidden (``ovl_listxattr``)."""
        if name.startswith(self.escaped):
            return self.prefix + name[len(self.escaped) :]
        return None if name.startswith(self.prefix) else name


def is_fd_path(path: bytes) -> bool:
    """Tell whether a path is the name of a descriptor rather than of an entry below one."""
    return path.count(b"/") == 4


def get_xattr(path: bytes, name: str, *, follow: bool | None = None) -> bytes | None:
    """Read an attribute of *path*; None when it is absent or can't exist there.

    A path of a descriptor (``/proc/self/fd/N``) must be followed, that of an entry must not: *follow* says which,
    None finds out from the path.
    """
    try:
        return os.getxattr(path, name, follow_symlinks=is_fd_path(path) if follow is None else follow)
    except OSError as exc:
        if exc.errno in XATTR_ABSENT or exc.errno in (errno.EACCES, errno.EPERM):
            return None
        raise


def list_xattrs(path: bytes, *, follow: bool | None = None) -> list[str]:
    """List the attributes of *path*, followed like :func:`get_xattr`; empty where the file system has none."""
    try:
        return os.listxattr(path, follow_symlinks=is_fd_path(path) if follow is None else follow)
    except OSError as exc:
        if exc.errno in XATTR_ABSENT or exc.errno in (errno.EACCES, errno.EPERM):
            return []
        raise
