"""Identity: which node of the mount stands for which real object.

*Node id* is the number that the kernel uses to name an inode to us; *st_ino* is what users see. They are the same
number wherever that is unique among the living nodes, so plain pyfuse3 (which can't tell them apart) is right;
where two nodes must show one ``st_ino`` (names of a lower hard link that copy-up will break apart) the second gets
a node id of its own.

``st_ino`` follows overlayfs (``ovl_map_ino`` and ``ovl_getattr`` in fs/overlayfs/inode.c): the number of the lower
object while there is one, before and after copy-up; that of the upper object otherwise. Numbers of other file
systems than the upper's carry the number of the file system in their high bits (xino), so no two files share one.

A node lives while the kernel knows it (`Node.nlookup` > 0), or while a node below it does (`Dir.children` is not
empty): the way to a file's layers leads through its parent directories. Every living name of a node is in
`Dir.children` of its parent, which is what makes unlink and rename constant in the size of the directory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Final, Protocol

from unionfs.core.reserve import Reserve

ROOT_ID: Final = 1

# Node.flags
UPPER: Final = 1  # the real object is in upper
META: Final = 2  # its data is in a lower layer (metacopy)
INDEXED: Final = 4  # an index entry ties the names of this lower hard link together; Node.nlink counts them
ORIGIN: Final = 8  # an upper object that knows its lower origin (or a lower part)
UNLINKED: Final = 16  # no name is left; what is open, or Node.anchor, keeps it
REDIRECT: Final = 32  # has a redirect attribute
OPAQUE: Final = 64  # a directory that is marked opaque in upper
IMPURE: Final = 128  # an upper directory known to carry the impure mark
BROKEN_LINK: Final = 256  # a lower hard link that copy-up will separate: identified by its name
IMMUTABLE: Final = 512  # chattr +i; it and the next are right once PROTECTION_KNOWN is set
APPEND_ONLY: Final = 1024  # chattr +a
PROTECTION_KNOWN: Final = 2048
PLAIN: Final = 4096  # was found in a lower layer, without any extended attribute
PLAIN_MASK: Final = PLAIN | UPPER  # where only PLAIN is set of these it still is one
CACHED: Final = 8192  # was read as a lower file, so the kernel may have its data

_NOT_PLAIN: Final = META | INDEXED | UNLINKED | BROKEN_LINK

NUMBER_BITS: Final = 55
"""How many bits of the `st_ino` shown are the file's own; those above them are its file system's."""

_INO_MASK: Final = (1 << NUMBER_BITS) - 1
_EXTRA_BIT: Final = 1 << 63


class Job(Protocol):
    """A copy-up of a file's data that is under way (copyup.DataCopy)."""

    def shown(self, st: os.stat_result) -> os.stat_result:
        """Return what the file shows meanwhile, given the stat result of the lower file."""


