"""``-o lower=watch``: what somebody changes in a lower layer behind the union's back is seen.

Without it the kernel may cache names and attributes for ever, since lowers are declared unchanging. With it each lower
directory that the union has looked into is watched (inotify(7)). An event names a directory and an entry of it. What
the core knows of that entry is taken out of the tree, and the kernel is told to forget it, and nothing else: the entry
where names change, pages and attributes where content or attributes do. An object in upper stays, but a directory in
upper finds its lower parts again.

What somebody asks for between a change and its event is known by its inode number as another object (`Tree.replaced`).

A node that is taken out and still open lives on as an unlinked file does. Any other is gone: whoever still has it, as a
working directory for example, gets ESTALE.

Limits. A change is seen some milliseconds late; that a name is absent may be remembered for `ABSENT_SECONDS`. What
inotify doesn't tell isn't seen: writes through a shared mapping, what a server changes on a network file system, a
change through a hard link in a directory that nobody looked into, and the times of such a directory. overlayfs's
attributes on a file that is known already (a metacopy's data, its redirect) are not looked at again. Files of upper
keep what they took from their origin. Where events come faster than they are read (IN_Q_OVERFLOW), all that is known of
lowers is forgotten. Directories are watched as far as the limit of watches (fs.inotify.max_user_watches) goes, of which
the log tells once. A lower directory itself that is replaced by another one at its path, on the same file system, is
opened anew.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import trio

from unionfs.core import sysio
from unionfs.core.inodes import (
    APPEND_ONLY,
    IMMUTABLE,
    META,
    PLAIN,
    PROTECTION_KNOWN,
    ROOT_ID,
    UNLINKED,
    UPPER,
    Dir,
    Node,
)
from unionfs.core.layers import Layer
from unionfs.core.markers import WH_OPAQUE, WH_PREFIX
from unionfs.core.union import Union

log = logging.getLogger(__name__)

ABSENT_SECONDS: Final = 1.0
"""How long the kernel may remember that a name is absent: of the root's it can't be told to forget all."""

_MODIFY, _ATTRIB, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
_OVERFLOW, _IGNORED = 0x4000, 0x8000
_NAMES: Final = _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_WATCHED: Final = _NAMES | _MODIFY | _ATTRIB
_ONLYDIR, _MASK_ADD = 0x0100_0000, 0x2000_0000
_EVENT: Final = struct.Struct("iIII")
_BUFFER_BYTES: Final = 1 << 16
_LEAST_SWEEP: Final = 1024


class Event(NamedTuple):
    """One event: which watch, what happened (a mask), and the entry, b"" for the directory itself."""

    watch: int
    mask: int
    name: bytes


def parse_events(data: bytes) -> Iterator[Event]:
    """Yield the events in what was read from an inotify descriptor."""
    at = 0
    while at + _EVENT.size <= len(data):
        watch, mask, _, length = _EVENT.unpack_from(data, at)
        at += _EVENT.size
        yield Event(watch, mask, data[at : at + length].rstrip(b"\0"))
        at += length


class Forgotten:
    """What the kernel must forget: entries, by directory and name, and inodes; each once, in order."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, bytes], None] = {}
        self.inodes: dict[int, None] = {}

    def __bool__(self) -> bool:
        return bool(self.entries or self.inodes)


