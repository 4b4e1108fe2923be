"""POSIX access-control lists as far as creating a file and showing other owners need them (fs/posix_acl.c).

A new object in a directory with a default ACL gets that as its access ACL, masked with the mode asked for, and the
umask does not count; a new directory passes the default ACL on. The kernel's own file systems do this by themselves;
it is needed here because objects are built in the work directory, which has no default ACL.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

ACCESS: Final = "system.posix_acl_access"
DEFAULT: Final = "system.posix_acl_default"
NAMES: Final = frozenset((ACCESS, DEFAULT))

_HEAD: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")
_VERSION: Final = 2
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20


def inherit(default: bytes, mode: int) -> tuple[int, bytes | None]:
    """Return (permission bits, access ACL or None) of a new object under a parent with this default ACL.

    *default* is the value of ``system.posix_acl_default``, *mode* what the caller asked for, umask not applied. None
    means that the bits say it all. A malformed value counts as absent.
    """
    entries = _parse(default)
    if entries is None:
        return mode, None
    masked: list[tuple[int, int, int]] = []
    bits = mode & 0o7777
    extended = any(tag in (_USER, _GROUP, _MASK) for tag, _, _ in entries)
    group_tag = _MASK if any(tag == _MASK for tag, _, _ in entries) else _GROUP_OBJ
    for tag, perm, ident in entries:
        if tag == _USER_OBJ:
            perm &= (mode >> 6) & 7
            bits = (bits & ~0o700) | perm << 6
        elif tag == _OTHER:
            perm &= mode & 7
            bits = (bits & ~0o007) | perm
        elif tag == group_tag:
            perm &= (mode >> 3) & 7
            bits = (bits & ~0o070) | perm << 3
        masked.append((tag, perm, ident))
    value = _HEAD.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in masked)
    return bits, value if extended else None


def translated(value: bytes, uid: Callable[[int], int], gid: Callable[[int], int]) -> bytes:
    """Return an ACL with other users and groups in its entries; a malformed value is returned as it is."""
    entries = _parse(value)
    if entries is None:
        return value
    by_tag = {_USER: uid, _GROUP: gid}
    changed = ((tag, perm, by_tag[tag](ident) if tag in by_tag else ident) for tag, perm, ident in entries)
    return _HEAD.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in changed)


def _parse(value: bytes) -> list[tuple[int, int, int]] | None:
    if len(value) < _HEAD.size or (len(value) - _HEAD.size) % _ENTRY.size:
        return None
    if _HEAD.unpack_from(value)[0] != _VERSION:
        return None
    return list(_ENTRY.iter_unpack(value[_HEAD.size :]))
