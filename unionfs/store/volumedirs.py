"""The directories of the volume store: built aside, published with one rename, thrown away with one.

    ROOT/                 0711; locked while one short step is done
        unionfs.db        0600; see `volumes`
        volumes/          0701
            NAME/         0701; locked while its content is read (shared) or replaced (exclusive)
                _data     the content, as Docker has it
                _fill, _restore, _old    content on its way in or out
            .stage-HEX    a volume that is being made; locked by whoever makes it
            .trash-HEX    what is being removed; locked by whoever removes it

The locks are flock(2) on the directories themselves. They end with the process that holds them, so what is not
locked has been left by a dead one; and they tell the truth across pid namespaces.

ROOT belongs to one user and no other may write there, so paths below it are safe. A volume's device may lie in a
directory of somebody else's: below it all goes by descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from typing import Final

from unionfs.archives import attributes
from unionfs.core import sysio
from unionfs.errors import VolumeError

ROOT_MODE: Final = 0o711
INNER_MODE: Final = 0o701
DATA_MODE: Final = 0o755
DATA: Final = "_data"

_STAGE, _TRASH = ".stage-", ".trash-"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def default_root() -> str:
    """Return where the store lies when nothing is said; for users (root of a user namespace is one) XDG's place."""
    if attributes.privileged():
        return "/var/lib/unionfs"
    data = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(data):
        data = os.path.join(os.path.expanduser("~"), ".local", "share")
    return os.path.join(data, "unionfs")


def prepare_root(root: str) -> None:
    """Make the store's directories where they are missing.

    Raises VolumeError for a root that somebody else owns or may write to, or that can't be made.
    """
    try:
        for path, mode in ((root, ROOT_MODE), (os.path.join(root, "volumes"), INNER_MODE)):
            _make(path, mode)
            status = os.stat(path)
            if status.st_uid != os.geteuid():
                raise VolumeError(f"{path} belongs to another user: choose a directory of your own with --root")
            if status.st_mode & 0o022:
                raise VolumeError(f"others may write to {path}: chmod go-w it, or choose another --root")
    except OSError as exc:
        raise VolumeError(f"the volume store {root} can't be used: {exc.filename}: {exc.strerror}: see --root") from exc


