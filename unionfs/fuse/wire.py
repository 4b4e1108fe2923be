"""Requests and answers of the kernel as bytes (include/uapi/linux/fuse.h), as far as both short ways need them."""

from __future__ import annotations

import struct
from typing import Final

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
