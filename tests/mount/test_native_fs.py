"""The native layer under a bare passthrough file system: what it serves, and what still reaches Python.

The file system runs in a process of its own (`python -m tests.mount.test_native_fs SOURCE MOUNTPOINT [word...]`), does
nothing but forward, and reports which handlers ran. Words: `plain` (no native layer), `dispatch`, `passthrough`,
`own` (attributes of open files are served natively), `listings` (the kernel keeps them), `ioctl` (with a handler for
them), `ticks` (a task counts its turns).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw
from tests.support.people import ALICE, REPOSITORY, as_user

FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IOC_FSGETXATTR = 0x801C581F
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16
MIB = 1 << 20


# --- the file system, in its own process ------------------------------------------------------------


def serve(source: str, mountpoint: str, words: set[str]) -> None:
    """Mount `source` on `mountpoint` and serve it until it is unmounted, or until SIGTERM."""
    from unionfs.fuse import native

    loaded = "plain" not in words and native.load(passthrough="passthrough" in words)
    import pyfuse3
    import trio

    calls: Counter[str] = Counter()
    ticks = 0

    def fail(error: OSError) -> pyfuse3.FUSEError:
        return pyfuse3.FUSEError(error.errno)

    class Passthrough(pyfuse3.Operations):
        enable_acl = True

        def __init__(self) -> None:
            super().__init__()
            self.paths = {pyfuse3.ROOT_INODE: os.fsencode(source)}
            self.nodes: dict[bytes, int] = {}
            self.modes = native.IoModes()
            self.node_of: dict[int, int] = {}

        def _entry(self, path: bytes) -> pyfuse3.EntryAttributes:
            try:
                st = os.lstat(path)
            except OSError as error:
                raise fail(error) from None
            node = self.nodes.setdefault(path, len(self.nodes) + 2)
            self.paths[node] = path
            entry = self._attributes(st, node)
            entry.st_ino = node
            entry.generation = st.st_ino
            return entry

        def _attributes(self, st: os.stat_result, node: int) -> pyfuse3.EntryAttributes:
            entry = pyfuse3.EntryAttributes()
            for name in ("mode", "nlink", "uid", "gid", "rdev", "size", "blksize", "blocks", "ino"):
                setattr(entry, f"st_{name}", getattr(st, f"st_{name}"))
            for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
                setattr(entry, name, getattr(st, name))
            entry.entry_timeout = entry.attr_timeout = 1e6
            if self.modes.passed(node) and st.st_mode & (stat.S_ISUID | stat.S_ISGID):
                entry.attr_timeout = 0
            return entry

        async def lookup(self, parent: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
            calls["lookup"] += 1
            if name.startswith(b"slow"):
                await trio.to_thread.run_sync(time.sleep, 0.5)
            return self._entry(self.paths[parent] + b"/" + name)

        async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
            calls["getattr"] += 1
            return self._attributes(os.lstat(self.paths[inode]), inode)

        async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
            calls["setattr"] += 1
            path = self.paths[inode]
            kill = native.kill_suidgid(ctx.uid)
            if fields.update_mode:
                os.chmod(path, stat.S_IMODE(attr.st_mode))
            if fields.update_uid or fields.update_gid:
                owner = attr.st_uid if fields.update_uid else -1
                os.chown(path, owner, attr.st_gid if fields.update_gid else -1)
            if fields.update_size:
                os.truncate(path, attr.st_size)
                st = os.stat(path)
                groups = pyfuse3.get_sup_groups(ctx.pid) | {ctx.gid}
                keeps_sgid = not st.st_mode & stat.S_IXGRP and st.st_gid in groups
                lost = (stat.S_ISUID if keeps_sgid else stat.S_ISUID | stat.S_ISGID) if kill else 0
                os.chmod(path, stat.S_IMODE(st.st_mode & ~lost))
            return await self.getattr(inode)

        def _open(self, path: bytes, flags: int, mode: int = 0) -> pyfuse3.FileInfo:
            flags &= ~(os.O_APPEND | os.O_DIRECT)
            if flags & os.O_ACCMODE == os.O_WRONLY:
                flags += os.O_RDWR - os.O_WRONLY
            try:
                return pyfuse3.FileInfo(fh=os.open(path, flags, mode), keep_cache=True)
            except OSError as error:
                raise fail(error) from None

        async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
            calls["open"] += 1
            return self._opened(inode, self._open(self.paths[inode], flags))

        def _opened(self, node: int, info: pyfuse3.FileInfo) -> pyfuse3.FileInfo:
            self.node_of[info.fh] = node
            allowed = not os.fstat(info.fh).st_mode & (stat.S_ISUID | stat.S_ISGID)
            self.modes.opened(node, info.fh, allowed=allowed)
            if "own" in words:
                native.own_attributes(node, info.fh, os.fstat(info.fh).st_ino, 1e6)
            return info

        async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
            calls["create"] += 1
            path = self.paths[parent] + b"/" + name
            info = self._open(path, flags | os.O_CREAT, mode & ~(ctx.umask if native.active() else 0))
            os.chown(info.fh, ctx.uid, ctx.gid)
            os.chmod(info.fh, stat.S_IMODE(mode) & ~(ctx.umask if native.active() else 0))  # chown clears suid
            entry = self._entry(path)
            return self._opened(entry.st_ino, info), entry

        async def read(self, fh: int, offset: int, size: int) -> bytes:
            calls["read"] += 1
            if b"/lazy" in self.paths[self.node_of[fh]]:
                await trio.sleep(0.5)
            return os.pread(fh, size, offset)

        async def write(self, fh: int, offset: int, data: bytes) -> int:
            calls["write"] += 1
            return os.pwrite(fh, data, offset)

        async def flush(self, fh: int) -> None:
            calls["flush"] += 1

        async def fsync(self, fh: int, datasync: bool) -> None:
            calls["fsync"] += 1

        async def release(self, fh: int) -> None:
            calls["release"] += 1
            self.modes.released(self.node_of[fh])
            os.close(fh)

        async def opendir(self, inode: int, ctx: Any) -> int:
            return inode

        async def releasedir(self, fh: int) -> None:
            pass

        async def readdir(self, fh: int, start: int, token: Any) -> None:
            calls["readdir"] += 1
            names = sorted(os.listdir(self.paths[fh]))
            for number, name in enumerate(names[start:], start + 1):
                if not pyfuse3.readdir_reply(token, name, self._entry(self.paths[fh] + b"/" + name), number):
                    break

        async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
            calls[f"getxattr {name.decode()}"] += 1
            try:
                return os.getxattr(self.paths[inode], name, follow_symlinks=False)
            except OSError as error:
                raise fail(error) from None

        async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
            return pyfuse3.StatvfsData()

        async def forget(self, inodes: Any) -> None:
            calls["forget"] += len(inodes)

    def report() -> None:
        told = {"loaded": loaded, "active": native.active(), "python": calls, "native": native.counters()}
        print(json.dumps({**told, "ticks": ticks}), flush=True)

    async def tick() -> None:
        nonlocal ticks
        while True:
            await trio.sleep(0.001)
            ticks += 1

    async def obey_signals(*, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGUSR1:
                    report()
                elif number == signal.SIGUSR2:
                    session_scope.cancel()
                else:
                    pyfuse3.terminate()

    session_scope = trio.CancelScope()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(obey_signals)
            if "ticks" in words:
                nursery.start_soon(tick)
            report()
            with session_scope:
                await pyfuse3.main()
            nursery.cancel_scope.cancel()

    def ioctl_handler(request: object, node: int, fh: int, cmd: int, data: bytes) -> None:
        calls[f"ioctl {cmd:#x} {data.hex()}"] += 1
        if cmd == FS_IOC_GETFLAGS:
            native.answer_ioctl(request, 0, struct.pack("i", 0x80))
        elif cmd == FS_IOC_FSGETXATTR:  # the kernel asks for it before it sets anything
            native.answer_ioctl(request, 0, bytes(28))
        elif data != bytes(4):
            native.answer_ioctl(request, errno.EPERM)  # and a request for no flags is dropped

    if "ioctl" in words:
        native.set_ioctl_handler(ioctl_handler)
    os.umask(0)
    native.cache_directories("listings" in words)
    if "dispatch" in words:
        from unionfs.fuse import dispatch

        dispatch.install()
    options = {*pyfuse3.default_options, "allow_other", "suid", "fsname=native-test"}
    pyfuse3.init(Passthrough(), mountpoint, options)
    try:
        trio.run(main)
    finally:
        pyfuse3.close()
    report()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], set(sys.argv[3:]))


# --- the tests' side ---------------------------------------------------------------------------------


class Served:
    """A running passthrough file system: what is at `mnt` comes from `source`."""

    def __init__(self, ground: Path, words: tuple[str, ...]) -> None:
        self.source = ground / "source"
        self.mnt = ground / "mnt"
        for directory in (self.source, self.mnt):
            directory.mkdir(exist_ok=True)
        self.source.chmod(0o777)
        command = [
            sys.executable,
            "-m",
            "tests.mount.test_native_fs",
            str(self.source.resolve()),
            str(self.mnt),
            *words,
        ]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        self.first = self._line()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the file system ended with status {self.process.wait(10)}"
        return json.loads(line)  # type: ignore[no-any-return]

    def report(self) -> dict[str, Any]:
        """What has been called so far: `python` and `native` map operations to numbers."""
        self.process.send_signal(signal.SIGUSR1)
        return self._line()

    def end(self) -> dict[str, Any]:
        """Unmount and wait for the process; its last report."""
        if os.path.ismount(self.mnt):
            raw.umount2(self.mnt, 0)
        return self.ended()

    def ended(self) -> dict[str, Any]:
        """Wait for the process, which must end well; its last report."""
        last = self._line()
        assert self.process.wait(20) == 0
        return last


@contextmanager
def served(ground: Path, *words: str) -> Iterator[Served]:
    """Serve `ground`/source on `ground`/mnt while the context lasts."""
    fs = Served(ground, words)
    try:
        yield fs
    finally:
        if os.path.ismount(fs.mnt):
            raw.umount2(fs.mnt, raw.MNT_DETACH)
        with suppress(subprocess.TimeoutExpired):
            fs.process.wait(20)
        fs.process.kill()
        fs.process.wait()
        assert fs.process.stdout is not None
        fs.process.stdout.close()


@contextmanager
def fails(*errnos: int) -> Iterator[None]:
    """Expect an OSError with one of `errnos`."""
    with pytest.raises(OSError, match="Errno") as caught:
        yield
    assert caught.value.errno in errnos


@pytest.fixture(params=["native", "native dispatch", "native dispatch own"])
def fs(ground: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    """The file system with the native layer: under pyfuse3's own dispatch, under ours, and with attributes owned."""
    with served(ground, *request.param.split()) as running:
        assert running.first["active"]
        yield running


