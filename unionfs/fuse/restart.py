"""A mount that outlives its daemon (``--auto-restart``): what the next one has to know, and how it goes on from there.

What the kernel allows. A FUSE connection lives as long as some process holds its descriptor. The kernel sends INIT only
once, so the next daemon has libfuse answer the first one's again. What a dead daemon had read and not answered is sent
again when asked for (FUSE_NOTIFY_RESEND, Linux 6.9), marked in its number; before that it would hang for ever, so older
kernels are refused. Backing ids of passed files belong to the connection; such files are read and written even while
there is no daemon. Locks, working directories and mappings are the kernel's own affair.

The *supervisor* (`supervise`) starts daemons by a fork that shares the table of descriptors, and uses none of them. So
whatever the dead daemon had open is still open, behind the same number, in the next one: the device, the layers (which
the mount may hide), the locks on them (no other mount gets between), and every open file, deleted ones too. A handle is
the number of a descriptor, so handles need no more than to be known.

What is known goes to the `ledger` after each request, before its answer: nodes (number, names, lookups), handles. It
says no more of a node than the kernel can refer to; what a name means is looked up anew, in the layers, as at a mount.
So what a crash left half done in a layer is seen as it is there. Changes of nodes are noticed as they are set
(`KeptNode`), so nothing can be left out. The ways past Python that make nodes or handles are off: handles that readers
share (csrc/readers.c), copies whose data follows (csrc/lazy.c), and bind paths, which are refused.

What was carried out and not answered is carried out again when it comes again. For most requests that makes no
difference: reading, writing at an offset (an append has one, too), setting attributes. For the rest there is the slot:
`OnceDirOps` notes what it is about to do, and what there was before; each ends in one system call that publishes it,
and whether that was made shows in upper. A name that was removed or moved then is answered as done. An object that was
made is removed and made again: nobody can have seen it. What was counted for an answer that never came is taken back.

What is left: FORGETs that a daemon had read and not heeded are not sent again, so their nodes stay until the unmount;
so does the backing id of an open that was under way. An attribute that was created (XATTR_CREATE) is set once more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import struct
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from unionfs.core import sysio
from unionfs.core.inodes import BROKEN_LINK, INDEXED, META, ROOT_ID, UNLINKED, UPPER, Dir, Node
from unionfs.core.union import DirHandle, Union
from unionfs.fuse import kept, native, once, wire
from unionfs.fuse.handles import Handles
from unionfs.fuse.kept import DirectoryRecord, DirHandles, FileRecord, KeptNodes, NodeRecord, Past, Unanswered
from unionfs.fuse.ledger import Ledger, State, open_descriptors
from unionfs.fuse.once import RESENT, KeptUnion, Once, OnceDirOps, request

log = logging.getLogger(__name__)

_NOTIFY_RESEND: Final = struct.pack("=IiQ", 16, 7, 0)

_RELEASES: Final = frozenset((18, 29))

T = TypeVar("T")


class Keeper:
    """Keeps the ledger of one daemon, and knows what the one before has left."""

    def __init__(self, ledger: Ledger) -> None:
        """Read what is there; descriptors that mean nothing any more are closed. Nothing may have been opened yet."""
        self.ledger = ledger
        self.resuming = ledger.state is not State.STARTING
        self.past = Past(ledger)
        self.passthrough = self.past.passthrough  # whether to ask the kernel for it; each daemon must do as the first
        self.once = Once(ledger)
        self.directories = DirHandles()
        self._meta = b""
        self._union: KeptUnion | None = None
        self._handles: Handles | None = None
        self._unanswered: dict[int, Unanswered] = {}
        self._settled = b""  # records for the next batch
        self._numbered = (0, 0)  # how many numbers the ledger has
        if self.resuming:
            there = set(open_descriptors())
            for fd in there - ledger.base - {ledger.fd} - self.past.descriptors():
                os.close(fd)
            self.past.keep_files(there)

    @property
    def goes_on(self) -> bool:
        """Whether another daemon is to serve the mount when this one has failed."""
        return self.ledger.state is State.SERVING

    def attach(self, union: Union, handles: Handles) -> None:
        """Say what is kept. Called when the protocol is agreed on."""
        assert isinstance(union, KeptUnion)
        self._union, self._handles = union, handles
        device = self.past.device if self.resuming else native.device()
        self._meta = kept.record(b"I", native.init_message())
        self._meta += kept.pack_mount(device, union.layers.held(), passthrough=self.passthrough)
        if not self.resuming:
            self.ledger.append(0, self._meta)

    # -- requests --

    def begin(self, number: int) -> None:
        """A request is about to be handled."""
        request.set(number)
        if answered := self.once.answered():
            self._settled += kept.gone(b"o", answered)
        if number & RESENT and (unanswered := self._unanswered.pop(number & ~RESENT, None)):
            self._settled += kept.gone(b"u", unanswered.unique)
            self._take_back(unanswered)

    def keeping(self, opcode: int, handler: Callable[..., T]) -> Callable[..., T | int]:
        """Return a handler of `direct` that tells the ledger what it does, before it is answered."""

        def handle(node_id: int, uid: int, gid: int, pid: int, body: bytes) -> T | int:
            self.begin(native.unique())
            if opcode in _RELEASES and request.get() & RESENT and not self._is_open(opcode, body):
                return 0
            try:
                return handler(node_id, uid, gid, pid, body)
            finally:
                self.flush()

        return handle

    def _is_open(self, opcode: int, body: bytes) -> bool:
        assert self._union is not None
        handle = wire.u64(body)[0]
        return handle in (self._union.open_files if opcode == 18 else self.directories)

    async def attend(self, call: Callable[[], Awaitable[T]]) -> T:
        """The same for a handler that may wait."""
        self.begin(native.unique())
        try:
            return await call()
        finally:
            self.flush()

    def flush(self) -> None:
        """Write down what has changed. Raises OSError: ENOSPC, ENOMEM."""
        union = self._union
        if union is None or not (kept.changed or union.changed_files or self.directories.changed or self._settled):
            return
        parts = [self._settled, self._new_numbers(union)]
        parts += [self._node(node_id) for node_id in kept.changed if node_id != ROOT_ID]
        parts += [self._file(fd) for fd in union.changed_files]
        parts += [self._directory(handle) for handle in self.directories.changed]
        self.ledger.append(request.get() & ~RESENT, b"".join(parts))
        self._written()
        if self.ledger.outgrown:
            with contextlib.suppress(OSError):  # there is no need: all is written
                self.ledger.write_anew(self._everything())

    def _written(self) -> None:
        assert self._union is not None
        kept.changed.clear()
        self._union.changed_files.clear()
        self._numbered = self._table(self._union).counts()
        self.directories.changed.clear()
        self._settled = b""

    @staticmethod
    def _table(union: KeptUnion) -> KeptNodes:
        assert isinstance(union.inodes, KeptNodes)
        return union.inodes

    def _new_numbers(self, union: KeptUnion) -> bytes:
        table = self._table(union)
        if table.counts() == self._numbered:
            return b""
        devices, odd = self._numbered
        return table.numbers(devices=devices, odd=odd)

    def _node(self, node_id: int) -> bytes:
        assert self._union is not None
        node = self._union.inodes.nodes.get(node_id)
        if node is None:
            return kept.gone(b"n", node_id)
        return kept.pack_node(node, self._union.tree.data_anchors.get(node, -1))

    def _file(self, fd: int) -> bytes:
        assert self._union is not None
        assert self._handles is not None
        node = self._union.open_files.get(fd)
        if node is None:
            return kept.gone(b"f", fd)
        return kept.pack_file(FileRecord(fd, node.id, *self._handles.kept(node, fd)))

    def _directory(self, handle: int) -> bytes:
        opened = self.directories.get(handle)
        if opened is None:
            return kept.gone(b"d", handle)
        return kept.pack_directory(DirectoryRecord(handle, opened.node.id, opened.kept))

    def _everything(self) -> bytes:
        assert self._union is not None
        parts = [self._meta, self._table(self._union).numbers()]
        parts += [self._node(node_id) for node_id in self._union.inodes.nodes if node_id != ROOT_ID]
        parts += [self._file(fd) for fd in self._union.open_files]
        parts += [self._directory(handle) for handle in self.directories]
        parts += [kept.pack_owed(*owed) for owed in self.once.owed.items()]
        parts += [unanswered.pack() for unanswered in self._unanswered.values()]
        return b"".join(parts)

    def _take_back(self, counted: Unanswered) -> None:
        union, handles = self._union, self._handles
        assert union is not None
        assert handles is not None
        for fd in counted.files:
            node = union.open_files.get(fd)
            if node is not None:
                handles.closed(node, fd)
                union.close_file(fd)
        for handle in counted.directories:
            self.directories.pop(handle, None)
        for node_id, lookups in counted.lookups.items():
            node = union.inodes.nodes.get(node_id)
            if node is not None and lookups > 0:
                union.tree.forget(node, lookups)

    # -- taking over --

    def take_over(self) -> list[Node]:
        """Make nodes and handles as they were; return the nodes. Raises OSError."""
        union, handles = self._union, self._handles
        assert union is not None
        assert handles is not None
        self._table(union).number_as(self.past.numbered, self.past.odd)
        self.once.owed = self.past.owed
        self._settle(_Restored(union, self.past))
        nodes = _Restored(union, self.past)
        nodes.all()
        for file in self.past.files.values():
            self._take_file(union, handles, file)
        for directory in self.past.directories.values():
            node = union.inodes.nodes.get(directory.node)
            if isinstance(node, Dir):
                self.directories[directory.handle] = opened = DirHandle(node)
                opened.kept = bool(directory.kept)
        for node in list(union.inodes.nodes.values()):
            if not node.nlookup:
                union.tree.forget(node, 0)
        self._unanswered = self.past.unanswered
        self.past.forget()
        self._written()
        self.ledger.write_anew(self._everything())
        return list(union.inodes.nodes.values())

    def have_resent(self, device: int) -> None:
        """Ask the kernel for what the last daemon has not answered. Raises OSError: ENODEV, unmounted."""
        os.write(device, _NOTIFY_RESEND)

    def _take_file(self, union: KeptUnion, handles: Handles, file: FileRecord) -> None:
        node = union.inodes.nodes.get(file.node)
        if node is None or not _is_regular(file.fd):
            return
        if node.flags & (UPPER | META) == UPPER and node.anchor < 0:
            with contextlib.suppress(OSError):
                _point_at_upper(union, node, file.fd)
        union.open_files[file.fd] = node
        node.handles = [*(node.handles or ()), file.fd]
        handles.take_over(node, file.fd, file.backing_id, maps=bool(file.maps))

    def _settle(self, nodes: _Restored) -> None:
        """Find out whether the request in the slot was carried out; if so it is owed no more than an answer."""
        slot = self.ledger.noted()
        if slot is None:
            return
        kind = slot.noted[:1]
        done = kind == once.MARKED
        if kind == once.MADE:
            parent_id, existed, name = once.unpack_made(slot.noted)
            parent = nodes.directory(parent_id)
            done = not existed and parent is not None and nodes.in_upper(parent, name)
        elif kind == once.REMOVED:
            parent_id, name = once.unpack_removed(slot.noted)
            parent = nodes.directory(parent_id)
            done = parent is not None and nodes.ino_at(parent, name) == 0
        elif kind == once.MOVED:
            done = self._settle_move(nodes, once.Move.unpack(slot.noted))
        if done:
            self.once.owed[slot.unique] = slot.noted

    def _settle_move(self, nodes: _Restored, move: once.Move) -> bool:
        """The same for a rename. Where it was made the records get the new names."""
        old_dir, new_dir = nodes.directory(move.old_dir), nodes.directory(move.new_dir)
        if old_dir is None or new_dir is None or move.old_ino == move.new_ino:
            return False
        left = nodes.ino_at(old_dir, move.old_name)
        exchanged = move.new_ino != 0 and left == move.new_ino
        if left and not exchanged:
            return False
        self._rename_records(move, exchanged=exchanged)
        return True

    def _rename_records(self, move: once.Move, *, exchanged: bool) -> None:
        """Give records the names after a rename, unless they have them: it may have been answered long ago."""
        old, new = (move.old_dir, move.old_name), (move.new_dir, move.new_name)
        holders = [node for node in self.past.nodes.values() if old in node.names or new in node.names]
        if not any(old in node.names and node.ino == move.old_ino for node in holders):
            return
        moved = {old: [new], new: [old] if exchanged else []}
        for node in holders:
            names = [after for name in node.names for after in moved.get(name, [name])]
            node.names[:] = dict.fromkeys(names)


def _is_regular(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


def _point_at_upper(union: Union, node: Node, fd: int) -> None:
    """Copy-up may have ended before the handles were told; see `CopyUp.reopen_handles`."""
    real = union.tree.stat(node)
    if os.path.samestat(real, os.fstat(fd)) or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
        return
    fresh = union.tree.open_real(node, os.O_RDONLY)
    os.dup2(fresh, fd, inheritable=False)
    os.close(fresh)


class _Restored:
    """Nodes as the ledger has them, made when they are needed."""

    def __init__(self, union: KeptUnion, past: Past) -> None:
        self._union = union
        self._tree = union.tree
        self._past = past
        self._nodes = union.inodes.nodes
        assert isinstance(union.inodes, KeptNodes)
        self._table = union.inodes
        self._table.count_on_from(past.nodes)
        self._lost: set[int] = set()
        self._open: dict[int, int] = {file.node: file.fd for file in past.files.values()}

    def all(self) -> None:
        """Make all; those that can't be made any more are ESTALE for the kernel."""
        for node_id in self._past.nodes:
            self._get(node_id)
        for node_id in self._lost:
            self._table.never_again(node_id)

    def directory(self, node_id: int) -> Dir | None:
        """Return a directory, None where it is no more."""
        node = self._get(node_id)
        return node if isinstance(node, Dir) else None

    def in_upper(self, parent: Dir, name: bytes) -> bool:
        """Tell whether upper has something at a name."""
        assert isinstance(self._union.dirs, OnceDirOps)
        return self._union.dirs.in_upper(parent, name)

    def ino_at(self, parent: Dir, name: bytes) -> int:
        """Return the ``st_ino`` that shows at a name, 0 where there is nothing. Makes no node."""
        found = self._tree.resolver.lookup(parent, name)
        return 0 if found is None else self._tree.ino_of(found)

    def _get(self, node_id: int) -> Node | None:
        """Return a node; those above it are made first, however many they are."""
        waiting = [node_id]
        while waiting:
            at = waiting[-1]
            record = self._past.nodes.get(at)
            if at in self._nodes or at in self._lost or record is None:
                waiting.pop()
                continue
            above = [parent for parent, _ in record.names if self._is_to_come(parent) and parent not in waiting]
            if above:
                waiting += above
                continue
            waiting.pop()
            if not self._made(record):
                self._lost.add(at)
        return self._nodes.get(node_id)

    def _made(self, record: NodeRecord) -> bool:
        """Make a node; tell whether that could be done."""
        try:
            return self._by_name(record) or self._by_descriptor(record)
        except OSError as exc:
            log.warning("what was %s can't be found again: %s", record.names or "deleted", exc.strerror)
            return False

    def _is_to_come(self, node_id: int) -> bool:
        return node_id in self._past.nodes and node_id not in self._nodes and node_id not in self._lost

    def _by_name(self, record: NodeRecord) -> bool:
        node: Node | None = None
        for parent_id, name in record.names:
            parent = self._nodes.get(parent_id)
            if isinstance(parent, Dir):
                found = self._look(parent, name, record, node)
                node = node or found
        if node is not None:
            node.nlookup = record.nlookup
        return node is not None

    def _look(self, parent: Dir, name: bytes, record: NodeRecord, known: Node | None) -> Node | None:
        self._table.forced = 0 if known is not None else record.id
        try:
            looked = self._tree.look(parent, name)
        except OSError:
            return None
        finally:
            self._table.forced = 0
        if looked is None:
            return None
        node = looked[0]
        if node.id == record.id and self._is_same(node, record):
            return node
        self._tree.forget(node, 0)  # dies, if it was only made now
        return None

    @staticmethod
    def _is_same(node: Node, record: NodeRecord) -> bool:
        if node.fmt != record.fmt:
            return False
        return node.ino == record.ino or bool(record.flags & BROKEN_LINK and node.flags & UPPER)

    def _by_descriptor(self, record: NodeRecord) -> bool:
        """Make a node that has no name, of what was open of it."""
        anchor = record.anchor
        if not _is_object(anchor, record):
            fd = self._open.get(record.id, -1)
            pinned = all(_is_directory(pin) for _, pin in record.pins) and _is_object(_top(record), record)
            if not _is_object(fd, record) and not pinned:
                return False
            anchor = -1 if pinned else os.open(sysio.fd_path(fd), os.O_PATH | os.O_CLOEXEC)
        parent = self._nodes.get(record.parent)
        above = parent if isinstance(parent, Dir) else self._tree.root
        node: Node
        if record.fmt == stat.S_IFDIR:
            node = made = kept.make_dir(record.id, record.ino, above, b"?")
            made.stack = tuple(layer for layer, _ in record.pins)
        else:
            node = kept.make_node(record.id, record.ino, record.fmt, above, b"?")
        self._nodes[record.id] = node
        node.layer, node.rino, node.anchor = record.layer, record.rino, anchor
        node.flags = record.flags & ~INDEXED  # its entry is not known, and not needed
        if anchor < 0 or os.fstat(anchor).st_nlink == 0 or not record.flags & UPPER:
            node.flags |= UNLINKED
        node.nlookup = record.nlookup
        if isinstance(node, Dir) and record.pins:
            self._tree.dirfds.set(node, tuple(fd for _, fd in record.pins))
            self._tree.dirfds.pin(node)
        if record.data_anchor >= 0:
            self._tree.data_anchors[node] = record.data_anchor
        return True


def _top(record: NodeRecord) -> int:
    """Return the descriptor of a directory without a name in its topmost layer, -1 where there is none."""
    return record.pins[0][1] if record.pins else -1


def _is_directory(fd: int) -> bool:
    try:
        return stat.S_ISDIR(os.fstat(fd).st_mode)
    except OSError:
        return False


def _is_object(fd: int, record: NodeRecord) -> bool:
    """Tell whether a descriptor is of the object that a record names."""
    if fd < 0:
        return False
    try:
        st = os.fstat(fd)
    except OSError as exc:
        if exc.errno != errno.EBADF:
            raise
        return False
    return stat.S_IFMT(st.st_mode) == record.fmt and (st.st_ino == record.rino or bool(record.flags & META))
