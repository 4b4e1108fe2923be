"""The native layer by itself: attributes, byte for byte as include/uapi/linux/fuse.h has them, and what its stub says."""

from __future__ import annotations

import ast
import os
import struct
from pathlib import Path

import pytest

import unionfs
from unionfs import _native as native

ATTR = struct.Struct("=QQQqqqIIIIIIIIII")
HUGE = 15_032_385_535 * 10**9 + 999_999_999  # more nanoseconds than 64 bits hold: ext4's latest time


def unpacked(st: os.stat_result, ino: int, nlink: int, blocks: int) -> tuple[int, ...]:
    """What struct fuse_attr must hold."""
    times = (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)
    seconds, rests = [ns // 10**9 for ns in times], [ns % 10**9 for ns in times]
    rest = (st.st_mode, nlink, st.st_uid, st.st_gid, st.st_rdev, st.st_blksize, 0)
    return (ino, st.st_size, blocks, *seconds, *rests, *rest)


@pytest.mark.parametrize("mtime", [0, 1, -1, 1_700_000_000_123_456_789, -1_500_000_001, HUGE])
def test_attributes(tmp_path: Path, mtime: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 5000)
    os.chown(path, 4_000_000_000, 7)
    os.utime(path, ns=(mtime, mtime))
    for st in (path.stat(), os.stat("/dev/null"), os.stat("/")):
        entry = native.pack_entry(2**64 - 1, 2**63 + 5, 1.5, 365 * 86400.0, -1, -1, st)
        assert struct.unpack_from("=QQQQII", entry) == (2**64 - 1, 0, 1, 365 * 86400, 500_000_000, 0)
        assert ATTR.unpack_from(entry, 40) == unpacked(st, 2**63 + 5, st.st_nlink, st.st_blocks)
        assert len(entry) == 128
        attributes = native.pack_attributes(7, 0.25, 3, 0, st)
        assert struct.unpack_from("=QII", attributes) == (0, 250_000_000, 0)
        assert ATTR.unpack_from(attributes, 16) == unpacked(st, 7, 3, 0)
        assert len(attributes) == 104


def test_only_stat_results_are_taken() -> None:
    with pytest.raises(TypeError):
        native.pack_attributes(7, 0.0, 3, 0, (1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        native.pack_attributes(-7, 0.0, 3, 0, os.stat("/"))


def test_the_stub_has_all_functions() -> None:
    stub = ast.parse((Path(unionfs.__file__).parent / "_native.pyi").read_text())
    told = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert told == {name for name, value in vars(native).items() if callable(value) and not name.startswith("_")}