class Node:
    """One inode of the union. `parent` and `name` are one of its living names; more are in `links`."""

    __slots__ = (
        "anchor",
        "flags",
        "fmt",
        "handles",
        "id",
        "ino",
        "job",
        "layer",
        "links",
        "name",
        "nlink",
        "nlookup",
        "parent",
        "rino",
    )

    def __init__(self, node_id: int, ino: int, fmt: int, parent: Dir | None, name: bytes) -> None:
        self.id = node_id
        self.ino = ino
        self.fmt = fmt  # S_IFMT bits
        self.parent = parent
        self.name = name
        self.links: list[tuple[Dir, bytes]] | None = None
        self.layer = 0  # index of the layer that holds the real object; 0 is upper
        self.rino = 0  # st_ino of the real object
        self.flags = 0
        self.nlookup = 0
        self.nlink = 0  # with INDEXED: the number of names in the union
        self.anchor = -1  # O_PATH descriptor where no name leads to the real object
        self.handles: list[int] | None = None  # open file handles (descriptor numbers)
        self.job: Job | None = None

    @property
    def is_dir(self) -> bool:
        """Tell whether this is a directory."""
        return self.fmt == stat.S_IFDIR

    @property
    def is_upper(self) -> bool:
        """Tell whether the real object is in upper already."""
        return bool(self.flags & UPPER)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.name!r} layer={self.layer} flags={self.flags:#x}>"


class Dir(Node):
    """A directory: the layers that it merges, top first, and what is known below it."""

    __slots__ = ("children", "default_acl", "fds", "listed", "stack", "stale", "version", "where")

    def __init__(self, node_id: int, ino: int, parent: Dir | None, name: bytes) -> None:
        super().__init__(node_id, ino, stat.S_IFDIR, parent, name)
        self.stack: tuple[int, ...] = ()
        # Per layer where it isn't simply NAME in the parent's directory of the same layer: a path from the layer's
        # root, or `/OTHER` for another name in the parent's directory.
        self.where: tuple[bytes | None, ...] | None = None
        self.fds: tuple[int, ...] | None = None  # owned by dirfds
        self.stale = False  # renamed: `where` must be found again before the next opening
        self.children: dict[bytes, Node] = {}
        self.listed = -1  # its version when it was last read
        self.version = 0  # counts changes of what names the directory holds, and where
        self.default_acl: bytes | bool | None = False  # False: not looked at yet

    @property
    def is_merged(self) -> bool:
        """Tell whether more than one layer shows through (OVL_TYPE_MERGE)."""
        return len(self.stack) > 1

    @property
    def is_pure_upper(self) -> bool:
        """Tell whether upper alone makes up this directory."""
        return self.stack == (0,)


class InodeTable:
    """All living nodes, by node id."""

    make_node: Callable[[int, int, int, Dir | None, bytes], Node] = Node
    make_dir: Callable[[int, int, Dir | None, bytes], Dir] = Dir

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.reserve = Reserve()
        self._extra = 0
        self._fsids: dict[int, int] = {}
        self._odd: dict[tuple[int, int], int] = {}
        self._by_upper: dict[int, Node] = {}
        self.retired: set[int] = set()  # ids that are no node's any more, but that the kernel has not forgotten

    # -- numbers --

    def know_device(self, device: int) -> None:
        """Give the next file-system number to an ``st_dev``; the first, which gets plain numbers, is upper's."""
        self._fsids.setdefault(device, len(self._fsids))

    def map_ino(self, device: int, ino: int) -> int:
        """Return the ``st_ino`` that a real object shows in the union (``ovl_map_dev_ino``)."""
        fsid = self._fsids.get(device)
        if fsid is None:
            self.know_device(device)
            fsid = self._fsids[device]
        if ino <= _INO_MASK and fsid < 256:
            return fsid << NUMBER_BITS | ino
        # No room for the file system's number: overlayfs falls back to non-persistent numbers, so do we.
        return self._odd.setdefault((device, ino), _EXTRA_BIT | (1 << 62) | len(self._odd))

    def number_base(self, device: int) -> int | None:
        """Return what `map_ino` adds to the numbers that leave room for it; None where it adds nothing of the kind."""
        fsid = self._fsids.get(device)
        return None if fsid is None or fsid >= 256 else fsid << NUMBER_BITS

    def _free_id(self, ino: int) -> int:
        if ino > ROOT_ID and ino not in self.nodes and ino not in self.retired:
            return ino
        self._extra += 1
        return _EXTRA_BIT | self._extra

    # -- nodes --

    def add_root(self, st: os.stat_result) -> Dir:
        """Create the root directory, which is never forgotten."""
        root = self.make_dir(ROOT_ID, self.map_ino(st.st_dev, st.st_ino), None, b"")
        root.nlookup = 1
        self.nodes[ROOT_ID] = root
        return root

    def find_lower(self, ino: int, rino: int) -> Node | None:
        """Return the living node of a lower object that shows *ino*."""
        node = self.nodes.get(ino)
        if node is not None and node.rino == rino and not node.flags & (UPPER | UNLINKED | BROKEN_LINK):
            return node
        return None

    def find_upper(self, rino: int) -> Node | None:
        """Return the living node of an upper object."""
        for node in (self.nodes.get(rino), self._by_upper.get(rino)):
            if node is not None and node.rino == rino and node.flags & (UPPER | UNLINKED) == UPPER:
                return node
        return None

    def note_upper(self, node: Node) -> None:
        """Make an upper node findable by its real inode where its id is another number."""
        if node.id != node.rino:
            self._by_upper[node.rino] = node

    def renumber_upper(self, node: Node, rino: int) -> None:
        """Another upper object has taken the place of a node's."""
        if self._by_upper.get(node.rino) is node:
            del self._by_upper[node.rino]
        node.rino = rino
        self.note_upper(node)

    def retire(self, node: Node) -> bool:
        """Take a node out of the table that the kernel may still know; tell whether it was in it."""
        if self.nodes.get(node.id) is not node:
            return False
        del self.nodes[node.id]
        if node.nlookup:
            self.retired.add(node.id)
        return True

    def add(self, ino: int, fmt: int, parent: Dir, name: bytes, *, made: bool = False) -> Node:
        """Create a node and give it its first name.

        *made*: for a new object. Whoever makes one calls `reserve.check` before.

        Raises OSError: ENOMEM, there is no room for a new node; not if *made*.
        """
        if not made:
            self.reserve.check()
        node_id = self._free_id(ino)
        if fmt == stat.S_IFDIR:
            node: Node = self.make_dir(node_id, ino, parent, name)
        else:
            node = self.make_node(node_id, ino, fmt, parent, name)
        self.nodes[node_id] = node
        parent.children[name] = node
        return node

    def plain(self, ino: int, rino: int, parent: Dir, name: bytes, layer: int) -> Node | None:
        """Return the node of a regular file with one name and no attribute, as it is or a new one.

        None where there is more to it: a living node of that number is another's, or in use. Raises OSError: ENOMEM.
        """
        known = self.nodes.get(ino)
        if known is not None:
            same = known.parent is parent and known.name == name and known.layer == layer and known.rino == rino
            return (
                known if same and not (known.handles or known.job or known.links or known.flags & _NOT_PLAIN) else None
            )
        if name in parent.children or ino in self.retired or (not layer and rino in self._by_upper):
            return None
        self.reserve.check()
        node = self.nodes[ino] = parent.children[name] = self.make_node(ino, ino, stat.S_IFREG, parent, name)
        node.layer, node.rino = layer, rino
        node.flags = PLAIN if layer else UPPER | PROTECTION_KNOWN
        return node

    @staticmethod
    def add_name(node: Node, parent: Dir, name: bytes) -> None:
        """Note one more name of a node."""
        if parent.children.get(name) is node:
            return
        parent.version += 1
        parent.children[name] = node
        if node.parent is None or node.parent.children.get(node.name) is not node:
            node.parent, node.name = parent, name
        else:
            node.links = [*(node.links or ()), (parent, name)]

    @staticmethod
    def drop_name(node: Node, parent: Dir, name: bytes) -> bool:
        """Forget one name; tell whether another one is known. With the last one `parent` stays for messages."""
        parent.version += 1
        if parent.children.get(name) is node:
            del parent.children[name]
        links = node.links
        if node.parent is parent and node.name == name:
            if not links:
                return False
            node.parent, node.name = links.pop()
        elif links:
            links[:] = [link for link in links if link != (parent, name)]
        node.links = links or None
        return True

    def release(self, node: Node, count: int) -> list[Node]:
        """Take *count* lookups off; return the nodes that died of it, so that their descriptors can be closed."""
        node.nlookup -= count
        dead: list[Node] = []
        current: Node | None = node
        while current is not None and current.nlookup <= 0 and not current.handles and current.job is None:
            if isinstance(current, Dir) and current.children:
                break
            if self.nodes.get(current.id) is not current or current.id == ROOT_ID:
                break
            del self.nodes[current.id]
            if self._by_upper.get(current.rino) is current:
                del self._by_upper[current.rino]
            dead.append(current)
            parents = [parent for parent, _ in current.links or ()]
            for parent, name in current.links or ():
                if parent.children.get(name) is current:
                    del parent.children[name]
            parent_dir, name = current.parent, current.name
            if parent_dir is not None and parent_dir.children.get(name) is current:
                del parent_dir.children[name]
            for extra in parents:
                if extra is not parent_dir:
                    dead += self.release(extra, 0)
            current = parent_dir
        return dead
