"""Immutable and append-only files and directories (``chattr +i``, ``+a``): who is refused what, and the inode flags.

Kernel overlayfs shows these two flags on its own inodes, and the VFS refuses what they forbid. An inode of a FUSE file
system can't carry them, so the union refuses: each check here says which one of the VFS's it stands for. What never
comes to the union as a request it can't refuse (see "Known differences" in the README).

All other flags are those of the real object: the lower one, or after copy-up the upper one, which carries none of the
two, or it could be neither renamed nor linked; they are in its ``protattr`` attribute (``ovl_set_protattr``).
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from typing import Final

from unionfs.core import sysio
from unionfs.core.copyup import CopyUp
from unionfs.core.inodes import APPEND_ONLY, IMMUTABLE, Dir, Node
from unionfs.core.markers import encode_protattr
from unionfs.core.tree import Tree

GET: Final = frozenset((sysio.FS_IOC_GETFLAGS, sysio.FS_IOC_FSGETXATTR))
SET: Final = frozenset((sysio.FS_IOC_SETFLAGS, sysio.FS_IOC_FSSETXATTR))

_PROTECTION: Final = sysio.FS_IMMUTABLE | sysio.FS_APPEND
_XFLAG_IMMUTABLE, _XFLAG_APPEND = 0x08, 0x10
_FSXATTR_BYTES: Final = 28


class Protection:
    """Checks and flags of one mount. A check says what it is for, and raises OSError, EPERM, where that is refused."""

    def __init__(self, tree: Tree, up: CopyUp) -> None:
        self._tree = tree
        self._up = up

    # -- what is refused, with EPERM --

    def check_change(self, node: Node) -> None:
        """Owner, mode, given times, attributes, links (``may_setattr``, ``may_write_xattr``, ``vfs_link``)."""
        if self._tree.protection(node):
            raise _refused(node)

    def check_write(self, node: Node) -> None:
        """Truncation by path, touch; in a directory: new names (``inode_permission``)."""
        if self._tree.protection(node) & IMMUTABLE:
            raise _refused(node)

    def check_open(self, node: Node, flags: int) -> None:
        """Opening for other than reading, or, where append-only, appending (``may_open``)."""
        protection = self._tree.protection(node)
        if protection & IMMUTABLE or (protection and (flags & os.O_TRUNC or not flags & os.O_APPEND)):
            raise _refused(node)

    def check_remove(self, parent: Dir, node: Node) -> None:
        """Taking a name away or over (``may_delete``)."""
        if self._tree.protection(parent):
            raise _refused(parent)
        self.check_change(node)

    def check_size(self, node: Node, *, by_handle: bool) -> None:
        """Truncation: whoever could open an immutable file for writing before it was one may go on."""
        protection = self._tree.protection(node)
        if protection & APPEND_ONLY or (protection and not by_handle):
            raise _refused(node)

    # -- flags, as ioctl(2) has them --

    def get(self, node: Node, command: int) -> bytes:
        """Answer FS_IOC_GETFLAGS or FS_IOC_FSGETXATTR (``ovl_fileattr_get``)."""
        protection = self._tree.protection(node)
        read = functools.partial(_read_flags_at, command, follow=self._tree.follow(node))
        answer = self._tree.door.ask_path(self._tree.path(node), ("flags", command), read)
        return _with_protection(answer, command, protection)

    def set(self, node: Node, command: int, data: bytes) -> None:
        """Do FS_IOC_SETFLAGS or FS_IOC_FSSETXATTR (``ovl_fileattr_set``); the kernel has checked who may.

        Raises DataCopyPending, EROFS, and what the file system of upper says; EPERM where it can't keep an attribute.
        """
        wanted, rest = split_protection(command, data)
        self._up.node(node, data=False)
        fd = self._open(node)
        try:
            self._keep(sysio.fd_path(fd), wanted)
            self._tree.set_protection(node, wanted)
            write_flags(fd, command, rest)
        finally:
            os.close(fd)
            self._up.notify_changed.append(node)

    def _keep(self, path: bytes, flags: int) -> None:
        name = self._tree.fmt.protattr
        try:
            if flags:
                os.setxattr(path, name, encode_protattr(flags))
            else:
                os.removexattr(path, name)
        except OSError as exc:
            if flags and exc.errno == errno.EOPNOTSUPP:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from None
            if flags or exc.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise

    def _open(self, node: Node) -> int:
        """Open the real object itself: of a metacopy the upper file, of a directory the topmost one."""
        if isinstance(node, Dir):
            fd = self._tree.dirfds.fds(node)[0]
            return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        if node.anchor >= 0:
            return os.open(sysio.fd_path(node.anchor), flags)
        dirfd, name = self._tree.place(node)
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=dirfd)


def read_flags(fd: int, command: int) -> bytes:
    """Answer FS_IOC_GETFLAGS or FS_IOC_FSGETXATTR for an open file."""
    if command == sysio.FS_IOC_GETFLAGS:
        return struct.pack("I", sysio.get_inode_flags(fd))
    return sysio.get_fsxattr(fd)


def _read_flags_at(command: int, path: bytes, *, follow: bool) -> bytes:
    """The same for a path; may run in a thread."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        return read_flags(fd, command)
    finally:
        os.close(fd)


def _with_protection(answer: bytes, command: int, protection: int) -> bytes:
    immutable, append = (
        (sysio.FS_IMMUTABLE, sysio.FS_APPEND) if command == sysio.FS_IOC_GETFLAGS else (_XFLAG_IMMUTABLE, _XFLAG_APPEND)
    )
    (flags,) = struct.unpack_from("I", answer)
    flags |= (immutable if protection & IMMUTABLE else 0) | (append if protection & APPEND_ONLY else 0)
    return struct.pack("I", flags) + answer[4:]


def write_flags(fd: int, command: int, data: bytes) -> None:
    """Do FS_IOC_SETFLAGS or FS_IOC_FSSETXATTR to an open file."""
    if command == sysio.FS_IOC_SETFLAGS:
        sysio.set_inode_flags(fd, struct.unpack_from("I", data)[0])
    else:
        sysio.set_fsxattr(fd, data)


def split_protection(command: int, data: bytes) -> tuple[int, bytes]:
    """Return FS_IMMUTABLE and FS_APPEND of what is to be set, and all the rest of it in the same form."""
    if len(data) < (4 if command == sysio.FS_IOC_SETFLAGS else _FSXATTR_BYTES):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    (flags,) = struct.unpack_from("I", data)
    if command == sysio.FS_IOC_SETFLAGS:
        return flags & _PROTECTION, struct.pack("I", flags & ~_PROTECTION)
    wanted = (sysio.FS_IMMUTABLE if flags & _XFLAG_IMMUTABLE else 0) | (sysio.FS_APPEND if flags & _XFLAG_APPEND else 0)
    return wanted, struct.pack("I", flags & ~(_XFLAG_IMMUTABLE | _XFLAG_APPEND)) + data[4:]


def _refused(node: Node) -> OSError:
    return OSError(errno.EPERM, os.strerror(errno.EPERM), node.name)
