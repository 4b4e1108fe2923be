"""A mount that outlives its daemon (``--auto-restart``): what the next one has to know (and `takeover` how it goes on).

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
import os
import struct
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from unionfs.core.dirhandle import DirHandle
from unionfs.core.inodes import ROOT_ID, Dir, Node
from unionfs.core.union import Union
from unionfs.fuse import kept, native, wire
from unionfs.fuse.handles import Handles
from unionfs.fuse.kept import DirectoryRecord, DirHandles, FileRecord, KeptNodes, Past, Unanswered
from unionfs.fuse.ledger import Ledger, State, open_descriptors
from unionfs.fuse.once import RESENT, KeptUnion, Once, request
from unionfs.fuse.takeover import Restored, carried_out, take_file
from unionfs.fuse.wire import Opcode

_NOTIFY_RESEND: Final = struct.pack("=IiQ", 16, 7, 0)

_RELEASES: Final = frozenset((Opcode.RELEASE, Opcode.RELEASEDIR))

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
        return handle in (self._union.open_files if opcode == Opcode.RELEASE else self.directories)

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
        slot = self.ledger.noted()
        if slot is not None and carried_out(slot.noted, self.past, Restored(union, self.past)):
            self.once.owed[slot.unique] = slot.noted  # it is owed no more than an answer
        Restored(union, self.past).all()
        for file in self.past.files.values():
            take_file(union, handles, file)
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
