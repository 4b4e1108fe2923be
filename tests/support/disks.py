"""A disk that remembers in which order it was written, and that fails when it is told to.

It is a loop device over a file that a FUSE file system of our own shows. Whatever the kernel writes to that disk comes
here and is put into the image and, with each request to make it last (a flush), into the log; so it can be known what
a power cut at any moment might have left (`cuts`, in `tests/power`). While the file `fail` exists, the requests that it
names (`read`, `write`, `flush`) fail with EIO, like those of a disk that is worn out; and writes of what has `BAD` in it
while it names `bad`.

`python -m tests.support.disks DIRECTORY` serves the image in that directory until it is unmounted; `disk` does all that.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from tests.support import raw
from tests.support.filesystems import run
from tests.support.mounts import environment, wait_gone

START_SECONDS = 20
_DISK_INODE = pyfuse3.InodeT(2)
RECORD = struct.Struct("<QI")
"""An entry of the log: where was written, how much; these bytes follow. With `FLUSH` as the place it is a flush."""
FLUSH = (1 << 64) - 1
BAD = b"can't be written"


class DiskFile(pyfuse3.Operations):
    """A directory with one file, `disk`."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._image = os.open(directory / "image", os.O_RDWR)
        self._log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._fail = directory / "fail"

    def _maybe_fail(self, what: str) -> None:
        with suppress(FileNotFoundError):
            if what in self._fail.read_text():
                raise pyfuse3.FUSEError(errno.EIO)

    async def lookup(self, parent: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        if name != b"disk":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(_DISK_INODE, ctx)

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        attr = pyfuse3.EntryAttributes()
        attr.st_ino = pyfuse3.InodeT(inode)
        is_disk = inode == _DISK_INODE
        attr.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o600 if is_disk else stat.S_IFDIR | 0o700)
        attr.st_nlink = 1
        attr.st_size = os.fstat(self._image).st_size if is_disk else 0
        attr.entry_timeout = attr.attr_timeout = 3600
        return attr

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1), direct_io=True)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        self._maybe_fail("read")
        return os.pread(self._image, size, offset)

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        self._maybe_fail("write")
        if BAD in data:
            self._maybe_fail("bad")
        os.writev(self._log, [RECORD.pack(offset, len(data)), data])
        return os.pwrite(self._image, data, offset)

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._maybe_fail("flush")
        os.write(self._log, RECORD.pack(FLUSH, 0))

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        pass


@dataclass(frozen=True)
class Disk:
    """One that is there.

    Attributes:
        device: the block device.
        image: what is on it.
        log: all that was written to it, in order.
    """

    directory: Path
    device: Path

    @property
    def image(self) -> Path:
        return self.directory / "image"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @contextmanager
    def failing(self, *what: str) -> Iterator[None]:
        """Let `read`, `write`, `bad` or `flush` fail for a while."""
        (self.directory / "fail").write_text(" ".join(what))
        try:
            yield
        finally:
            (self.directory / "fail").unlink()


@contextmanager
def disk(directory: Path) -> Iterator[Disk]:
    """Make a disk of the file `image` in a directory; it is gone at the end, but for image and log."""
    mountpoint = directory / "fuse"
    mountpoint.mkdir()
    command = [sys.executable, "-m", "tests.support.disks", str(directory)]
    with subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL) as process:
        try:
            _wait_for(process, mountpoint / "disk")
            device = run("losetup", "--find", "--show", str(mountpoint / "disk")).strip()
            try:
                yield Disk(directory, Path(device))
            finally:
                run("losetup", "--detach", device)
        finally:
            with suppress(OSError):
                raw.umount2(mountpoint, raw.MNT_DETACH)
            if not wait_gone(process.pid, 10):
                process.kill()
    mountpoint.rmdir()


def _wait_for(process: subprocess.Popen[bytes], path: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not path.exists():
        assert process.poll() is None, "the disk did not start"
        assert time.monotonic() < end, "the disk did not appear"
        time.sleep(0.02)


def main(directory: str) -> None:
    """Mount and serve."""
    pyfuse3.init(DiskFile(Path(directory)), os.path.join(directory, "fuse"), {"fsname=disk", "subtype=disk"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
