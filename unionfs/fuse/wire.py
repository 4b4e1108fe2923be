"""Requests and answers of the kernel as bytes (include/uapi/linux/fuse.h), as far as both short ways need them."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final


class Opcode(IntEnum):
    """Which request it is (``enum fuse_opcode``)."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    RELEASE = 18
    GETXATTR = 22
    OPENDIR = 27
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    BATCH_FORGET = 42
    READDIRPLUS = 44
    RENAME2 = 45


# What the answer to OPEN, CREATE and OPENDIR says of a handle.
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_NOFLUSH: Final = 1 << 5
FOPEN_PASSTHROUGH: Final = 1 << 7

DT_SHIFT: Final = 12
"""How far the type in a mode is from that of an entry (``IFTODT``)."""

UNKNOWN_INO: Final = 1 << 62
"""The ``st_ino`` of a listed entry whose own can't be found out: 0 would leave it out."""

open_in: Final = struct.Struct("=II").unpack_from
create_in: Final = struct.Struct("=IIII").unpack_from
getxattr_in: Final = struct.Struct("=II").unpack_from
getxattr_out: Final = struct.Struct("=II").pack
u64: Final = struct.Struct("=Q").unpack_from
rename2_in: Final = struct.Struct("=QII").unpack_from
read_in: Final = struct.Struct("=QQI").unpack_from
forget_one: Final = struct.Struct("=QQ").iter_unpack
open_out: Final = struct.Struct("=QIi").pack
_dirent: Final = struct.Struct("=QQII").pack

ENTRY_SIZE: Final = 128
NO_ENTRY: Final = bytes(ENTRY_SIZE)


def dirent(ino: int, position: int, name: bytes, kind: int) -> bytes:
    """Pack ``struct fuse_dirent``."""
    length = len(name)
    return _dirent(ino, position, length, kind) + name + bytes(-length % 8)
