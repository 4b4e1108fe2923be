"""Nodes and handles as a dead daemon has left them in the ledger, made anew (`restart` says what for).

What a name means is looked up again, in the layers. Where the dead daemon may have carried out a request that it did
not answer, it is found out first whether it did: after a rename the records have the old names.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat

from unionfs.core import sysio
from unionfs.core.inodes import BROKEN_LINK, INDEXED, META, UNLINKED, UPPER, Dir, Node
from unionfs.core.union import Union
from unionfs.fuse import kept, once
from unionfs.fuse.handles import Handles
from unionfs.fuse.kept import FileRecord, KeptNodes, NodeRecord, Past
from unionfs.fuse.once import KeptUnion, OnceDirOps

log = logging.getLogger(__name__)


class Restored:
    """Nodes as the ledger has them, made when they are needed."""

    def __init__(self, union: KeptUnion, past: Past) -> None:
        self._union = union
        self._tree = union.tree
        assert isinstance(union.dirs, OnceDirOps)
        self._dirs = union.dirs
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
        return self._dirs.in_upper(parent, name)

    def leave_whiteout(self, parent: Dir, name: bytes) -> None:
        """Put a whiteout at a name where upper has nothing. Raises OSError."""
        self._dirs.leave_whiteout(parent, name)

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


# --- the last request -----------------------------------------------------------------------------


def carried_out(noted: bytes, past: Past, nodes: Restored) -> bool:
    """Find out whether a request was carried out; where that was a rename the records of *past* get the new names.

    A rename that was carried out but for the whiteout at the old name gets that one.

    Args:
        noted: what was noted of it (see `once`).
        past: what the ledger says.
        nodes: makes those that the answer takes; use another one for the rest, by the names that are right then.

    Raises:
        OSError: what the layers raise.
    """
    kind = noted[:1]
    if kind == once.MADE:
        parent_id, existed, name = once.unpack_made(noted)
        parent = nodes.directory(parent_id)
        return not existed and parent is not None and nodes.in_upper(parent, name)
    if kind == once.REMOVED:
        parent_id, name = once.unpack_removed(noted)
        parent = nodes.directory(parent_id)
        return parent is not None and nodes.ino_at(parent, name) == 0
    if kind == once.MOVED:
        return _moved(past, nodes, once.Move.unpack(noted))
    return kind == once.MARKED


def _moved(past: Past, nodes: Restored, move: once.Move) -> bool:
    """The same for a rename."""
    old_dir, new_dir = nodes.directory(move.old_dir), nodes.directory(move.new_dir)
    if old_dir is None or new_dir is None or move.old_ino == move.new_ino:
        return False
    left = nodes.ino_at(old_dir, move.old_name)
    exchanged = move.new_ino != 0 and left == move.new_ino
    if left and not exchanged:
        if nodes.in_upper(old_dir, move.old_name) or nodes.ino_at(new_dir, move.new_name) != move.old_ino:
            return False
        nodes.leave_whiteout(old_dir, move.old_name)  # all but this was done (`whiteouts.rename_leaving_one`)
    _rename_records(past, move, exchanged=exchanged)
    return True


def _rename_records(past: Past, move: once.Move, *, exchanged: bool) -> None:
    """Give records the names after a rename, unless they have them: it may have been answered long ago."""
    old, new = (move.old_dir, move.old_name), (move.new_dir, move.new_name)
    holders = [node for node in past.nodes.values() if old in node.names or new in node.names]
    if not any(old in node.names and node.ino == move.old_ino for node in holders):
        return
    moved = {old: [new], new: [old] if exchanged else []}
    for node in holders:
        names = [after for name in node.names for after in moved.get(name, [name])]
        node.names[:] = dict.fromkeys(names)


# --- files ----------------------------------------------------------------------------------------


def take_file(union: KeptUnion, handles: Handles, file: FileRecord) -> None:
    """Have an open file again, if its node is there and its descriptor still is a file's. Raises OSError."""
    node = union.inodes.nodes.get(file.node)
    if node is None or not _is_regular(file.fd):
        return
    if node.flags & (UPPER | META) == UPPER and node.anchor < 0:
        with contextlib.suppress(OSError):
            _point_at_upper(union, node, file.fd)
    union.open_files[file.fd] = node
    node.handles = [*(node.handles or ()), file.fd]
    handles.take_over(node, file.fd, file.backing_id, maps=bool(file.maps))


def _is_regular(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


def _point_at_upper(union: Union, node: Node, fd: int) -> None:
    """Copy-up may have ended before the handles were told; see `CopyUp.exchanging_handles`."""
    real = union.tree.stat(node)
    if os.path.samestat(real, os.fstat(fd)) or sysio.may_write(fd):
        return
    fresh = union.tree.open_real(node, os.O_RDONLY)
    os.dup2(fresh, fd, inheritable=False)
    os.close(fresh)
