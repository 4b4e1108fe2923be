"""Operations that change directories: create, remove, link, rename (fs/overlayfs/dir.c).

Each ends in one system call that publishes it: a create, a link, a rename. What must be true before that call (a
parent copied up, marks, link counts) is made true first and is harmless if the call never comes. What replaces
something visible is built in the work directory.

A name that upper doesn't have but a lower layer does is hidden by a whiteout; a new directory at such a name, or
simply below a merge directory, is marked opaque so that nothing of the lower layers shows through.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Final, NamedTuple

from unionfs.config import MountConfig
from unionfs.core import acl, sysio, whiteouts
from unionfs.core.caller import Caller
from unionfs.core.copyup import CopyUp
from unionfs.core.inodes import (
    IMPURE,
    INDEXED,
    META,
    OPAQUE,
    ORIGIN,
    PROTECTION_KNOWN,
    REDIRECT,
    UNLINKED,
    UPPER,
    Dir,
    Node,
)
from unionfs.core.listing import Lister
from unionfs.core.markers import REDIRECT_MAX, get_xattr
from unionfs.core.protect import Protection
from unionfs.core.tree import Tree
from unionfs.core.workdir import WorkDir, set_impure

_OPEN_FOR_CREATE: Final = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class DirOps:
    """Changes directories of one mount.

    Every operation names its place by a directory and one path component, takes *mode* and *flags* as the system call
    of its name does, and applies the umask of *who* asks unless a default ACL takes its place. It raises OSError: what
    that system call says of the merged directory, EROFS without upper, EPERM for immutable and append-only objects,
    ENOMEM before anything is changed; and DataCopyPending where data must be copied first.
    """

    def __init__(self, config: MountConfig, tree: Tree, up: CopyUp, lister: Lister, protection: Protection) -> None:
        self._protection = protection
        self._tree = tree
        self._up = up
        self._lister = lister
        self._can_redirect = config.redirect_dir == "on"
        # ovl_allow_offline_changes: with any of these a lower may not change while unmounted either.
        self._mark_new_dirs = (
            self._can_redirect or config.metacopy or tree.resolver.index_fd >= 0 or config.xino == "on"
        )
        self._uid, self._gid = os.geteuid(), os.getegid()

    def _work(self) -> WorkDir:
        if self._tree.work is None:
            raise sysio.error(errno.EROFS)
        return self._tree.work

    def _begin(self) -> WorkDir:
        """Make sure that a change may be made and needn't stop in the midst. Raises EROFS, ENOMEM."""
        work = self._work()
        self._tree.inodes.reserve.before_change()
        return work

    # -- create --

    def create(self, parent: Dir, name: bytes, mode: int, flags: int, who: Caller) -> tuple[Node, os.stat_result, int]:
        """Create a regular file and open it; return its node, stat result and descriptor."""
        made = _Regular(flags & (os.O_ACCMODE | os.O_SYNC | os.O_DSYNC | os.O_NOATIME))
        node, st = self._make(parent, name, stat.S_IFREG | stat.S_IMODE(mode), who, made)
        return node, st, made.fd

    def mkdir(self, parent: Dir, name: bytes, mode: int, who: Caller) -> tuple[Node, os.stat_result]:
        """Create a directory."""
        return self._make(parent, name, stat.S_IFDIR | stat.S_IMODE(mode), who, _Directory())

    def mknod(self, parent: Dir, name: bytes, mode: int, rdev: int, who: Caller) -> tuple[Node, os.stat_result]:
        """Create a fifo, socket, device or regular file; EPERM for a 0:0 character device, which is a whiteout."""
        if stat.S_ISCHR(mode) and rdev == 0:
            raise sysio.error(errno.EPERM, name)
        return self._make(parent, name, mode, who, _Special(rdev))

    def symlink(self, parent: Dir, name: bytes, target: bytes, who: Caller) -> tuple[Node, os.stat_result]:
        """Create a symbolic link."""
        return self._make(parent, name, stat.S_IFLNK | 0o777, who, _Symlink(target))

    def _make(self, parent: Dir, name: bytes, mode: int, who: Caller, made: _Maker) -> tuple[Node, os.stat_result]:
        """Create an object with the owner, mode and ACLs that the kernel would give it (``ovl_create_object``)."""
        work = self._work()
        self._tree.inodes.reserve.check()
        self._check_name(name)
        self._protection.check_write(parent)
        self._up.directory(parent)
        upper = self._tree.dirfds.upper(parent)
        plan = self._plan(parent, upper, mode, who)
        is_dir = stat.S_ISDIR(mode)
        if plan.direct:
            try:
                made.make(upper, name, plan.mode)
            except FileExistsError:
                if not self._whiteout_at(upper, name):
                    raise
            else:
                opaque = is_dir and parent.is_merged and self._mark_new_dirs
                if opaque:
                    opaque = self._set_opaque(sysio.entry_path(upper, name), best_effort=True)
                return self._made(parent, upper, name, made, opaque=opaque)
        over = self._whiteout_at(upper, name)
        with work.temp_entry() as temp:
            made.make(work.fd, temp, plan.bits)
            try:
                self._dress(work.fd, temp, plan, made)
                opaque = is_dir and (over or (parent.is_merged and self._mark_new_dirs))
                if opaque:
                    opaque = self._set_opaque(sysio.entry_path(work.fd, temp), best_effort=not over)
                flags = 0 if over and not is_dir else sysio.RENAME_EXCHANGE if over else sysio.RENAME_NOREPLACE
                sysio.rename(work.fd, temp, upper, name, flags)
            except BaseException:
                made.close()
                raise
        if over and is_dir:
            work.discard(temp)
        return self._made(parent, upper, name, made, opaque=opaque)

    @staticmethod
    def _check_name(name: bytes) -> None:
        if len(name) > 255:
            raise sysio.error(errno.ENAMETOOLONG, name)

    def _made(self, parent: Dir, upper: int, name: bytes, made: _Maker, *, opaque: bool) -> tuple[Node, os.stat_result]:
        st = os.fstat(made.fd) if made.fd >= 0 else os.stat(name, dir_fd=upper, follow_symlinks=False)
        device = self._tree.layers.layer(0).device
        node = self._tree.inodes.add(
            self._tree.inodes.map_ino(device, st.st_ino), stat.S_IFMT(st.st_mode), parent, name, made=True
        )
        parent.version += 1
        node.rino = st.st_ino
        node.flags = UPPER | PROTECTION_KNOWN | (OPAQUE if opaque else 0)
        if isinstance(node, Dir):
            node.stack = (0,)
        self._tree.inodes.note_upper(node)
        return node, st

    def _plan(self, parent: Dir, upper: int, mode: int, who: Caller) -> _Plan:
        """Work out owner, mode and ACLs of a new object (``inode_init_owner``, ``posix_acl_create``)."""
        st = os.fstat(upper)
        is_dir, is_link = stat.S_ISDIR(mode), stat.S_ISLNK(mode)
        gid, bits = who.gid, stat.S_IMODE(mode)
        inherits = bool(st.st_mode & stat.S_ISGID)
        if inherits:
            gid = st.st_gid
            if is_dir:
                bits |= stat.S_ISGID
        access: bytes | None = None
        default = None if is_link else self._default_acl(parent, upper)
        if default is not None:
            bits, access = acl.inherit(default, bits)
        elif not is_link:
            bits &= ~who.umask
        direct = who.uid == self._uid and (gid == self._gid or inherits)
        # The file system itself applies the default ACL to what is made in place: it gets the mode as asked for.
        asked = stat.S_IFMT(mode) | (bits if default is None else stat.S_IMODE(mode))
        return _Plan(direct, asked, stat.S_IFMT(mode) | bits, who.uid, gid, access, default if is_dir else None)

    def _default_acl(self, parent: Dir, upper: int) -> bytes | None:
        known = parent.default_acl
        if isinstance(known, bool):
            known = parent.default_acl = get_xattr(sysio.fd_path(upper), acl.DEFAULT)
        return known

    def _dress(self, dirfd: int, name: bytes, plan: _Plan, made: _Maker) -> None:
        st = os.fstat(made.fd) if made.fd >= 0 else os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        if (st.st_uid, st.st_gid) != (plan.uid, plan.gid):
            os.chown(name, plan.uid, plan.gid, dir_fd=dirfd, follow_symlinks=False)
        path = sysio.entry_path(dirfd, name)
        if plan.access is not None:
            os.setxattr(path, acl.ACCESS, plan.access, follow_symlinks=False)
        if plan.default is not None:
            os.setxattr(path, acl.DEFAULT, plan.default, follow_symlinks=False)
        if not stat.S_ISLNK(plan.bits):
            sysio.chmod_at(dirfd, name, stat.S_IMODE(plan.bits))

    def _set_opaque(self, path: bytes, *, best_effort: bool) -> bool:
        """Mark a directory opaque; tell whether that is done, which may only fail as a *best_effort*."""
        try:
            os.setxattr(path, self._tree.fmt.opaque, b"y", follow_symlinks=False)
        except OSError as exc:
            if not best_effort:
                raise sysio.error(errno.EIO if exc.errno == errno.EOPNOTSUPP else exc.errno or errno.EIO) from None
            return False
        return True

    def _whiteout_at(self, upper: int, name: bytes) -> bool:
        """Tell whether upper has a whiteout at a name; raises EEXIST for anything else there."""
        try:
            st = os.stat(name, dir_fd=upper, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if self._work().is_whiteout(upper, name, st):
            return True
        raise sysio.error(errno.EEXIST, name)

    # -- link --

    def link(self, node: Node, parent: Dir, name: bytes) -> None:
        """Give a file one more name (``ovl_link``)."""
        work = self._begin()
        self._check_name(name)
        self._protection.check_write(parent)
        self._protection.check_change(node)
        self._up.node(node, data=bool(node.flags & UNLINKED))
        self._up.directory(parent)
        if node.flags & META:
            self._set_redirect(node, absolute=True)
        upper = self._tree.dirfds.upper(parent)
        over = self._whiteout_at(upper, name)
        if node.flags & ORIGIN:
            set_impure(parent, upper, self._tree.fmt, IMPURE)
        self._up.set_nlink(node)
        if over:
            with work.temp_entry() as temp:
                self._link_real(node, work.fd, temp)
                sysio.rename(work.fd, temp, upper, name)
        else:
            self._link_real(node, upper, name)
        node.nlink += 1
        self._tree.named(node, parent, name)

    def _link_real(self, node: Node, to_fd: int, to: bytes) -> None:
        if node.anchor >= 0:
            sysio.linkat_fd(node.anchor, to_fd, to)
            return
        dirfd, name = self._tree.place(node)
        os.link(name, to, src_dir_fd=dirfd, dst_dir_fd=to_fd, follow_symlinks=False)

    # -- remove --

    def unlink(self, parent: Dir, name: bytes) -> None:
        """Remove a name that is no directory's (``ovl_unlink``)."""
        self._begin()
        node = self._tree.need(parent, name)
        if node.is_dir:
            raise sysio.error(errno.EISDIR, name)
        self._protection.check_remove(parent, node)
        self._up.idle(node)
        self._up.directory(parent)
        self._before_unlink(node, parent, name)
        positive = self._tree.resolver.lower_positive(parent, name)
        anchor = node.anchor
        last = self._keep_reachable(node, parent, name)
        try:
            if positive:
                whiteouts.put(self._work(), self._tree.dirfds.upper(parent), name)
            else:
                os.unlink(name, dir_fd=self._tree.dirfds.upper(parent))
        except BaseException:
            self._keeps_its_name(node, anchor)
            raise
        self._lost_name(node, parent, name, last=last)

    def _before_unlink(self, node: Node, parent: Dir, name: bytes) -> None:
        """Make the link count of an indexed file right before one of its names goes (``ovl_nlink_start``)."""
        if not node.is_upper and self._tree.resolver.index_fd >= 0 and self._tree.stat(node).st_nlink > 1:
            self._up.node(node, data=False)
        if node.flags & INDEXED:
            self._up.alias(node, parent, name)
            self._up.set_nlink(node)

    def _keep_reachable(self, node: Node, parent: Dir, name: bytes) -> bool:
        """Open what is about to lose the last name that is known; tell whether it is that."""
        if node.links or (node.flags & INDEXED and node.nlink > 1):
            return False
        if not (node.parent is parent and node.name == name) and not node.flags & INDEXED:
            return False
        if node.nlookup or node.handles:
            self._tree.anchor(node)
        return True

    @staticmethod
    def _keeps_its_name(node: Node, anchor: int) -> None:
        """The name didn't go: the node is reached by it again, where `anchor` says that it was before."""
        if anchor < 0 <= node.anchor:
            os.close(node.anchor)
            node.anchor = -1

    def _lost_name(self, node: Node, parent: Dir, name: bytes, *, last: bool) -> None:
        self._tree.inodes.drop_name(node, parent, name)
        if node.flags & INDEXED:
            node.nlink -= 1
            if node.nlink <= 0:
                self._drop_index(node)
        if last and (node.anchor < 0 or not node.is_upper or os.fstat(node.anchor).st_nlink == 0):
            node.flags |= UNLINKED
        self._tree.forget(node, 0)

    def _drop_index(self, node: Node) -> None:
        """Remove the index entry of a file without a name (``ovl_cleanup_index``), or leave that to the next mount."""
        entry = self._tree.index_names.pop(node)
        node.flags &= ~INDEXED
        index_fd = self._tree.resolver.index_fd
        with contextlib.suppress(OSError):
            if os.stat(entry, dir_fd=index_fd, follow_symlinks=False).st_nlink == 1:
                os.unlink(entry, dir_fd=index_fd)

    def rmdir(self, parent: Dir, name: bytes) -> None:
        """Remove an empty directory; one that holds only whiteouts is empty (``ovl_rmdir``)."""
        self._begin()
        node = self._tree.need(parent, name)
        if not isinstance(node, Dir):
            raise sysio.error(errno.ENOTDIR, name)
        self._protection.check_remove(parent, node)
        positive = self._tree.resolver.lower_positive(parent, name)
        if not node.is_pure_upper or positive:
            self._require_empty(node)
        self._up.directory(parent)
        self._tree.dirfds.pin(node)
        try:
            if positive:
                self._whiteout_dir(node, parent, name)
            else:
                self._remove_upper_dir(node, parent, name)
        except BaseException:
            self._tree.dirfds.drop(node)
            raise
        self._gone_dir(node, parent, name)

    def _gone_dir(self, node: Dir, parent: Dir, name: bytes) -> None:
        self._tree.inodes.drop_name(node, parent, name)
        node.flags |= UNLINKED
        self._tree.forget(node, 0)

    def _require_empty(self, node: Dir) -> None:
        if self._lister.entries(node):
            raise sysio.error(errno.ENOTEMPTY, node.name)

    def _remove_upper_dir(self, node: Dir, parent: Dir, name: bytes) -> None:
        upper = self._tree.dirfds.upper(parent)
        try:
            os.rmdir(name, dir_fd=upper)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self._lister.entries(node):
                raise sysio.error(errno.ENOTEMPTY, name) from None
            self._clear_empty(node, parent, name)
            os.rmdir(name, dir_fd=upper)

    def _whiteout_dir(self, node: Dir, parent: Dir, name: bytes) -> None:
        """Exchange a directory with a whiteout; its remains vanish with the work directory's."""
        work = self._work()
        upper = self._tree.dirfds.upper(parent)
        if not node.is_upper:
            whiteouts.put(work, upper, name)
            return
        if work.whiteout_form == "wh":
            self._clear_empty(node, parent, name)
        whiteouts.put_over_directory(work, upper, name)

    def _clear_empty(self, node: Dir, parent: Dir, name: bytes) -> None:
        """Replace a directory that holds only whiteouts by an empty, opaque one (``ovl_clear_empty``)."""
        work = self._work()
        if not self._lister.upper_leftovers(node):
            return
        upper = self._tree.dirfds.upper(parent)
        old = self._tree.dirfds.upper(node)
        st = os.fstat(old)
        with work.temp_entry() as temp:
            os.mkdir(temp, 0o700, dir_fd=work.fd)
            path = sysio.entry_path(work.fd, temp)
            os.chown(path, st.st_uid, st.st_gid, follow_symlinks=False)
            self._up.metadata.copy_xattrs(sysio.fd_path(old), path, follow_source=True, follow=False)
            self._set_opaque(path, best_effort=False)
            sysio.chmod_at(work.fd, temp, stat.S_IMODE(st.st_mode))
            sysio.utimens_at(work.fd, temp, st.st_atime_ns, st.st_mtime_ns)
            sysio.rename(work.fd, temp, upper, name, sysio.RENAME_EXCHANGE)
        work.discard(temp)
        self._tree.dirfds.drop(node)
        node.stack, node.where = (0,), node.where and node.where[:1]
        node.flags |= OPAQUE
        self._tree.dirfds.pin(node)
        self._tree.inodes.renumber_upper(node, os.fstat(self._tree.dirfds.upper(node)).st_ino)

    # -- rename --

    def rename(self, old_dir: Dir, old_name: bytes, new_dir: Dir, new_name: bytes, flags: int) -> None:
        """Rename, with the flags of ``renameat2(2)`` (``ovl_rename``).

        RENAME_WHITEOUT, which overlayfs refuses, leaves a whiteout at the old name. Raises EXDEV for a directory
        with a lower part where redirects are off, or whose redirect would be too long.
        """
        self._begin()
        self._check_name(new_name)
        exchange = bool(flags & sysio.RENAME_EXCHANGE)
        if flags & ~7 or (exchange and flags & (sysio.RENAME_NOREPLACE | sysio.RENAME_WHITEOUT)):
            raise sysio.error(errno.EINVAL)
        tree = self._tree
        old = tree.need(old_dir, old_name)
        new = tree.child(new_dir, new_name)
        if new is None and exchange:
            raise sysio.error(errno.ENOENT, new_name)
        if new is not None and flags & sysio.RENAME_NOREPLACE:
            raise sysio.error(errno.EEXIST, new_name)
        if old is new:
            return
        self._check_protection(old, old_dir, new, new_dir)
        self._check_types(old, new, new_name, exchange=exchange)
        self._can_move(old)
        if exchange and new is not None:
            self._can_move(new)
        elif isinstance(new, Dir) and not new.is_pure_upper:
            self._require_empty(new)
        self._up.node(old, data=False)
        self._up.alias(old, old_dir, old_name)
        self._up.directory(new_dir)
        if new is not None and exchange:
            self._up.node(new, data=False)
            self._up.alias(new, new_dir, new_name)
        elif new is not None and not isinstance(new, Dir):
            self._up.idle(new)
            self._before_unlink(new, new_dir, new_name)
        if exchange and new is not None:
            self._exchange(old, old_dir, old_name, new, new_dir, new_name)
        else:
            self._replace(
                old,
                old_dir,
                old_name,
                new,
                new_dir,
                new_name,
                leave_whiteout=bool(flags & sysio.RENAME_WHITEOUT),
            )

    def _check_protection(self, old: Node, old_dir: Dir, new: Node | None, new_dir: Dir) -> None:
        self._protection.check_remove(old_dir, old)
        if new is None:
            self._protection.check_write(new_dir)
        else:
            self._protection.check_remove(new_dir, new)

    @staticmethod
    def _check_types(old: Node, new: Node | None, name: bytes, *, exchange: bool) -> None:
        if new is None or exchange:
            return
        if old.is_dir and not new.is_dir:
            raise sysio.error(errno.ENOTDIR, name)
        if new.is_dir and not old.is_dir:
            raise sysio.error(errno.EISDIR, name)

    def _can_move(self, node: Node) -> None:
        """A directory with a lower part can only be moved with a redirect."""
        if isinstance(node, Dir) and not node.is_pure_upper and not self._can_redirect:
            raise sysio.error(errno.EXDEV, node.name)

    def _replace(
        self,
        old: Node,
        old_dir: Dir,
        old_name: bytes,
        new: Node | None,
        new_dir: Dir,
        new_name: bytes,
        *,
        leave_whiteout: bool,
    ) -> None:
        tree, work = self._tree, self._work()
        last = False
        positive = leave_whiteout or tree.resolver.lower_positive(old_dir, old_name)
        self._mark_for_move(old, old_dir, new_dir)
        if isinstance(new, Dir):
            self._empty_for_rename(new, new_dir, new_name)
        old_fd, new_fd = tree.dirfds.upper(old_dir), tree.dirfds.upper(new_dir)
        whiteout_there = new is None and self._whiteout_at(new_fd, new_name)
        anchor = new.anchor if new is not None else -1
        if new is not None and not isinstance(new, Dir):
            last = self._keep_reachable(new, new_dir, new_name)
        try:
            if positive and whiteout_there:
                whiteouts.move_one(work, old_fd, old_name, new_fd, new_name)
            elif positive:
                whiteouts.rename_leaving_one(work, old_fd, old_name, new_fd, new_name, over=new is not None)
            elif whiteout_there and isinstance(old, Dir):
                sysio.rename(old_fd, old_name, new_fd, new_name, sysio.RENAME_EXCHANGE)
                with contextlib.suppress(OSError):  # it is moved; a whiteout that stays hides nothing
                    os.unlink(old_name, dir_fd=old_fd)
            else:
                sysio.rename(old_fd, old_name, new_fd, new_name)
        except BaseException:
            if isinstance(new, Dir):
                tree.dirfds.drop(new)  # another one may have its name now
            elif new is not None:
                self._keeps_its_name(new, anchor)
            raise
        if isinstance(new, Dir):
            self._gone_dir(new, new_dir, new_name)
        elif new is not None:
            self._lost_name(new, new_dir, new_name, last=last)
        tree.moved(old, old_dir, old_name, new_dir, new_name)

    def _empty_for_rename(self, new: Dir, new_dir: Dir, new_name: bytes) -> None:
        """Hold a directory that is about to be replaced, and have nothing in upper's, not even whiteouts."""
        self._tree.dirfds.pin(new)
        try:
            if new.is_upper and self._lister.upper_leftovers(new):
                self._require_empty(new)
                self._clear_empty(new, new_dir, new_name)
        except BaseException:
            self._tree.dirfds.drop(new)
            raise

    def _exchange(self, old: Node, old_dir: Dir, old_name: bytes, new: Node, new_dir: Dir, new_name: bytes) -> None:
        tree = self._tree
        self._mark_for_move(old, old_dir, new_dir)
        self._mark_for_move(new, new_dir, old_dir)
        old_fd, new_fd = tree.dirfds.upper(old_dir), tree.dirfds.upper(new_dir)
        sysio.rename(old_fd, old_name, new_fd, new_name, sysio.RENAME_EXCHANGE)
        tree.exchanged(old, old_dir, old_name, new, new_dir, new_name)

    def _mark_for_move(self, node: Node, from_dir: Dir, to_dir: Dir) -> None:
        """Set what keeps an object itself at its new place: impure above, redirect or opaque on it."""
        tree = self._tree
        same = from_dir is to_dir
        if not same and node.flags & ORIGIN:
            set_impure(to_dir, tree.dirfds.upper(to_dir), tree.fmt, IMPURE)
        if isinstance(node, Dir):
            if not node.is_pure_upper:
                self._set_redirect(node, absolute=not same)
            elif not node.flags & OPAQUE and to_dir.is_merged:
                try:
                    os.setxattr(tree.path(node), tree.fmt.opaque, b"y")
                except OSError as exc:
                    if exc.errno != errno.EOPNOTSUPP:
                        raise
                    raise sysio.error(errno.EXDEV, node.name) from None
                node.flags |= OPAQUE
        elif node.flags & META:
            self._set_redirect(node, absolute=not same or bool(node.flags & INDEXED))

    def _set_redirect(self, node: Node, *, absolute: bool) -> None:
        """Note where the lower part of a moved object is (``ovl_set_redirect``)."""
        tree = self._tree
        path = tree.path(node)
        if node.flags & REDIRECT:
            value = get_xattr(path, tree.fmt.redirect)
            if value and (not absolute or value.startswith(b"/")):
                return
        value = self._overlay_path(node) if absolute else node.name
        if len(value) > REDIRECT_MAX:
            raise sysio.error(errno.EXDEV, node.name)
        try:
            os.setxattr(path, tree.fmt.redirect, value, follow_symlinks=tree.follow(node))
        except OSError:
            raise sysio.error(errno.EXDEV, node.name) from None
        node.flags |= REDIRECT

    def _overlay_path(self, node: Node) -> bytes:
        """Return the path in the lower layers: names from the root, replaced by redirects where they are known."""
        parts: list[bytes] = []
        length = 0
        at: Node | None = node
        while at is not None and at.parent is not None:
            part = (get_xattr(self._tree.path(at), self._tree.fmt.redirect) if at.flags & REDIRECT else None) or at.name
            length += len(part) + 1
            if length > REDIRECT_MAX + 1:
                raise sysio.error(errno.EXDEV, node.name)
            parts.append(part)
            if part.startswith(b"/"):
                return b"/".join(reversed(parts))
            at = at.parent
        return b"/" + b"/".join(reversed(parts))


class _Plan(NamedTuple):
    """What a new object is to be."""

    direct: bool  # may be made in place: the file system gives it the right owner by itself
    mode: int  # for making it in place
    bits: int  # what the mode ends as
    uid: int
    gid: int
    access: bytes | None
    default: bytes | None


class _Maker:
    """How one kind of object is made; `fd` is left open where the kind has one."""

    fd = -1

    def make(self, dirfd: int, name: bytes, mode: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Regular(_Maker):
    def __init__(self, flags: int) -> None:
        self._flags = flags

    def make(self, dirfd: int, name: bytes, mode: int) -> None:
        self.fd = os.open(name, self._flags | _OPEN_FOR_CREATE, stat.S_IMODE(mode), dir_fd=dirfd)


class _Directory(_Maker):
    def make(self, dirfd: int, name: bytes, mode: int) -> None:
        os.mkdir(name, stat.S_IMODE(mode), dir_fd=dirfd)


class _Special(_Maker):
    def __init__(self, rdev: int) -> None:
        self._rdev = rdev

    def make(self, dirfd: int, name: bytes, mode: int) -> None:
        os.mknod(name, mode, self._rdev, dir_fd=dirfd)


class _Symlink(_Maker):
    def __init__(self, target: bytes) -> None:
        self._target = target

    def make(self, dirfd: int, name: bytes, mode: int) -> None:
        del mode
        os.symlink(self._target, name, dir_fd=dirfd)
