"""The native layer by itself: attributes, byte for byte as include/uapi/linux/fuse.h has them, and what its stub says."""

from __future__ import annotations

import ast
import os
import struct
from pathlib import Path

import pytest

import unionfs
from unionfs import _native as native
from unionfs.core import sysio
from unionfs.core.merge import Entry

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


def test_directories_are_read_alike(tmp_path: Path) -> None:
    """By the native layer and in Python: every name that a directory may have, and those of several buffers."""
    for number in range(3000):
        (tmp_path / f"{number}-{'x' * (number % 240)}").touch()
    for byte in range(1, 256):
        if byte != ord("/") and byte != ord("."):
            os.close(os.open(os.path.join(os.fsencode(tmp_path), bytes([byte])), os.O_CREAT | os.O_WRONLY))
    (tmp_path / "...").mkdir()
    (tmp_path / "..a").symlink_to("nowhere")
    os.mkfifo(tmp_path / ".b")
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    found = native.getdents(fd)
    assert len(found) == 3000 + 253 + 3
    assert found == native.getdents(fd) == sysio.getdents(fd)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.getdents(fd)
    with open(tmp_path / "a") as file, pytest.raises(NotADirectoryError):
        native.getdents(file.fileno())


def test_names_are_packed_until_one_must_be_asked_for() -> None:
    names = [b"a", b"bb" * 40, b"known", b"c", b"other layer", b"d", b"huge"]
    entries = [Entry(name, 1, number + 10, 4) for number, name in enumerate(names)]
    entries[4] = entries[4]._replace(layer=2)
    entries[6] = entries[6]._replace(ino=1 << 63)
    native.number_bits(48)
    cookies = [100 + number for number in range(len(names))]

    def pack(first: int, room: int) -> tuple[list[tuple[int, int, bytes]], int]:
        text, at = native.pack_names({1: 3 << 48}, {b"known": None}, cookies, entries, first, room)
        found = []
        while text:
            assert text[:128] == bytes(128)
            ino, position, length, kind = struct.unpack_from("=QQII", text, 128)
            assert kind == 4
            found.append((ino, position, text[152 : 152 + length]))
            text = text[128 + (24 + length + 7 & ~7) :]
        return found, at

    packed = [((3 << 48) + 10 + number, 100 + number, name) for number, name in enumerate(names)]
    assert pack(0, 10_000) == (packed[:2], 2)
    assert pack(0, 128 + 32) == (packed[:1], 1)
    assert pack(0, 128 + 31) == ([], 0)
    assert pack(0, -5) == ([], 0)
    assert pack(2, 10_000) == ([], 2)
    assert pack(3, 10_000) == (packed[3:4], 4)
    assert pack(5, 10_000) == (packed[5:6], 6)
    assert pack(7, 10_000) == ([], 7)