class Watching:
    """The watches of one mount."""

    def __init__(
        self, union: Union, *, forget_entry: Callable[[int, bytes], None], forget_inode: Callable[[int], None]
    ) -> None:
        """Start watching; what is opened from now on is watched.

        Args:
            union: the union.
            forget_entry: has the kernel forget a name, and listings of the directory; may wait.
            forget_inode: has the kernel forget pages and attributes; may wait.

        Raises:
            OSError: EMFILE where this user has too many such descriptors.
        """
        self._union = union
        self._tree = union.tree
        self._forget_entry = forget_entry
        self._forget_inode = forget_inode
        self._fd = sysio.inotify()
        self._dirs: dict[int, set[Dir]] = {}  # by watch
        self._places: dict[int, list[tuple[Layer, bytes]]] = {}  # where the roots of lowers lie, by watch: their names
        self._sweep_at = _LEAST_SWEEP
        self._is_full = False
        for layer in (*union.layers.lowers, *union.layers.data):
            self._watch_place(layer)
        union.dirfds.opened = self._opened
        union.tree.replaced = self._detach
        for node in list(union.inodes.nodes.values()):
            if isinstance(node, Dir) and node.fds is not None:
                self._opened(node, node.fds)

    def __len__(self) -> int:
        return len(self._dirs)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Heed events until cancelled."""
        try:
            task_status.started()
            while True:
                await trio.lowlevel.wait_readable(self._fd)
                forgotten = self._heed(parse_events(os.read(self._fd, _BUFFER_BYTES)))
                if forgotten:
                    await trio.to_thread.run_sync(self._tell, forgotten)
        finally:
            self._union.dirfds.opened = lambda node, fds: None
            os.close(self._fd)

    def _tell(self, forgotten: Forgotten) -> None:
        """Tell the kernel; not in the loop: it waits for requests that are under way."""
        with contextlib.suppress(OSError):  # the mount has ended
            for parent, name in forgotten.entries:
                self._forget_entry(parent, name)
            for node_id in forgotten.inodes:
                self._forget_inode(node_id)

    # -- watches --

    def _opened(self, node: Dir, fds: tuple[int, ...]) -> None:
        """A directory has got descriptors: watch those of lowers."""
        for layer, fd in zip(node.stack, fds, strict=True):
            if layer != 0 and not self._is_full:
                self._watch(node, fd)

    def _watch(self, node: Dir, fd: int) -> None:
        try:
            watch = sysio.inotify_add(self._fd, sysio.fd_path(fd), _WATCHED | _ONLYDIR)
        except OSError as exc:
            if exc.errno == errno.ENOSPC:
                self._is_full = True
                log.warning("no more watches (see fs.inotify.max_user_watches): changes of lowers may be missed")
            return
        self._dirs.setdefault(watch, set()).add(node)
        if len(self._dirs) > self._sweep_at:
            self._sweep()

    def _sweep(self) -> None:
        """Give up the watches of directories that nobody knows any more."""
        living = self._union.inodes.nodes
        for watch, dirs in list(self._dirs.items()):
            dirs -= {node for node in dirs if living.get(node.id) is not node}
            if not dirs:
                del self._dirs[watch]
                sysio.inotify_remove(self._fd, watch)
        self._sweep_at = max(_LEAST_SWEEP, 2 * len(self._dirs))
        self._is_full = False

    def _watch_place(self, layer: Layer) -> None:
        """Watch the directory in which the root of a lower lies, for another one in its place."""
        parent, name = os.path.split(os.fsencode(layer.path))
        with contextlib.suppress(OSError):
            mask = _CREATE | _MOVED_TO | _ONLYDIR | _MASK_ADD
            watch = sysio.inotify_add(self._fd, parent, mask)
            self._places.setdefault(watch, []).append((layer, name))

    # -- events --

    def _heed(self, events: Iterator[Event]) -> Forgotten:
        """Bring the tree up to date; return what the kernel must forget."""
        forgotten = Forgotten()
        for watch, mask, name in dict.fromkeys(events):
            if mask & _OVERFLOW:
                log.warning("changes of lowers came too fast: all that is known of them is forgotten")
                self._everything(forgotten)
            elif mask & _IGNORED:
                self._dirs.pop(watch, None)
            else:
                self._place_changed(watch, mask, name, forgotten)
                for node in list(self._dirs.get(watch, ())):
                    if self._union.inodes.nodes.get(node.id) is node:
                        self._changed(node, mask, name, forgotten)
        return forgotten

    def _place_changed(self, watch: int, mask: int, name: bytes, forgotten: Forgotten) -> None:
        """A directory in which roots of lowers lie has a new entry."""
        for layer, its_name in self._places.get(watch, ()):
            if name == its_name and mask & (_CREATE | _MOVED_TO) and self._union.layers.reopen(layer):
                log.info("lower %s is another directory now", layer.path)
                self._tree.dirfds.drop(self._tree.root)
                self._everything(forgotten)

    def _changed(self, node: Dir, mask: int, name: bytes, forgotten: Forgotten) -> None:
        if not name:
            forgotten.inodes[node.id] = None
        elif name == WH_OPAQUE:
            self._stack_changed(node, forgotten)
        elif mask & _NAMES:
            for one in {name, name.removeprefix(WH_PREFIX)} - {b""}:
                self._renamed(node, one, forgotten)
        elif (child := node.children.get(name)) is not None and child.flags & (UPPER | META) != UPPER:
            child.flags &= ~(PLAIN | PROTECTION_KNOWN | IMMUTABLE | APPEND_ONLY)
            self._tree.data_blocks.pop(child, None)
            forgotten.inodes[child.id] = None

    def _renamed(self, parent: Dir, name: bytes, forgotten: Forgotten) -> None:
        """Something else is at a name now, or nothing."""
        parent.version += 1
        child = parent.children.get(name)
        if child is not None:
            self._detach(parent, name, child)
            forgotten.inodes[child.id] = None  # its link count; and the number may be given to another file
        forgotten.entries[parent.id, name] = None
        forgotten.inodes[parent.id] = None

    def _stack_changed(self, node: Dir, forgotten: Forgotten) -> None:
        """Other layers may make up a directory now."""
        if node.parent is not None:
            self._renamed(node.parent, node.name, forgotten)
        forgotten.inodes[node.id] = None

    def _everything(self, forgotten: Forgotten) -> None:
        root = self._tree.root
        for name in list(root.children):
            self._renamed(root, name, forgotten)
        root.version += 1
        forgotten.inodes[root.id] = None

    # -- nodes --

    def _detach(self, parent: Dir, name: bytes, node: Node) -> None:
        """Take a node out of the tree that may not be what is at its name any more; what is in upper stays."""
        if node.job is not None or node.flags & UNLINKED:
            return
        if isinstance(node, Dir):
            for inner, child in list(node.children.items()):
                self._detach(node, inner, child)
            node.version += 1
            self._tree.dirfds.drop(node)
            node.stale = True
            node.default_acl = False
        if node.flags & UPPER or (isinstance(node, Dir) and node.children) or node.id == ROOT_ID:
            return
        if self._union.inodes.drop_name(node, parent, name):
            return  # it has other names
        if node.handles:
            self._keep_open(node)
        elif self._union.inodes.retire(node):
            self._tree.bury(node)

    @staticmethod
    def _keep_open(node: Node) -> None:
        """A file without a name lives on as long as it is open."""
        assert node.handles
        if node.anchor < 0 and not node.flags & META:
            node.anchor = os.open(sysio.fd_path(node.handles[0]), os.O_PATH | os.O_CLOEXEC)
        node.flags |= UNLINKED
