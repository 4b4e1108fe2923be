"""The adapter between pyfuse3 and the union: thin, with one error translator and one place that leaves the loop.

Code between two awaits is atomic. A handler calls the union synchronously; only four things await: data copies of
some size (`_settle`), answers of slow layers, fsync, and what pyfuse3 itself waits for. While one handler waits, the
others are served. A handler that a slow layer blocks is called again from its beginning (`handler`), so it changes
nothing before the union has done what it was asked for, and nothing blocks it after that.

The kernel may cache everything for ever, since the layers below don't change and upper changes only through here.
What copy-up changes behind a cached inode (link counts, change times) is invalidated before the request is answered.
Only attributes and listings: that waits for nothing; to invalidate entries or files' pages in a request could deadlock.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from unionfs.config import MountConfig
from unionfs.core import acl, protect
from unionfs.core.caller import Caller, caller, clear_suidgid
from unionfs.core.changes import Changes, stored
from unionfs.core.copyup import DataCopy, DataCopyPending
from unionfs.core.dirhandle import DirHandle
from unionfs.core.inodes import INDEXED, META, Node
from unionfs.core.merge import Entry
from unionfs.core.slow import WouldBlock, committed
from unionfs.core.union import Union
from unionfs.fuse import native
from unionfs.fuse.direct import Direct
from unionfs.fuse.following import Following
from unionfs.fuse.handles import Handles, NativeDirectories
from unionfs.fuse.patience import Patience
from unionfs.fuse.watching import ABSENT_SECONDS, Watching
from unionfs.fuse.wire import DT_SHIFT, UNKNOWN_INO

if TYPE_CHECKING:
    from unionfs.fuse.restart import Keeper

log = logging.getLogger(__name__)

_SAY_AGAIN_SECONDS = 60.0
"""How long nothing is said of memory that runs out again."""

FOREVER = 365 * 86400.0

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="UnionOperations")
Handler = Callable[Concatenate[S, P], Coroutine[Any, Any, R]]


def handler(fn: Handler[S, P, R]) -> Handler[S, P, R]:
    """Translate errors at the one place: an OSError is its errno, no memory ENOMEM, anything else is logged and EIO."""

    @functools.wraps(fn)
    async def wrapper(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            if self.keeper is not None:
                return await self.keeper.attend(lambda: fn(self, *args, **kwargs))
            if self.patience.needed:
                return await self.patience.attempt(fn, self, *args, **kwargs)
            return await fn(self, *args, **kwargs)
        except OSError as exc:
            raise FUSEError(exc.errno or errno.EIO) from None
        except FUSEError:
            raise
        except MemoryError:
            self.out_of_memory()
            raise FUSEError(errno.ENOMEM) from None
        except Exception:
            log.exception("%s failed", fn.__name__)
            raise FUSEError(errno.EIO) from None

    return wrapper


def wanted_changes(attr: EntryAttributes, fields: SetattrFields) -> Changes:
    """What a SETATTR asks for."""
    return Changes(
        mode=attr.st_mode if fields.update_mode else None,
        uid=attr.st_uid if fields.update_uid else None,
        gid=attr.st_gid if fields.update_gid else None,
        size=attr.st_size if fields.update_size else None,
        atime=attr.st_atime_ns if fields.update_atime else None,
        mtime=attr.st_mtime_ns if fields.update_mtime else None,
        # pyfuse3 doesn't say which times are to be now; if both, they are the same to the nanosecond.
        touched=fields.update_atime and fields.update_mtime and attr.st_atime_ns == attr.st_mtime_ns,
    )


def forget_entry(parent: int, name: bytes) -> None:
    """Have the kernel drop an entry, and listings that it keeps of the parent.

    Not in the loop: it waits for requests that are under way.
    """
    with contextlib.suppress(FileNotFoundError):  # it knew nothing
        pyfuse3.invalidate_entry(parent, name)
    forget_inode(parent)


def forget_inode(node_id: int) -> None:
    """Have the kernel forget pages, listings and attributes of an inode. Not in the loop either."""
    with contextlib.suppress(FileNotFoundError):
        pyfuse3.invalidate_inode(node_id)


def _forget_data(node_ids: Iterable[int]) -> None:
    """Have the kernel forget the data of files, once it has written what is new in it.

    Not in the loop: it waits for requests (``fuse_reverse_inval_inode``).
    """
    for node_id in node_ids:
        with contextlib.suppress(OSError):
            pyfuse3.invalidate_inode(node_id, attr_only=False)


class UnionOperations(pyfuse3.Operations):
    """Serves one union to the kernel."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, union: Union, config: MountConfig, keeper: Keeper | None = None) -> None:
        super().__init__()
        self.keeper = keeper
        self._union = union
        self._tree = union.tree
        self._inodes = union.inodes
        self._timeout = FOREVER if config.timeout is None else config.timeout
        self._dir_handles: dict[int, DirHandle] = {} if keeper is None else keeper.directories
        self._serial = 0
        self._native = False
        self._ids = config.ids if config.ids.needed else None
        self._owning = config.shows_as_stored
        self.enable_acl = config.acl
        self._handles = Handles(
            timeout=self._timeout,
            read_only=config.upper is None,
            owning=self._owning,
            sharing=config.lower != "watch" and keeper is None,
            fstat=union.door.fstat,
        )
        self._watching: Watching | None = None
        self._absent_timeout = self._timeout
        if config.lower == "watch":
            self._watching = Watching(union, forget_entry=forget_entry, forget_inode=forget_inode)
            self._absent_timeout = min(self._timeout, ABSENT_SECONDS)
        union.door.stat_opened = config.upper is None or config.lower == "watch"
        self._invalidations = 0
        self._memory_silent_until = 0.0
        self._inodes.reserve.on_spent = self._say_out_of_memory
        self.patience = Patience(union.door)
        self._following = Following(
            union,
            self.patience,
            invalidate_changed=self._invalidate_changed,
            invalidate_data=lambda node: _forget_data({node.id}),
            allowed=keeper is None,
        )
        union.up.offload = True
        self.answering = trio.Event()  # the kernel's INIT has come: from now on the mount answers

    def covered(self) -> Mapping[tuple[int, bytes], object] | None:
        """Where something else than the union's is: (id of a directory, name).

        A subclass that adds other nodes than the union's must say it, or else all requests take pyfuse3's way.
        """
        return {} if type(self) is UnionOperations else None

    def init(self) -> None:
        """Called by pyfuse3 when the kernel has agreed on the protocol."""
        self.answering.set()
        self._native = native.active()
        self._union.up.copy_plain = native.copy_plain if self._native else None
        if self._native:
            self._union.lister.getdents = native.getdents
        native.ignore_sync(self._union.config.volatile)
        native.set_ioctl_handler(self.inode_flags)
        covered = self.covered()
        if self.keeper is not None:
            self.keeper.attach(self._union, self._handles)
        if self._native and self._owning:
            self._tree.dirfds.watcher = NativeDirectories(self._timeout)
        if self._native and covered is not None:
            self._direct = Direct(
                self._union,
                self._handles,
                self._dir_handles,
                timeout=self._timeout,
                absent_timeout=self._absent_timeout,
                invalidate_changed=self._invalidate_changed,
                ended=self._ended,
                closed=self._following.closed,
                covered=covered,
                out_of_memory=self.out_of_memory,
                keeper=self.keeper,
            )

    def take_over(self) -> None:
        """Go on where another daemon was ended; no request may have been received yet. Raises OSError."""
        assert self.keeper is not None
        nodes = self.keeper.take_over()
        self._serial = max((handle for handle in self._dir_handles if not handle & 1), default=0)
        self._direct.take_over()
        for node in nodes:
            self._invalidate(node)  # it may have been about to

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what the operations need in the background, for as long as the mount lives."""
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self.patience.run)
            if self._watching is not None:
                await self._nursery.start(self._watching.run)
            await self._following.run(task_status)

    async def finish(self) -> None:
        """Wait until all that was written is where it belongs, before the mount ends on a signal.

        An unmount does as much by itself; a signal also ends a mount that is in use. What was written to a shared
        mapping may still be in the kernel's page cache then, which the end of the session would throw away.
        """
        await self._following.finish()
        await trio.to_thread.run_sync(_forget_data, self.written())

    def written(self) -> set[int]:
        """Return the node ids of what somebody has open for writing."""
        return self._union.written_nodes()

    def counters(self) -> dict[str, int]:
        """Return figures for the log and for tools."""
        union = self._union
        return {
            "nodes": len(self._inodes.nodes),
            "retired": len(self._inodes.retired),
            "open_files": len(union.open_files),
            "open_directories": len(self._dir_handles),
            "copy_ups": union.up.copies,
            "following_copies": len(self._following),
            "invalidations": self._invalidations,
            "watches": 0 if self._watching is None else len(self._watching),
            "slow_answers": self.patience.answered,
            **{f"native_{name}": value for name, value in native.counters().items()},
        }

    # -- helpers --

    def out_of_memory(self) -> None:
        """Have what is needed from now on from what was kept back for that."""
        self._inodes.reserve.spend()

    def _say_out_of_memory(self) -> None:
        now = time.monotonic()
        if now >= self._memory_silent_until:
            self._memory_silent_until = now + _SAY_AGAIN_SECONDS
            log.error("out of memory: nothing but what is in use can be had until the kernel has forgotten some inodes")

    def _named(self, node: Node, st: os.stat_result) -> EntryAttributes:
        """Build the reply for a name that was looked up or listed; the caller counts the lookup."""
        attr = self._entry(node, st)
        if (st.st_nlink > 1 or node.flags & INDEXED) and self._tree.awaits_links(node, st):
            attr.entry_timeout = 0
        return attr

    def _entry(self, node: Node, st: os.stat_result) -> EntryAttributes:
        attr = self._attributes(node, st)
        attr.st_ino = node.id
        if node.ino != node.id and self._native:
            attr.generation = node.ino  # the native layer shows it as st_ino
        return attr

    def _attributes(self, node: Node, st: os.stat_result) -> EntryAttributes:
        attr = EntryAttributes()
        attr.st_ino = node.ino if self._native else node.id
        attr.entry_timeout = attr.attr_timeout = self._timeout
        if node.handles and not self._handles.attributes_stay(node, st.st_mode):
            attr.attr_timeout = 0
        attr.st_mode = st.st_mode
        attr.st_nlink = self._tree.nlink(node, st)
        if self._ids is not None:
            st = self._ids.shown(st)
        attr.st_uid = st.st_uid
        attr.st_gid = st.st_gid
        attr.st_rdev = st.st_rdev
        attr.st_size = st.st_size
        attr.st_blksize = st.st_blksize
        attr.st_blocks = self._tree.blocks(node, st) if node.flags & META else st.st_blocks
        attr.st_atime_ns = st.st_atime_ns
        attr.st_mtime_ns = st.st_mtime_ns
        attr.st_ctime_ns = st.st_ctime_ns
        return attr

    def _absent(self) -> EntryAttributes:
        """Build a reply that lets the kernel remember that there is nothing."""
        attr = EntryAttributes()
        attr.st_ino = 0
        attr.entry_timeout = self._absent_timeout
        return attr

    def _caller(self, ctx: RequestContext) -> Caller:
        return caller(self._ids, ctx.uid, ctx.gid, ctx.umask, ctx.pid)

    async def _settled(self, operation: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Call an operation that changes something; wait for the copies of data that it needs first."""
        while True:
            try:
                result = operation(*args, **kwargs)
            except DataCopyPending as pending:
                await self._settle(pending.job)
                continue
            finally:
                if self._union.up.notify_changed:
                    self._invalidate_changed()
            committed()
            return result

    def _invalidate_changed(self) -> None:
        """Tell the kernel about attributes that copy-up changed behind its cache, before it gets the reply."""
        changed = self._union.up.notify_changed
        for node in changed:
            self._invalidate(node)
        changed.clear()

    def _invalidate(self, node: Node) -> None:
        if node.nlookup:
            self._invalidations += 1
            with contextlib.suppress(OSError):
                # To drop a listing waits for nothing: unlike those of files its pages are never written or read again.
                pyfuse3.invalidate_inode(node.id, attr_only=not node.is_dir)

    async def _settle(self, job: DataCopy) -> None:
        """Run a copy of data in a thread, or let it follow, or wait for whoever does."""
        if job.follows:
            await self._following.end(job)
            return
        if job.waiters is not None:
            assert isinstance(job.waiters, trio.Event)
            await job.waiters.wait()
            return
        job.waiters = done = trio.Event()
        try:
            with trio.CancelScope(shield=True):
                if not await self._following.begin(job):
                    await self.patience.copy(job.run)
        except BaseException:
            job.node.job = None
            job.abandon()
            raise
        else:
            if not job.follows:
                with trio.CancelScope(shield=True):
                    await self.patience.call(job.publish)
        finally:
            done.set()
            self._tree.forget(job.node, 0)

    # -- names --

    @handler
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name (``ovl_lookup``)."""
        parent = self._union.directory(parent_inode)
        if len(name) > 255:
            raise FUSEError(errno.ENAMETOOLONG)
        looked = self._tree.look(parent, name)
        if looked is None:
            return self._absent()
        node, st = looked
        if node.links:
            self._tree.prefer(node, parent, name)
        attr = self._named(node, st)
        node.nlookup += 1
        return attr

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Take lookups off nodes; those without any go."""
        nodes = self._inodes.nodes
        for node_id, count in inode_list:
            node = nodes.get(node_id)
            if node is not None and node_id != pyfuse3.ROOT_INODE:
                try:
                    self._tree.forget(node, count)
                except Exception:
                    log.exception("forget failed")
            else:
                self._inodes.retired.discard(node_id)
        if self.keeper is not None:
            self.keeper.flush()

    @handler
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Return attributes (``ovl_getattr``)."""
        node = self._union.node(inode)
        return self._attributes(node, self._tree.stat(node))

    @handler
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Change attributes (``ovl_setattr``)."""
        kill = self._caller(ctx) if fields.update_size and native.kill_suidgid(ctx.uid) else None
        node = self._union.node(inode)
        handle = -1 if fh is None else fh
        changes, who = stored(self._ids, wanted_changes(attr, fields)), self._caller(ctx)
        st = await self._settled(self._union.setattr, node, changes, handle, kill_for=kill, who=who)
        return self._attributes(node, st)

    @handler
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Return a symbolic link's target."""
        return self._union.readlink(self._union.node(inode))

    def _made(self, node: Node, st: os.stat_result) -> EntryAttributes:
        node.nlookup += 1
        return self._entry(node, st)

    @handler
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        """Create a special or regular file."""
        parent = self._union.directory(parent_inode)
        return self._made(*await self._settled(self._union.dirs.mknod, parent, name, mode, rdev, self._caller(ctx)))

    @handler
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        """Create a directory."""
        parent = self._union.directory(parent_inode)
        return self._made(*await self._settled(self._union.dirs.mkdir, parent, name, mode, self._caller(ctx)))

    @handler
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        """Create a symbolic link."""
        parent = self._union.directory(parent_inode)
        return self._made(*await self._settled(self._union.dirs.symlink, parent, name, target, self._caller(ctx)))

    @handler
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Give a file one more name."""
        node = self._union.node(inode)
        parent = self._union.directory(new_parent_inode)
        await self._settled(self._union.dirs.link, node, parent, new_name)
        node.nlookup += 1
        return self._named(node, self._tree.stat(node))

    @handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a file's name."""
        await self._settled(self._union.dirs.unlink, self._union.directory(parent_inode), name)

    @handler
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a directory."""
        await self._settled(self._union.dirs.rmdir, self._union.directory(parent_inode), name)

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
        """Rename."""
        old_dir = self._union.directory(parent_inode_old)
        new_dir = self._union.directory(parent_inode_new)
        await self._settled(self._union.dirs.rename, old_dir, name_old, new_dir, name_new, flags)

    # -- files --

    @handler
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file; the handle is the number of a descriptor of its data."""
        kill = self._caller(ctx) if flags & os.O_TRUNC and native.kill_suidgid(ctx.uid) else None
        node = self._union.node(inode)
        fd = await self._settled(self._union.open_file, node, flags, kill_for=kill)
        try:
            if self._handles.opened(node, fd, flags):
                self._invalidate(node)
        except OSError:
            self._union.close_file(fd)
            raise
        if self._native and self.patience.needed:
            self._handles.share(node, fd, flags)
        return FileInfo(fh=fd, keep_cache=True)

    @handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Create a file and open it."""
        parent = self._union.directory(parent_inode)
        node, st, fd = await self._settled(self._union.create_file, parent, name, mode, flags, self._caller(ctx))
        try:
            self._handles.created(node, fd, flags, st)
        except OSError:
            self._union.close_file(fd)
            raise
        return FileInfo(fh=fd, keep_cache=True), self._made(node, st)

    @handler
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read from an open file; with the native layer this is served there."""
        if self.patience.needed and not self._union.open_files[fh].is_upper:
            return await trio.to_thread.run_sync(os.pread, fh, size, off)
        return os.pread(fh, size, off)

    @handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to an open file; with the native layer this is served there."""
        done = os.pwrite(fh, buf, off)
        # Without the native layer nobody says who writes, and the kernel leaves suid and sgid to us.
        clear_suidgid(fh, None)
        return done

    @handler
    async def flush(self, fh: int) -> None:
        """Nothing is kept back, so the kernel need not ask again."""
        raise FUSEError(errno.ENOSYS)

    @handler
    async def release(self, fh: int) -> None:
        """Close an open file."""
        node = self._union.open_files[fh]
        self._handles.closed(node, fh)
        self._union.close_file(fh)
        self._following.closed(node)

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make a file durable, off the loop; what follows must be there for that."""
        node = self._union.open_files[fh]
        if not self._union.config.volatile:
            await self._following.settle(node)
        if node.flags & META:
            if not datasync:
                await self._sync(node)  # the handle is one of the lower file's data
        elif self._union.syncable(fh):
            await trio.to_thread.run_sync(os.fdatasync if datasync else os.fsync, fh)

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make a directory's entries durable, off the loop."""
        await self._sync(self._dir_handles[fh].node)

    async def _sync(self, node: Node) -> None:
        fd = self._union.open_for_sync(node)
        if fd >= 0:
            try:
                await trio.to_thread.run_sync(os.fsync, fd)
            finally:
                os.close(fd)

    # -- directories --

    @handler
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory."""
        node = self._union.directory(inode)
        self._serial += 2  # `direct` takes the odd ones
        self._dir_handles[self._serial] = DirHandle(node)
        return self._serial

    @handler
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        del self._dir_handles[fh]

    @handler
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory with the attributes of each entry; positions are 1 and 2 for the dots, then cookies."""
        handle = self._dir_handles[fh]
        node = handle.node
        entries = self._union.read_entries(handle, start_id)
        for position, name in ((1, b"."), (2, b"..")):
            if start_id < position:
                of = node if position == 1 or node.parent is None else node.parent
                if not pyfuse3.readdir_reply(token, name, self._bare(of.ino, stat.S_IFDIR), position):
                    return
        replied = start_id < 2
        for position, entry in entries:
            try:
                if not self._reply_entry(token, handle, entry, position):
                    return
            except WouldBlock:
                if not replied:
                    raise
                return  # the kernel will ask for the rest
            replied = True
        self._ended(handle)

    def _ended(self, handle: DirHandle) -> None:
        """A reader is about to be told that there is no more, and what the kernel has is complete (csrc/listers.c)."""
        if handle.kept and native.end_listing(handle.node.id):
            self._invalidate(handle.node)

    def _reply_entry(self, token: pyfuse3.ReaddirToken, handle: DirHandle, entry: Entry, position: int) -> bool:
        name = entry.name
        try:
            looked = self._union.look_at(handle, entry)
        except OSError:
            # Listed all the same: whoever asks for it gets the error.
            return pyfuse3.readdir_reply(token, name, self._bare(UNKNOWN_INO, entry.kind << DT_SHIFT), position)
        except WouldBlock:
            # Attributes that must be waited for are left to those who want them, where an entry can do without.
            ino = self._union.listed_ino(handle.node, entry) if self._native else None
            if ino is None:
                raise
            return pyfuse3.readdir_reply(token, name, self._bare(ino, entry.kind << DT_SHIFT), position)
        if looked is None:
            return True  # gone since the listing was made
        node, st = looked
        if not pyfuse3.readdir_reply(token, name, self._named(node, st), position):
            self._tree.forget(node, 0)
            return False
        node.nlookup += 1
        return True

    def _bare(self, ino: int, mode: int) -> EntryAttributes:
        """Build an entry that only has a number and a type: node id 0 tells the kernel that there is no more."""
        attr = EntryAttributes()
        attr.st_ino = 0 if self._native else ino
        if self._native:
            attr.generation = ino
        attr.st_mode = mode
        return attr

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Return the file system's figures."""
        real = self._union.statfs()
        data = StatvfsData()
        for field in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"
        ):  # fmt: skip
            setattr(data, field, getattr(real, field))
        data.f_namemax = real.f_namemax
        return data

    # -- inode flags --

    def inode_flags(self, request: object, inode: int, fh: int, command: int, data: bytes) -> None:
        """Get or set inode flags or project attributes, as the native layer asks for it (``native``)."""
        try:
            answer = self._flags_now(inode, command, data)
        except (DataCopyPending, WouldBlock):
            self._nursery.start_soon(self._flags_later, request, inode, command, data)
        except Exception as exc:
            self._flags_failed(request, exc)
        else:
            native.answer_ioctl(request, 0, answer)

    async def _flags_later(self, request: object, inode: int, command: int, data: bytes) -> None:
        """The same once data is up, or a slow layer has answered; a nursery's task, so nothing may be raised."""
        try:
            answer = await self.patience.attempt(self._settled, self._flags_now, inode, command, data)
        except Exception as exc:
            self._flags_failed(request, exc)
        else:
            native.answer_ioctl(request, 0, answer)

    @staticmethod
    def _flags_failed(request: object, exc: Exception) -> None:
        if isinstance(exc, OSError | FUSEError):
            native.answer_ioctl(request, exc.errno or errno.EIO)
        else:
            log.error("an ioctl failed", exc_info=exc)
            native.answer_ioctl(request, errno.EIO)

    def _flags_now(self, inode: int, command: int, data: bytes) -> bytes:
        """Raises DataCopyPending or WouldBlock, before anything was done."""
        node = self._union.node(inode)
        if command in protect.GET:
            return self._union.protection.get(node, command)
        try:
            self._union.protection.set(node, command, data)
        finally:
            if self._union.up.notify_changed:
                self._invalidate_changed()
        if node.handles and self._tree.protection(node):
            native.disown_attributes(node.id)  # who sets them must ask from now on
        return b""

    # -- extended attributes --

    def _xattr_name(self, name: bytes) -> str:
        """Return an attribute's name. Raises EOPNOTSUPP for an ACL where there are none."""
        text = os.fsdecode(name)
        if text in acl.NAMES and not self.enable_acl:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return text

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """Return an extended attribute."""
        text = self._xattr_name(name)
        value = self._union.getxattr(self._union.node(inode), text)
        if self._ids is not None and text in acl.NAMES:
            value = acl.translated(value, self._ids.shown_uid, self._ids.shown_gid)
        return value

    @handler
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """Return the names of extended attributes."""
        names = self._union.listxattr(self._union.node(inode))
        if ctx.uid != 0:
            # Listing them takes CAP_SYS_ADMIN, which the kernel leaves to the file system (``ovl_can_list``).
            names = [name for name in names if not name.startswith("trusted.")]
        if not self.enable_acl:
            names = [name for name in names if name not in acl.NAMES]
        return [os.fsencode(name) for name in names]

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute."""
        flags = native.xattr_flags()
        node = self._union.node(inode)
        text = self._xattr_name(name)
        if self._ids is not None and text in acl.NAMES:
            value = acl.translated(value, self._ids.stored_uid, self._ids.stored_gid)
        await self._settled(self._union.setxattr, node, text, value, flags, self._caller(ctx))

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an extended attribute."""
        node = self._union.node(inode)
        await self._settled(self._union.removexattr, node, self._xattr_name(name), self._caller(ctx))