def test_plain_mode_works_without_the_layer(ground: Path) -> None:
    with served(ground, "plain", "dispatch") as plain:
        (plain.mnt / "f").write_bytes(b"data")
        assert (plain.mnt / "f").read_bytes() == b"data"
        last = plain.end()
    assert not last["active"]
    assert last["python"]["write"] == 1
    assert last["native"] == {}


def test_data_never_reaches_python(fs: Served) -> None:
    data = os.urandom(5 * MIB + 17)
    (fs.mnt / "f").write_bytes(data)
    with open(fs.mnt / "f", "r+b", buffering=0) as file:
        file.seek(MIB + 3)
        file.write(b"middle")
        os.pwrite(file.fileno(), b"beyond", 7 * MIB)
    with open(fs.mnt / "f", "ab", buffering=0) as file:
        file.write(b"end")
    expected = bytearray(data)
    expected[MIB + 3 : MIB + 9] = b"middle"
    expected += bytes(7 * MIB - len(expected)) + b"beyondend"
    assert (fs.source / "f").read_bytes() == expected
    assert (fs.mnt / "f").read_bytes() == expected
    raw_drop_caches()
    assert (fs.mnt / "f").read_bytes() == expected
    last = fs.end()
    assert not {"read", "write", "flush"} & set(last["python"])
    assert last["native"]["write"] >= 6
    assert last["native"]["read"] >= 5


