"""Temporary objects, and how they become visible: built in work, published with one rename or link.

Layout of the work directory, overlayfs's own: ``work/`` holds temporary objects (named ``#N``) and is emptied at
mount; ``index/`` holds hard links to copied-up files, named after the file handle of their lower origin;
``work/incompat/volatile`` marks a mount that did not sync, and forbids the next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Final, Literal

import xattr

from unionfs.core import acl, sysio
from unionfs.core.inodes import Dir
from unionfs.core.markers import Format, is_whiteout_device
from unionfs.errors import LayerError

WhiteoutForm = Literal["char", "xattr", "wh"]
# Never removed by a mount: whoever knows that upper is complete, or doesn't care, deletes `incompat` by hand.
_LISTED: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_VOLATILE: Final = (b"incompat", b"incompat/volatile", b"incompat/volatile/dirty")

# Errors of mknod(2) that tell that there can't be such devices, to us or on this file system.
_CAN_NEVER_BE: Final = frozenset(
    (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENXIO, errno.ENODEV)
)


class WorkDir:
    """The work directory of one writable mount."""

    def __init__(self, root_fd: int, fmt: Format) -> None:
        self.root_fd = root_fd
        self.fmt = fmt
        self.fd = _subdir(root_fd, b"work")
        self.index_fd = -1
        self.whiteout_form: WhiteoutForm = "char"
        self._serial = 0
        self._whiteout: bytes | None = None
        self.makes_nameless = True  # as far as is known

    def close(self) -> None:
        """Remove the kept whiteout and close the descriptors."""
        if self._whiteout is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._whiteout, dir_fd=self.fd)
        for fd in (self.fd, self.index_fd, self.root_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.index_fd = self.root_fd = -1

    # -- at mount --

    def prepare(self, path: str, whiteout: str, *, volatile: bool) -> None:
        """Empty ``work/``, find out what the file system can do, and mark a volatile mount.

        Raises LayerError where an earlier volatile mount was not clean, or attributes can't be stored.
        """
        if self._incompat():
            raise LayerError(
                f"{path} was last used by a volatile mount: its upper may be incomplete; "
                f"remove {path}/work/incompat to use it all the same"
            )
        remove_tree(self.fd)
        self._probe_xattrs(path)
        self.whiteout_form = self._probe_whiteout(whiteout)
        if volatile:
            for name in _VOLATILE:
                os.mkdir(name, 0o700, dir_fd=self.fd)

    def _incompat(self) -> list[str]:
        """List the features that forbid this mount (``work/incompat/*``)."""
        try:
            fd = os.open(_VOLATILE[0], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except (FileNotFoundError, NotADirectoryError):
            return []  # what is no directory says nothing, and is removed
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def _probe_xattrs(self, path: str) -> None:
        target = os.fsdecode(sysio.fd_path(self.fd))
        try:
            xattr.setxattr(target, self.fmt.opaque, b"0")
            xattr.removexattr(target, self.fmt.opaque)
        except OSError as exc:
            raise LayerError(
                f"the file system of {path} can't store {self.fmt.prefix}* attributes ({os.strerror(exc.errno or 0)}): "
                "use an upper on ext4, xfs, btrfs or tmpfs"
            ) from None

    def _probe_whiteout(self, wanted: str) -> WhiteoutForm:
        if wanted in ("xattr", "wh"):
            return "xattr" if wanted == "xattr" else "wh"
        name = self.temp_name()
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=self.fd)
        except OSError as exc:
            if exc.errno not in _CAN_NEVER_BE:
                return "char"  # there is only no room now, or an error that may pass
            if wanted == "char":
                raise
            return "xattr"
        os.unlink(name, dir_fd=self.fd)
        return "char"

    def open_index(self) -> None:
        """Open or make ``index/``."""
        self.index_fd = _subdir(self.root_fd, b"index")

    # -- temporary objects --

    def temp_name(self) -> bytes:
        """Return a name that nothing in ``work/`` has."""
        self._serial += 1
        return b"#%x" % self._serial

    def open_temp(self) -> tuple[int, bytes | None]:
        """Return a new regular file open for reading and writing, and its name, None for a nameless one."""
        if self.makes_nameless:
            try:
                return os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.fd), None
            except OSError as exc:
                if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                    raise
                self.makes_nameless = False
        name = self.temp_name()
        return os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.fd), name

    @contextlib.contextmanager
    def temp_entry(self) -> Iterator[bytes]:
        """A name in ``work/`` for building an object; what is still there at the end is removed."""
        name = self.temp_name()
        try:
            yield name
        except BaseException:
            self.discard(name)
            raise

    def discard(self, name: bytes) -> None:
        """Remove a temporary object of any kind; errors are left to the clean-up of the next mount."""
        with contextlib.suppress(OSError):
            try:
                os.unlink(name, dir_fd=self.fd)
            except IsADirectoryError:
                with contextlib.suppress(OSError):
                    os.rmdir(name, dir_fd=self.fd)
                    return
                below = os.open(name, sysio.O_PATH_DIR, dir_fd=self.fd)
                try:
                    remove_tree(below)
                finally:
                    os.close(below)
                os.rmdir(name, dir_fd=self.fd)

    # -- whiteouts --

    def whiteout(self) -> bytes:
        """Put a fresh whiteout in ``work/`` and return its name: a hard link to a shared one (``ovl_whiteout``)."""
        name = self.temp_name()
        if self._whiteout is None:
            shared = self.temp_name()
            self._make_whiteout(shared)
            self._whiteout = shared
        try:
            os.link(self._whiteout, name, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
        except OSError as exc:
            if exc.errno not in (errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.ENOENT):
                raise
            used, self._whiteout = self._whiteout, None
            return used if exc.errno == errno.EMLINK else self._make_whiteout(name)
        return name

    def _make_whiteout(self, name: bytes) -> bytes:
        if self.whiteout_form == "char":
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=self.fd)
        else:
            fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=self.fd)
            try:
                if self.whiteout_form == "xattr":
                    os.setxattr(fd, self.fmt.whiteout, b"y")
            finally:
                os.close(fd)
        return name

    def is_whiteout(self, dirfd: int, name: bytes, st: os.stat_result) -> bool:
        """Tell whether an entry of upper with this stat result is a whiteout of any form."""
        if is_whiteout_device(st):
            return True
        if st.st_size == 0 and stat.S_ISREG(st.st_mode):
            path = sysio.entry_path(dirfd, name)
            return self.fmt.whiteout in os.listxattr(path, follow_symlinks=False)
        return False


def set_impure(node: Dir, fd: int, fmt: Format, flag: int) -> None:
    """Mark an upper directory as one that may hold entries with an origin (``ovl_set_impure``)."""
    if node.flags & flag:
        return
    try:
        os.setxattr(sysio.fd_path(fd), fmt.impure, b"y")
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
    node.flags |= flag


def _subdir(root_fd: int, name: bytes) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=root_fd)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root_fd)
    try:
        _hand_nothing_on(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _hand_nothing_on(fd: int) -> None:
    """Take from a directory what is made in it would inherit: ACLs and set-group-id (``ovl_workdir_create``).

    It has them from the directory that it was made in itself.
    """
    for name in (acl.DEFAULT, acl.ACCESS):
        try:
            os.removexattr(fd, name)
        except OSError as exc:
            if exc.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
    if os.fstat(fd).st_mode & stat.S_ISGID:
        os.fchmod(fd, 0o700)


def remove_tree(fd: int) -> None:
    """Remove everything below a directory, never leaving its file system nor following a link.

    Nobody else may use the directory meanwhile. Directories are moved up to it before they are emptied, so the depth
    doesn't matter; a mount point can be neither moved nor removed (EBUSY).
    """
    here = os.open(b".", _LISTED, dir_fd=fd)
    try:
        while directories := _remove_files(here):
            for name in directories:
                try:
                    os.rmdir(name, dir_fd=here)
                except OSError as exc:
                    if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    _empty(here, name)
                    os.rmdir(name, dir_fd=here)
    finally:
        os.close(here)


def _remove_files(fd: int) -> list[bytes]:
    """Remove all that is no directory; return the names of the rest."""
    directories = []
    for name, _, _ in sysio.getdents(fd):
        try:
            os.unlink(name, dir_fd=fd)
        except IsADirectoryError:
            directories.append(name)
    return directories


def _empty(here: int, name: bytes) -> None:
    """Empty a directory, by moving its directories up."""
    if os.geteuid() != 0:  # its mode may forbid that to its owner
        sysio.chmod_at(here, name, 0o700)
    below = os.open(name, _LISTED | os.O_NOFOLLOW, dir_fd=here)
    try:
        token = os.urandom(8).hex().encode()
        for number, inner in enumerate(_remove_files(below)):
            if os.geteuid() != 0:
                sysio.chmod_at(below, inner, 0o700)
            os.rename(inner, b"#%b-%d" % (token, number), src_dir_fd=below, dst_dir_fd=here)
    finally:
        os.close(below)
