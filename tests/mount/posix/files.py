"""Opening, reading, writing, truncating, seeking and mapping files."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

from tests.mount.posix.table import behaviour, fails
from tests.support import raw
from tests.support.layers import File

BIG = bytes(range(256)) * 1024
TEXT = b"0123456789" * 100


@behaviour({"f": TEXT})
def read_whole(d: Path) -> None:
    assert (d / "f").read_bytes() == TEXT


@behaviour({"f": BIG})
def read_at_offsets(d: Path) -> None:
    with open(d / "f", "rb", buffering=0) as stream:
        for offset in (0, 1, 4095, 4096, 65537, len(BIG) - 1):
            assert os.pread(stream.fileno(), 100, offset) == BIG[offset : offset + 100]
        assert os.pread(stream.fileno(), 100, len(BIG)) == b""


@behaviour({"f": BIG})
def append_keeps_the_rest(d: Path) -> None:
    with open(d / "f", "ab") as stream:
        stream.write(b"tail")
    assert (d / "f").read_bytes() == BIG + b"tail"


@behaviour({"f": BIG})
def write_in_the_middle_keeps_the_rest(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_WRONLY)
    os.pwrite(descriptor, b"middle", 5000)
    os.close(descriptor)
    assert (d / "f").read_bytes() == BIG[:5000] + b"middle" + BIG[5006:]


@behaviour({"f": BIG})
def write_past_the_end_leaves_zeros(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDWR)
    os.pwrite(descriptor, b"far", len(BIG) + 10000)
    os.close(descriptor)
    assert (d / "f").read_bytes() == BIG + bytes(10000) + b"far"


@behaviour({"f": TEXT})
def read_what_was_just_written(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDWR)
    os.pwrite(descriptor, b"XX", 4)
    assert os.pread(descriptor, 10, 0) == b"0123XX6789"
    os.close(descriptor)


@behaviour({"f": TEXT})
def two_descriptors_share_the_file(d: Path) -> None:
    one = os.open(d / "f", os.O_RDWR)
    two = os.open(d / "f", os.O_RDWR)
    os.pwrite(one, b"one", 0)
    os.pwrite(two, b"two", 3)
    assert os.pread(one, 6, 0) == os.pread(two, 6, 0) == b"onetwo"
    assert os.fstat(one).st_ino == os.fstat(two).st_ino
    os.close(one)
    os.close(two)


@behaviour({"f": TEXT})
def reader_opened_first_sees_later_writes(d: Path) -> None:
    reader = os.open(d / "f", os.O_RDONLY)
    assert os.pread(reader, 4, 0) == b"0123"
    with open(d / "f", "r+b") as writer:
        writer.write(b"new!")
    assert os.pread(reader, 6, 0) == b"new!45"
    assert os.fstat(reader).st_size == len(TEXT)
    os.close(reader)


@behaviour({"f": TEXT})
def reader_opened_first_sees_growth_and_truncation(d: Path) -> None:
    reader = os.open(d / "f", os.O_RDONLY)
    with open(d / "f", "ab") as writer:
        writer.write(b"grown")
    assert os.pread(reader, 100, len(TEXT)) == b"grown"
    assert os.fstat(reader).st_size == len(TEXT) + 5
    os.truncate(d / "f", 3)
    assert os.pread(reader, 100, 0) == b"012"
    os.close(reader)


# overlayfs's documented exception; a FUSE file has one page cache whatever lies below.
@behaviour({"f": BIG}, unlike="overlay-lower overlay-touched")
def shared_mapping_made_first_sees_later_writes(d: Path) -> None:
    reader = os.open(d / "f", os.O_RDONLY)
    with mmap.mmap(reader, 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        assert view[:4] == BIG[:4]
        with open(d / "f", "r+b") as writer:
            writer.seek(2)
            writer.write(b"####")
        assert view[:8] == BIG[:2] + b"####" + BIG[6:8]
        assert view[100000:100010] == BIG[100000:100010]
    os.close(reader)


@behaviour({"f": BIG})
def writable_mapping_reaches_the_file(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDWR)
    with mmap.mmap(descriptor, 0) as view:
        view[5000:5004] = b"mmap"
        view.flush()
    os.close(descriptor)
    assert (d / "f").read_bytes() == BIG[:5000] + b"mmap" + BIG[5004:]


@behaviour({"f": BIG})
def private_mapping_leaves_the_file(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDONLY)
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as view:
        view[0:4] = b"mine"
    os.close(descriptor)
    assert (d / "f").read_bytes() == BIG


@behaviour({"f": TEXT})
def open_trunc_empties(d: Path) -> None:
    with open(d / "f", "wb") as stream:
        assert os.fstat(stream.fileno()).st_size == 0
        stream.write(b"short")
    assert (d / "f").read_bytes() == b"short"


@behaviour({"f": TEXT})
def open_trunc_read_only_empties(d: Path) -> None:
    os.close(os.open(d / "f", os.O_RDONLY | os.O_TRUNC))
    assert (d / "f").stat().st_size == 0


@behaviour({"f": TEXT})
def truncate_shrinks_and_grows(d: Path) -> None:
    os.truncate(d / "f", 10)
    assert (d / "f").read_bytes() == TEXT[:10]
    os.truncate(d / "f", 20)
    assert (d / "f").read_bytes() == TEXT[:10] + bytes(10)


@behaviour({"f": BIG})
def ftruncate_through_the_descriptor(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDWR)
    os.ftruncate(descriptor, 5000)
    assert os.fstat(descriptor).st_size == (d / "f").stat().st_size == 5000
    os.close(descriptor)
    assert (d / "f").read_bytes() == BIG[:5000]


@behaviour({"f": TEXT, "d": {}, "l": File(b"")})
def truncate_errors(d: Path) -> None:
    with fails(errno.EISDIR):
        os.truncate(d / "d", 0)
    with fails(errno.ENOENT):
        os.truncate(d / "missing", 0)
    descriptor = os.open(d / "f", os.O_RDONLY)
    with fails(errno.EINVAL):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)


@behaviour({"f": TEXT, "d": {}})
def open_errors(d: Path) -> None:
    with fails(errno.ENOENT):
        os.open(d / "missing", os.O_RDONLY)
    with fails(errno.EISDIR):
        os.open(d / "d", os.O_WRONLY)
    with fails(errno.ENOTDIR):
        os.open(d / "f" / "x", os.O_RDONLY)
    with fails(errno.ENOTDIR):
        os.open(d / "f", os.O_RDONLY | os.O_DIRECTORY)
    with fails(errno.EEXIST):
        os.open(d / "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    with fails(errno.EBADF):
        descriptor = os.open(d / "f", os.O_RDONLY)
        try:
            os.write(descriptor, b"x")
        finally:
            os.close(descriptor)


@behaviour({"f": TEXT})
def creat_of_an_existing_file_keeps_its_mode(d: Path) -> None:
    os.chmod(d / "f", 0o604)
    os.close(os.open(d / "f", os.O_CREAT | os.O_WRONLY, 0o777))
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o604
    assert (d / "f").read_bytes() == TEXT


@behaviour()
def create_exclusive_then_again(d: Path) -> None:
    os.close(os.open(d / "new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o640))
    status = (d / "new").stat()
    assert stat.S_IMODE(status.st_mode) == 0o640
    assert (status.st_size, status.st_nlink) == (0, 1)
    with fails(errno.EEXIST):
        os.open(d / "new", os.O_CREAT | os.O_EXCL | os.O_RDWR)


@behaviour()
def create_without_write_permission_is_still_writable_once(d: Path) -> None:
    descriptor = os.open(d / "new", os.O_CREAT | os.O_RDWR, 0o000)
    assert os.write(descriptor, b"x") == 1
    os.close(descriptor)
    assert stat.S_IMODE((d / "new").stat().st_mode) == 0


@behaviour({"f": TEXT})
def o_append_writes_at_the_end_each_time(d: Path) -> None:
    one = os.open(d / "f", os.O_WRONLY | os.O_APPEND)
    two = os.open(d / "f", os.O_RDWR | os.O_APPEND)
    os.write(one, b"a")
    os.write(two, b"b")
    os.lseek(one, 0, os.SEEK_SET)
    os.write(one, b"c")
    assert os.pread(two, 10, len(TEXT)) == b"abc"
    assert os.lseek(one, 0, os.SEEK_CUR) == len(TEXT) + 3
    os.close(one)
    os.close(two)
    assert (d / "f").read_bytes() == TEXT + b"abc"


@behaviour({"f": TEXT})
def o_append_set_by_fcntl(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_WRONLY)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    os.write(descriptor, b"end")
    os.close(descriptor)
    assert (d / "f").read_bytes() == TEXT + b"end"


@behaviour({"f": BIG})
def o_direct_reads_and_writes(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, 8192) as page:
        assert os.preadv(descriptor, [page], 4096) == 8192
        assert page[:] == BIG[4096 : 4096 + 8192]
        page[:] = b"D" * 8192
        assert os.pwritev(descriptor, [page], 8192) == 8192
    os.close(descriptor)
    assert (d / "f").read_bytes() == BIG[:8192] + b"D" * 8192 + BIG[16384:]


@behaviour({"f": BIG})
def o_direct_and_cached_agree(d: Path) -> None:
    cached = os.open(d / "f", os.O_RDWR)
    assert os.pread(cached, 4, 0) == BIG[:4]
    direct = os.open(d / "f", os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as page:
        page[:] = b"E" * 4096
        os.pwritev(direct, [page], 0)
        assert os.pread(cached, 4, 0) == b"EEEE"
        os.pwrite(cached, b"FFFF", 0)
        os.preadv(direct, [page], 0)
        assert page[:8] == b"FFFFEEEE"
    os.close(cached)
    os.close(direct)


@behaviour({"f": TEXT})
def seek_data_and_hole(d: Path) -> None:
    descriptor = os.open(d / "new", os.O_CREAT | os.O_RDWR)
    os.pwrite(descriptor, b"x" * 4096, 1 << 20)
    os.ftruncate(descriptor, 2 << 20)
    os.fsync(descriptor)
    assert os.lseek(descriptor, 0, os.SEEK_DATA) == 1 << 20
    assert os.lseek(descriptor, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 4096
    with fails(errno.ENXIO):
        os.lseek(descriptor, (1 << 20) + 8192, os.SEEK_DATA)
    os.close(descriptor)


@behaviour({"f": TEXT})
def fallocate_grows_or_keeps_the_size(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDWR)
    raw.fallocate(descriptor, raw.FALLOC_FL_KEEP_SIZE, 0, 100000)
    assert os.fstat(descriptor).st_size == len(TEXT)
    os.posix_fallocate(descriptor, 0, 50000)
    assert os.fstat(descriptor).st_size == 50000
    os.close(descriptor)
    assert (d / "f").read_bytes() == TEXT + bytes(50000 - len(TEXT))


@behaviour({"f": BIG})
def fallocate_punches_holes(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDWR)
    raw.fallocate(descriptor, raw.FALLOC_FL_KEEP_SIZE | raw.FALLOC_FL_PUNCH_HOLE, 4096, 8192)
    assert os.pread(descriptor, len(BIG), 0) == BIG[:4096] + bytes(8192) + BIG[12288:]
    os.close(descriptor)


@behaviour({"f": BIG, "g": b"old"})
def copy_file_range_between_files(d: Path) -> None:
    source = os.open(d / "f", os.O_RDONLY)
    target = os.open(d / "g", os.O_RDWR)
    copied = 0
    while copied < 100000:
        copied += os.copy_file_range(source, target, 100000 - copied, 10 + copied, copied)
    os.close(source)
    os.close(target)
    assert (d / "g").read_bytes() == BIG[10:100010]


@behaviour({"f": BIG})
def sendfile_from_the_file(d: Path) -> None:
    source = os.open(d / "f", os.O_RDONLY)
    target = os.open(d / "copy", os.O_CREAT | os.O_WRONLY)
    sent = 0
    while sent < len(BIG):
        sent += os.sendfile(target, source, sent, len(BIG) - sent)
    os.close(source)
    os.close(target)
    assert (d / "copy").read_bytes() == BIG


@behaviour({"f": TEXT})
def fsync_fdatasync_and_syncfs(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDWR)
    os.write(descriptor, b"sync")
    os.fsync(descriptor)
    os.fdatasync(descriptor)
    raw.syncfs(descriptor)
    os.close(descriptor)
    directory = os.open(d, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)


@behaviour({"f": TEXT})
def unlinked_file_lives_on_through_its_descriptor(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDWR)
    os.unlink(d / "f")
    assert not (d / "f").exists()
    assert os.fstat(descriptor).st_nlink == 0
    assert os.pread(descriptor, 10, 0) == TEXT[:10]
    os.pwrite(descriptor, b"gone", 0)
    assert os.pread(descriptor, 8, 0) == b"gone4567"
    os.ftruncate(descriptor, 4)
    os.fchmod(descriptor, 0o600)
    os.utime(descriptor, (5, 6))
    status = os.fstat(descriptor)
    assert (status.st_size, stat.S_IMODE(status.st_mode), status.st_mtime) == (4, 0o600, 6)
    os.fsync(descriptor)
    os.close(descriptor)


# On a lower file that is gone, overlayfs answers EEXIST to fchmod.
@behaviour({"f": TEXT}, unlike="overlay-lower")
def unlinked_file_opened_for_reading_only(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDONLY)
    os.unlink(d / "f")
    assert os.pread(descriptor, 10, 0) == TEXT[:10]
    os.fchmod(descriptor, 0o640)
    assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o640
    assert os.pread(descriptor, len(TEXT), 0) == TEXT
    os.close(descriptor)


@behaviour({"f": TEXT})
def unlinked_and_made_anew_are_two_files(d: Path) -> None:
    old = os.open(d / "f", os.O_RDWR)
    os.unlink(d / "f")
    (d / "f").write_bytes(b"another")
    assert os.pread(old, 10, 0) == TEXT[:10]
    os.pwrite(old, b"oldold", 0)
    assert (d / "f").read_bytes() == b"another"
    assert os.fstat(old).st_ino != (d / "f").stat().st_ino
    os.close(old)


@behaviour({"f": TEXT, "g": b"winner"})
def file_replaced_by_rename_lives_on_through_its_descriptor(d: Path) -> None:
    old = os.open(d / "f", os.O_RDWR)
    os.rename(d / "g", d / "f")
    assert os.pread(old, len(TEXT), 0) == TEXT
    assert os.fstat(old).st_nlink == 0
    os.pwrite(old, b"still mine", 0)
    assert (d / "f").read_bytes() == b"winner"
    os.close(old)


@behaviour({"f": TEXT})
def open_descriptor_follows_a_rename(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDWR)
    os.rename(d / "f", d / "g")
    os.pwrite(descriptor, b"moved", 0)
    assert (d / "g").read_bytes() == b"moved" + TEXT[5:]
    os.close(descriptor)


@behaviour({"f": TEXT})
def reopen_through_proc(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDONLY)
    again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    os.pwrite(again, b"again", 0)
    assert os.pread(descriptor, 5, 0) == b"again"
    os.close(again)
    os.close(descriptor)


@behaviour({"f": TEXT})
def o_path_descriptor(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_PATH)
    assert os.fstat(descriptor).st_size == len(TEXT)
    with fails(errno.EBADF):
        os.read(descriptor, 1)
    os.close(descriptor)


# libfuse before 3.17 has no such request.
@behaviour(unlike="union-lower union-upper union-touched bind-lower bind-upper bind-touched")
def o_tmpfile_gets_a_name_by_link(d: Path) -> None:
    descriptor = os.open(d, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(descriptor, b"nameless")
    assert os.listdir(d) == []
    raw.link_fd(descriptor, d / "named")
    os.close(descriptor)
    assert (d / "named").read_bytes() == b"nameless"


@behaviour({"f": TEXT})
def flock_and_record_locks(d: Path) -> None:
    one = os.open(d / "f", os.O_RDWR)
    two = os.open(d / "f", os.O_RDWR)
    fcntl.flock(one, fcntl.LOCK_EX)
    with fails(errno.EWOULDBLOCK):
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(one, fcntl.LOCK_UN)
    fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(one, fcntl.LOCK_EX, 10)
    os.close(one)
    os.close(two)


@behaviour({"f": TEXT})
def lock_held_from_before_the_first_write(d: Path) -> None:
    reader = os.open(d / "f", os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    writer = os.open(d / "f", os.O_RDWR)
    with fails(errno.EWOULDBLOCK):
        fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(reader)
    fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(writer)


@behaviour({"f": b"#!/bin/sh\necho ran\n"})
def executable_runs_and_is_busy(d: Path) -> None:
    import subprocess

    os.chmod(d / "f", 0o755)
    assert subprocess.run([d / "f"], capture_output=True, check=True).stdout == b"ran\n"


# overlayfs copies the data up on opening, and forgets mtime where a metacopy was there.
@behaviour({"f": TEXT}, unlike="overlay-touched")
def write_zero_bytes_changes_nothing(d: Path) -> None:
    before = (d / "f").stat().st_mtime_ns
    descriptor = os.open(d / "f", os.O_WRONLY)
    assert os.write(descriptor, b"") == 0
    os.close(descriptor)
    assert (d / "f").stat().st_mtime_ns == before
    assert (d / "f").read_bytes() == TEXT


@behaviour({"f": b""})
def many_small_writes(d: Path) -> None:
    expected = b""
    with open(d / "f", "wb", buffering=0) as stream:
        for number in range(300):
            piece = bytes([number % 256]) * (number % 97)
            stream.write(piece)
            expected += piece
    assert (d / "f").read_bytes() == expected


@behaviour({"f": BIG})
def readv_and_writev(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDWR)
    buffers = [bytearray(10), bytearray(20)]
    assert os.preadv(descriptor, buffers, 3) == 30
    assert b"".join(buffers) == BIG[3:33]
    assert os.pwritev(descriptor, [b"aa", b"bbb"], 7) == 5
    assert os.pread(descriptor, 12, 0) == BIG[:7] + b"aabbb"
    os.close(descriptor)


@behaviour({"f": TEXT})
def blocks_and_block_size(d: Path) -> None:
    status = (d / "f").stat()
    assert status.st_blksize >= 512
    assert status.st_blocks * 512 >= 0
    descriptor = os.open(d / "sparse", os.O_CREAT | os.O_WRONLY)
    os.ftruncate(descriptor, 1 << 30)
    os.close(descriptor)
    assert (d / "sparse").stat().st_blocks < 1000
    os.unlink(d / "sparse")


@behaviour({"f": TEXT})
def offsets_beyond_four_gib(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDWR)
    far = (5 << 30) + 17
    os.pwrite(descriptor, b"far out", far)
    assert os.fstat(descriptor).st_size == far + 7
    assert os.pread(descriptor, 9, far - 2) == b"\0\0far out"
    os.close(descriptor)
    os.unlink(d / "f")  # no test after this one wants to read it all


@behaviour({"d": {"f": TEXT}})
def chdir_and_relative_paths(d: Path) -> None:
    descriptor = os.open(d / "d", os.O_RDONLY | os.O_DIRECTORY)
    assert os.stat("f", dir_fd=descriptor).st_size == len(TEXT)
    inner = os.open("f", os.O_RDWR, dir_fd=descriptor)
    os.write(inner, b"rel")
    os.close(inner)
    os.close(descriptor)
    assert (d / "d" / "f").read_bytes() == b"rel" + TEXT[3:]


@behaviour({"f": TEXT})
def inode_number_and_device_stay_over_a_write(d: Path) -> None:
    before = (d / "f").stat()
    descriptor = os.open(d / "f", os.O_RDWR)
    os.write(descriptor, b"!")
    after = os.fstat(descriptor)
    os.close(descriptor)
    assert (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino)
    assert (d / "f").stat().st_ino == before.st_ino
    assert {entry.name: entry.inode() for entry in os.scandir(d)} == {"f": before.st_ino}
