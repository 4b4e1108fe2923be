"""Copying a tree exactly: what fills an empty volume, and clones one.

Content, owners, modes, times in nanoseconds, extended attributes and ACLs, hard links among themselves, holes, special
files; data is reflinked where the file system can. As ``cp -a``, but made for a source that others change meanwhile and
that may be a FUSE mount: each object is opened once and everything is read through that descriptor, so what is swapped
for a symbolic link can't lead out of the source. What vanishes before it is reached counts as not there.

A directory's own attributes are set when all in it is done: a read-only directory is no obstacle, and its times stay.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from unionfs.archives import attributes
from unionfs.archives.dirstack import DirStack
from unionfs.core import sysio

ByteCount = Callable[[int], None]

_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_tree(
    source: str | bytes | os.PathLike[str] | int,
    target: str | bytes | os.PathLike[str] | int,
    *,
    progress: ByteCount | None = None,
    one_file_system: bool = True,
) -> None:
    """Copy what is in the directory *source*, and its own attributes, into the empty directory *target*.

    Both are paths or descriptors of directories (``O_PATH`` too). *progress* is called with the number of content
    bytes since the last call. With *one_file_system*, of a directory that something is mounted on only the empty
    directory is made, and a file that is a mount point is left out. All is on disk at the return.

    Raises OSError whose filename is a str, the path from *source*; then *target* holds a part, the caller's to
    remove, as after a KeyboardInterrupt.
    """
    with ExitStack() as stack:
        source_fd, target_fd = (_open_directory(stack, place) for place in (source, target))
        copy = _Copy(source_fd, target_fd, progress, one_file_system)
        stack.callback(copy.close)
        copy.run()
        sysio.sync_file_system(copy.target.root_fd)


def _open_directory(stack: ExitStack, place: str | bytes | os.PathLike[str] | int) -> int:
    if isinstance(place, int):
        return place
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


@dataclass(slots=True)
class _Level:
    """A directory that is being copied: what is still to do in it, and what it will get at the end."""

    names: Iterator[tuple[bytes, int, int]]
    attributes: attributes.Attributes
    device: int


class _Copy:
    def __init__(self, source_fd: int, target_fd: int, progress: ByteCount | None, one_file_system: bool) -> None:
        self.source = DirStack(source_fd)
        self.target = DirStack(target_fd)
        self._progress = progress
        self._mount = _mount_id(self.source.fd) if one_file_system else None
        self._root = attributes.privileged()
        self._levels: list[_Level] = []
        # The first copy of a file with several names, by the source's identity: its place, and the names still to come.
        self._links: dict[tuple[int, int], tuple[list[bytes], bytes, int]] = {}

    def close(self) -> None:
        self.source.close()
        self.target.close()

    def run(self) -> None:
        name = b""
        try:
            attributes.clear_inherited(self.target.fd)
            self._levels.append(self._level())
            while self._levels:
                level = self._levels[-1]
                name = next(level.names, (b"", 0, 0))[0]
                if name:
                    self._entry(name, level)
                else:
                    self._leave(level)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, os.fsdecode(self.source.path(name) or b".")) from exc

    def _level(self, *, skip: bool = False) -> _Level:
        fd = self.source.fd
        st = os.fstat(fd)
        names = [] if skip else sysio.getdents(fd)
        return _Level(iter(names), attributes.read(fd, st), st.st_dev)

    def _leave(self, level: _Level) -> None:
        attributes.apply(self.target.fd, level.attributes, root=self._root)
        self._levels.pop()
        if self._levels:
            self.source.up()
            self.target.up()

    def _entry(self, name: bytes, level: _Level) -> None:
        try:
            fd = os.open(name, sysio.O_PATH_NOFOLLOW, dir_fd=self.source.fd)
        except FileNotFoundError:
            return
        try:
            st = os.fstat(fd)
            is_dir = stat.S_ISDIR(st.st_mode)
            # A file that is mounted from the same device holds nothing that isn't on it.
            look = self._mount is not None and (is_dir or st.st_dev != level.device)
            crosses = look and _mount_id(fd) != self._mount
            if is_dir:
                self._enter(name, skip=crosses)
            elif not crosses:
                self._file(fd, st, name)
        finally:
            os.close(fd)

    def _enter(self, name: bytes, *, skip: bool) -> None:
        try:
            self.source.down(name)
        except FileNotFoundError:
            return
        if not skip and self._mount is not None and _mount_id(self.source.fd) != self._mount:
            skip = True  # mounted between the two looks
        os.mkdir(name, 0o700, dir_fd=self.target.fd)
        self.target.down(name)
        self._levels.append(self._level(skip=skip))

    def _file(self, fd: int, st: os.stat_result, name: bytes) -> None:
        if st.st_nlink > 1 and self._linked(st, name):
            return
        wanted = attributes.read(fd, st)
        if stat.S_ISREG(st.st_mode):
            self._regular(fd, st, name, wanted)
            return
        link = os.readlink(b"", dir_fd=fd) if stat.S_ISLNK(st.st_mode) else b""
        make_special(self.target.fd, name, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, link)
        made = os.open(name, sysio.O_PATH_NOFOLLOW, dir_fd=self.target.fd)
        try:
            attributes.apply(made, wanted, root=self._root)
        finally:
            os.close(made)

    def _linked(self, st: os.stat_result, name: bytes) -> bool:
        """Link to the copy that was made under another name; False where this is the first."""
        key = st.st_dev, st.st_ino
        first = self._links.get(key)
        if first is None:
            self._links[key] = self.target.parts(), name, st.st_nlink - 1
            return False
        parts, first_name, left = first
        if parts:
            parent = sysio.open_beneath(self.target.root_fd, b"/".join(parts), sysio.O_PATH_DIR)
        else:
            parent = os.dup(self.target.root_fd)
        try:
            os.link(first_name, name, src_dir_fd=parent, dst_dir_fd=self.target.fd, follow_symlinks=False)
        finally:
            os.close(parent)
        if left > 1:
            self._links[key] = parts, first_name, left - 1
        else:
            del self._links[key]
        return True

    def _regular(self, fd: int, st: os.stat_result, name: bytes, wanted: attributes.Attributes) -> None:
        source = os.open(sysio.fd_path(fd), _READ)
        try:
            target = os.open(name, _CREATE, 0o600, dir_fd=self.target.fd)
            try:
                sysio.copy_data(source, target, st.st_size, self._counter())
                attributes.apply(target, wanted, root=self._root)
            finally:
                os.close(target)
        finally:
            os.close(source)
        if self._progress is not None:
            self._progress(st.st_size - self._reached)

    _reached = 0

    def _counter(self) -> Callable[[int], bool]:
        self._reached = 0

        def count(offset: int) -> bool:
            if self._progress is not None:
                self._progress(offset - self._reached)
            self._reached = offset
            return True

        return count


def make_special(dirfd: int, name: bytes, mode: int, device: int, link: bytes) -> None:
    """Make a symbolic link to *link*, a fifo, a socket or a device, as the format in *mode* says.

    Raises OSError; for a device without privilege its text says what is missing.
    """
    if stat.S_ISLNK(mode):
        os.symlink(link, name, dir_fd=dirfd)
        return
    try:
        os.mknod(name, mode, device, dir_fd=dirfd)
    except PermissionError as exc:
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise OSError(errno.EPERM, "a device node can be made by root only") from exc
        raise


def _mount_id(fd: int) -> bytes:
    """Return what tells the mount of *fd* from others."""
    with open(b"/proc/self/fdinfo/%d" % fd, "rb", buffering=0) as lines:
        return lines.read(4096).partition(b"mnt_id:")[2].split(maxsplit=1)[0]
