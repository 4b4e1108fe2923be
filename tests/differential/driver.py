"""Executes one operation on one side of the comparison and tells what came of it, in terms that both sides share.

An outcome is ``("ok", value)`` or ``("error", errno name)``. What can't be equal on two file systems is expressed by what
must be: an inode number becomes a label in the order of first sight, a time of the present becomes "now".
Open files and directory scans live in numbered slots and survive other operations, until the next remount.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from . import layers, syscalls
from .layers import pattern
from .operations import Fields, Op, Outcome
from .syscalls import identity

_DAY = 86400 * 10**9
_SLACK = 10**9 // 50


class Labels:
    """Inode numbers of one side, named in the order in which they were first seen."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def of(self, ino: int) -> int:
        """The label of inode number ``ino``."""
        return self._known.setdefault(ino, len(self._known))


@dataclass
class View:
    """What it takes to describe an inode comparably: device and inode labels of the mount, and when "now" began."""

    device: int
    started: int
    labels: Labels | None = field(default_factory=Labels)
    count_blocks: bool = True  # not where the file system allocates ahead

    def time(self, nanoseconds: int) -> object:
        """A time as it was set, or "now" for one that a clock gave since the sequence began."""
        return "now" if self.started - _SLACK <= nanoseconds < self.started + _DAY else nanoseconds

    def fields(self, status: os.stat_result) -> Fields:
        """Everything in ``status`` that two equal unions share."""
        fields: Fields = {
            "type": stat.S_IFMT(status.st_mode),
            "mode": oct(stat.S_IMODE(status.st_mode)),
            "owner": (status.st_uid, status.st_gid),
            "nlink": status.st_nlink,
            "mtime": self.time(status.st_mtime_ns),
            "atime": self.time(status.st_atime_ns),
            "ctime": "now" if self.time(status.st_ctime_ns) == "now" else "earlier",
            "same device": status.st_dev == self.device,
        }
        if self.labels:
            fields["inode"] = self.labels.of(status.st_ino)
        if not stat.S_ISDIR(status.st_mode):
            fields["size"] = status.st_size
        if stat.S_ISREG(status.st_mode) and self.count_blocks:
            fields["blocks"] = status.st_blocks
        if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            fields["rdev"] = (os.major(status.st_rdev), os.minor(status.st_rdev))
        return fields


def digest(data: bytes) -> object:
    """``data`` itself when it is short, else its length, check sum and beginning."""
    return data if len(data) <= 64 else (len(data), zlib.crc32(data), data[:32])


@dataclass
class Scan:
    """An open directory being read in pieces, with what it promised when it was opened."""

    fd: int
    at_open: dict[bytes, int]
    seen: list[syscalls.DirEntry] = field(default_factory=list)


def view_of(kind: str, device: int, started: int) -> View:
    """A view that looks at what is deterministic on file system ``kind``: only tmpfs never uses an inode number again."""
    return View(device, started, Labels() if kind == "tmpfs" else None, kind in ("tmpfs", "ext4"))