def raw_drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("1")


def test_full_file_system_gives_what_fits_and_then_its_error(ground: Path) -> None:
    (ground / "source").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", ground / "source"], check=True)
    try:
        with served(ground, "dispatch") as small:
            with open(small.mnt / "f", "wb", buffering=0) as file:
                assert file.write(bytes(3 * MIB)) == MIB
                with fails(errno.ENOSPC):
                    file.write(b"more")
            small.end()
    finally:
        raw.umount2(ground / "source", 0)


def test_one_flush_and_close_succeeds(fs: Served) -> None:
    for number in range(5):
        (fs.mnt / f"f{number}").write_bytes(b"x")
    assert fs.end()["native"]["flush"] == 1


def test_holes(fs: Served) -> None:
    with open(fs.mnt / "f", "w+b", buffering=0) as file:
        fd = file.fileno()
        os.pwrite(fd, b"a" * MIB, 0)
        os.pwrite(fd, b"b" * MIB, 4 * MIB)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == MIB
        assert os.lseek(fd, MIB, os.SEEK_DATA) == 4 * MIB
        with fails(errno.ENXIO):
            os.lseek(fd, 5 * MIB, os.SEEK_DATA)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def test_fallocate(fs: Served) -> None:
    with open(fs.mnt / "f", "w+b", buffering=0) as file:
        fd = file.fileno()
        os.pwrite(fd, b"a" * 65536, 0)
        fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 4096, 8192)
        assert os.pread(fd, 3 * 4096, 0) == b"a" * 4096 + bytes(8192)
        fallocate(fd, FALLOC_ZERO_RANGE, 16384, 4096)
        assert os.pread(fd, 4097, 16384) == bytes(4096) + b"a"
        fallocate(fd, FALLOC_KEEP_SIZE, 0, MIB)
        assert os.fstat(fd).st_size == 65536
        fallocate(fd, 0, 0, 2 * MIB)
        assert os.fstat(fd).st_size == 2 * MIB
        with fails(errno.EOPNOTSUPP):
            fallocate(fd, 0x80, 0, 4096)
    assert (fs.source / "f").stat().st_blocks * 512 >= 2 * MIB - 12288


