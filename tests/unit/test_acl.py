"""Inheriting default ACLs: the same as what the host's file system does by itself."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

import pytest

from unionfs.core import acl

USER_OBJ, USER, GROUP_OBJ, MASK, OTHER = 1, 2, 4, 16, 32
NOBODY_ID = 0xFFFFFFFF


def value(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


MINIMAL = value((USER_OBJ, 7, NOBODY_ID), (GROUP_OBJ, 5, NOBODY_ID), (OTHER, 1, NOBODY_ID))
EXTENDED = value(
    (USER_OBJ, 7, NOBODY_ID), (USER, 6, 1234), (GROUP_OBJ, 7, NOBODY_ID), (MASK, 6, NOBODY_ID), (OTHER, 5, NOBODY_ID)
)


@pytest.mark.parametrize("default", [MINIMAL, EXTENDED], ids=["minimal", "extended"])
@pytest.mark.parametrize("mode", [0o777, 0o666, 0o640, 0o600, 0o000, 0o4755])
def test_same_as_the_file_system(tmp_path: Path, default: bytes, mode: int) -> None:
    os.setxattr(tmp_path, acl.DEFAULT, default)
    old = os.umask(0o027)
    try:
        os.close(os.open(tmp_path / "f", os.O_CREAT | os.O_WRONLY, mode))
    finally:
        os.umask(old)
    try:
        real: bytes | None = os.getxattr(tmp_path / "f", acl.ACCESS)
    except OSError:
        real = None
    bits, access = acl.inherit(default, mode)
    assert bits == stat.S_IMODE(os.stat(tmp_path / "f").st_mode)
    assert access == real


@pytest.mark.parametrize("broken", [b"", b"\x02\0\0", struct.pack("<I", 1), value((1, 7, 0))[:-1]])
def test_malformed_values_count_as_absent(broken: bytes) -> None:
    assert acl.inherit(broken, 0o644)[1] is None
    assert acl.inherit(broken, 0o644)[0] == 0o644
