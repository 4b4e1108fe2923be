"""An archive into directories, trusting nothing in it.

Everything is made with a descriptor of a directory and one name; no symbolic link is ever followed, whoever made it,
and no name has a ``..``. So a symbolic link that leads out is content like any other, and what would be written through
it is refused, as is whatever is not to be believed: the archive is refused whole, and since it is unpacked into
directories that nobody sees yet, nothing of it stays.

Owners are set by their numbers, not by their names: a volume's files belong to numbers, whatever they are called here.
Suid bits and capabilities come after the content. Directories get their mode and times at the very end.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Final, NoReturn

from unionfs.archives import attributes, tarformat
from unionfs.archives.attributes import Attributes
from unionfs.archives.copytree import make_special
from unionfs.archives.dirstack import DirStack
from unionfs.archives.tarformat import Member, Reader, Root, Totals, Warn
from unionfs.core import sysio
from unionfs.errors import VolumeError, one_line

_ROOT: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NAMESPACES: Final = ("user.", "trusted.", "security.", "system.")
_NAME_MAX: Final = 255
_FORMATS: Final = {
    tarformat.SYMLINK: stat.S_IFLNK,
    tarformat.CHAR: stat.S_IFCHR,
    tarformat.BLOCK_DEVICE: stat.S_IFBLK,
    tarformat.FIFO: stat.S_IFIFO,
}

Parts = list[bytes]


def unpack(stream: tarformat.Readable, roots: Sequence[Root], *, warn: Warn | None = None) -> Totals:
    """Unpack all of an archive into these empty directories, and write it to disk.

    An entry goes to the root with the longest prefix that its name starts with. Raises VolumeError, which names the
    entry, and OSError for the directories themselves.
    """
    with ExitStack() as stack:
        targets = [_Target(root, stack) for root in roots]
        reader = Reader(stream)
        totals = Totals()
        for member in reader:
            for line in _leave_out_foreign(member):
                totals.warnings += 1
                if warn is not None:
                    warn(line)
            with _named(member):
                _one(member, targets, reader, totals)
        for target in targets:
            target.finish()
    return totals


@contextmanager
def _named(member: Member) -> Iterator[None]:
    """Let what goes wrong name the entry."""
    try:
        yield
    except OSError as exc:
        _refuse(member.name, exc.strerror or str(exc))


def _leave_out_foreign(member: Member) -> list[str]:
    """Take away attributes of other systems, which Linux has no place for; one line for each."""
    foreign = [name for name in member.xattrs if not name.startswith(_NAMESPACES)]
    for name in foreign:
        del member.xattrs[name]
    return [f"archive entry {_shown(member.name)}: extended attribute {one_line(name)} left out" for name in foreign]


def _refuse(name: bytes, reason: str) -> NoReturn:
    raise VolumeError(f"archive entry {_shown(name)}: {reason}")


def _shown(name: bytes) -> str:
    return one_line(name.decode(errors="backslashreplace"))[:1000]


def _one(member: Member, targets: list[_Target], reader: Reader, totals: Totals) -> None:
    parts = _parts(member.name, member.name)
    found = _target_of(parts, targets)
    if found is None:
        if member.kind == tarformat.DIRECTORY and any(target.prefix[: len(parts)] == parts for target in targets):
            return  # a directory above a volume
        _refuse(member.name, "it belongs to none of the volumes that are restored")
    below = parts[len(found.prefix) :]
    link = None
    if member.kind == tarformat.HARD_LINK:
        link = _parts(member.link, member.name)
        if _target_of(link, targets) is not found:
            _refuse(member.name, f"a hard link to {_shown(member.link)}, which is not in the same volume")
        link = link[len(found.prefix) :]
    totals.content += found.make(member, below, link, reader)
    totals.entries += 1


def _parts(path: bytes, name: bytes) -> Parts:
    """Split a path of an archive; refuses what leads out, or what no file system takes."""
    if path.startswith(b"/"):
        _refuse(name, f"{_what(path, name)} is absolute")
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        _refuse(name, f"{_what(path, name)} has a '..'")
    if b"\0" in path:
        _refuse(name, f"{_what(path, name)} has a null byte")
    if any(len(part) > _NAME_MAX for part in parts):
        _refuse(name, f"{_what(path, name)} has a part of more than {_NAME_MAX} bytes")
    return parts


def _what(path: bytes, name: bytes) -> str:
    return "its name" if path == name else f"the name it links to, {_shown(path)},"


def _target_of(parts: Parts, targets: list[_Target]) -> _Target | None:
    fitting = [target for target in targets if parts[: len(target.prefix)] == target.prefix]
    return max(fitting, key=lambda target: len(target.prefix), default=None)


class _Target:
    """One directory that is filled."""

    def __init__(self, root: Root, stack: ExitStack) -> None:
        self.prefix: Parts = root.parts
        self._shown = root.prefix or "the archive"
        if isinstance(root.directory, int):
            self._fd = os.open(b".", _ROOT, dir_fd=root.directory)
        else:
            self._fd = os.open(root.directory, _ROOT)
        stack.callback(os.close, self._fd)
        if os.listdir(self._fd):
            raise VolumeError(f"{self._shown}: the directory to restore into is not empty")
        self._stack = DirStack(self._fd, readable=False)
        stack.callback(self._stack.close)
        attributes.clear_inherited(self._fd)
        self._root = attributes.privileged()
        self._seen = False
        # What the directories get at the end, by path.
        self._directories: dict[bytes, Attributes] = {}

    # -- entries --

    def make(self, member: Member, parts: Parts, link: Parts | None, reader: Reader) -> int:
        """Make an entry; returns its content bytes. Raises OSError and VolumeError."""
        self._seen = True
        if member.kind == tarformat.DIRECTORY:
            self._directory(member, parts)
            return 0
        if not parts:
            _refuse(member.name, "the volume itself must be a directory")
        name = parts[-1]
        self._enter(member, parts[:-1])
        if link is not None:
            self._hard_link(member, link, parts)
            return 0
        if member.kind == tarformat.REGULAR:
            return self._regular(member, name, reader)
        self._special(member, name)
        return 0

    def _enter(self, member: Member, parts: Parts) -> None:
        """Go to a directory; the missing ones on the way are made, as tar does."""
        for name in parts[self._stack.go_towards(parts) :]:
            try:
                self._stack.down(name)
            except FileNotFoundError:
                os.mkdir(name, 0o700, dir_fd=self._stack.fd)
                self._stack.down(name)
                self._directories[self._stack.path()] = Attributes(os.geteuid(), os.getegid(), 0o755, None, None)
            except OSError as exc:
                if exc.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                _refuse(member.name, f"it lies below {_shown(self._stack.path(name))}, which is no directory")

    def _directory(self, member: Member, parts: Parts) -> None:
        if parts:
            self._enter(member, parts[:-1])
            try:
                os.mkdir(parts[-1], 0o700, dir_fd=self._stack.fd)
            except FileExistsError:
                if not stat.S_ISDIR(os.lstat(sysio.entry_path(self._stack.fd, parts[-1])).st_mode):
                    os.unlink(parts[-1], dir_fd=self._stack.fd)
                    os.mkdir(parts[-1], 0o700, dir_fd=self._stack.fd)
        path, wanted = b"/".join(parts), _attributes(member)
        before = self._directories.get(path)
        if before is not None:  # given twice: the last one counts, but takes no extended attribute away
            wanted = replace(wanted, xattrs={**before.xattrs, **wanted.xattrs})
        self._directories[path] = wanted

    def _regular(self, member: Member, name: bytes, reader: Reader) -> int:
        try:
            fd = os.open(name, _CREATE, 0o600, dir_fd=self._stack.fd)
        except FileExistsError:
            self._remove(member, name)
            fd = os.open(name, _CREATE, 0o600, dir_fd=self._stack.fd)
        try:
            if member.extents is None:
                while data := reader.read():
                    _write_all(fd, data)
            else:
                _write_sparse(fd, member, reader)
            attributes.apply(fd, _attributes(member), root=self._root)
        finally:
            os.close(fd)
        return member.size

    def _special(self, member: Member, name: bytes) -> None:
        if member.kind == tarformat.SYMLINK and (not member.link or b"\0" in member.link):
            _refuse(member.name, "a symbolic link to nowhere")
        if not (0 <= member.major < 1 << 12 and 0 <= member.minor < 1 << 20):
            _refuse(member.name, "its device number is out of range")
        mode, device = _FORMATS[member.kind] | 0o600, os.makedev(member.major, member.minor)
        try:
            make_special(self._stack.fd, name, mode, device, member.link)
        except FileExistsError:
            self._remove(member, name)
            make_special(self._stack.fd, name, mode, device, member.link)
        fd = os.open(name, sysio.O_PATH_NOFOLLOW, dir_fd=self._stack.fd)
        try:
            attributes.apply(fd, _attributes(member), root=self._root)
        finally:
            os.close(fd)

    def _hard_link(self, member: Member, link: Parts, parts: Parts) -> None:
        if link == parts:
            _refuse(member.name, "a hard link to itself")
        source = self._linked(member, link)
        try:
            self._link(source, parts[-1])
        except FileExistsError:
            self._remove(member, parts[-1])
            self._link(source, parts[-1])
        finally:
            os.close(source)

    def _link(self, source: int, name: bytes) -> None:
        sysio.linkat_fd(source, self._stack.fd, name)

    def _linked(self, member: Member, link: Parts) -> int:
        """Open what a hard link names: it must be in this directory already, and no directory itself."""
        try:
            fd = sysio.open_beneath(self._fd, b"/".join(link), sysio.O_PATH_NOFOLLOW) if link else os.dup(self._fd)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
                raise
            _refuse(member.name, f"a hard link to {_shown(member.link)}, which is not in the archive before it")
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            _refuse(member.name, f"a hard link to {_shown(member.link)}, a directory")
        return fd

    def _remove(self, member: Member, name: bytes) -> None:
        """Make room for a later entry of the same name: the last one counts, as with tar."""
        try:
            os.unlink(name, dir_fd=self._stack.fd)
        except IsADirectoryError:
            try:
                os.rmdir(name, dir_fd=self._stack.fd)
            except OSError as exc:
                if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                _refuse(member.name, "it is a directory with content and something else in the same archive")
            self._directories.pop(self._stack.path(name), None)

    # -- the end --

    def finish(self) -> None:
        """Give the directories their attributes, those below first, and write everything to disk."""
        if self.prefix and not self._seen:
            raise VolumeError(f"the archive has nothing for {self._shown}")
        for parts in sorted((path.split(b"/") if path else [] for path in self._directories), reverse=True):
            path = b"/".join(parts)
            try:
                self._stack.go(parts)
                attributes.apply(self._stack.fd, self._directories[path], root=self._root)
            except OSError as exc:
                _refuse(path, exc.strerror or str(exc))
        sysio.sync_file_system(self._fd)


def _attributes(member: Member) -> Attributes:
    return Attributes(member.uid, member.gid, member.mode, member.atime_ns, member.mtime_ns, member.xattrs)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _write_sparse(fd: int, member: Member, reader: Reader) -> None:
    """Write each piece of data where it belongs; between them nothing is written, so holes stay holes."""
    assert member.extents is not None
    os.ftruncate(fd, member.real_size)
    data = memoryview(b"")
    for index in range(0, len(member.extents), 2):
        at, left = member.extents[index], member.extents[index + 1]
        while left:
            data = data or memoryview(reader.read())
            done = os.pwrite(fd, data[:left], at)
            data = data[done:]
            at += done
            left -= done
