"""What names a sequence may well use: a rough picture of the tree, kept from the outcomes, to aim operations at what exists.

Operations are drawn before anything runs, so their paths and slots are drawn as wishes (``Ref``): an existing file, a new name in
some directory, an open slot. When its turn comes, a wish is granted from this picture. The picture may be wrong after odd
operations; then a sequence only does something less useful.
"""

from __future__ import annotations

import os
import stat
from typing import Any, NamedTuple

from . import layers
from .layers import Kinds


class Ref(NamedTuple):
    """A wish: ``want`` is file, dir, any, new, raw, slot or scan; ``number`` chooses, ``suffix`` is a new name or appended."""

    want: str
    number: int
    suffix: bytes = b""


class Model:
    """Names and types in one subtree, of which those below the directories ``focus`` are offered."""

    def __init__(self, kinds: Kinds, focus: tuple[bytes, ...]) -> None:
        self.kinds, self.focus = dict(kinds), set(focus)
        self.slots, self.scans = set[int](), set[int]()

    def grant(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """``args`` with each wish replaced by what it gets; None when a slot is wanted and none is open."""
        granted = tuple(self._resolve(arg) if isinstance(arg, Ref) else arg for arg in args)
        return None if None in granted else granted

    def _resolve(self, ref: Ref) -> object:
        if ref.want in ("slot", "scan"):
            slots = sorted(self.slots if ref.want == "slot" else self.scans)
            return slots[ref.number % len(slots)] if slots else None
        pool = self._pool(ref.want)
        path = pool[ref.number % len(pool)]
        path = path + b"/" + ref.suffix if ref.want == "new" else path + ref.suffix
        return b"." if os.path.normpath(path).startswith(b"..") else path

    def _pool(self, want: str) -> list[bytes]:
        if want == "raw":
            return layers.paths()
        near = sorted(path for path in self.kinds if self._near(path))
        directories = [path for path in near if self.kinds[path] == stat.S_IFDIR]
        files = [path for path in near if self.kinds[path] != stat.S_IFDIR]
        return {"dir": directories, "new": directories, "file": files}.get(want) or near or [b"."]

    def _near(self, path: bytes) -> bool:
        return any(path == place or path.startswith(place + b"/") for place in self.focus)

    def note(self, kind: str, user: str, args: tuple[Any, ...]) -> None:
        """Take in that an operation of ``kind`` succeeded."""
        if kind in ("remount", "swap"):
            self.slots.clear()
            self.scans.clear()
        if kind in ("open", "tmpfile", "close"):
            (self.slots.discard if kind == "close" else self.slots.add)(args[0])
        if kind in ("scan_open", "scan_end"):
            (self.scans.discard if kind == "scan_end" else self.scans.add)(args[0])
        if kind == "reopen":
            self.slots.add(args[1])
        if kind in ("mkdir", "mknod", "writefile", "open"):
            path = args[1] if kind == "open" else args[0]
            self.kinds.setdefault(path, stat.S_IFDIR if kind == "mkdir" else stat.S_IFREG)
        elif kind in ("symlink", "link", "publish"):
            self.kinds[args[1]] = stat.S_IFLNK if kind == "symlink" else stat.S_IFREG
        elif kind in ("unlink", "rmdir", "rmtree"):
            self._move(args[0], None)
        elif kind == "exchange" and args[0] != args[1]:
            for old, new in ((args[0], b"\0"), (args[1], args[0]), (b"\0", args[1])):
                self._move(old, new)
        elif kind == "rename" and args[0] != args[1]:
            self._move(args[1], None)
            self._move(args[0], args[1])

    def _move(self, old: bytes, new: bytes | None) -> None:
        for path in [path for path in self.kinds if path == old or path.startswith(old + b"/")]:
            kind = self.kinds.pop(path)
            if new is not None:
                self.kinds[new + path[len(old) :]] = kind
        if new is not None and old in self.focus | self.kinds.keys():
            self.focus.add(new)
