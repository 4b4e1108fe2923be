"""A FUSE file system that shows a directory, read-only and slowly: each operation takes a while, and nothing may be cached.

`python -m tests.support.slowfs SOURCE MOUNTPOINT SECONDS` serves it until it is unmounted; `slow_view` does all that. Many
operations may be under way at a time, as on a server far away.
"""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from tests.support import raw
from tests.support.mounts import environment, wait_gone

START_SECONDS = 20
_COPIED = (
    *("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blksize", "st_blocks"),
    *("st_atime_ns", "st_mtime_ns", "st_ctime_ns"),
)


def slowly(fn: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Sleep before an operation, and turn an OSError into its errno."""

    @functools.wraps(fn)
    async def wrapper(self: SlowView, *args: Any) -> Any:
        await trio.sleep(self.seconds)
        try:
            return await fn(self, *args)
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from None

    return wrapper


class SlowView(pyfuse3.Operations):
    """Shows one directory of one file system; inode numbers are the real ones."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, source: str, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self._paths = {pyfuse3.ROOT_INODE: os.fsencode(source)}
        self._listings: dict[int, tuple[int, list[bytes]]] = {}

    def _attributes(self, path: bytes, inode: int | None = None) -> pyfuse3.EntryAttributes:
        st = os.lstat(path)
        attr = pyfuse3.EntryAttributes()
        for name in _COPIED:
            setattr(attr, name, getattr(st, name))
        attr.st_ino = st.st_ino if inode is None else inode
        attr.entry_timeout = attr.attr_timeout = 0
        return attr

    @slowly
    async def lookup(self, parent: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        path = self._paths[parent] + b"/" + name
        attr = self._attributes(path)
        self._paths[attr.st_ino] = path
        return attr

    @slowly
    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        return self._attributes(self._paths[inode], inode)

    @slowly
    async def readlink(self, inode: int, ctx: object) -> bytes:
        return os.readlink(self._paths[inode])

    @slowly
    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "")
        return pyfuse3.FileInfo(fh=os.open(self._paths[inode], os.O_RDONLY))

    @slowly
    async def read(self, fh: int, offset: int, size: int) -> bytes:
        return os.pread(fh, size, offset)

    @slowly
    async def flush(self, fh: int) -> None:
        pass

    @slowly
    async def release(self, fh: int) -> None:
        os.close(fh)

    @slowly
    async def opendir(self, inode: int, ctx: object) -> int:
        handle = len(self._listings)
        self._listings[handle] = inode, sorted(os.listdir(self._paths[inode]))
        return handle

    @slowly
    async def readdir(self, fh: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        inode, names = self._listings[fh]
        for at, name in enumerate(names[start:], start + 1):
            path = self._paths[inode] + b"/" + name
            attr = self._attributes(path)
            if not pyfuse3.readdir_reply(token, name, attr, at):
                return
            self._paths[attr.st_ino] = path

    @slowly
    async def releasedir(self, fh: int) -> None:
        pass

    @slowly
    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        real = os.statvfs(self._paths[pyfuse3.ROOT_INODE])
        data = pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, name, getattr(real, name))
        data.f_namemax = real.f_namemax
        return data

    @slowly
    async def getxattr(self, inode: int, name: bytes, ctx: object) -> bytes:
        return os.getxattr(self._paths[inode], name, follow_symlinks=False)

    @slowly
    async def listxattr(self, inode: int, ctx: object) -> list[bytes]:
        return [os.fsencode(name) for name in os.listxattr(self._paths[inode], follow_symlinks=False)]

    async def forget(self, inode_list: object) -> None:
        pass


def main(source: str, mountpoint: str, seconds: str) -> None:
    """Mount and serve."""
    operations = SlowView(source, float(seconds))
    pyfuse3.init(
        operations, mountpoint, {"fsname=slow", "subtype=slow", "ro", "allow_other", "default_permissions", "dev"}
    )
    try:
        trio.run(functools.partial(pyfuse3.main, min_tasks=20, max_tasks=200))
    finally:
        pyfuse3.close(unmount=True)


@contextmanager
def slow_view(source: Path, mountpoint: Path, seconds: float) -> Iterator[int]:
    """Show `source` at `mountpoint` (made here), as slowly as said; the process id of who serves it."""
    mountpoint.mkdir(exist_ok=True)
    before = mountpoint.stat().st_dev
    command = [sys.executable, "-m", "tests.support.slowfs", str(source), str(mountpoint), str(seconds)]
    with subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL) as process:
        try:
            _wait_mounted(process, mountpoint, before)
            yield process.pid
        finally:
            with suppress(OSError):
                raw.umount2(mountpoint, raw.MNT_DETACH)
            if not wait_gone(process.pid, 10):
                process.kill()


def _wait_mounted(process: subprocess.Popen[bytes], mountpoint: Path, before: int) -> None:
    end = time.monotonic() + START_SECONDS
    while mountpoint.stat().st_dev == before:
        assert process.poll() is None, "the slow file system did not start"
        assert time.monotonic() < end, "the slow file system did not mount"
        time.sleep(0.02)


if __name__ == "__main__":
    main(*sys.argv[1:])