def _make(path: str, mode: int) -> None:
    if not os.path.isdir(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
            os.chmod(path, mode)


# --- locks ----------------------------------------------------------------------------------------


def lock(path: str, *, shared: bool = False, wait: bool = False) -> int | None:
    """Lock directory `path` and return the descriptor that holds the lock; None if somebody else has it.

    Raises FileNotFoundError.
    """
    fd = os.open(path, _DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def unlock(fd: int) -> None:
    """Give back a lock, also where a forked process has the descriptor too."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def sync(path: str) -> None:
    """Make the names in directory `path` survive a power cut."""
    fd = os.open(path, _DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- stages and trash -----------------------------------------------------------------------------


def new_stage(volumes: str) -> tuple[str, int]:
    """Make a directory with an empty `_data` and return its name and the lock on it."""
    name = _STAGE + secrets.token_hex(8)
    path = os.path.join(volumes, name)
    os.mkdir(path, 0o700)
    held = lock(path, wait=True)
    assert held is not None
    os.chmod(path, INNER_MODE)
    data = os.path.join(path, DATA)
    os.mkdir(data, 0o700)
    os.chmod(data, DATA_MODE)
    return name, held


def trash_name() -> str:
    """Return a fresh name for what is thrown away."""
    return _TRASH + secrets.token_hex(8)


def to_trash(path: str, volumes: str) -> None:
    """Move a directory of the store to the trash, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, os.path.join(volumes, trash_name()))


def leftovers(volumes: str, stages_in_use: set[str]) -> list[tuple[str, int]]:
    """Lock what dead processes have left in `volumes` and return (path, lock) of each."""
    found = []
    for name in os.listdir(volumes):
        if name.startswith((_STAGE, _TRASH)) and name not in stages_in_use:
            path = os.path.join(volumes, name)
            with contextlib.suppress(FileNotFoundError):
                held = lock(path)
                if held is not None:
                    found.append((path, held))
    return found


def remove_directory(parent: int | None, path: str) -> int:
    """Remove a directory and all below it, and return how many bytes of files that gave back.

    Directories are moved up to `path` before they are emptied, so a tree of any depth needs two descriptors. No
    link is followed and no mount is entered (EBUSY). A file that has other names gives nothing back.
    """
    top = os.open(path, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        token, number, freed = secrets.token_hex(8), 0, 0
        while directories := [name for name, _, kind in _entries(top) if kind]:
            for name in directories:
                below = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
                try:
                    _own(below)
                    for inner, size, kind in _entries(below):
                        if kind:
                            _own_entry(below, inner)
                            number += 1
                            os.rename(inner, f"{token}-{number}", src_dir_fd=below, dst_dir_fd=top)
                        else:
                            os.unlink(inner, dir_fd=below)
                            freed += size
                finally:
                    os.close(below)
                os.rmdir(name, dir_fd=top)
        for name, size, _ in _entries(top):
            os.unlink(name, dir_fd=top)
            freed += size
    finally:
        os.close(top)
    os.rmdir(path, dir_fd=parent)
    return freed


def _entries(fd: int) -> Iterator[tuple[str, int, bool]]:
    """Yield name, bytes that its removal gives back, and whether it is a directory, of each entry."""
    for name in os.listdir(fd):
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        single = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
        size = min(status.st_size, max(status.st_blocks * 512, 4096)) if single else 0
        yield name, size, stat.S_ISDIR(status.st_mode)


def _own(fd: int) -> None:
    """Make a directory writable for its owner; root needs no such thing."""
    if os.geteuid() != 0:
        os.fchmod(fd, 0o700)


def _own_entry(fd: int, name: str) -> None:
    if os.geteuid() != 0:
        sysio.chmod_at(fd, os.fsencode(name), 0o700)


# --- content that is exchanged in place -----------------------------------------------------------


def is_empty(path: str) -> bool:
    """Whether a directory has no entry."""
    with os.scandir(path) as entries:
        return next(entries, None) is None


def make_private(parent: int, name: str) -> int:
    """Make an empty directory that only its owner may enter and return a descriptor of it.

    Raises FileExistsError; PermissionError when somebody else has put another thing in its place.
    """
    os.mkdir(name, 0o700, dir_fd=parent)
    fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077 or os.listdir(fd):
        os.close(fd)
        raise PermissionError(errno.EPERM, "somebody else changes this directory", name)
    return fd


def move_entries(source: int, target: int, *, keep: tuple[str, ...] = (), replace: bool = False) -> None:
    """Move the entries of one directory into another of the same file system; done twice it does no harm.

    Names in `keep` stay. One that the target has stays there too, unless `replace` has the two change places.
    """
    for name in os.listdir(source):
        if name in keep:
            continue
        raw = os.fsencode(name)
        try:
            _rename_new(source, raw, target)
        except FileExistsError:
            if replace:
                sysio.rename(source, raw, target, raw, sysio.RENAME_EXCHANGE)


def _rename_new(source: int, name: bytes, target: int) -> None:
    try:
        sysio.rename(source, name, target, name, sysio.RENAME_NOREPLACE)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        with contextlib.suppress(FileNotFoundError):  # a file system without renameat2's flags
            os.stat(name, dir_fd=target, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from None
        os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)


def copy_root(source: int, target: int) -> None:
    """Give one directory the owner, attributes, mode and times of another, where this user may."""
    wanted = attributes.read(source)
    with contextlib.suppress(PermissionError):
        for name in set(attributes.read_xattrs(sysio.fd_path(target))) - set(wanted.xattrs):
            os.removexattr(target, name)
        attributes.apply(target, wanted, root=attributes.privileged())
