"""Directories into an archive: the walk, and what is written of each thing that it meets.

Each object is opened once and everything is read through that descriptor, so a name that is swapped meanwhile can't
lead out. A volume in use may be archived: what vanishes before it is reached is left out, a file that shrinks is filled
up with zeros to the announced size, and one that changes is warned about. The archive is well-formed in any case.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from array import array
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import cache
from typing import Final

from unionfs.archives import attributes, tarformat
from unionfs.archives.dirstack import DirStack
from unionfs.archives.tarformat import Member, Progress, Root, Totals, Warn, Writable
from unionfs.core import sysio
from unionfs.errors import VolumeError, one_line

_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_ROOT: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_GONE: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE))
_KINDS: Final = {
    stat.S_IFREG: tarformat.REGULAR,
    stat.S_IFDIR: tarformat.DIRECTORY,
    stat.S_IFLNK: tarformat.SYMLINK,
    stat.S_IFCHR: tarformat.CHAR,
    stat.S_IFBLK: tarformat.BLOCK_DEVICE,
    stat.S_IFIFO: tarformat.FIFO,
}

Found = tuple[bytes, int, os.stat_result]
"""What the walk meets: its path in the archive, an ``O_PATH`` descriptor and its stat result."""


def content_bytes(roots: Sequence[Root]) -> int:
    """Return about how many content bytes an archive of these directories will have. Raises VolumeError."""
    total = 0
    links: set[tuple[int, int]] = set()
    for _, _, st in _walk(roots, lambda line: None):
        if stat.S_ISREG(st.st_mode):
            if st.st_nlink > 1:
                if (st.st_dev, st.st_ino) in links:
                    continue
                links.add((st.st_dev, st.st_ino))
            total += min(st.st_size, st.st_blocks * 512)
    return total


def write(
    roots: Sequence[Root], out: Writable, *, total: int = 0, progress: Progress | None = None, warn: Warn | None = None
) -> Totals:
    """Write an archive of these directories, its end mark included.

    *total* is what *progress* is told as the content bytes there are. Raises VolumeError: the archive can't be written,
    or what it names can't be read.
    """
    writer = _Writer(out, total, progress, warn)
    with closing(_walk(roots, writer.warn)) as found:
        for path, fd, st in found:
            writer.add(path, fd, st)
    writer.finish()
    return writer.totals


def _walk(roots: Sequence[Root], warn: Warn) -> Generator[Found, None, None]:
    """Go through the directories, parents first, names in order. A root in another's tree is no part of that one."""
    prefixes = {b"/".join(root.parts) for root in roots}
    for root in roots:
        prefix = b"/".join(root.parts) or b"."
        try:
            fd = os.dup(root.directory) if isinstance(root.directory, int) else os.open(root.directory, _ROOT)
        except OSError as exc:
            raise _unreadable(prefix, exc) from exc
        try:
            with closing(DirStack(fd)) as stack:
                yield prefix + b"/", stack.fd, os.fstat(stack.fd)
                yield from _below(stack, prefix + b"/", prefixes, warn)
        finally:
            os.close(fd)


def _below(stack: DirStack, prefix: bytes, prefixes: set[bytes], warn: Warn) -> Generator[Found, None, None]:
    todo = [_names(stack, prefix)]
    while todo:
        if not todo[-1]:
            todo.pop()
            if todo:
                stack.up()
            continue
        name = todo[-1].pop()
        path = prefix + stack.path(name)
        if path.removeprefix(b"./") in prefixes:
            continue
        try:
            fd = os.open(name, sysio.O_PATH_NOFOLLOW, dir_fd=stack.fd)
        except OSError as exc:
            _gone(path, exc, warn)
            continue
        try:
            st = os.fstat(fd)
            if not stat.S_ISDIR(st.st_mode):
                yield path, fd, st
                continue
            try:
                stack.down(name)
            except OSError as exc:
                _gone(path, exc, warn)
                continue
            yield path + b"/", stack.fd, os.fstat(stack.fd)
            todo.append(_names(stack, path))
        finally:
            os.close(fd)


def _names(stack: DirStack, path: bytes) -> list[bytes]:
    """Return the names in the directory, the first one last."""
    try:
        return sorted((name for name, _, _ in sysio.getdents(stack.fd)), reverse=True)
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _gone(path: bytes, exc: OSError, warn: Warn) -> None:
    """What is not there any more is left out; anything else ends the backup."""
    if exc.errno not in _GONE:
        raise _unreadable(path, exc) from exc
    warn(f"{_shown(path)}: removed before it was read")


def _shown(path: bytes) -> str:
    return one_line(path.decode(errors="backslashreplace"))


def _unreadable(path: bytes, exc: OSError) -> VolumeError:
    return VolumeError(f"{_shown(path)} can't be read: {exc.strerror}")


@cache
def _user(uid: int) -> bytes:
    try:
        return pwd.getpwuid(uid).pw_name.encode(errors="surrogateescape")
    except KeyError:
        return b""


@cache
def _group(gid: int) -> bytes:
    try:
        return grp.getgrgid(gid).gr_name.encode(errors="surrogateescape")
    except KeyError:
        return b""