def test_copy_file_range(fs: Served) -> None:
    (fs.mnt / "from").write_bytes(bytes(range(256)) * 40)
    with open(fs.mnt / "from", "rb") as source, open(fs.mnt / "to", "w+b", buffering=0) as target:
        os.pwrite(target.fileno(), b"old" * 100, 0)
        assert os.read(target.fileno(), 3) == b"old"
        assert os.copy_file_range(source.fileno(), target.fileno(), 1000, 5, 10) == 1000
        assert os.pread(target.fileno(), 300, 0) == (b"old" * 4)[:10] + (bytes(range(256)) * 2)[5:295]
    assert fs.report()["native"]["copy_file_range"] == 1


def get_flags(path: Path) -> int:
    with open(path, "rb") as file:
        flags: int = struct.unpack("i", fcntl.ioctl(file, FS_IOC_GETFLAGS, bytes(8))[:4])[0]
        return flags


def test_inode_flags_are_read_and_never_set_below(fs: Served) -> None:
    (fs.source / "f").write_bytes(b"x")
    before = get_flags(fs.source / "f")
    assert get_flags(fs.mnt / "f") == before
    with open(fs.mnt / "f", "rb") as file:
        with fails(errno.ENOTTY, errno.EOPNOTSUPP):
            fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("l", before | 0x40))
        with fails(errno.ENOTTY):
            fcntl.ioctl(file, 0x5401, bytes(64))
    assert get_flags(fs.source / "f") == before


