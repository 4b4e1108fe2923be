"""The living tree: nodes made of what a walk found, and the way back from a node to its real object.

Where the real object of a node is:

- `Node.anchor` is a descriptor of it (no name leads there: unlinked);
- else, with INDEXED, its entry in the index directory (any name of the link may be missing in upper);
- else ``name`` in the parent's directory of layer `Node.layer`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from collections.abc import Callable
from typing import Final

from unionfs.config import MountConfig
from unionfs.core import sysio
from unionfs.core.dirfds import DirFds
from unionfs.core.inodes import (
    APPEND_ONLY,
    BROKEN_LINK,
    IMMUTABLE,
    IMPURE,
    INDEXED,
    META,
    OPAQUE,
    ORIGIN,
    PLAIN,
    PROTECTION_KNOWN,
    REDIRECT,
    UNLINKED,
    UPPER,
    Dir,
    InodeTable,
    Node,
)
from unionfs.core.layers import LayerStack
from unionfs.core.markers import Format, decode_nlink, decode_protattr, get_xattr
from unionfs.core.resolve import Found, Resolver, where_tuple
from unionfs.core.slow import WouldBlock
from unionfs.core.workdir import WorkDir, set_impure

_LISTED: Final = (stat.S_IFREG, stat.S_IFDIR)  # whose extended attributes a lookup lists
STRIP_OPEN: Final = os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_APPEND | os.O_DIRECT | os.O_NOFOLLOW | os.O_DIRECTORY


class Tree:
    """Nodes of one mount and their real objects."""

    def __init__(
        self,
        config: MountConfig,
        layers: LayerStack,
        dirfds: DirFds,
        inodes: InodeTable,
        resolver: Resolver,
        work: WorkDir | None,
        fmt: Format,
    ) -> None:
        self.config = config
        self.layers = layers
        self.door = door = layers.door
        self._stat, self._fstat, self._open = door.stat, door.fstat, door.open
        self.dirfds = dirfds
        self.inodes = inodes
        self.resolver = resolver
        self.work = work
        self.fmt = fmt
        self.index_names: dict[Node, bytes] = {}
        self.data_anchors: dict[Node, int] = {}
        self.data_blocks: dict[Node, int] = {}  # of metacopies: the lower data does not change
        # Set where lowers may change: takes a node out of the tree that is not what is at its name any more.
        self.replaced: Callable[[Dir, bytes, Node], None] | None = None
        self.root = self._make_root()

    def _make_root(self) -> Dir:
        layers = self.layers
        top = layers.upper or layers.lowers[0]
        root = self.inodes.add_root(top.root_stat)
        root.stack = (*((0,) if layers.upper else ()), *(layer.index for layer in layers.lowers))
        root.layer, root.rino = root.stack[0], top.root_stat.st_ino
        if layers.upper is not None:
            root.flags = UPPER
            if get_xattr(sysio.fd_path(top.fd), self.fmt.impure) is not None:
                root.flags |= IMPURE
        return root

    # -- from names to nodes --

    def child(self, parent: Dir, name: bytes) -> Node | None:
        """Return the node of an entry, None where there is none. A node that is new has no lookups yet."""
        node = parent.children.get(name)
        if node is not None:
            return node
        found = self.resolver.lookup(parent, name)
        return None if found is None else self.attach(parent, name, found)

    def look(self, parent: Dir, name: bytes, first: int = 0) -> tuple[Node, os.stat_result] | None:
        """Return the node of an entry and the stat result of its real object, None where there is none.

        *first* is a layer above which the name is known to be absent.
        """
        node = parent.children.get(name)
        if node is not None:
            try:
                return node, self.stat(node)
            except OSError as exc:
                if self.replaced is None or exc.errno not in (errno.ESTALE, errno.ENOENT):
                    raise
            self.replaced(parent, name, node)
            if parent.children.get(name) is node:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
        plain = self.resolver.plain_file(parent, name, first)
        if plain is not None:
            return self._attach_plain(parent, name, *plain)
        found = self.resolver.lookup(parent, name, first)
        if found is None:
            return None
        node = self.attach(parent, name, found)
        return node, found.st if node.job is None else self.stat(node)

    @staticmethod
    def prefer(node: Node, parent: Dir, name: bytes) -> None:
        """The name that was looked up last is the one that a following copy-up is for."""
        if node.links and (node.parent is not parent or node.name != name) and node.parent is not None:
            node.links = [link for link in node.links if link != (parent, name)] + [(node.parent, node.name)]
            node.parent, node.name = parent, name

    def awaits_links(self, node: Node, st: os.stat_result) -> bool:
        """Tell whether some name of an indexed hard link, or one to be, is not in upper yet.

        FUSE names inodes in its requests, overlayfs links the *name* used into upper. The names of such a file must
        not stay in the kernel's cache: then each operation by name is preceded by a lookup of it, and `prefer` knows.
        """
        if node.fmt == stat.S_IFDIR or self.resolver.index_fd < 0:
            return False
        if not node.flags & UPPER:
            return st.st_nlink > 1
        # The index entry is a link too: all names are there when it is the only one more.
        return bool(node.flags & INDEXED) and node.nlink != st.st_nlink - 1

    def need(self, parent: Dir, name: bytes) -> Node:
        """Like :meth:`child`; raises ENOENT."""
        node = self.child(parent, name)
        if node is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return node

    def attach(self, parent: Dir, name: bytes, found: Found) -> Node:
        """Return the node of what was found: a living one under one more name, or a new one (``ovl_get_inode``).

        Raises OSError: ENOMEM, there is no room for a new one.
        """
        fmt = stat.S_IFMT(found.st.st_mode)
        upper = found.layer == 0
        broken = not upper and fmt != stat.S_IFDIR and self._will_break(found)
        ino = self.ino_of(found)
        if fmt != stat.S_IFDIR and not broken:
            real = found.st.st_ino
            known = self.inodes.find_upper(real) if upper else self.inodes.find_lower(ino, real)
            if known is not None and known.fmt == fmt:
                self.named(known, parent, name)
                return known
        node = self.inodes.add(ino, fmt, parent, name)
        node.layer, node.rino = found.layer, found.st.st_ino
        node.flags = (
            (UPPER if upper else 0)
            | (BROKEN_LINK if broken else 0)
            | (META if found.metacopy else 0)
            | (REDIRECT if found.redirect is not None else 0)
            | (OPAQUE if found.opaque else 0)
            | (PLAIN if not (upper or found.xattrs) and fmt in _LISTED else 0)
            | (ORIGIN if upper and (found.origin or len(found.stack) > 1) else 0)
        )
        if isinstance(node, Dir):
            node.stack, node.where = tuple(found.stack), where_tuple(found)
            if upper and self.fmt.impure in found.xattrs:
                node.flags |= IMPURE
            if upper and node.is_merged and self.fmt.origin not in found.xattrs and self.work is not None:
                try:
                    self._fix_origin(node, parent)
                except WouldBlock:
                    self.forget(node, 0)
                    raise
        elif found.index_name:
            self._attach_index(node, found)
        if upper:
            self.inodes.note_upper(node)
            if self.fmt.protattr in found.xattrs or node.flags & INDEXED:
                self.protection(node)
            else:
                node.flags |= PROTECTION_KNOWN
        return node

    def _attach_plain(self, parent: Dir, name: bytes, layer: int, st: os.stat_result) -> tuple[Node, os.stat_result]:
        """The same as `attach` for a file about which there is nothing to find out (`Resolver.plain_file`)."""
        ino = self.inodes.map_ino(st.st_dev, st.st_ino)
        known = self.inodes.find_lower(ino, st.st_ino)
        if known is not None and known.fmt == stat.S_IFREG:  # the directory has two places in the union
            self.named(known, parent, name)
            return known, st if known.job is None else self.stat(known)
        node = self.inodes.add(ino, stat.S_IFREG, parent, name)
        node.layer, node.rino, node.flags = layer, st.st_ino, PLAIN
        return node, st

    def _will_break(self, found: Found) -> bool:
        """A lower hard link that is not indexed gets separated from its other names by copy-up."""
        return found.st.st_nlink > 1 and self.resolver.index_fd < 0 and self.layers.upper is not None

    def ino_of(self, found: Found) -> int:
        """Return the ``st_ino`` that the union shows of what was found."""
        st = found.st
        if found.is_dir:
            st = found.top_lower or st
        elif found.layer == 0 and found.origin is not None and (found.index_name or found.lower_nlink == 1):
            return self.inodes.map_ino(*found.origin)
        return self.inodes.map_ino(st.st_dev, st.st_ino)

    def _attach_index(self, node: Node, found: Found) -> None:
        node.flags |= INDEXED
        self.index_names[node] = found.index_name
        path = sysio.entry_path(self.resolver.index_fd, found.index_name)
        value = get_xattr(path, self.fmt.nlink)
        total = decode_nlink(value, found.st.st_nlink, found.lower_nlink) if value else None
        node.nlink = total if total is not None else found.st.st_nlink

    def _fix_origin(self, node: Dir, parent: Dir) -> None:
        """Give a merge directory that came without one its origin (``ovl_fix_origin``)."""
        fds = self.dirfds.fds(node)
        value = self.origin_value(node.stack[1], fds[1], b"")
        with contextlib.suppress(OSError):
            os.setxattr(sysio.fd_path(fds[0]), self.fmt.origin, value)
            set_impure(parent, self.dirfds.upper(parent), self.fmt, IMPURE)

    def origin_value(self, layer_index: int, dirfd: int, name: bytes) -> bytes:
        """Return the origin attribute of a lower object; empty where nobody could decode it (``ovl_get_origin_fh``)."""
        if not self.resolver.decodes_handles:
            return b""
        return self.resolver.encode_origin(self.layers.layer(layer_index), dirfd, name) or b""

    # -- from nodes to real objects --

    def place(self, node: Node) -> tuple[int, bytes]:
        """Return (dirfd, name) of the real object; the node must have a living name."""
        if node.flags & INDEXED:
            return self.resolver.index_fd, self.index_names[node]
        parent = node.parent
        if parent is None:
            return self.dirfds.fds(self.root)[0], b"."
        return self.dirfds.fd(parent, node.layer), node.name

    def path(self, node: Node) -> bytes:
        """Return a path of the real object for calls that take no descriptor; don't follow its last component."""
        if node.anchor >= 0:
            return self.door.fd_path(node.anchor)
        if isinstance(node, Dir):
            return self.door.fd_path(self.dirfds.fds(node)[0])
        return self.door.entry_path(*self.place(node))

    def follow(self, node: Node) -> bool:
        """Tell whether :meth:`path` must be followed: it is the name of a descriptor."""
        return node.anchor >= 0 or isinstance(node, Dir)

    def stat(self, node: Node) -> os.stat_result:
        """Return the stat result of the real object, with what a copy-up of its data has changed so far."""
        return self._real_stat(node) if node.job is None else node.job.shown(self._real_stat(node))

    def _real_stat(self, node: Node) -> os.stat_result:
        if node.anchor >= 0:
            return self._fstat(node.anchor)
        if isinstance(node, Dir):
            if node.fds is not None or node.parent is None or node.where is not None or node.stale:
                return self._fstat(self.dirfds.fds(node)[0])
            dirfd, name = self.dirfds.fds(node.parent)[self._at(node)], node.name
        else:
            dirfd, name = self.place(node)
        st = self._stat(name, dir_fd=dirfd, follow_symlinks=False)
        if self.replaced is not None:
            self._check_same(node, st)
        return st

    @staticmethod
    def _check_same(node: Node, st: os.stat_result) -> None:
        """Where lowers may change: raise ESTALE, on which the kernel looks the name up again, for another object."""
        if not node.flags & UPPER and (st.st_ino != node.rino or stat.S_IFMT(st.st_mode) != node.fmt):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), node.name)

    def protection(self, node: Node) -> int:
        """Return IMMUTABLE and APPEND_ONLY as the union shows them; looked up once (``ovl_check_protattr``)."""
        if not node.flags & PROTECTION_KNOWN:
            self.set_protection(node, self._real_protection(node))
        return node.flags & (IMMUTABLE | APPEND_ONLY)

    @staticmethod
    def set_protection(node: Node, inode_flags: int) -> None:
        """Note which of FS_IMMUTABLE and FS_APPEND a node has."""
        node.flags &= ~(IMMUTABLE | APPEND_ONLY)
        node.flags |= (
            PROTECTION_KNOWN
            | (IMMUTABLE if inode_flags & sysio.FS_IMMUTABLE else 0)
            | (APPEND_ONLY if inode_flags & sysio.FS_APPEND else 0)
        )

    def _real_protection(self, node: Node) -> int:
        """A lower object's is its own; an upper one has it in an attribute, so that it can be renamed and linked."""
        if node.fmt not in (stat.S_IFREG, stat.S_IFDIR):
            return 0
        path, follow = self.path(node), self.follow(node)
        if not node.flags & UPPER:
            return self.door.ask_path(path, ("protected",), functools.partial(sysio.protected, follow=follow))
        value = get_xattr(path, self.fmt.protattr, follow=follow)
        return decode_protattr(value) if value else 0

    @staticmethod
    def _at(node: Dir) -> int:
        parent = node.parent
        assert parent is not None
        return parent.stack.index(node.stack[0])

    def nlink(self, node: Node, st: os.stat_result) -> int:
        """Return the link count that the union shows (``ovl_getattr``)."""
        if node.flags & INDEXED:
            return node.nlink
        if node.flags & UNLINKED:
            return st.st_nlink if node.flags & UPPER else 0
        if isinstance(node, Dir) and (node.is_merged or self.config.static_nlink):
            return 1
        return st.st_nlink

    def blocks(self, node: Node, st: os.stat_result) -> int:
        """Return the number of 512-byte blocks: those of the data, which a metacopy has in a lower layer."""
        if not node.flags & META:
            return st.st_blocks
        known = self.data_blocks.get(node)
        if known is None:
            known = self.data_blocks[node] = self._read_blocks(node, st)
        return known

    def readlink(self, node: Node) -> bytes:
        """Return the target of a symbolic link."""
        if node.anchor >= 0:
            return self.door.readlink(b"", dir_fd=node.anchor)
        dirfd, name = self.place(node)
        return self.door.readlink(name, dir_fd=dirfd)

    def _read_blocks(self, node: Node, st: os.stat_result) -> int:
        try:
            fd = self.open_data_place(node, sysio.O_PATH_NOFOLLOW)
        except OSError:
            return -(-st.st_size // 4096) * 8
        try:
            return self._fstat(fd).st_blocks
        finally:
            os.close(fd)

    # -- opening --

    def open_real(self, node: Node, flags: int) -> int:
        """Open the data of a regular file with the access mode and status flags of an ``open(2)``.

        The caller sees to it that what is opened for writing is in upper.
        """
        flags = (flags & ~STRIP_OPEN) | os.O_CLOEXEC
        if node.flags & META:
            return self._without_atime(lambda extra: self.open_data_place(node, flags | extra), node.layer)
        if node.anchor >= 0:
            return self._open(self.door.fd_path(node.anchor), flags)
        dirfd, name = self.place(node)
        if node.flags & UPPER:
            return os.open(name, flags | os.O_NOFOLLOW, dir_fd=dirfd)
        fd = self._without_atime(
            lambda extra: self._open(name, flags | os.O_NOFOLLOW | extra, dir_fd=dirfd), node.layer
        )
        if self.replaced is not None:
            try:
                self._check_same(node, self._fstat(fd))
            except BaseException:
                self.door.close_file(fd)
                raise
        return fd

    def _without_atime(self, opener: Callable[[int], int], layer: int) -> int:
        """Reading must not change a lower layer; where the mount isn't noatime, ask for each file (owner only).

        Nor may it wait, but for a lease (fcntl(2)): somebody may have put a fifo in the place of a regular file.
        """
        real = self.layers.by_index[layer]
        noatime = real.read_noatime if real is not None else 0
        for extra in (noatime | os.O_NONBLOCK, os.O_NONBLOCK):
            try:
                return opener(extra)
            except PermissionError:
                if not extra & os.O_NOATIME:
                    raise
            except BlockingIOError:
                break
        return opener(0)

    def open_data_place(self, node: Node, flags: int) -> int:
        """Open the lower object that holds the data of a metacopy file."""
        if node in self.data_anchors:
            return self._open(self.door.fd_path(self.data_anchors[node]), flags & ~os.O_NOFOLLOW)
        if node.parent is None:
            raise OSError(errno.EIO, "metacopy without a name")
        found = self.resolver.lookup(node.parent, node.name)
        if found is None or found.data is None:
            raise OSError(errno.ENOENT, "the data of a metacopy is missing", node.name)
        layer, where = found.data
        if where is None or where.startswith(b"/"):
            name = node.name if where is None else where[1:]
            return self._open(name, flags | os.O_NOFOLLOW, dir_fd=self.dirfds.fd(node.parent, layer))
        return self.door.open_beneath(self.layers.layer(layer).fd, where, flags | os.O_NOFOLLOW)

    # -- names that come and go --

    def named(self, node: Node, parent: Dir, name: bytes) -> None:
        """A node has one more name, or one again after its known ones were removed."""
        self.inodes.add_name(node, parent, name)
        node.flags &= ~UNLINKED
        if node.anchor >= 0:
            os.close(node.anchor)
            node.anchor = -1

    def moved(self, node: Node, old_dir: Dir, old_name: bytes, new_dir: Dir, new_name: bytes) -> None:
        """A node's name has changed."""
        if old_dir.children.get(old_name) is node:
            del old_dir.children[old_name]
        old_dir.version += 1
        self._renamed(node, old_dir, old_name, new_dir, new_name)
        self.forget(old_dir, 0)

    def exchanged(self, one: Node, one_dir: Dir, one_name: bytes, two: Node, two_dir: Dir, two_name: bytes) -> None:
        """Two nodes have changed places."""
        self._renamed(one, one_dir, one_name, two_dir, two_name)
        self._renamed(two, two_dir, two_name, one_dir, one_name)

    @staticmethod
    def _renamed(node: Node, old_dir: Dir, old_name: bytes, new_dir: Dir, new_name: bytes) -> None:
        new_dir.version += 1
        new_dir.children[new_name] = node
        if node.parent is old_dir and node.name == old_name:
            node.parent, node.name = new_dir, new_name
        elif node.links:
            node.links = [(new_dir, new_name) if link == (old_dir, old_name) else link for link in node.links]
        if isinstance(node, Dir) and len(node.stack) > 1:
            node.stale = True

    # -- letting go --

    def anchor(self, node: Node) -> None:
        """Keep a file that is about to lose its last name reachable, for those who still have it open."""
        if node.anchor >= 0:
            return
        if node.flags & META and node not in self.data_anchors:
            self.data_anchors[node] = self.open_data_place(node, sysio.O_PATH_NOFOLLOW)
        dirfd, name = self.place(node)
        node.anchor = self._open(name, sysio.O_PATH_NOFOLLOW, dir_fd=dirfd)

    def forget(self, node: Node, count: int) -> None:
        """Take lookups off a node; what dies is closed."""
        for dead in self.inodes.release(node, count):
            self.bury(dead)

    def bury(self, node: Node) -> None:
        """Close what a dead node holds."""
        if isinstance(node, Dir):
            self.dirfds.drop(node)
        if node.anchor >= 0:
            os.close(node.anchor)
            node.anchor = -1
        data = self.data_anchors.pop(node, -1)
        if data >= 0:
            os.close(data)
        self.index_names.pop(node, None)
        self.data_blocks.pop(node, None)
