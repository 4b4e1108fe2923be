"""Which host object a node of a bind path is: nodes, their descriptors and their names.

The host changes under us at any time, so nothing is remembered but *who is who*. A node stands for one host object, by
(st_dev, st_ino), and keeps an ``O_PATH`` descriptor of it. While that is open the host can't give the inode's number
to another object, a rename on the host does no harm, and an object without names stays reachable. Descriptors are
bounded: the least recently used are closed, and opened again by (parent, name). What is found there must then be the
same object (its file handle, where the file system has such, tells a reused number apart); else the answer is ESTALE,
on which the kernel looks the name up again.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from unionfs.core import sysio

ID_PREFIX: Final = 0b101
ID_SHIFT: Final = 61
"""Node ids of bind paths have these top bits, which no union node has."""

_FIRST_ID: Final = ID_PREFIX << ID_SHIFT
_EXTRA_BIT: Final = 1 << ID_SHIFT - 1
MADE_NATIVELY: Final = _FIRST_ID | _EXTRA_BIT | _EXTRA_BIT >> 1
"""The first node id for files that the native layer creates."""

_EVICTIONS: Final = 64

CACHED_SECONDS: Final = 1.0
"""How late the host's changes of names and attributes may be seen in a bind path with the option `cached`."""


class Bind:
    """One attached path."""

    __slots__ = ("by_key", "number", "parent_ino", "read_only", "root", "timeout")

    def __init__(self, number: int, *, read_only: bool, cached: bool, parent_ino: int) -> None:
        self.number = number  # from 1 on
        self.read_only = read_only
        self.timeout = CACHED_SECONDS if cached else 0.0  # how long the kernel may keep names and attributes
        self.parent_ino = parent_ino  # the st_ino of its root's `..`
        self.by_key: dict[tuple[int, int], BindNode] = {}
        self.root: BindNode  # the first one of `by_key`


class BindNode:
    """One host object. `parent` and `name` are where it was seen last; `name` is None where it has no known name."""

    __slots__ = (
        "bind",
        "children",
        "fd",
        "fmt",
        "handles",
        "id",
        "ino",
        "key",
        "name",
        "nlookup",
        "parent",
        "proof",
        "used",
    )

    def __init__(self, node_id: int, bind: Bind, key: tuple[int, int], ino: int, fmt: int) -> None:
        self.id = node_id
        self.bind = bind
        self.key = key  # (st_dev, st_ino) on the host
        self.ino = ino  # the st_ino to show
        self.fmt = fmt
        self.parent: BindNode | None = None
        self.name: bytes | None = None
        self.children: dict[bytes, BindNode] = {}  # by their `name`: a hint, the host decides
        self.fd = -1
        self.used = False  # since the last search for descriptors to close
        self.proof: tuple[int, bytes] | None = None  # file handle, kept while there is no descriptor
        self.nlookup = 0
        self.handles: list[int] = []


def is_bind(node_id: int) -> bool:
    """Tell whether a node id belongs to a bind path."""
    return node_id >> ID_SHIFT == ID_PREFIX


class Watcher:
    """Is told of what the native layer may answer by itself; this one does nothing."""

    def reserved(self, name: bytes) -> None:
        """What is at this name, in whatever directory, may only be touched with care."""

    def opened(self, node: BindNode) -> None:
        """A node has got its descriptor."""

    def closing(self, node: BindNode) -> None:
        """A node is about to lose its descriptor."""

    def named(self, parent: BindNode, name: bytes, node: BindNode) -> None:
        """A node was seen at a name."""

    def unnamed(self, parent: BindNode, name: bytes) -> None:
        """What was seen at a name is not there any more."""

    def handles(self, node: BindNode) -> None:
        """A file of a node was opened or closed."""

    def lookups(self, node: BindNode) -> int:
        """Return how many lookups of the node were answered past `Binds` since the last call."""
        return 0