class _Writer:
    """What one archive needs while it is written."""

    def __init__(self, out: Writable, total: int, progress: Progress | None, warn: Warn | None) -> None:
        self.totals = Totals()
        self._out = out
        self._total = total
        self._progress = progress
        self._warn = warn
        self._written = 0
        # Files with several names: the name they are in the archive by, and the names still to come.
        self._links: dict[tuple[int, int], tuple[bytes, int]] = {}

    def warn(self, line: str) -> None:
        self.totals.warnings += 1
        if self._warn is not None:
            self._warn(line)

    def add(self, path: bytes, fd: int, st: os.stat_result) -> None:
        """Write the entry of an object, and its content."""
        kind = _KINDS.get(stat.S_IFMT(st.st_mode))
        if kind is None:
            self.warn(f"{_shown(path)}: socket left out, archives hold none")
            return
        if kind != tarformat.DIRECTORY and st.st_nlink > 1 and self._link(path, st):
            return
        try:
            if kind == tarformat.REGULAR:
                self._regular(path, fd)
                return
            member = self._member(path, kind, fd, st)
            if kind == tarformat.SYMLINK:
                member.link = os.readlink(b"", dir_fd=fd)
            elif kind in (tarformat.CHAR, tarformat.BLOCK_DEVICE):
                member.major, member.minor = os.major(st.st_rdev), os.minor(st.st_rdev)
        except OSError as exc:
            raise _unreadable(path, exc) from exc
        self._header(member)

    def finish(self) -> None:
        self._put(tarformat.end_mark(self._written))
        self._tell()

    def _put(self, data: bytes) -> None:
        try:
            self._out.write(data)
        except OSError as exc:
            raise VolumeError(f"the archive can't be written: {exc.strerror or exc}") from exc
        self._written += len(data)

    def _header(self, member: Member) -> None:
        try:
            self._put(tarformat.encode(member))
        except ValueError as exc:
            raise VolumeError(f"{_shown(member.name)} can't be archived: {exc}") from exc
        self.totals.entries += 1

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.totals.content, max(self._total, self.totals.content))

    def _link(self, path: bytes, st: os.stat_result) -> bool:
        """Write another name of a file that is in the archive; False where this is its first one."""
        key = st.st_dev, st.st_ino
        if key not in self._links:
            self._links[key] = path, st.st_nlink - 1
            return False
        first, left = self._links[key]
        member = Member(path, tarformat.HARD_LINK, stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid)
        member.uname, member.gname = _user(st.st_uid), _group(st.st_gid)
        member.link, member.mtime_ns = first, st.st_mtime_ns
        self._header(member)
        if left > 1:
            self._links[key] = first, left - 1
        else:
            del self._links[key]
        return True

    def _member(self, path: bytes, kind: bytes, fd: int, st: os.stat_result) -> Member:
        has = attributes.read(fd, st)
        return Member(
            path,
            kind,
            has.mode,
            has.uid,
            has.gid,
            _user(has.uid),
            _group(has.gid),
            mtime_ns=has.mtime_ns,
            atime_ns=has.atime_ns,
            xattrs=dict(has.xattrs),
        )

    def _regular(self, path: bytes, fd: int) -> None:
        source = os.open(sysio.fd_path(fd), _READ)
        try:
            st = os.fstat(source)
            member = self._member(path, tarformat.REGULAR, source, st)
            extents = find_extents(source, st.st_size)
            if extents is None:
                member.size = st.st_size
                extents = array("q", (0, st.st_size))
            else:
                member.extents, member.real_size = extents, st.st_size
                member.size = sum(extents[1::2])
            self._header(member)
            lost = self._content(source, extents)
            self._put(bytes(tarformat.padding(member.size)))
            after = os.fstat(source)
        finally:
            os.close(source)
        if lost:
            self.warn(f"{_shown(path)}: file shrank by {lost} bytes; filled up with zeros")
        elif (after.st_size, after.st_mtime_ns) != (st.st_size, st.st_mtime_ns):
            self.warn(f"{_shown(path)}: file changed as it was read")

    def _content(self, source: int, extents: array[int]) -> int:
        """Write what lies in the extents; returns how much of it was not there any more."""
        lost = 0
        for index in range(0, len(extents), 2):
            at, end = extents[index], extents[index] + extents[index + 1]
            while at < end:
                want = min(end - at, tarformat.CHUNK)
                data = b"" if lost else os.pread(source, want, at)
                if not data:
                    data = bytes(want)
                    lost += want
                self._put(data)
                at += len(data)
                self.totals.content += len(data)
                self._tell()
        return lost


def find_extents(fd: int, size: int) -> array[int] | None:
    """Return where a file has data: offset, length, offset, length, ...; None where it has no holes worth keeping.

    A file in more pieces than an archive's map may have counts as one without holes.
    """
    extents = array("q")
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                break
            if exc.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return None
            raise
        if start < size:
            extents.extend((start, at - start))
        if len(extents) > 2 * tarformat.MAX_EXTENTS - 2:
            return None
    if sum(extents[1::2]) == size:
        return None
    return extents