def test_inode_flags_are_asked_of_a_handler(ground: Path) -> None:
    with served(ground, "dispatch", "ioctl") as fs:
        (fs.source / "f").write_bytes(b"x")
        with open(fs.mnt / "f", "rb") as file:
            with fails(errno.EPERM):
                fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("l", 0x40))
            with fails(errno.EIO):
                fcntl.ioctl(file, FS_IOC_SETFLAGS, bytes(8))
        assert get_flags(fs.mnt / "f") == 0x80
        fd = os.open(fs.mnt, os.O_RDONLY)
        assert struct.unpack("i", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4]) == (0x80,)
        os.close(fd)
        assert fs.end()["python"][f"ioctl {FS_IOC_SETFLAGS:#x} 40000000"] == 1


def test_shown_inode_number_is_apart_from_the_node(fs: Served) -> None:
    (fs.mnt / "f").write_bytes(b"x")
    (fs.source / "g").write_bytes(b"x")
    for name in ("f", "g"):
        assert (fs.mnt / name).stat().st_ino == (fs.source / name).stat().st_ino
    shown = {entry.name: entry.inode() for entry in os.scandir(fs.mnt)}
    assert shown == {entry.name: entry.inode() for entry in os.scandir(fs.source)}


def test_umask_is_left_to_the_file_system(fs: Served) -> None:
    old = os.umask(0o027)
    try:
        os.close(os.open(fs.mnt / "f", os.O_CREAT | os.O_WRONLY, 0o666))
    finally:
        os.umask(old)
    assert stat.S_IMODE((fs.mnt / "f").stat().st_mode) == 0o640


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def overwrite(path: Path) -> None:
    with open(path, "wb"):
        pass


def allocate(path: Path) -> None:
    with open(path, "r+b") as file:
        fallocate(file.fileno(), 0, 0, 8192)


def clone(path: Path) -> None:
    with open(path, "r+b") as file:
        os.copy_file_range(file.fileno(), file.fileno(), 10, 0, 500)


def cut(path: Path) -> None:
    os.truncate(path, 3)


@pytest.mark.parametrize("change", [append, overwrite, allocate, clone, cut])
@pytest.mark.parametrize("groups", [(), (0,)])
@pytest.mark.parametrize("mode", [0o6777, 0o2767, 0o4666, 0o777])
def test_suid_and_sgid_end_as_on_the_host(
    fs: Served, change: Callable[[Path], None], mode: int, groups: tuple[int, ...]
) -> None:
    """A change by another user clears the bits at once, in the kernel's copy of the mode as well, which exec trusts."""
    for directory in (fs.source, fs.mnt):
        for user in (0, ALICE):
            path = directory / f"{directory.name}-{user}"
            path.write_bytes(b"0123456789" * 100)
            path.chmod(mode)
            assert stat.S_IMODE(path.stat().st_mode) == mode
            as_user(user, lambda path=path: change(path)) if user else change(path)  # type: ignore[misc]
    for user in (0, ALICE):
        below = stat.S_IMODE((fs.source / f"source-{user}").stat().st_mode)
        assert stat.S_IMODE((fs.mnt / f"mnt-{user}").stat().st_mode) == below
        assert stat.S_IMODE((fs.source / f"mnt-{user}").stat().st_mode) == below


