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
    """A wish: ``want`` is file, dir, any, new, raw or slot; ``number`` chooses, ``suffix`` is a new name or is appended."""

    want: str
    number: int
    suffix: bytes = b""


class Model:
    """Names and types in one subtree, of which those below the directories ``focus`` are offered."""

    def __init__(self, kinds: Kinds, focus: tuple[bytes, ...]) -> None:
        self.kinds, self.focus, self.slots = dict(kinds), set(focus), set[int]()

    def grant(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """``args`` with each wish replaced by what it gets."""
        return tuple(self._resolve(arg) if isinstance(arg, Ref) else arg for arg in args)

    def _resolve(self, ref: Ref) -> object:
        if ref.want == "slot":
            slots = sorted(self.slots) or [ref.number % 4]
            return slots[ref.number % len(slots)]
        if ref.want == "raw":
            paths = layers.paths()
            return paths[ref.number % len(paths)] + ref.suffix
        near = sorted(path for path in self.kinds if self._near(path))
        directories = [path for path in near if self.kinds[path] == stat.S_IFDIR]
        if ref.want == "new":
            places = [place + b"/" for place in directories] or [b""]
            return places[ref.number % len(places)] + ref.suffix
        files = [path for path in near if self.kinds[path] != stat.S_IFDIR]
        pool = {"dir": directories, "file": files}.get(ref.want) or near or [b"."]
        return pool[ref.number % len(pool)] + ref.suffix

    def _near(self, path: bytes) -> bool:
        return any(path == place or path.startswith(place + b"/") for place in self.focus)

    def note(self, kind: str, user: str, args: tuple[Any, ...]) -> None:
        """Take in that an operation of ``kind`` succeeded."""
        if kind in ("remount", "swap"):
            self.slots.clear()
        if kind in ("open", "tmpfile", "scan_open"):
            self.slots.add(args[0])
        if kind in ("reopen", "close", "scan_end"):
            (self.slots.add if kind == "reopen" else self.slots.discard)(args[1 if kind == "reopen" else 0])
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
