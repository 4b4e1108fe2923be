"""FUSE passthrough: the kernel moves the bytes, no open is ever of the wrong mode, and suid ends as on the host."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.test_native_fs import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    MIB,
    Served,
    fails,
    fallocate,
    served,
)
from tests.support.people import ALICE, as_user


@pytest.fixture
def fs(ground: Path) -> Iterator[Served]:
    """The file system with passthrough for every file that has neither suid nor sgid."""
    with served(ground, "dispatch", "passthrough") as running:
        yield running


def passed(fs: Served) -> int:
    """How many opens have been passthrough."""
    return int(fs.report()["native"]["passthrough"])


def test_data_goes_past_the_daemon(fs: Served) -> None:
    data = os.urandom(5 * MIB + 17)
    (fs.mnt / "f").write_bytes(data)
    with open(fs.mnt / "f", "ab") as file:
        file.write(b"end")
    assert (fs.source / "f").read_bytes() == data + b"end"
    assert (fs.mnt / "f").read_bytes() == data + b"end"
    assert (fs.mnt / "f").stat().st_size == len(data) + 3
    shutil.copyfile(fs.mnt / "f", fs.mnt / "g")
    assert (fs.source / "g").read_bytes() == data + b"end"
    native = fs.end()["native"]
    assert native["passthrough"] == 5
    assert native["read"] == native["write"] == 0


def test_created_entry_is_complete(fs: Served) -> None:
    with open(fs.mnt / "f", "wb") as file:
        here, below = os.fstat(file.fileno()), (fs.source / "f").stat()
    assert here.st_dev != below.st_dev
    assert here[:2] == below[:2]
    assert here[3:] == below[3:]
    assert here.st_mtime_ns == below.st_mtime_ns
    assert here.st_blksize == below.st_blksize


def test_shared_mappings_and_handles_see_each_other(fs: Served) -> None:
    (fs.mnt / "f").write_bytes(b"a" * 8192)
    one = os.open(fs.mnt / "f", os.O_RDWR)
    with open(fs.mnt / "f", "r+b", buffering=0) as two, mmap.mmap(one, 8192) as mapping:
        os.close(one)  # from here on the mapping alone keeps that handle
        os.pwrite(two.fileno(), b"two", 4096)
        assert mapping[4096:4099] == b"two"
        mapping[0:3] = b"map"
        assert os.pread(two.fileno(), 3, 0) == b"map"
        assert (fs.source / "f").read_bytes()[:3] == b"map"
        two.close()
        assert (fs.mnt / "f").read_bytes()[:3] == b"map"
        mapping[0:3] = b"MAP"
        assert (fs.mnt / "f").read_bytes() == (fs.source / "f").read_bytes()


def test_other_operations_on_a_passed_handle(fs: Served) -> None:
    with open(fs.mnt / "f", "w+b", buffering=0) as file:
        fd = file.fileno()
        os.pwrite(fd, b"a" * MIB, 0)
        fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 4096, 4096)
        assert os.pread(fd, 8193, 0) == b"a" * 4096 + bytes(4096) + b"a"
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 4096
        fallocate(fd, 0, MIB, MIB)
        assert os.fstat(fd).st_size == 2 * MIB
        assert os.copy_file_range(fd, fd, 4096, 0, 4096) == 4096
        assert os.pread(fd, 4096, 4096) == b"a" * 4096
        os.ftruncate(fd, 10)
        assert os.read(fd, 100)[:10] == b""
        assert os.pread(fd, 100, 0) == b"a" * 10
        os.unlink(fs.source / "f")
        os.pwrite(fd, b"still here", 0)
        assert os.pread(fd, 100, 0) == b"still here"


def test_direct_io(fs: Served) -> None:
    (fs.mnt / "f").write_bytes(b"a" * 8192)
    fd = os.open(fs.mnt / "f", os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4096) as page:
            page[:] = b"d" * 4096
            assert os.pwrite(fd, page, 4096) == 4096
            assert os.preadv(fd, [page], 0) == 4096
            assert page[:] == b"a" * 4096
    finally:
        os.close(fd)
    assert (fs.source / "f").read_bytes() == b"a" * 4096 + b"d" * 4096


def test_an_open_node_keeps_its_mode(fs: Served) -> None:
    """The kernel would fail an open of the other mode with EIO."""
    (fs.source / "f").write_bytes(b"data")
    (fs.source / "f").chmod(0o4644)
    with open(fs.mnt / "f", "rb"):
        (fs.mnt / "f").chmod(0o644)
        assert (fs.mnt / "f").read_bytes() == b"data"
        assert passed(fs) == 0
    assert (fs.mnt / "f").read_bytes() == b"data"
    assert passed(fs) == 1
    with open(fs.mnt / "f", "rb"):
        (fs.mnt / "f").chmod(0o4644)
        with open(fs.mnt / "f", "r+b") as file:
            file.write(b"DA")
        assert (fs.mnt / "f").read_bytes() == b"DAta"
        assert passed(fs) == 4
    (fs.mnt / "f").chmod(0o4644)
    assert (fs.mnt / "f").read_bytes() == b"DAta"
    assert passed(fs) == 4


def test_each_inode_has_a_backing_file_of_its_own(fs: Served) -> None:
    """Many nodes open at once, several handles each, closed in another order; ids are given up and used again."""
    for _ in range(3):
        handles = {}
        for number in range(40):
            path = fs.mnt / f"f{number}"
            handles[number] = [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(3)]
        for number, fds in handles.items():
            os.pwrite(fds[number % 3], str(number).encode(), 0)
            os.close(fds[0])
            assert os.pread(fds[1], 100, 0) == str(number).encode()
        for fds in reversed(handles.values()):
            os.close(fds[2])
            os.close(fds[1])


@pytest.mark.parametrize("user", [0, ALICE])
def test_suid_set_while_open_ends_with_the_next_write(fs: Served, user: int) -> None:
    """And an exec that comes at once does not run with the old mode, though no request said that it was gone."""
    program = fs.mnt / "program"
    shutil.copyfile("/usr/bin/id", program)
    program.chmod(0o777)

    def write() -> None:
        with open(program, "r+b", buffering=0) as file:
            assert os.fstat(file.fileno()).st_mode & stat.S_ISUID
            file.write(Path("/usr/bin/id").read_bytes()[:100])

    with open(program, "rb"):
        program.chmod(0o6777)
        as_user(user, write) if user else write()
    printed = subprocess.run([program, "-u"], user=ALICE, capture_output=True, text=True, check=True).stdout
    assert int(printed) == ALICE
    assert stat.S_IMODE(program.stat().st_mode) == 0o777
    assert stat.S_IMODE((fs.source / "program").stat().st_mode) == 0o777
    assert passed(fs) >= 3


def test_suid_works_where_nothing_is_written(fs: Served) -> None:
    program = fs.mnt / "program"
    shutil.copyfile("/usr/bin/id", program)
    program.chmod(0o4755)
    printed = subprocess.run([program, "-u"], user=ALICE, capture_output=True, text=True, check=True).stdout
    assert int(printed) == 0


def test_capability_ends_with_the_next_write(fs: Served) -> None:
    capability = struct.pack("<IIIII", 0x02000000, 1 << 13, 0, 0, 0)
    (fs.mnt / "f").write_bytes(b"x")
    os.setxattr(fs.source / "f", "security.capability", capability)
    with open(fs.mnt / "f", "ab") as file:
        file.write(b"y")
    with fails(errno.ENODATA):
        os.getxattr(fs.source / "f", "security.capability")
    assert passed(fs) == 2
