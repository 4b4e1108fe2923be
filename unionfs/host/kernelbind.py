"""Volumes by the kernel: real bind mounts on paths of the merged tree.

A bind mount takes the union out of the way altogether: the kernel walks into the volume's own file system, the daemon
sees no request. It is made in three steps, none of which names a path twice: the source is opened and cloned as a
detached mount *before* the union is mounted (which may hide it), its attributes are set while nobody can see it, and it
is moved onto a descriptor of its target. The target is resolved inside the union as if that were the root directory, so
that a symbolic link in a layer leads nowhere else.

Undoing goes from the last to the first. It takes a clone of every mount before it goes, so that one that turns out to
be busy brings the others back.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable

from unionfs.core import sysio
from unionfs.errors import EnvironmentUnfit, LayerError
from unionfs.host.mountinfo import Mount, mount_id_of

DIR_MODE = 0o755
FILE_MODE = 0o644


class Source:
    """What is to be bound: a descriptor of a host directory or file, and, where the kernel can bind it, its clone."""

    def __init__(self, path: str) -> None:
        """Open `path`.

        Raises LayerError.
        """
        self.path = path
        try:
            self.fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            raise LayerError(f"volume source {path}: {error.strerror}") from None
        self.is_dir = stat.S_ISDIR(os.fstat(self.fd).st_mode)
        self.tree = -1

    def clone(self, *, read_only: bool, propagation: str, recursive: bool) -> bool:
        """Make the detached mount; False where this process may not.

        Raises EnvironmentUnfit where the kernel is too old for it.
        """
        try:
            self.tree = sysio.clone_tree(self.fd, recursive=recursive)
        except PermissionError:
            return False
        except OSError as error:
            if error.errno == errno.ENOSYS:
                return False
            raise LayerError(f"volume source {self.path} can't be bound: {error.strerror}") from None
        try:
            sysio.set_mount(
                self.tree, read_only=read_only, propagation=propagation.removeprefix("r"), recursive=recursive
            )
        except OSError as error:
            raise EnvironmentUnfit(
                f"binding {self.path} needs Linux 5.12 ({error.strerror}): use --bind-mode fuse"
            ) from None
        return True

    def leave_mounts_out(self) -> None:
        """Let the descriptor lead to the source without the mounts below it.

        Raises EnvironmentUnfit where this process may not.
        """
        try:
            fd = sysio.clone_tree(self.fd, recursive=False)
        except OSError as error:
            raise EnvironmentUnfit(
                f"volume source {self.path}: bind-nonrecursive needs root ({error.strerror}): leave it out"
            ) from None
        os.close(self.fd)
        self.fd = fd

    def take_fd(self) -> int:
        """Hand the descriptor of the source over to the caller."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Close what is still held."""
        for fd in (self.fd, self.tree):
            if fd >= 0:
                os.close(fd)
        self.fd = self.tree = -1


def open_target(root_fd: int, target: str, *, is_dir: bool, make: bool) -> int:
    """Return a descriptor of a path in the union, made where it is missing: a directory, or an empty file.

    Args:
        root_fd: the union's root.
        target: an absolute path in it.
        is_dir: what it must be.
        make: whether it may be made.

    Raises:
        LayerError: it is missing and may not be made, or is something else.
    """
    name = os.fsencode(target)
    try:
        fd = _open_or_make(root_fd, name, is_dir=is_dir, make=make)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EROFS) and not make:
            raise LayerError(f"{target} is missing in the read-only union: make it in a layer first") from None
        raise LayerError(f"{target} in the union can't be made a mount point: {error.strerror}") from None
    if stat.S_ISDIR(os.fstat(fd).st_mode) != is_dir:
        os.close(fd)
        what = "a directory onto a file" if is_dir else "a file onto a directory"
        raise LayerError(f"{target} in the union: can't bind {what}")
    return fd


def _open_or_make(root_fd: int, path: bytes, *, is_dir: bool, make: bool, links: int = 0) -> int:
    """Open a path in the union and make what is missing of it; symbolic links lead on inside, to missing things too."""
    try:
        return sysio.open_in_root(root_fd, path, os.O_PATH)
    except FileNotFoundError:
        if not make or path == b"/":
            raise
    above, name = os.path.split(path)
    if name == b"..":
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    parent = _open_or_make(root_fd, above, is_dir=True, make=True, links=links)
    try:
        try:
            if is_dir:
                os.mkdir(name, DIR_MODE, dir_fd=parent)
            else:
                os.mknod(name, stat.S_IFREG | FILE_MODE, dir_fd=parent)
        except FileExistsError:
            link = _link_at(parent, name)
            if link:
                if links == _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path) from None
                return _open_or_make(root_fd, os.path.join(above, link), is_dir=is_dir, make=True, links=links + 1)
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)


# As in the kernel's own path walk (MAXSYMLINKS).
_MAX_LINKS = 40


def _link_at(dirfd: int, name: bytes) -> bytes:
    """Return the target of a symbolic link, empty for anything else."""
    try:
        return os.readlink(name, dir_fd=dirfd)
    except OSError:
        return b""


def mounts_below(top: Mount, mounts: Iterable[Mount]) -> list[Mount]:
    """Return every mount that lies on `top` or on one of these, in the order they were made."""
    inside = {top.mount_id}
    found = []
    for mount in mounts:
        if mount.parent_id in inside:
            inside.add(mount.mount_id)
            found.append(mount)
    return found


class Undoing:
    """Unmounts binds one after the other, and can put them all back."""

    def __init__(self) -> None:
        self._gone: list[tuple[Mount, int]] = []

    def unmount(self, mount: Mount, *, detach: bool) -> None:
        """Unmount one bind with all that is mounted in it already gone.

        Raises OSError, EBUSY if it is in use.
        """
        path = os.fsencode(mount.mountpoint)
        clone = -1
        if not detach:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                clone = sysio.clone_tree(fd, recursive=False)
            finally:
                os.close(fd)
        try:
            sysio.unmount(path, detach=detach)
        except BaseException:
            if clone >= 0:
                os.close(clone)
            raise
        if clone >= 0:
            self._gone.append((mount, clone))

    def put_back(self) -> dict[int, int]:
        """Mount again what was unmounted, as it was, in the order in which it was mounted first.

        Returns the new numbers of these mounts by their old ones.
        """
        numbers: dict[int, int] = {}
        for mount, clone in reversed(self._gone):
            fd = os.open(mount.mountpoint, os.O_PATH | os.O_CLOEXEC)
            try:
                sysio.move_mount(clone, fd)
            finally:
                os.close(fd)
            numbers[mount.mount_id] = mount_id_of(clone)
        self.close()
        return numbers

    def close(self) -> None:
        """Let go of the clones."""
        for _, clone in self._gone:
            os.close(clone)
        self._gone.clear()
