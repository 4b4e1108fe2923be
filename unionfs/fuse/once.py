"""Carrying out each request once, however often it comes (`restart` says why it may come again)."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final, NamedTuple

from unionfs.config import MountConfig
from unionfs.core import sysio, whiteouts
from unionfs.core.caller import Caller
from unionfs.core.dirops import DirOps, _Maker
from unionfs.core.inodes import BROKEN_LINK, Dir, Node
from unionfs.core.union import Union
from unionfs.errors import EnvironmentUnfit
from unionfs.fuse.kept import KeptNodes
from unionfs.fuse.ledger import Ledger

RESENT: Final = 1 << 63
"""Set in the number of a request that was sent before."""

request: ContextVar[int] = ContextVar("request", default=0)
"""The number of the request being handled."""

# --- once -----------------------------------------------------------------------------------------

# What is noted of a request begins with its kind.
MADE: Final = b"M"
REMOVED: Final = b"R"
MOVED: Final = b"V"
MARKED: Final = b"X"

_MADE: Final = struct.Struct("=cQB")  # id of the parent, whether upper had something there; the name follows
_REMOVED: Final = struct.Struct("=cQ")  # id of the parent; the name follows
_MOVED: Final = struct.Struct("=cQQQQH")  # both parents, st_ino at both names, length of the old name; the names follow
_MARKED: Final = struct.Struct("=cB")  # an extended attribute: whether it was there


def unpack_made(noted: bytes) -> tuple[int, bool, bytes]:
    """Return what was noted of an object to be made: the parent's id, whether upper had something there, the name."""
    _, parent, existed = _MADE.unpack_from(noted)
    return parent, bool(existed), noted[_MADE.size :]


def unpack_removed(noted: bytes) -> tuple[int, bytes]:
    """Return what was noted of a name to be removed: the parent's id, and the name."""
    return _REMOVED.unpack_from(noted)[1], noted[_REMOVED.size :]


class Move(NamedTuple):
    """What is noted of a rename: ids of the parents, what showed at both names (``st_ino``, 0: nothing), the names."""

    old_dir: int
    new_dir: int
    old_ino: int
    new_ino: int
    old_name: bytes
    new_name: bytes

    def pack(self) -> bytes:
        """Pack it."""
        return _MOVED.pack(MOVED, *self[:4], len(self.old_name)) + self.old_name + self.new_name

    @classmethod
    def unpack(cls, noted: bytes) -> Move:
        """Return what was packed."""
        _, old_dir, new_dir, old_ino, new_ino, length = _MOVED.unpack_from(noted)
        names = noted[_MOVED.size :]
        return cls(old_dir, new_dir, old_ino, new_ino, names[:length], names[length:])


