"""The short way: requests that are answered without pyfuse3.

pyfuse3 makes a coroutine, a context and an attribute object for each request, which costs more than most of them
need. Where the native layer is in force, it hands the frequent requests as they come from the device to a method of
`Direct`, named by the opcode: with the node id, the caller's uid, gid and pid, and the bytes of the request's body
(include/uapi/linux/fuse.h). What the method returns is the answer:

- bytes: the body of the answer;
- an int: an errno, 0 for success without a body;
- True: the answer comes later (`native.sync_later`);
- None: nothing was done, and pyfuse3 shall handle the request. So goes what would have to wait (for a copy of data or
  a slow layer), and what isn't the union's.

An OSError is its errno, no memory ENOMEM; any other exception is logged and EIO. Nothing here waits, so each method is
atomic.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from unionfs.core import sysio
from unionfs.core.caller import Caller, caller
from unionfs.core.changes import Changes, stored
from unionfs.core.copyup import DataCopyPending
from unionfs.core.dirhandle import DOTS, DirHandle
from unionfs.core.inodes import INDEXED, META, NUMBER_BITS, PLAIN, PLAIN_MASK, UNLINKED, Dir, Node
from unionfs.core.merge import Entry
from unionfs.core.slow import WouldBlock
from unionfs.core.union import Union
from unionfs.fuse import native, wire
from unionfs.fuse.handles import Handles
from unionfs.fuse.wire import (
    DT_SHIFT,
    FOPEN_CACHE_DIR,
    FOPEN_KEEP_CACHE,
    FOPEN_NOFLUSH,
    FOPEN_PASSTHROUGH,
    UNKNOWN_INO,
    Opcode,
)

if TYPE_CHECKING:
    from unionfs.fuse.restart import Keeper

log = logging.getLogger(__name__)

Answer = bytes | int | None
Handler = Callable[[int, int, int, int, bytes], Answer]

# FUSE_SETATTR's `valid`.
_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME, _FH, _ATIME_NOW, _MTIME_NOW = (1 << bit for bit in range(9))
_TOUCHED: Final = _ATIME_NOW | _MTIME_NOW

_NAME_MAX: Final = 255
_LASTING: Final = 3600.0

_setattr_in: Final = struct.Struct("=IIQQQqqqIIIIIIII").unpack_from
_mkdir_in: Final = struct.Struct("=II").unpack_from
_DIRENT_SIZE: Final = 24

_MANY: Final = 8192
"""From so many entries on a listing goes without attributes, unless these are asked for."""

_COLD_SECONDS: Final = 100e-6
"""An entry whose attributes take longer has its inode on a disk; from memory they take a tenth of it."""


class Direct:
    """Answers the frequent requests of one mount."""

    def __init__(
        self,
        union: Union,
        handles: Handles,
        dir_handles: dict[int, DirHandle],
        *,
        timeout: float,
        absent_timeout: float,
        invalidate_changed: Callable[[], None],
        ended: Callable[[DirHandle], None],
        closed: Callable[[Node], None],
        covered: Mapping[tuple[int, bytes], object],
        out_of_memory: Callable[[], None],
        keeper: Keeper | None = None,
    ) -> None:
        """Share with the operations what both work on.

        Args:
            union: the union.
            handles: its open files.
            dir_handles: its open directories, by handle number.
            timeout: how long the kernel may keep names and attributes, in seconds.
            absent_timeout: how long it may remember that there is no such name.
            invalidate_changed: tells the kernel of attributes that copy-up changed.
            ended: is told of readers that are about to be told that a listing ends.
            closed: is told of files of which a handle was closed.
            covered: (id of a directory, name) where something else than the union's is.
            out_of_memory: is told when there is no memory.
            keeper: is told of all that changes.
        """
        self._union = union
        self._tree = union.tree
        self._up = union.up
        self._dirs = union.dirs
        self._nodes = union.inodes.nodes
        self._retired = union.inodes.retired
        self._handles = handles
        self._dir_handles = dir_handles
        self._timeout = float(timeout)
        self._ids = union.config.ids if union.config.ids.needed else None
        self._getxattr = union.getxattr_of_unchanging if timeout >= _LASTING else union.getxattr
        self._invalidate_changed = invalidate_changed
        self._ended = ended
        self._closed = closed
        self._out_of_memory = out_of_memory
        self._covered = covered
        native.number_bits(NUMBER_BITS)
        self._absent = bytes(16) + struct.pack("=Q", int(absent_timeout)) + bytes(8)
        self._absent += struct.pack("=I", int(absent_timeout % 1 * 1e9)) + bytes(wire.ENTRY_SIZE - 36)
        self._serial = 0
        self._reopens = keeper is None
        handlers = self._handlers()
        if not union.config.shows_as_stored:
            del handlers[Opcode.GETXATTR]  # an ACL may name other owners than the stored one, or must not be seen
        elif timeout >= _LASTING and keeper is None:
            native.tell_lacking(union.inodes.nodes, union.absent, PLAIN_MASK, PLAIN)
        if union.door.is_slow:
            handlers = {opcode: _unblocked(handler) for opcode, handler in handlers.items()}
        if keeper is not None:
            handlers = {opcode: keeper.keeping(opcode, handler) for opcode, handler in handlers.items()}
        native.answer_directly(handlers, self._failed)

    def _handlers(self) -> dict[int, Callable[[int, int, int, int, bytes], Answer]]:
        """Return the handlers by opcode."""
        return {
            Opcode.LOOKUP: self.lookup,
            Opcode.FORGET: self.forget,
            Opcode.GETATTR: self.getattr,
            Opcode.SETATTR: self.setattr,
            Opcode.READLINK: self.readlink,
            Opcode.SYMLINK: self.symlink,
            Opcode.MKDIR: self.mkdir,
            Opcode.UNLINK: self.unlink,
            Opcode.RMDIR: self.rmdir,
            Opcode.RENAME: self.rename,
            Opcode.OPEN: self.open,
            Opcode.RELEASE: self.release,
            Opcode.GETXATTR: self.getxattr,
            Opcode.OPENDIR: self.opendir,
            Opcode.RELEASEDIR: self.releasedir,
            Opcode.FSYNCDIR: self.fsyncdir,
            Opcode.CREATE: self.create,
            Opcode.BATCH_FORGET: self.batch_forget,
            Opcode.READDIRPLUS: self.readdirplus,
            Opcode.RENAME2: self.rename2,
        }

    # -- helpers --

    def _failed(self, exc: BaseException) -> None:
        if isinstance(exc, MemoryError):
            self._out_of_memory()
        else:
            log.error("a request failed", exc_info=exc)

    def _directory(self, node_id: int, name: bytes) -> Dir | None:
        """Return the union's directory in which *name* is its own, None where pyfuse3 must see to it."""
        node = self._nodes.get(node_id)
        if not isinstance(node, Dir) or (self._covered and (node_id, name) in self._covered):
            return None
        return node

    def _caller(self, uid: int, gid: int, umask: int, pid: int) -> Caller:
        return caller(self._ids, uid, gid, umask, pid)

    def _changed(self) -> None:
        if self._up.notify_changed:
            self._invalidate_changed()

    def _entry(self, node: Node, st: os.stat_result) -> bytes:
        """Build the answer for a name (``struct fuse_entry_out``); the caller counts the lookup."""
        timeout = attributes = self._timeout
        blocks = nlink = -1
        flags = node.flags
        if flags & (INDEXED | UNLINKED) or node.fmt == stat.S_IFDIR:
            nlink = self._tree.nlink(node, st)
        if flags & META:
            blocks = self._tree.blocks(node, st)
        if (st.st_nlink > 1 or flags & INDEXED) and self._tree.awaits_links(node, st):
            timeout = 0.0
        if node.handles and not self._handles.attributes_stay(node, st.st_mode):
            attributes = 0.0
        if self._ids is not None:
            st = self._ids.shown(st)
        return native.pack_entry(node.id, node.ino, timeout, attributes, nlink, blocks, st)

    def _attributes(self, node: Node, st: os.stat_result) -> bytes:
        """Build ``struct fuse_attr_out``."""
        timeout = self._timeout
        blocks = nlink = -1
        flags = node.flags
        if flags & (INDEXED | UNLINKED) or node.fmt == stat.S_IFDIR:
            nlink = self._tree.nlink(node, st)
        if flags & META:
            blocks = self._tree.blocks(node, st)
        if node.handles and not self._handles.attributes_stay(node, st.st_mode):
            timeout = 0.0
        if self._ids is not None:
            st = self._ids.shown(st)
        return native.pack_attributes(node.ino, timeout, nlink, blocks, st)

    def _handed_out(self, fd: int) -> bytes:
        """Build ``struct fuse_open_out``."""
        backing = native.take_backing(fd)
        # The kernel refuses passthrough together with flags about a page cache that there is not.
        return wire.open_out(fd, FOPEN_PASSTHROUGH | FOPEN_NOFLUSH if backing else FOPEN_KEEP_CACHE, backing)

    # -- names --

    def lookup(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Find a name."""
        name = body[:-1]
        parent = self._directory(node_id, name)
        if parent is None:
            return None
        if len(name) > _NAME_MAX:
            return errno.ENAMETOOLONG
        looked = self._tree.look(parent, name)
        if looked is None:
            return self._absent
        node, st = looked
        if node.links:
            self._tree.prefer(node, parent, name)
        answer = self._entry(node, st)
        node.nlookup += 1
        return answer

    def forget(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Take lookups off a node."""
        node = self._nodes.get(node_id)
        if node is None:
            return None
        if node.parent is not None:
            self._tree.forget(node, wire.u64(body)[0])
        return 0

    def batch_forget(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Take lookups off many nodes."""
        if self._covered:
            return None
        for forgotten, count in wire.forget_one(body[8:]):
            node = self._nodes.get(forgotten)
            if node is None:
                self._retired.discard(forgotten)
            elif node.parent is not None:
                self._tree.forget(node, count)
        return 0

    def readlink(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Return a symbolic link's target."""
        node = self._nodes.get(node_id)
        return None if node is None else self._union.readlink(node)

    def _made(self, made: tuple[Node, os.stat_result]) -> bytes:
        node, st = made
        answer = self._entry(node, st)
        node.nlookup += 1
        return answer

    def symlink(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Create a symbolic link."""
        name, target, _ = body.split(b"\0")
        parent = self._directory(node_id, name)
        if parent is None:
            return None
        try:
            return self._made(self._dirs.symlink(parent, name, target, self._caller(uid, gid, 0, pid)))
        finally:
            self._changed()

    def mkdir(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Create a directory."""
        mode, umask = _mkdir_in(body)
        name = body[8:-1]
        parent = self._directory(node_id, name)
        if parent is None:
            return None
        try:
            return self._made(self._dirs.mkdir(parent, name, mode, self._caller(uid, gid, umask, pid)))
        finally:
            self._changed()

    def unlink(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Remove a file's name."""
        name = body[:-1]
        parent = self._directory(node_id, name)
        if parent is None or self._covered:
            return None
        try:
            self._dirs.unlink(parent, name)
        except DataCopyPending:
            return None
        finally:
            self._changed()
        return 0

    def rmdir(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Remove a directory."""
        name = body[:-1]
        parent = self._directory(node_id, name)
        if parent is None or self._covered:
            return None
        try:
            self._dirs.rmdir(parent, name)
        finally:
            self._changed()
        return 0

    def rename(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Rename."""
        return self._rename(node_id, wire.u64(body)[0], body[8:], 0)

    def rename2(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Rename with flags."""
        new_id, flags, _ = wire.rename2_in(body)
        return self._rename(node_id, new_id, body[16:], flags)

    def _rename(self, old_id: int, new_id: int, names: bytes, flags: int) -> Answer:
        old, new, _ = names.split(b"\0")
        old_dir, new_dir = self._directory(old_id, old), self._directory(new_id, new)
        if old_dir is None or new_dir is None or self._covered:
            return None  # what leads to a covered place must stay
        try:
            self._dirs.rename(old_dir, old, new_dir, new, flags)
        except DataCopyPending:
            return None
        finally:
            self._changed()
        return 0

    # -- attributes --

    def getattr(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Return attributes."""
        node = self._nodes.get(node_id)
        return None if node is None else self._attributes(node, self._tree.stat(node))

    def setattr(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Change attributes."""
        node = self._nodes.get(node_id)
        if node is None:
            return None
        valid, _, fh, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, new_uid, new_gid, _ = _setattr_in(body)
        who = self._caller(uid, gid, 0, pid)
        kill = who if valid & _SIZE and native.kill_suidgid(uid) else None
        changes = Changes(
            mode=mode if valid & _MODE else None,
            uid=new_uid if valid & _UID else None,
            gid=new_gid if valid & _GID else None,
            size=size if valid & _SIZE else None,
            atime=_time(valid, _ATIME, _ATIME_NOW, atime, atime_ns),
            mtime=_time(valid, _MTIME, _MTIME_NOW, mtime, mtime_ns),
            touched=valid & _TOUCHED == _TOUCHED,
        )
        try:
            handle = fh if valid & _FH else -1
            changes = stored(self._ids, changes)
            answer = self._attributes(node, self._union.setattr(node, changes, handle, kill_for=kill, who=who))
            while node in self._up.notify_changed:
                self._up.notify_changed.remove(node)  # the answer says it
            return answer
        except DataCopyPending:
            return None
        finally:
            self._changed()

    def getxattr(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Return an extended attribute, or its size if no room is given."""
        node = self._nodes.get(node_id)
        if node is None:
            return None
        room, _ = wire.getxattr_in(body)
        value = self._getxattr(node, os.fsdecode(body[8:-1]))
        if not room:
            return wire.getxattr_out(len(value), 0)
        return value if len(value) <= room else errno.ERANGE

    # -- files --

    def open(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Open a file."""
        node = self._nodes.get(node_id)
        if node is None:
            return None
        flags, _ = wire.open_in(body)
        kill = self._caller(uid, gid, 0, pid) if flags & os.O_TRUNC and native.kill_suidgid(uid) else None
        try:
            fd = self._union.open_file(node, flags, kill_for=kill)
            try:
                if self._handles.opened(node, fd, flags):
                    self._up.notify_changed.append(node)
            except OSError:
                self._union.close_file(fd)
                raise
        except DataCopyPending:
            return None
        finally:
            self._changed()
        answer = self._handed_out(fd)
        self._handles.share(node, fd, flags)
        return answer

    def create(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Create a file and open it."""
        flags, mode, umask, _ = wire.create_in(body)
        name = body[16:-1]
        parent = self._directory(node_id, name)
        if parent is None:
            return None
        try:
            node, st, fd = self._union.create_file(parent, name, mode, flags, self._caller(uid, gid, umask, pid))
        finally:
            self._changed()
        try:
            self._handles.created(node, fd, flags, st)
        except OSError:
            self._union.close_file(fd)
            raise
        return self._made((node, st)) + self._handed_out(fd)

    def release(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Close an open file."""
        fh = wire.u64(body)[0]
        node = self._union.open_files.get(fh)
        if node is None:
            return None
        self._handles.closed(node, fh)
        self._union.close_file(fh)
        if node.job is not None:
            self._closed(node)
        return 0

    # -- directories --

    def opendir(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Open a directory.

        The kernel may keep its listing, and sees itself when that is out of date.
        """
        node = self._directory(node_id, b"")
        if node is None or self._covered:
            return None
        return self._opened_dir(node, keep=True)

    def _opened_dir(self, node: Dir, *, keep: bool) -> bytes:
        self._serial += 1
        handle = self._serial << 1 | 1  # those of pyfuse3's way are even
        self._dir_handles[handle] = opened = DirHandle(node)
        if not keep or not self._timeout:
            return wire.open_out(handle, 0, 0)
        native.keep_listing(node, reopens=self._reopens)
        opened.kept = True
        return wire.open_out(handle, FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR, 0)

    def take_over(self) -> None:
        """Go on with directories that the kernel has opened with another daemon."""
        self._serial = max((handle >> 1 for handle in self._dir_handles if handle & 1), default=0)
        for opened in self._dir_handles.values():
            if opened.kept:
                native.keep_listing(opened.node, taken_over=True)

    def _dir_handle(self, node_id: int, handle: int) -> DirHandle | None:
        """Return an open directory, None if it is not the union's; the native layer may have opened it."""
        opened = self._dir_handles.get(handle)
        if opened is None:
            if not native.opened_again(node_id, handle):
                return None
            node = self._nodes[node_id]
            assert isinstance(node, Dir)
            self._dir_handles[handle] = opened = DirHandle(node)
            opened.kept = True
        return opened

    def releasedir(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Close a directory."""
        handle = wire.u64(body)[0]
        opened = self._dir_handles.pop(handle, None)
        if opened is None:
            return 0 if native.close_listing(node_id, handle, known=False) else None
        if opened.kept:
            native.close_listing(node_id, handle, known=True)
        return 0

    def fsyncdir(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Make a directory's entries durable."""
        handle = self._dir_handle(node_id, wire.u64(body)[0])
        if handle is None:
            return None
        fd = self._union.open_for_sync(handle.node)
        return native.sync_later(fd) if fd >= 0 else 0

    def readdirplus(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """List a directory with the attributes of each entry; positions are 1 and 2 for the dots, then cookies.

        The kernel doesn't say whether its reader wants attributes. They are cheap for a few files; for a hundred
        thousand the disk has to read as many inodes. So a long listing goes on with names alone (`_reads_names`), soon
        if it is seen that the disk reads.
        """
        fh, offset, size = wire.read_in(body)
        handle = self._dir_handle(node_id, fh)
        if handle is None:
            return None
        parts: list[bytes] = []
        node = handle.node
        if not offset and handle.kept:
            handle.shared = native.shares_listing(node_id)
        for position, name in ((1, b"."), (2, b"..")):
            if offset < position:
                of = node if position == 1 or node.parent is None else node.parent
                parts.append(wire.NO_ENTRY + wire.dirent(of.ino, position, name, stat.S_IFDIR >> DT_SHIFT))
                size -= len(parts[-1])
        if self._reads_names(handle, offset):
            parts += self._bare(handle, offset, size)
            return self._ending(handle, parts)
        began = time.monotonic()
        for position, entry, record in self._listed(handle, offset, size):
            try:
                packed = self._taken(node, entry, record, size) or self._packed(handle, entry, position, size)
            except WouldBlock:
                if not parts:
                    raise
                break
            if packed is None:
                break
            parts.append(packed)
            size -= len(packed)
        if offset > DOTS:  # else the listing was read as well
            handle.cold = time.monotonic() - began > _COLD_SECONDS * len(parts)
        return self._ending(handle, parts)

    def _ending(self, handle: DirHandle, parts: list[bytes]) -> bytes:
        text = b"".join(parts)
        if not text:
            self._ended(handle)
        return text

    @staticmethod
    def _reads_names(handle: DirHandle, offset: int) -> bool:
        """Whether a long listing goes on without attributes: until half of what came so is looked up one by one."""
        if handle.entries is None or len(handle.entries) < _MANY:
            return False
        if handle.first_after(offset) < _MANY and not handle.cold:
            return False
        if handle.bare and len(handle.node.children) - handle.children > handle.bare // 2:
            handle.wants_all = True
        return not handle.wants_all

    def _bare(self, handle: DirHandle, offset: int, room: int) -> list[bytes]:
        entries = handle.entries
        assert entries is not None
        node = handle.node
        bases = {} if self._covers(node) else self._union.number_bases(node)
        parts: list[bytes] = []
        at = first = handle.first_after(offset)
        while True:
            packed, at = native.pack_names(bases, node.children, handle.cookies, entries, at, room)
            parts.append(packed)
            room -= len(packed)
            if at == len(entries):
                break
            name = entries[at].name
            size = wire.ENTRY_SIZE + _DIRENT_SIZE + len(name) + 7 & ~7
            if size > room:
                break
            ino = self._ino_of(handle, entries[at])
            if ino:  # what is gone takes no room: with nothing to show for it the kernel would see the end here
                parts.append(wire.NO_ENTRY + wire.dirent(ino, handle.cookies[at], name, entries[at].kind))
                room -= size
            at += 1
        handle.bare, handle.children = at - first, len(node.children)
        return parts

    def _ino_of(self, handle: DirHandle, entry: Entry) -> int:
        """Return the ``st_ino`` of a listed entry, 0 where it is gone."""
        if self._covered and (handle.node.id, entry.name) in self._covered:
            return UNKNOWN_INO
        ino = self._union.listed_ino(handle.node, entry)
        if ino is not None:
            return ino
        try:
            looked = self._union.look_at(handle, entry)
        except OSError:
            return UNKNOWN_INO
        if looked is None:
            return 0
        ino = looked[0].ino
        self._tree.forget(looked[0], 0)
        return ino

    def _listed(self, handle: DirHandle, offset: int, room: int) -> Iterable[tuple[int, Entry, native.Record | None]]:
        """Return what comes after an offset: positions, entries, and where these are plain what the kernel gets."""
        entries = self._union.read_entries(handle, offset)
        places = self._union.places(handle) if self._ids is None and not self._covers(handle.node) else None
        if not places or handle.entries is None:
            return ((position, entry, None) for position, entry in entries)
        children = {} if handle.again else handle.node.children  # of these the kernel has what it needs
        first = handle.first_after(offset)
        records = native.pack_listed(places, children, handle.cookies, handle.entries, first, room, self._timeout)
        return (
            (position, entry, record)
            for (position, entry), record in zip(
                entries, itertools.chain(records, itertools.repeat(None)), strict=False
            )
        )

    def _covers(self, node: Dir) -> bool:
        return bool(self._covered) and any(parent == node.id for parent, _ in self._covered)

    def _taken(self, parent: Dir, entry: Entry, record: native.Record | None, room: int) -> bytes | None:
        """Give what is packed a node and count its lookup; None where there is no room, or more to be found out."""
        if record is None or len(record[2]) > room:
            return None
        ino, rino, packed = record
        try:
            node = self._union.inodes.plain(ino, rino, parent, entry.name, entry.layer)
        except OSError:
            return None  # there is no memory: it is listed without attributes
        if node is None:
            return None
        node.nlookup += 1
        return packed

    def _packed(self, handle: DirHandle, entry: Entry, position: int, room: int) -> bytes | None:
        """Pack an entry and count its lookup; None where there is no room."""
        if wire.ENTRY_SIZE + _DIRENT_SIZE + len(entry.name) + 7 & ~7 > room:
            return None
        if self._covered and (handle.node.id, entry.name) in self._covered:
            return wire.NO_ENTRY + wire.dirent(UNKNOWN_INO, position, entry.name, entry.kind)
        known = handle.node.children.get(entry.name)
        if known is not None and known.nlookup > 0 and self._timeout >= _LASTING and not handle.again:
            # The kernel has it, with attributes that last: it would only have to count one more lookup.
            return wire.NO_ENTRY + wire.dirent(known.ino, position, entry.name, known.fmt >> DT_SHIFT)
        try:
            looked = self._union.look_at(handle, entry)
        except OSError:
            # Listed all the same: whoever asks for it gets the error.
            return wire.NO_ENTRY + wire.dirent(UNKNOWN_INO, position, entry.name, entry.kind)
        except WouldBlock:
            # Attributes that must be waited for are left to those who want them.
            ino = self._union.listed_ino(handle.node, entry)
            if ino is None:
                raise
            return wire.NO_ENTRY + wire.dirent(ino, position, entry.name, entry.kind)
        if looked is None:
            return b""  # gone since the listing was made
        node, st = looked
        packed = self._entry(node, st) + wire.dirent(node.ino, position, entry.name, node.fmt >> DT_SHIFT)
        node.nlookup += 1
        return packed


def _unblocked(handler: Handler) -> Handler:
    """Leave requests that a slow layer blocks to pyfuse3's way, which can wait."""

    def handle(node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        try:
            return handler(node_id, uid, gid, pid, body)
        except WouldBlock:
            return None

    return handle


def _time(valid: int, given: int, now: int, seconds: int, nanoseconds: int) -> int | None:
    """Return a time to set in nanoseconds or `NOW`, None where it is not to be set.

    Now is by the clock that upper's file system gives other files their times by: it goes in steps of some
    milliseconds, and by another one a file that was touched were newer than what is written after it.
    """
    if valid & now:
        return sysio.NOW
    return seconds * 1_000_000_000 + nanoseconds if valid & given else None