def test_a_new_file_keeps_the_suid_it_is_made_with(fs: Served) -> None:
    fs.mnt.chmod(0o777)

    def create(directory: Path) -> int:
        os.close(os.open(directory / "f", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o4755))
        return stat.S_IMODE((directory / "f").stat().st_mode)

    assert as_user(ALICE, lambda: create(fs.mnt)) == 0o4755
    (fs.source / "f").unlink()
    assert as_user(ALICE, lambda: create(fs.source)) == 0o4755


def test_capability_is_asked_for_once_and_removed(fs: Served) -> None:
    capability = struct.pack("<IIIII", 0x02000000, 1 << 13, 0, 0, 0)
    (fs.mnt / "f").write_bytes(b"x")
    os.setxattr(fs.source / "f", "security.capability", capability)
    before = fs.report()["python"].get("getxattr security.capability", 0)
    with open(fs.mnt / "f", "ab", buffering=0) as file:
        file.writelines([b"some bytes"] * 1000)
    assert fs.report()["python"].get("getxattr security.capability", 0) - before <= 2
    with fails(errno.ENODATA):
        os.getxattr(fs.source / "f", "security.capability")


def test_attributes_of_open_files_are_served_natively(ground: Path) -> None:
    with served(ground, "dispatch", "own") as owning:
        path, below = owning.mnt / "f", owning.source / "f"
        with open(path, "wb") as file, open(path, "r+b") as other:
            fd = file.fileno()
            asked = owning.report()["python"]
            os.write(fd, b"some data")
            os.fchmod(fd, 0o640)
            os.fchown(fd, 7, 8)
            assert os.fstat(fd).st_size == 9
            os.ftruncate(fd, 5)
            os.utime(fd, ns=(1_000_000_001, 2_000_000_002))
            st = os.fstat(fd)
            assert (st.st_mode, st.st_uid, st.st_gid, st.st_size) == (stat.S_IFREG | 0o640, 7, 8, 5)
            assert (st.st_atime_ns, st.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
            file.close()
            os.utime(path, (5, 6))
            assert other.read() == b"some "
            assert below.stat().st_mtime == path.stat().st_mtime == 6
            os.utime(path)
            assert below.stat().st_mtime_ns == path.stat().st_mtime_ns > 6_000_000_000
            assert below.stat()[:2] == path.stat()[:2]
            now = owning.report()
        assert now["python"].get("setattr") == asked.get("setattr")
        assert now["python"].get("getattr") == asked.get("getattr")
        assert now["native"]["setattr"] == 6
        path.chmod(0o600)  # no handle is open any more
        assert owning.end()["python"]["setattr"] == 1


def test_a_node_is_not_owned_beyond_its_handles(ground: Path) -> None:
    """A descriptor number that was closed and used again must not lend its attributes to the old node."""
    with served(ground, "dispatch", "own") as owning:
        for number in range(20):
            (owning.mnt / f"f{number}").write_bytes(b"x" * number)
        for number in range(20):
            (owning.mnt / f"f{number}").chmod(0o600 + number % 8)
            assert (owning.mnt / f"f{number}").stat().st_size == number
            assert stat.S_IMODE((owning.source / f"f{number}").stat().st_mode) == 0o600 + number % 8
        owning.end()


def test_kept_listings_follow_changes(ground: Path) -> None:
    """The second listing costs no request, and one after a change through the mount is right."""
    with served(ground, "dispatch", "listings") as fs:
        names = {f"f{number}" for number in range(500)}
        for name in names:
            (fs.mnt / name).touch()
        assert set(os.listdir(fs.mnt)) == names
        assert set(os.listdir(fs.mnt)) == names
        before = fs.report()["python"]["readdir"]
        for _ in range(5):
            assert set(os.listdir(fs.mnt)) == names
        assert fs.report()["python"]["readdir"] == before
        (fs.mnt / "new").touch()
        assert set(os.listdir(fs.mnt)) == {*names, "new"}
        os.listdir(fs.mnt)
        fs.end()