class Driver:
    """One side's subtree with its open files. Operations are the methods ``do_KIND``, called with the operation's arguments."""

    def __init__(self, root: bytes, started: int, kind: str) -> None:
        self.root, self.started, self.kind = root, started, kind
        self.files: dict[int, int] = {}
        self.scans: dict[int, Scan] = {}
        self.connect(fresh_labels=True)

    def connect(self, fresh_labels: bool) -> None:
        """Open the subtree of a mount that has just come up; labels stay valid while the implementation does."""
        self.root_fd = os.open(self.root, os.O_PATH | os.O_DIRECTORY)
        device = os.fstat(self.root_fd).st_dev
        if fresh_labels:
            self.view = view_of(self.kind, device, self.started)
        self.view.device = device

    def disconnect(self) -> None:
        """Close everything, so that the mount can go."""
        for fd in (*self.files.values(), *(scan.fd for scan in self.scans.values()), self.root_fd):
            try:
                os.close(fd)
            except OSError:
                pass
        self.files.clear()
        self.scans.clear()
        os.chdir("/")

    def run(self, op: Op) -> Outcome:
        """Execute ``op`` as its user."""
        method: Callable[..., object] = getattr(self, "do_" + op.kind)
        try:
            os.fchdir(self.root_fd)
            with identity(op.user):
                return "ok", method(*op.args)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, str(error))
            # For a directory that isn't empty POSIX allows both, and xfs says EEXIST.
            return "error", "ENOTEMPTY" if self.kind == "xfs" and name == "EEXIST" and op.kind == "rename" else name
        except KeyError as error:
            return "error", f"slot {error} is empty"

    def look_up(self, slot: int) -> bool:
        """Look up the name under which an open file was opened; False when it is gone though the file has links.

        That is so for a hard link with other names, and in overlayfs for every lower file.
        """
        fd = self.files.get(slot, -1)
        if fd < 0 or os.fstat(fd).st_nlink == 0:
            return True
        try:
            os.stat(os.readlink(b"/proc/self/fd/%d" % fd), follow_symlinks=False)
        except OSError:
            return False
        return True

    def has_suidgid(self, target: int | bytes) -> bool:
        """Whether a slot's file, or one at a path of which a slot is open, has set-user-id or set-group-id."""
        try:
            os.fchdir(self.root_fd)
            status = os.stat(target) if isinstance(target, bytes) else os.fstat(self.files[target])
        except (OSError, KeyError):
            return False
        return bool(status.st_mode & 0o6000) and any(
            os.path.samestat(status, os.fstat(fd)) for fd in self.files.values()
        )

    def modified(self, op: Op) -> object:
        """When the file that ``op`` has opened was modified."""
        return self.view.time(os.stat(self._target(op)).st_mtime_ns)

    def touch(self, op: Op) -> None:
        """Set that to now."""
        syscalls.utimens(self._target(op), "omit", "now")

    def _target(self, op: Op) -> int | bytes:
        os.fchdir(self.root_fd)
        where: int | bytes = op.args[1] if op.kind == "reopen" else op.args[0]
        return self.files[where] if isinstance(where, int) else where

    # Open files

    def _keep(self, slot: int, fd: int) -> None:
        if slot in self.files:
            os.close(self.files.pop(slot))
        self.files[slot] = fd

    def do_open(self, slot: int, path: bytes, flags: int, mode: int, umask: int) -> object:
        os.umask(umask)
        self._keep(slot, os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, mode))
        return None

    def do_close(self, slot: int) -> object:
        os.close(self.files.pop(slot))
        return None

    def do_read(self, slot: int, length: int) -> object:
        return digest(os.read(self.files[slot], length))

    def do_pread(self, slot: int, length: int, offset: int) -> object:
        return digest(os.pread(self.files[slot], length, offset))

    def do_write(self, slot: int, seed: int, length: int) -> object:
        return os.write(self.files[slot], pattern(seed, length))

    def do_pwrite(self, slot: int, seed: int, length: int, offset: int) -> object:
        return os.pwrite(self.files[slot], pattern(seed, length), offset)

    def do_lseek(self, slot: int, offset: int, whence: int) -> object:
        fd = self.files[slot]
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            return None
        return os.lseek(fd, offset, whence)

    do_holes = do_lseek

    def do_fstat(self, slot: int) -> object:
        return self.view.fields(os.fstat(self.files[slot]))

    def do_ftruncate(self, slot: int, length: int) -> object:
        os.ftruncate(self.files[slot], length)
        return None

    def do_fchmod(self, slot: int, mode: int) -> object:
        os.fchmod(self.files[slot], mode)
        return None

    def do_fchown(self, slot: int, uid: int, gid: int) -> object:
        os.fchown(self.files[slot], uid, gid)
        return None

    def do_futimens(self, slot: int, atime: int | str, mtime: int | str) -> object:
        syscalls.utimens(self.files[slot], atime, mtime)
        return None

    def do_fsetxattr(self, slot: int, name: bytes, value: bytes) -> object:
        os.setxattr(self.files[slot], name, value)
        return None

    def do_fgetxattr(self, slot: int, name: bytes) -> object:
        return os.getxattr(self.files[slot], name)

    def do_flistxattr(self, slot: int) -> object:
        return sorted(os.listxattr(self.files[slot]))

    def do_fsync(self, slot: int) -> object:
        os.fsync(self.files[slot])
        return None

    def do_fallocate(self, slot: int, mode: int, offset: int, length: int) -> object:
        syscalls.fallocate(self.files[slot], mode, offset, length)
        return None

    def do_copy_range(self, source: int, target: int, length: int, at_source: int, at_target: int) -> object:
        return os.copy_file_range(self.files[source], self.files[target], length, at_source, at_target)

    def do_lock(self, slot: int, kind: str) -> object:
        """An open file description lock; a second description of the same file must meet it."""
        types = {"read": fcntl.F_RDLCK, "write": fcntl.F_WRLCK, "unlock": fcntl.F_UNLCK}
        request = struct.pack("hhqqi4x", types[kind], os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(self.files[slot], fcntl.F_OFD_SETLK, request)
        return None

    def do_flock(self, slot: int, kind: str) -> object:
        types = {"read": fcntl.LOCK_SH, "write": fcntl.LOCK_EX, "unlock": fcntl.LOCK_UN}
        fcntl.flock(self.files[slot], types[kind] | fcntl.LOCK_NB)
        return None

    def do_reopen(self, slot: int, other: int, flags: int) -> object:
        """Open a slot's file once more through /proc, also when its name is gone."""
        self._keep(other, os.open(f"/proc/self/fd/{self.files[slot]}", flags | os.O_NONBLOCK | os.O_NOCTTY))
        return None

    def do_publish(self, slot: int, path: bytes) -> object:
        """Give an open file a (further) name."""
        syscalls.link(b"/proc/self/fd/%d" % self.files[slot], path, follow=True)
        return None

    def do_create_at(self, slot: int, name: bytes) -> object:
        """Create a file relative to an open directory."""
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=self.files[slot]))
        return None

    def do_mkdir_at(self, slot: int, name: bytes) -> object:
        os.mkdir(name, 0o755, dir_fd=self.files[slot])
        return None

    def do_tmpfile(self, slot: int, path: bytes, mode: int) -> object:
        os.umask(0o022)
        self._keep(slot, os.open(path, os.O_TMPFILE | os.O_RDWR, mode))
        return None

    # Names

    def do_mkdir(self, path: bytes, mode: int, umask: int) -> object:
        os.umask(umask)
        os.mkdir(path, mode)
        return None

    def do_mknod(self, path: bytes, mode: int, device: tuple[int, int], umask: int) -> object:
        os.umask(umask)
        os.mknod(path, mode, os.makedev(*device))
        return None

    def do_symlink(self, target: bytes, path: bytes) -> object:
        os.symlink(target, path)
        return None

    def do_link(self, old: bytes, new: bytes, follow: bool) -> object:
        syscalls.link(old, new, follow)
        return None

    def do_unlink(self, path: bytes) -> object:
        os.unlink(path)
        return None

    def do_rmdir(self, path: bytes) -> object:
        os.rmdir(path)
        return None

    def do_rmtree(self, path: bytes) -> object:
        """Remove everything below ``path``, and ``path``, as far as it goes; not the whole subtree."""
        if os.path.samefile(path, b"."):
            return "left out"
        return self._remove_all(path)

    def _remove_all(self, path: bytes) -> int:
        """Remove in sorted order up to the first error; how much went."""
        removed = 1
        for name in sorted(os.listdir(path)):
            child = os.path.join(path, name)
            if stat.S_ISDIR(os.lstat(child).st_mode):
                removed += self._remove_all(child)
            else:
                os.unlink(child)
                removed += 1
        os.rmdir(path)
        return removed

    def do_rename(self, old: bytes, new: bytes, flags: int) -> object:
        syscalls.renameat2(old, new, flags)
        return None

    def do_exchange(self, one: bytes, two: bytes) -> object:
        syscalls.renameat2(one, two, syscalls.RENAME_EXCHANGE)
        return None

    def do_readlink(self, path: bytes) -> object:
        return os.readlink(path)

    def do_readdir(self, path: bytes) -> object:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            entries = syscalls.all_dents(fd)
        finally:
            os.close(fd)
        return sorted((entry.name, entry.kind) for entry in entries)

    # Attributes by path

    def do_stat(self, path: bytes, follow: bool) -> object:
        return self.view.fields(os.stat(path, follow_symlinks=follow))

    def do_chmod(self, path: bytes, mode: int) -> object:
        os.chmod(path, mode)
        return None

    def do_chown(self, path: bytes, uid: int, gid: int, follow: bool) -> object:
        os.chown(path, uid, gid, follow_symlinks=follow)
        return None

    def do_utimens(self, path: bytes, atime: int | str, mtime: int | str, follow: bool) -> object:
        syscalls.utimens(path, atime, mtime, follow)
        return None

    def do_access(self, path: bytes, mode: int, flags: int) -> object:
        syscalls.faccessat(path, mode, flags)
        return None

    def do_truncate(self, path: bytes, length: int) -> object:
        os.truncate(path, length)
        return None

    def do_statfs(self, path: bytes) -> object:
        status = os.statvfs(path)
        return status.f_bsize, status.f_frsize, status.f_blocks, status.f_namemax

    def do_setxattr(self, path: bytes, name: bytes, value: bytes, flags: int, follow: bool) -> object:
        os.setxattr(path, name, value, flags, follow_symlinks=follow)
        return None

    def do_getxattr(self, path: bytes, name: bytes, follow: bool) -> object:
        return os.getxattr(path, name, follow_symlinks=follow)

    def do_listxattr(self, path: bytes, follow: bool) -> object:
        return sorted(os.listxattr(path, follow_symlinks=follow))

    def do_removexattr(self, path: bytes, name: bytes, follow: bool) -> object:
        os.removexattr(path, name, follow_symlinks=follow)
        return None

    # Whole files

    def do_readfile(self, path: bytes) -> object:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            return digest(os.read(fd, 1 << 20))
        finally:
            os.close(fd)

    def do_writefile(self, path: bytes, flags: int, mode: int, umask: int, seed: int, length: int) -> object:
        os.umask(umask)
        fd = os.open(path, flags | os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY, mode)
        try:
            return os.write(fd, pattern(seed, length))
        finally:
            os.close(fd)

    def do_mmap_read(self, path: bytes) -> object:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if os.fstat(fd).st_size >= layers.SPARSE_SIZE:
                return "left out: on tmpfs, looking at a hole fills it"
            with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
                return digest(memory[:])
        except ValueError:
            return "empty"
        finally:
            os.close(fd)

    def do_mmap_write(self, path: bytes, seed: int, length: int) -> object:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            if "security.capability" in os.listxattr(fd) or os.fstat(fd).st_size >= layers.SPARSE_SIZE:
                return "left out, see deviations"
            with mmap.mmap(fd, 0, mmap.MAP_SHARED) as memory:
                length = min(length, len(memory))
                memory[:length] = pattern(seed, length)
                memory.flush()
                return length
        except ValueError:
            return "empty"
        finally:
            os.close(fd)

    # Directories read in pieces

    def do_scan_open(self, slot: int, path: bytes) -> object:
        if slot in self.scans:
            os.close(self.scans.pop(slot).fd)
        at_open = self._listing(path)
        self.scans[slot] = Scan(os.open(path, os.O_RDONLY | os.O_DIRECTORY), at_open)
        return sorted(at_open)

    @staticmethod
    def _listing(path: bytes) -> dict[bytes, int]:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return {entry.name: entry.ino for entry in syscalls.all_dents(fd)}
        finally:
            os.close(fd)

    def do_scan_some(self, slot: int, size: int) -> object:
        """Read a few entries; how many is not comparable."""
        scan = self.scans[slot]
        scan.seen += syscalls.getdents(scan.fd, size)
        return None

    def do_scan_back(self, slot: int, share: float) -> object:
        """Go back to the position after some entry, as seekdir does with what telldir gave."""
        scan = self.scans[slot]
        keep = int(len(scan.seen) * share)
        if keep:
            os.lseek(scan.fd, scan.seen[keep - 1].cookie, os.SEEK_SET)
            del scan.seen[keep:]
        return None

    def do_scan_end(self, slot: int) -> object:
        """Read the rest; names that were there all the time must have come exactly once."""
        scan = self.scans.pop(slot)
        try:
            scan.seen += syscalls.all_dents(scan.fd)
            os.lseek(scan.fd, 0, os.SEEK_SET)
            now = {entry.name: entry.ino for entry in syscalls.all_dents(scan.fd)}
        finally:
            os.close(scan.fd)
        stayed = [name for name, ino in scan.at_open.items() if now.get(name) == ino]
        names = [entry.name for entry in scan.seen]
        wrong = sorted((name, names.count(name)) for name in stayed if names.count(name) != 1)
        return wrong, sorted(now)