class BindNodes:
    """The living nodes of all bind paths of one mount."""

    def __init__(self, map_ino: Callable[[int, int], int], *, room: int | None, watcher: Watcher | None) -> None:
        """Start without any; the arguments are those of `Binds`."""
        self.nodes: dict[int, BindNode] = {}
        self.map_ino = map_ino
        self._room = _descriptor_room() if room is None else room
        self._watcher = watcher or Watcher()
        self._kept: OrderedDict[BindNode, None] = OrderedDict()  # those with a descriptor, the latest last
        self._extra = 0

    def node(self, node_id: int) -> BindNode:
        """Return a living node; raises ESTALE for an id that is not known."""
        if len(self._kept) > self._room:
            self._trim()
        try:
            return self.nodes[node_id]
        except KeyError:
            raise sysio.error(errno.ESTALE) from None

    def directory(self, node_id: int) -> BindNode:
        """Return a living directory; raises ENOTDIR for another node."""
        node = self.node(node_id)
        if node.fmt != stat.S_IFDIR:
            raise sysio.error(errno.ENOTDIR)
        return node

    def fd(self, node: BindNode) -> int:
        """Return an ``O_PATH`` descriptor of the object, good until the next `node`; ESTALE where it is lost."""
        node.used = True
        return node.fd if node.fd >= 0 else self._reopen(node)

    def _path(self, node: BindNode) -> bytes:
        """Return a path that leads to the object itself if it is followed, be it a symbolic link."""
        return b"/proc/self/fd/%d" % self.fd(node)

    def _keep(self, node: BindNode, fd: int) -> None:
        node.fd = fd
        node.used = True
        node.proof = None
        self._kept[node] = None
        self._watcher.opened(node)

    def _drop_fd(self, node: BindNode) -> None:
        self._collect(node)
        self._watcher.closing(node)
        os.close(node.fd)
        node.fd = -1

    def _collect(self, node: BindNode) -> None:
        """Count lookups that were answered past us."""
        looked = self._watcher.lookups(node)
        if looked:
            node.nlookup += looked
            node.used = True

    def _trim(self) -> None:
        """Close descriptors of nodes that were not used lately; few at a time, for no request shall wait for many.

        An object without names on the host is lost with its descriptor, so that one stays.
        """
        kept, most = self._kept, 2 * self._room
        for _ in range(_EVICTIONS):
            if len(kept) <= self._room:
                return
            node, _ = kept.popitem(last=False)
            self._collect(node)
            if node.used or (os.fstat(node.fd).st_nlink == 0 and len(kept) < most):
                node.used = False
                kept[node] = None
            else:
                node.proof = proof_of(node.fd)
                self._drop_fd(node)

    def _reopen(self, node: BindNode) -> int:
        chain = [node]
        while not chain[-1].handles and (parent := chain[-1].parent) is not None and parent.fd < 0:
            chain.append(parent)
        for link in reversed(chain):
            self._reopen_one(link)
        return node.fd

    def _reopen_one(self, node: BindNode) -> None:
        try:
            if node.handles:
                fd = os.open(sysio.fd_path(node.handles[0]), os.O_PATH | os.O_CLOEXEC)
            elif node.name is None or node.parent is None:
                raise sysio.error(errno.ESTALE)
            else:
                node.parent.used = True
                fd = os.open(node.name, sysio.O_PATH_NOFOLLOW, dir_fd=node.parent.fd)
        except (FileNotFoundError, NotADirectoryError):
            raise sysio.error(errno.ESTALE) from None
        try:
            if not self._is(node, fd, os.fstat(fd)):
                raise sysio.error(errno.ESTALE)
        except BaseException:
            os.close(fd)
            raise
        self._keep(node, fd)

    @staticmethod
    def _is(node: BindNode, fd: int, st: os.stat_result) -> bool:
        """Tell whether *fd* is the object that a node stands for."""
        if node.key != (st.st_dev, st.st_ino) or node.fmt != stat.S_IFMT(st.st_mode):
            return False
        return node.fd >= 0 or bool(node.handles) or node.proof == proof_of(fd)

    def _adopt(self, bind: Bind, fd: int) -> tuple[BindNode, os.stat_result]:
        """Take an ``O_PATH`` descriptor over; return the node of its object and its attributes."""
        try:
            st = os.fstat(fd)
            key = (st.st_dev, st.st_ino)
            node = bind.by_key.get(key)
            if node is not None and not self._is(node, fd, st):
                node = None  # gone, and its number was given to this one
        except BaseException:
            os.close(fd)
            raise
        if node is None:
            node = BindNode(self._free_id(st.st_ino), bind, key, self.map_ino(*key), stat.S_IFMT(st.st_mode))
            if not bind.by_key:
                bind.root = node
            bind.by_key[key] = self.nodes[node.id] = node
        if node.fd < 0:
            self._keep(node, fd)
        else:
            os.close(fd)
            node.used = True
        return node, st

    def _free_id(self, ino: int) -> int:
        """Return a node id: the host's number where it is free, for without the native layer users see node ids."""
        if ino < _EXTRA_BIT and _FIRST_ID | ino not in self.nodes:
            return _FIRST_ID | ino
        self._extra += 1
        return _FIRST_ID | _EXTRA_BIT | self._extra

    # -- names --

    def _named(self, node: BindNode, parent: BindNode, name: bytes) -> None:
        if node is node.bind.root:
            return
        if node.parent is not parent or node.name != name:
            self._unnamed(node)
            node.parent, node.name = parent, name
        parent.children[name] = node
        self._watcher.named(parent, name, node)

    def _unnamed(self, node: BindNode | None) -> None:
        if node is None or node.name is None:
            return
        if node.parent is not None and node.parent.children.get(node.name) is node:
            del node.parent.children[node.name]
            self._watcher.unnamed(node.parent, node.name)
        node.name = None

    # -- lookups --

    def forget(self, node_id: int, count: int) -> None:
        """Take lookups off a node; one without any goes."""
        node = self.nodes.get(node_id)
        if node is not None:
            node.nlookup -= count
            self._bury(node)

    def _bury(self, node: BindNode) -> None:
        if node.nlookup > 0 or node.handles:
            return
        self._collect(node)
        if node.nlookup > 0:
            return
        self.nodes.pop(node.id, None)
        if node.bind.by_key.get(node.key) is node:
            del node.bind.by_key[node.key]
        name = node.name
        self._unnamed(node)
        node.name = name  # a child that outlives it may need the way
        if node.fd >= 0:
            self._kept.pop(node, None)
            self._drop_fd(node)


def proof_of(fd: int) -> tuple[int, bytes] | None:
    """Return what tells an object from a later one with its number, None where the file system has no such thing."""
    try:
        return sysio.file_handle(fd, b"")
    except OSError:
        return None


def _descriptor_room() -> int:
    """Return how many descriptors nodes may keep: a quarter of what the process may have; layers have a half."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(soft // 4, 16384))