class Once:
    """Tells whether a request that comes again was carried out before."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.owed: dict[int, bytes] = {}
        """By number: requests that were carried out and not answered, and what was noted of them."""
        self._answering = 0

    def note(self, text: bytes) -> None:
        """Say what the request being handled is about to do."""
        self._ledger.note(request.get() & ~RESENT, text)

    def carried_out(self) -> bytes | None:
        """Return what was noted of the request being handled if it was carried out before; says so once."""
        number = request.get()
        if not number & RESENT or self._answering == number & ~RESENT:
            return None
        text = self.owed.get(number & ~RESENT)
        if text is not None:
            self._answering = number & ~RESENT
        return text

    def answered(self) -> int:
        """Return the number of the request that was owed an answer and got it, now that another begins; 0: none."""
        number = self._answering
        if not number or number == request.get() & ~RESENT:
            return 0
        self._answering = 0
        del self.owed[number]
        return number


class OnceDirOps(DirOps):
    """Carries out each request once, however often it comes."""

    once: Once

    @classmethod
    def of(cls, union: Union, once: Once) -> OnceDirOps:
        """Return what takes the place of a union's own."""
        made = cls(union.config, union.tree, union.up, union.lister, union.protection)
        made.once = once
        return made

    def _make(self, parent: Dir, name: bytes, mode: int, who: Caller, made: _Maker) -> tuple[Node, os.stat_result]:
        self._note_making(parent, name)
        return super()._make(parent, name, mode, who, made)

    def link(self, node: Node, parent: Dir, name: bytes) -> None:
        self._note_making(parent, name)
        super().link(node, parent, name)

    def _note_making(self, parent: Dir, name: bytes) -> None:
        if self.once.carried_out() is not None and self._tree.child(parent, name) is not None:
            self._remove(parent, name)
        self.once.note(_MADE.pack(MADE, parent.id, self.in_upper(parent, name)) + name)

    def _remove(self, parent: Dir, name: bytes) -> None:
        if self._tree.need(parent, name).is_dir:
            super().rmdir(parent, name)
        else:
            super().unlink(parent, name)

    def in_upper(self, parent: Dir, name: bytes) -> bool:
        """Tell whether upper has something at a name."""
        if self._tree.work is None or parent.stack[0]:
            return False
        upper = self._tree.dirfds.upper(parent)
        try:
            st = os.stat(name, dir_fd=upper, follow_symlinks=False)
        except OSError:
            return False
        return not self._tree.work.is_whiteout(upper, name, st)

    def leave_whiteout(self, parent: Dir, name: bytes) -> None:
        """Finish a rename that was carried out but for the whiteout at the old name. Raises OSError."""
        whiteouts.put(self._work(), self._tree.dirfds.upper(parent), name)

    def unlink(self, parent: Dir, name: bytes) -> None:
        if self.once.carried_out() is None:
            self._note_removing(parent, name)
            super().unlink(parent, name)

    def rmdir(self, parent: Dir, name: bytes) -> None:
        if self.once.carried_out() is None:
            self._note_removing(parent, name)
            super().rmdir(parent, name)

    def _note_removing(self, parent: Dir, name: bytes) -> None:
        self._tree.need(parent, name)
        self.once.note(_REMOVED.pack(REMOVED, parent.id) + name)

    def rename(self, old_dir: Dir, old_name: bytes, new_dir: Dir, new_name: bytes, flags: int) -> None:
        if self.once.carried_out() is not None:
            if not flags & sysio.RENAME_EXCHANGE and self._tree.child(old_dir, old_name) is not None:
                self._remove(old_dir, old_name)  # the victim, which an exchange has brought there
            return
        old, new = self._tree.need(old_dir, old_name), self._tree.child(new_dir, new_name)
        if new is not None and flags & sysio.RENAME_EXCHANGE and (old.flags | new.flags) & BROKEN_LINK:
            self._up.node(old, data=False)  # gives it another st_ino, which must be the one that is noted
            self._up.node(new, data=False)
        new_ino = 0 if new is None else new.ino
        self.once.note(Move(old_dir.id, new_dir.id, old.ino, new_ino, old_name, new_name).pack())
        super().rename(old_dir, old_name, new_dir, new_name, flags)


class KeptUnion(Union):
    """A union whose changes are noticed, and whose requests are carried out once."""

    make_inodes = KeptNodes
    changed_files: set[int]
    once: Once

    @classmethod
    def of(cls, config: MountConfig, held: Sequence[int], once: Once) -> KeptUnion:
        """Open the layers of *config*, or take them as another daemon has *held* them.

        Raises what `open` does, and EnvironmentUnfit for layers that are slow.
        """
        union = cls.open(config, held)
        if union.door.is_slow:
            union.close()
            raise EnvironmentUnfit(
                "--auto-restart: a lower layer is on a slow or remote file system: leave one of them out"
            )
        union.changed_files = set()
        union.once = once
        union.dirs = OnceDirOps.of(union, once)
        return union

    def _opened(self, node: Node, fd: int) -> None:
        self.changed_files.add(fd)
        super()._opened(node, fd)

    def close_file(self, fd: int) -> None:
        self.changed_files.add(fd)
        super().close_file(fd)

    def setxattr(self, node: Node, name: str, value: bytes, flags: int, who: Caller) -> None:
        noted = self.once.carried_out()
        if noted is not None and not _MARKED.unpack(noted)[1]:
            flags &= ~os.XATTR_CREATE
        if flags & os.XATTR_CREATE:
            self.once.note(_MARKED.pack(MARKED, self._has(node, name)))
        super().setxattr(node, name, value, flags, who)

    def removexattr(self, node: Node, name: str, who: Caller) -> None:
        noted = self.once.carried_out()
        if noted is not None and _MARKED.unpack(noted)[1] and not self._has(node, name):
            return
        self.once.note(_MARKED.pack(MARKED, self._has(node, name)))
        super().removexattr(node, name, who)

    def _has(self, node: Node, name: str) -> bool:
        try:
            self.getxattr(node, name)
        except OSError:
            return False
        return True
