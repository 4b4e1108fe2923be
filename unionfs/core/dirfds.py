"""Descriptors of the layers' directories, as many as there is room for.

A directory of the union has one ``O_PATH`` descriptor per layer that it merges; everything done to an entry starts
from these. They are opened when first needed, by name from the parent's, and the ones used least lately are closed
when there are too many. A removed directory can't be opened again: it is pinned until the kernel forgets it.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable

from unionfs.core import sysio
from unionfs.core.inodes import Dir
from unionfs.core.layers import LayerStack


class Watcher:
    """Is told of descriptors that the native layer may use by itself; this one does nothing."""

    def opened(self, node: Dir, fd: int) -> None:
        """A directory that upper alone makes up has got its descriptor."""

    def closing(self, node: Dir, fd: int) -> None:
        """It is about to lose it."""


class DirFds:
    """Opens, keeps and closes the descriptors of `Dir` nodes."""

    def __init__(self, layers: LayerStack, room: int) -> None:
        self._layers = layers
        self._door = layers.door
        self._room = max(room, 64)
        self._count = 0
        self._lru: OrderedDict[Dir, None] = OrderedDict()
        # Set by the resolver: finds `stack` and `where` of a renamed directory again.
        self.refresh: Callable[[Dir], None] = lambda _: None
        self.watcher = Watcher()
        # Set by whoever wants to know of directories that are opened, with their descriptors.
        self.opened: Callable[[Dir, tuple[int, ...]], None] = lambda node, fds: None

    def fds(self, node: Dir) -> tuple[int, ...]:
        """Return the descriptors of a directory, parallel to `Dir.stack`. They stay valid until the next await."""
        fds = node.fds
        if fds is None:
            return self._open(node)
        if node in self._lru:
            self._lru.move_to_end(node)
        return fds

    def fd(self, node: Dir, layer: int) -> int:
        """Return the descriptor of a directory in one layer."""
        return self.fds(node)[node.stack.index(layer)]

    def upper(self, node: Dir) -> int:
        """Return the descriptor in upper; the directory must be there (copied up)."""
        fds = self.fds(node)
        if node.stack[0] != 0:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return fds[0]

    def _open(self, node: Dir) -> tuple[int, ...]:
        """Open a directory, and before it those above that are closed; there may be thousands."""
        chain = [node]
        while (parent := chain[-1].parent) is not None and parent.fds is None:
            chain.append(parent)
        for above in chain[:0:-1]:
            self._open_one(above)
        return self._open_one(node)

    def _open_one(self, node: Dir) -> tuple[int, ...]:
        parent = node.parent
        if parent is None:
            return self.set(node, tuple(self._door.dup(self._layers.layer(index).fd) for index in node.stack))
        if node.stale:
            self.refresh(node)
        above = self.fds(parent)
        opened: list[int] = []
        try:
            for at, index in enumerate(node.stack):
                where = node.where[at] if node.where else None
                if where is None or where.startswith(b"/"):
                    name = node.name if where is None else where[1:]
                    opened.append(self._door.open(name, sysio.O_PATH_DIR, dir_fd=above[parent.stack.index(index)]))
                else:
                    opened.append(self._door.open_beneath(self._layers.layer(index).fd, where, sysio.O_PATH_DIR))
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise
        return self.set(node, tuple(opened))

    def set(self, node: Dir, fds: tuple[int, ...]) -> tuple[int, ...]:
        """Give a directory descriptors that the caller has opened; old ones are closed."""
        self.drop(node)
        node.fds = fds
        self.opened(node, fds)
        self._lru[node] = None
        self._count += len(fds)
        if node.is_pure_upper:
            self.watcher.opened(node, fds[0])
        while self._count > self._room and len(self._lru) > 8:
            oldest = next(iter(self._lru))
            if oldest is node:
                break
            self.drop(oldest)
        return fds

    def pin(self, node: Dir) -> None:
        """Keep the descriptors of a directory that is about to lose its name."""
        self.fds(node)
        self._lru.pop(node, None)

    def drop(self, node: Dir) -> None:
        """Close the descriptors of a directory."""
        if node.fds is not None:
            if node.is_pure_upper:
                self.watcher.closing(node, node.fds[0])
            for fd in node.fds:
                os.close(fd)
            self._count -= len(node.fds)
            node.fds = None
        self._lru.pop(node, None)
