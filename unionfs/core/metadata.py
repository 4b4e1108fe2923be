"""What a copy takes over from the lower object beside its data: owner, attributes, ACLs, flags, mode, times, origin.

The order matters, and is the callers' to keep (copyup.py): whoever writes data or changes the owner clears capabilities
and set-user-id bits, so these come after it; times come last (``ovl_copy_xattr``, ``ovl_copy_fileattr``,
``ovl_set_attr`` in fs/overlayfs/copy_up.c).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from unionfs.core import sysio
from unionfs.core.inodes import UNLINKED, UPPER, Dir, Node
from unionfs.core.markers import encode_protattr, is_fd_path
from unionfs.core.tree import Tree

CAPABILITY: Final = "security.capability"
COPIED_FLAGS: Final = sysio.FS_SYNC | sysio.FS_NOATIME  # OVL_COPY_FS_FLAGS_MASK
_MUST_COPY: Final = ("security.", "system.posix_acl_")
_PROTECTION: Final = sysio.FS_IMMUTABLE | sysio.FS_APPEND
_NO_FLAGS: Final = frozenset((errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL))


def inode_flags(path: bytes) -> int:
    """Return the flags of a file or directory; 0 where it can't be opened, or has none. May run in a thread."""
    follow = 0 if is_fd_path(path) else os.O_NOFOLLOW
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | follow)
    except OSError:
        return 0
    try:
        return sysio.get_inode_flags(fd)
    except OSError as exc:
        if exc.errno not in _NO_FLAGS:
            raise
        return 0
    finally:
        os.close(fd)


def set_mode_and_times(st: os.stat_result, fd: int) -> None:
    """Give an object, whose descriptor may be ``O_PATH``, the mode and the times of a stat result. Raises OSError."""
    os.chmod(sysio.fd_path(fd), stat.S_IMODE(st.st_mode))
    sysio.utimens_fd(fd, st.st_atime_ns, st.st_mtime_ns)


class Metadata:
    """Copies the metadata of one union's objects."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._heads: dict[int, bytes] = {}

    def foresee(self, node: Node, source: bytes, st: os.stat_result) -> None:
        """Ask a slow layer for all that the copy of a node takes, before anything is made."""
        door = self._tree.door
        if not door.is_slow or node.flags & UPPER:
            return
        door.foresee(source, lambda name: not self._tree.fmt.is_private(name))
        if stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode):
            door.ask_path(source, ("flags",), inode_flags)
        if isinstance(node, Dir):
            self._tree.origin_value(node.stack[0], self._tree.dirfds.fds(node)[0], b"")
        elif not node.flags & UNLINKED:
            self._tree.origin_value(node.layer, *self._tree.place(node))

    def copy(
        self,
        source: bytes,
        st: os.stat_result,
        target: bytes,
        *,
        follow_source: bool,
        follow: bool,
    ) -> int:
        """Copy owner, then attributes, ACLs and inode flags; mode and times are the caller's, last.

        Args:
            source: a path of the lower object, and whether it is to be followed.
            st: its stat result.
            target: the same of the copy; its inode flags are copied only if it is to be followed (a descriptor's path).

        Returns:
            The st_ino of the copy.

        Raises:
            OSError: what the layers raise, but for attributes that upper can't store and need not.
        """
        new = os.stat(target, follow_symlinks=follow)
        if (new.st_uid, new.st_gid) != (st.st_uid, st.st_gid):
            os.chown(target, st.st_uid, st.st_gid, follow_symlinks=follow)
        self.copy_xattrs(source, target, follow_source=follow_source, follow=follow)
        if follow:
            self.copy_inode_flags(source, st, target)
        return new.st_ino

    def copy_xattrs(self, source: bytes, target: bytes, *, follow_source: bool, follow: bool) -> None:
        """Copy all attributes but the union's own (``ovl_copy_xattr``); of two paths, each to be followed or not.

        Raises OSError; not for what upper doesn't support, unless it is one of those that must be copied.
        """
        private = self._tree.fmt.is_private
        door = self._tree.door
        names = door.listxattr(source, follow_symlinks=True) if follow_source else door.list_xattrs(source)
        for name in names:
            if private(name):
                continue
            try:
                value = door.getxattr(source, name, follow_symlinks=follow_source)
                os.setxattr(target, name, value, follow_symlinks=follow)
            except OSError as exc:
                if exc.errno == errno.ENODATA or (exc.errno == errno.EOPNOTSUPP and not name.startswith(_MUST_COPY)):
                    continue
                raise

    def copy_inode_flags(self, source: bytes, st: os.stat_result, target: bytes) -> None:
        """Keep append-only and immutable in an attribute, sync and noatime as flags (``ovl_copy_fileattr``)."""
        if not (stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode)):
            return
        flags = self._tree.door.ask_path(source, ("flags",), inode_flags)
        if flags & _PROTECTION:
            try:
                os.setxattr(target, self._tree.fmt.protattr, encode_protattr(flags))
            except OSError as exc:
                if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                    raise
        if flags & COPIED_FLAGS:
            fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
            try:
                mine = sysio.get_inode_flags(fd) & ~COPIED_FLAGS
                sysio.set_inode_flags(fd, mine | (flags & COPIED_FLAGS))
            except OSError as exc:
                if exc.errno not in _NO_FLAGS and exc.errno != errno.EPERM:
                    raise
            finally:
                os.close(fd)

    def mark_origin(self, node: Node, st: os.stat_result, path: bytes, *, follow: bool) -> bytes:
        """Give a copy its origin and return it; a hard link that gets separated from its other names has none."""
        if node.flags & UNLINKED or (st.st_nlink > 1 and self._tree.resolver.index_fd < 0):
            return b""
        dirfd, name = self._tree.place(node)
        return self.set_origin(node.layer, dirfd, name, path, follow=follow)

    def set_origin(self, layer: int, dirfd: int, name: bytes, target: bytes, *, follow: bool = True) -> bytes:
        """Give a copy (path *target*) the origin of an object of a lower layer and return it (``ovl_set_origin_fh``).

        Empty, and not stored, where upper can't store it; raises OSError for anything else.
        """
        value = self._tree.origin_value(layer, dirfd, name)
        try:
            os.setxattr(target, self._tree.fmt.origin, value, follow_symlinks=follow)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise
            return b""
        return value

    def origin_head(self, layer: int) -> bytes:
        """Return what the origins of all objects of a lower layer begin with (`Resolver.origin_head`)."""
        head = self._heads.get(layer)
        if head is None:
            head = self._heads[layer] = self._tree.resolver.origin_head(self._tree.layers.layer(layer))
        return head
