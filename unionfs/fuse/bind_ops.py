"""The adapter for mounts with bind paths that the daemon serves: each request goes to the bind path or to the union.

Whose a request is, its node id tells (`bind.is_bind`); only a lookup in, or a change of, a directory with a point
attached needs a look at the table of points.

What keeps the host's changes visible at once:

- Entries of bind paths have timeouts of 0, and what is absent is not remembered: every use of a path asks for each of
  its names. The entry of a bind path's own root may be kept; nobody but us can change it. Attributes are good for the
  use of a path that asked for the name (bind.py has the rules). The option `cached` gives up on "at once".
- The answers cost little: the native layer gives those to GETATTR, on each node's ``O_PATH`` descriptor, and the
  frequent other requests don't go through pyfuse3 (bind_direct.py).
- Pages: with passthrough the kernel uses the host's own. Else it is asked to drop its own when it learns of another
  mtime or size (FUSE_AUTO_INVAL_DATA, in place of the union's explicit invalidation), and asks for attributes before
  each read, since they have timed out. Opening a file drops them as well. So mmap works as on any file system (direct
  I/O would take shared mappings away on older kernels). The union's own files lose little: their attributes don't time
  out, but the first read after a write reads anew.
- Symbolic links: their targets are cached with the inode, and never change: a replaced link is another node.
- Appending goes to the end that the host's file has: the native layer, or `write`, sees to it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields

from unionfs.config import MountConfig
from unionfs.core import protect, sysio
from unionfs.core.bind import CHANGING, BindDirHandle, BindPoint, Binds
from unionfs.core.bindnodes import BindNode, is_bind
from unionfs.core.dirhandle import DirHandle
from unionfs.core.inodes import Dir, Node
from unionfs.core.merge import Entry
from unionfs.core.union import Union
from unionfs.fuse import native
from unionfs.fuse.bind_direct import BindHandles, BindingDirect, NativeWatcher
from unionfs.fuse.ops import UnionOperations, forget_entry, handler, wanted_changes
from unionfs.fuse.wire import DT_SHIFT, UNKNOWN_INO


class BindingOperations(UnionOperations):
    """Serves one union, and bind paths in it."""

    def __init__(self, union: Union, config: MountConfig) -> None:
        super().__init__(union, config)
        mountpoint = os.fsencode(os.path.realpath(config.mountpoint))
        self._binds = Binds(union.inodes.map_ino, mountpoint, watcher=NativeWatcher())
        self._union_read_only = config.read_only
        self._bind_dirs: dict[int, BindDirHandle] = {}
        self._bind_handles = BindHandles()
        self._appending: set[int] = set()
        self._not_there = EntryAttributes()
        self._not_there.st_ino = 0
        self._not_there.entry_timeout = 0

    def _check_union(self) -> None:
        """Raise EROFS for a change of a read-only union: the kernel can't say so, since bind paths may be writable."""
        if self._union_read_only:
            raise FUSEError(errno.EROFS)

    def init(self) -> None:
        """Called by pyfuse3 before the kernel gets the answer to INIT."""
        super().init()
        native.auto_invalidate()
        native.ignore_sync(False)  # the host's files last, whatever was said about the union
        if self._native:
            self._direct = BindingDirect(
                self._binds,
                self._bind_dirs,
                self._bind_handles,
                self._union,
                self._handles,
                self._dir_handles,
                timeout=self._timeout,
                absent_timeout=self._absent_timeout,
                invalidate_changed=self._invalidate_changed,
                ended=self._ended,
                closed=self._following.closed,
                out_of_memory=self.out_of_memory,
                read_only=self._union_read_only,
            )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what the operations need in the background, for as long as the mount lives."""
        try:
            await super().run(task_status)
        finally:
            self.detach_all()

    def written(self) -> set[int]:
        """Return the node ids of what somebody has open for writing."""
        return super().written() | {node.id for fd, node in self._binds.open_files.items() if sysio.may_write(fd)}

    def counters(self) -> dict[str, int]:
        """Return figures for the log and for tools."""
        return {**super().counters(), **self._binds.counters()}

    # -- attaching --

    async def attach(self, point: BindPoint) -> None:
        """Put a bind path in its place, and have the kernel forget what it knew there.

        The mount point must exist. Not for use in a request: it waits until requests for the mount point are done.
        Raises OSError: ENOENT or ENOTDIR where the way to the mount point is missing, EBUSY where a path is attached.
        """
        try:
            parent = self._walk(point.target[:-1])
        except BaseException:
            os.close(point.fd)
            raise
        name = point.target[-1]
        self._binds.attach(
            *(parent.id, self._shown(parent), name, point.fd), read_only=point.read_only, cached=point.cached
        )
        if isinstance(parent, BindNode):
            self._binds.hold(parent)
        else:
            parent.nlookup += 1
            native.ask_again(parent.id)  # its listing is not the union's alone any more
        await trio.to_thread.run_sync(forget_entry, parent.id, name)

    def _walk(self, names: Sequence[bytes]) -> Dir | BindNode:
        here: Dir | BindNode = self._tree.root
        for name in names:
            below = self._below(here, name)
            if below is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            here = below
        return here

    def _below(self, parent: Dir | BindNode, name: bytes) -> Dir | BindNode | None:
        """Return a directory in a directory of either kind, across points; None where there is none."""
        root = self._binds.points.get((parent.id, name))
        if root is not None:
            return self._binds.directory(root.id)
        if isinstance(parent, BindNode):
            looked = self._binds.look(parent, name)
            return None if looked is None else self._binds.directory(looked[0].id)
        child = self._tree.child(parent, name)
        return None if child is None else self._union.directory(child.id)

    def detach_all(self) -> None:
        """Close everything that belongs to bind paths. For the end: nothing is served there any more."""
        self._binds.close()

    # -- replies --

    def _shown(self, node: Node | BindNode) -> int:
        return node.ino if self._native else node.id

    def _bound_attributes(self, node: BindNode, st: os.stat_result) -> EntryAttributes:
        attr = EntryAttributes()
        attr.st_ino = self._shown(node)
        attr.entry_timeout = attr.attr_timeout = node.bind.timeout
        attr.st_mode = st.st_mode
        attr.st_nlink = st.st_nlink
        attr.st_uid = st.st_uid
        attr.st_gid = st.st_gid
        attr.st_rdev = st.st_rdev
        attr.st_size = st.st_size
        attr.st_blksize = st.st_blksize
        attr.st_blocks = st.st_blocks
        attr.st_atime_ns = st.st_atime_ns
        attr.st_mtime_ns = st.st_mtime_ns
        attr.st_ctime_ns = st.st_ctime_ns
        return attr

    def _bound_entry(self, node: BindNode, st: os.stat_result) -> EntryAttributes:
        """Build the reply for a name; the caller counts the lookup."""
        attr = self._bound_attributes(node, st)
        attr.st_ino = node.id
        if self._native:
            attr.generation = node.ino  # the native layer shows it as st_ino
        if node is node.bind.root:
            attr.entry_timeout = self._timeout
        return attr

    def _counted(self, node: BindNode, st: os.stat_result) -> EntryAttributes:
        node.nlookup += 1
        return self._bound_entry(node, st)

    # -- names --

    @handler
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name."""
        binds = self._binds
        root = binds.points.get((parent_inode, name))
        if root is not None:
            return self._counted(root, binds.stat(root))
        if not is_bind(parent_inode):
            return await super().lookup(parent_inode, name, ctx)
        if len(name) > 255:
            raise FUSEError(errno.ENAMETOOLONG)
        looked = binds.look(binds.directory(parent_inode), name)
        return self._not_there if looked is None else self._counted(*looked)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Take lookups off nodes; those without any go."""
        others = []
        for node_id, count in inode_list:
            if is_bind(node_id):
                self._binds.forget(node_id, count)
            else:
                others.append((node_id, count))
        if others:
            await super().forget(others)

    @handler
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Return attributes."""
        if not is_bind(inode):
            return await super().getattr(inode, ctx)
        node = self._binds.node(inode)
        return self._bound_attributes(node, self._binds.stat(node))

    @handler
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Change attributes."""
        if not is_bind(inode):
            self._check_union()
            return await super().setattr(inode, attr, fields, fh, ctx)
        kill = self._caller(ctx) if fields.update_size and native.kill_suidgid(ctx.uid) else None
        node = self._binds.node(inode)
        changes, handle = wanted_changes(attr, fields), -1 if fh is None else fh
        st = self._binds.setattr(node, changes, handle, kill_for=kill, who=self._caller(ctx))
        return self._bound_attributes(node, st)

    @handler
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Return a symbolic link's target."""
        if not is_bind(inode):
            return await super().readlink(inode, ctx)
        return self._binds.readlink(self._binds.node(inode))

    @handler
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        """Create a special or regular file."""
        if not is_bind(parent_inode):
            self._check_union()
            return await super().mknod(parent_inode, name, mode, rdev, ctx)
        parent = self._binds.directory(parent_inode)
        return self._counted(*self._binds.mknod(parent, name, mode, rdev, self._caller(ctx)))

    @handler
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        """Create a directory."""
        if not is_bind(parent_inode):
            self._check_union()
            return await super().mkdir(parent_inode, name, mode, ctx)
        parent = self._binds.directory(parent_inode)
        return self._counted(*self._binds.mkdir(parent, name, mode, self._caller(ctx)))

    @handler
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        """Create a symbolic link."""
        if not is_bind(parent_inode):
            self._check_union()
            return await super().symlink(parent_inode, name, target, ctx)
        parent = self._binds.directory(parent_inode)
        return self._counted(*self._binds.symlink(parent, name, target, self._caller(ctx)))

    @handler
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Give a file one more name."""
        bound = is_bind(inode)
        if bound != is_bind(new_parent_inode):
            raise FUSEError(errno.EXDEV)
        if not bound:
            self._check_union()
            return await super().link(inode, new_parent_inode, new_name, ctx)
        node, parent = self._binds.node(inode), self._binds.directory(new_parent_inode)
        return self._counted(node, self._binds.link(node, parent, new_name))

    @handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a file's name; EBUSY for a bind path."""
        self._binds.check_not_point(parent_inode, name)
        if is_bind(parent_inode):
            self._binds.unlink(self._binds.directory(parent_inode), name)
        else:
            self._check_union()
            await super().unlink(parent_inode, name, ctx)

    @handler
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a directory; EBUSY for a bind path."""
        self._binds.check_not_point(parent_inode, name)
        if is_bind(parent_inode):
            self._binds.rmdir(self._binds.directory(parent_inode), name)
        else:
            self._check_union()
            await super().rmdir(parent_inode, name, ctx)

    @handler
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Rename; EBUSY for a bind path, EXDEV across its border."""
        binds = self._binds
        binds.check_not_point(parent_inode_old, name_old)
        binds.check_not_point(parent_inode_new, name_new)
        bound = is_bind(parent_inode_old)
        if bound != is_bind(parent_inode_new):
            raise FUSEError(errno.EXDEV)
        if not bound:
            self._check_union()
            await super().rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, ctx)
            return
        old_dir, new_dir = binds.directory(parent_inode_old), binds.directory(parent_inode_new)
        binds.rename(old_dir, name_old, new_dir, name_new, flags)

    # -- files --

    @handler
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file; the handle is the number of a descriptor of it."""
        if not is_bind(inode):
            if flags & CHANGING:
                self._check_union()
            return await super().open(inode, flags, ctx)
        kill = self._caller(ctx) if flags & os.O_TRUNC and native.kill_suidgid(ctx.uid) else None
        node = self._binds.node(inode)
        fd = self._binds.open_file(node, flags, kill_for=kill)
        return self._bound_file(node, fd, flags)

    def _bound_file(self, node: BindNode, fd: int, flags: int) -> FileInfo:
        try:
            self._bind_handles.opened(node, fd, flags)
        except BaseException:
            self._binds.close_file(fd)
            raise
        if not self._native and flags & (os.O_APPEND | os.O_ACCMODE) == os.O_APPEND | os.O_WRONLY:
            self._appending.add(fd)  # one that can read may be mapped: what comes then has its own offset
        return FileInfo(fh=fd, keep_cache=False)

    @handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Create a file and open it."""
        if not is_bind(parent_inode):
            self._check_union()
            return await super().create(parent_inode, name, mode, flags, ctx)
        who = self._caller(ctx)
        kill = who if flags & os.O_TRUNC and native.kill_suidgid(ctx.uid) else None
        parent = self._binds.directory(parent_inode)
        node, st, fd = self._binds.create_file(parent, name, mode, flags, who, kill_for=kill)
        return self._bound_file(node, fd, flags), self._counted(node, st)

    @handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to an open file; with the native layer this is served there."""
        if fh not in self._appending:
            return await super().write(fh, off, buf)
        end = os.fstat(fh).st_size
        await super().write(fh, end, b"")  # clears suid and sgid
        return os.pwritev(fh, [buf], end, os.RWF_APPEND)

    @handler
    async def release(self, fh: int) -> None:
        """Close an open file."""
        node = self._binds.open_files.get(fh)
        if node is None:
            await super().release(fh)
            return
        self._appending.discard(fh)
        self._bind_handles.closed(node, fh)
        self._binds.close_file(fh)

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make a file durable, off the loop."""
        if fh in self._binds.open_files:
            await trio.to_thread.run_sync(os.fdatasync if datasync else os.fsync, fh)
        else:
            await super().fsync(fh, datasync)

    # -- directories --

    @handler
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory."""
        if not is_bind(inode):
            return await super().opendir(inode, ctx)
        self._serial += 2
        self._bind_dirs[self._serial] = BindDirHandle(self._binds.directory(inode))
        return self._serial

    @handler
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        if self._bind_dirs.pop(fh, None) is None:
            await super().releasedir(fh)

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make a directory's entries durable, off the loop."""
        handle = self._bind_dirs.get(fh)
        if handle is None:
            await super().fsyncdir(fh, datasync)
            return
        fd = self._binds.open_for_sync(handle.node)
        try:
            await trio.to_thread.run_sync(os.fsync, fd)
        finally:
            os.close(fd)

    @handler
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory; in a bind path without attributes, for they would be out of date at once."""
        handle = self._bind_dirs.get(fh)
        if handle is None:
            await super().readdir(fh, start_id, token)
            return
        node = self._binds.directory(handle.node.id)
        up = self._shown(node.parent) if node.parent is not None else node.bind.parent_ino
        for position, name, ino in ((1, b".", self._shown(node)), (2, b"..", up)):
            if start_id < position and not pyfuse3.readdir_reply(token, name, self._bare(ino, stat.S_IFDIR), position):
                return
        entries = self._binds.read_entries(handle, start_id)
        for at in range(max(start_id - 2, 0), len(entries)):
            if not self._list(token, node, *entries[at], at + 3):
                return

    def _list(
        self, token: pyfuse3.ReaddirToken, parent: BindNode, name: bytes, ino: int, kind: int, position: int
    ) -> bool:
        if self._native:
            return pyfuse3.readdir_reply(token, name, self._bare(ino, kind << DT_SHIFT), position)
        root = self._binds.points.get((parent.id, name))
        try:
            looked = self._binds.look(parent, name) if root is None else (root, self._binds.stat(root))
        except OSError:
            # Listed all the same: whoever asks for it gets the error.
            return pyfuse3.readdir_reply(token, name, self._bare(UNKNOWN_INO, kind << DT_SHIFT), position)
        return looked is None or self._reply_bound(token, name, *looked, position)

    def _reply_bound(
        self, token: pyfuse3.ReaddirToken, name: bytes, node: BindNode, st: os.stat_result, position: int
    ) -> bool:
        node.nlookup += 1
        if pyfuse3.readdir_reply(token, name, self._bound_entry(node, st), position):
            return True
        self._binds.forget(node.id, 1)
        return False

    def _reply_entry(self, token: pyfuse3.ReaddirToken, handle: DirHandle, entry: Entry, position: int) -> bool:
        """List an entry of the union; at a point the bind path's root is listed in its place."""
        root = self._binds.points.get((handle.node.id, entry.name))
        if root is None:
            return super()._reply_entry(token, handle, entry, position)
        return self._reply_bound(token, entry.name, root, self._binds.stat(root), position)

    # -- inode flags --

    def _flags_now(self, inode: int, command: int, data: bytes) -> bytes:
        """Those of bind paths are the host's objects' own, which the host's file system sees to."""
        if is_bind(inode):
            return self._binds.inode_flags(self._binds.node(inode), command, data)
        if command in protect.SET:
            self._check_union()
        return super()._flags_now(inode, command, data)

    # -- extended attributes --

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """Return an extended attribute."""
        if not is_bind(inode):
            return await super().getxattr(inode, name, ctx)
        return self._binds.getxattr(self._binds.node(inode), os.fsdecode(name))

    @handler
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """Return the names of extended attributes."""
        if not is_bind(inode):
            return await super().listxattr(inode, ctx)
        names = self._binds.listxattr(self._binds.node(inode))
        if ctx.uid != 0:
            names = [name for name in names if not name.startswith("trusted.")]  # as for the union
        return [os.fsencode(name) for name in names]

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute."""
        if not is_bind(inode):
            self._check_union()
            await super().setxattr(inode, name, value, ctx)
            return
        flags = native.xattr_flags()
        self._binds.setxattr(self._binds.node(inode), os.fsdecode(name), value, flags, self._caller(ctx))

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an extended attribute."""
        if is_bind(inode):
            self._binds.removexattr(self._binds.node(inode), os.fsdecode(name))
        else:
            self._check_union()
            await super().removexattr(inode, name, ctx)
