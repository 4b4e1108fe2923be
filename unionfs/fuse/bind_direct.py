"""The short way (see `direct`) for mounts with bind paths: frequent requests, the union's and the bind paths'.

What is rare in a bind path goes pyfuse3's way, to `bind_ops`: attributes of what is not open, special files, links.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any, Final

from unionfs.core.bind import BindDirHandle, Binds
from unionfs.core.bindnodes import MADE_NATIVELY, BindNode, Watcher, is_bind
from unionfs.core.caller import Caller
from unionfs.core.dirhandle import DirHandle
from unionfs.core.merge import Entry
from unionfs.fuse import native, wire
from unionfs.fuse.direct import Answer, Direct
from unionfs.fuse.handles import check_direct_io
from unionfs.fuse.wire import DT_SHIFT, FOPEN_NOFLUSH, FOPEN_PASSTHROUGH, Opcode

_DT_DIR: Final = stat.S_IFDIR >> DT_SHIFT

_MAY_CHANGE: Final = frozenset(
    (
        *(Opcode.SETATTR, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME),
        *(Opcode.LINK, Opcode.OPEN, Opcode.CREATE, Opcode.RENAME2),
    )
)


class NativeWatcher(Watcher):
    """Tells the native layer of descriptors and names, so that it answers LOOKUP, GETATTR and SETATTR by itself."""

    def reserved(self, name: bytes) -> None:
        native.reserve_name(name)

    def opened(self, node: BindNode) -> None:
        settable = not node.bind.read_only and node.fmt != stat.S_IFLNK
        native.own_bound(
            *(node.id, node.fd, node.ino, node.key, node.bind.number),
            timeout=node.bind.timeout,
            handles=len(node.handles),
            settable=settable,
            root=node is node.bind.root,
        )

    def closing(self, node: BindNode) -> None:
        native.disown_attributes(node.id, node.fd)

    def named(self, parent: BindNode, name: bytes, node: BindNode) -> None:
        native.know_name(parent.id, name, node.id)

    def unnamed(self, parent: BindNode, name: bytes) -> None:
        native.forget_name(parent.id, name)

    def handles(self, node: BindNode) -> None:
        native.count_handles(node.id, len(node.handles))

    def lookups(self, node: BindNode) -> int:
        return native.take_lookups(node.id)


class BindHandles:
    """What the kernel and the native layer do with open files of bind paths by themselves."""

    def __init__(self) -> None:
        self._modes = native.IoModes()
        self._passing: bool | None = None  # not known before the first open

    def opened_natively(self, node_id: int, backing_id: int) -> None:
        """Count the only handle of a node, which the native layer has opened; a backing id of 0: not passed through."""
        if self._has_passthrough():
            self._modes.opened_natively(node_id, backing_id)

    def opened(self, node: BindNode, fd: int, flags: int) -> None:
        """Decide how a handle is opened, just before the answer to OPEN or CREATE.

        Where passthrough is to be had the kernel reads, writes and maps the host's file itself. Raises OSError: EINVAL
        for O_DIRECT where the host's file system has none.
        """
        if self._has_passthrough():
            if flags & os.O_DIRECT:
                check_direct_io(fd)
            self._modes.opened(node.id, fd, allowed=self._may_pass(node, fd))
        if not node.bind.read_only:
            native.own_attributes(node.id, fd, node.ino, node.bind.timeout)

    def _has_passthrough(self) -> bool:
        if self._passing is None:
            self._passing = native.passthrough()
        return self._passing

    @staticmethod
    def _may_pass(node: BindNode, fd: int) -> bool:
        """Without the daemon the kernel would set the access time, and clear suid and sgid without saying so."""
        return not (node.bind.read_only or os.fstat(fd).st_mode & (stat.S_ISUID | stat.S_ISGID))

    def closed(self, node: BindNode, fd: int) -> None:
        """Count a handle as gone, before the descriptor is closed."""
        native.disown_attributes(node.id, fd)
        if self._passing:
            self._modes.released(node.id)


class BindingDirect(Direct):
    """Answers the frequent requests of a mount with bind paths."""

    def __init__(
        self,
        binds: Binds,
        bind_dirs: dict[int, BindDirHandle],
        bind_handles: BindHandles,
        *args: Any,
        read_only: bool,
        **kwargs: Any,
    ) -> None:
        """Share with the operations what both work on.

        Args:
            binds: the bind paths.
            bind_dirs: their open directories, by handle number.
            bind_handles: their open files.
            args, kwargs: what `Direct` takes.
            read_only: whether the union is; its changes are refused by the operations then.
        """
        self._binds = binds
        self._bind_dirs = bind_dirs
        self._bind_handles = bind_handles
        self._read_only = read_only
        super().__init__(*args, covered=binds.points, **kwargs)
        native.open_bound(MADE_NATIVELY, binds.map_ino, binds.created, self._opened_natively)

    def _opened_natively(self, node_id: int, fd: int, backing: int) -> None:
        self._bind_handles.opened_natively(node_id, backing)
        self._binds.opened(node_id, fd)

    def _handlers(self) -> dict[int, Callable[[int, int, int, int, bytes], Answer]]:
        handlers = super()._handlers()
        if self._read_only:
            return {opcode: handler for opcode, handler in handlers.items() if opcode not in _MAY_CHANGE}
        return handlers

    def _reply(self, node: BindNode, st: os.stat_result) -> bytes:
        """Build the answer for a name, and count the lookup."""
        node.nlookup += 1
        timeout = self._timeout if node is node.bind.root else node.bind.timeout
        return native.pack_entry(node.id, node.ino, timeout, self._binds.attributes_last(node), -1, -1, st)

    # -- names --

    def lookup(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Find a name."""
        binds, name = self._binds, body[:-1]
        root = binds.points.get((node_id, name))
        if root is not None:
            return self._reply(root, binds.stat(root))
        if not is_bind(node_id):
            return super().lookup(node_id, uid, gid, pid, body)
        looked = binds.look(binds.directory(node_id), name)
        return errno.ENOENT if looked is None else self._reply(*looked)

    def forget(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Take lookups off a node."""
        if not is_bind(node_id):
            return super().forget(node_id, uid, gid, pid, body)
        self._binds.forget(node_id, wire.u64(body)[0])
        return 0

    def batch_forget(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Take lookups off many nodes."""
        for forgotten, count in wire.forget_one(body[8:]):
            if is_bind(forgotten):
                self._binds.forget(forgotten, count)
            else:
                node = self._nodes.get(forgotten)
                if node is None:
                    self._retired.discard(forgotten)
                elif node.parent is not None:
                    self._tree.forget(node, count)
        return 0

    def mkdir(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Create a directory."""
        if not is_bind(node_id):
            return super().mkdir(node_id, uid, gid, pid, body)
        mode, umask = wire.open_in(body)
        parent = self._binds.directory(node_id)
        return self._reply(*self._binds.mkdir(parent, body[8:-1], mode, Caller(uid, gid, umask, pid)))

    def unlink(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Remove a file's name."""
        if not is_bind(node_id):
            return super().unlink(node_id, uid, gid, pid, body)
        self._binds.unlink(self._binds.directory(node_id), body[:-1])
        return 0

    def rmdir(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Remove a directory."""
        if not is_bind(node_id):
            return super().rmdir(node_id, uid, gid, pid, body)
        self._binds.rmdir(self._binds.directory(node_id), body[:-1])
        return 0

    def _rename(self, old_id: int, new_id: int, names: bytes, flags: int) -> Answer:
        if not is_bind(old_id):
            return super()._rename(old_id, new_id, names, flags)
        if not is_bind(new_id):
            return None
        old, new, _ = names.split(b"\0")
        old_dir, new_dir = self._binds.directory(old_id), self._binds.directory(new_id)
        self._binds.rename(old_dir, old, new_dir, new, flags)
        return 0

    # -- files --

    def _bound(self, node: BindNode, fd: int, flags: int) -> bytes:
        """Build ``struct fuse_open_out``."""
        try:
            self._bind_handles.opened(node, fd, flags)
        except BaseException:
            self._binds.close_file(fd)
            raise
        backing = native.take_backing(fd)
        return wire.open_out(fd, FOPEN_PASSTHROUGH | FOPEN_NOFLUSH if backing else 0, backing)

    def open(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Open a file."""
        if not is_bind(node_id):
            return super().open(node_id, uid, gid, pid, body)
        flags, _ = wire.open_in(body)
        kill = Caller(uid, gid, 0, pid) if flags & os.O_TRUNC and native.kill_suidgid(uid) else None
        node = self._binds.node(node_id)
        return self._bound(node, self._binds.open_file(node, flags, kill_for=kill), flags)

    def create(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Create a file and open it."""
        if not is_bind(node_id):
            return super().create(node_id, uid, gid, pid, body)
        flags, mode, umask, _ = wire.create_in(body)
        who = Caller(uid, gid, umask, pid)
        kill = who if flags & os.O_TRUNC and native.kill_suidgid(uid) else None
        parent = self._binds.directory(node_id)
        node, st, fd = self._binds.create_file(parent, body[16:-1], mode, flags, who, kill_for=kill)
        opened = self._bound(node, fd, flags)
        return self._reply(node, st) + opened

    def release(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Close an open file."""
        if not is_bind(node_id):
            return super().release(node_id, uid, gid, pid, body)
        fh = wire.u64(body)[0]
        node = self._binds.open_files.get(fh)
        if node is None:
            return None
        self._bind_handles.closed(node, fh)
        self._binds.close_file(fh)
        return 0

    # -- directories --

    def opendir(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Open a directory. The kernel may keep listings in which neither the host nor a point has a say."""
        if not is_bind(node_id):
            return self._opened_dir(self._union.directory(node_id), keep=node_id not in self._binds.parents)
        self._serial += 1
        handle = self._serial << 1 | 1  # those of pyfuse3's way are even
        self._bind_dirs[handle] = BindDirHandle(self._binds.directory(node_id))
        return wire.open_out(handle, 0, 0)

    def releasedir(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """Close a directory."""
        if not is_bind(node_id):
            return super().releasedir(node_id, uid, gid, pid, body)
        return None if self._bind_dirs.pop(wire.u64(body)[0], None) is None else 0

    def readdirplus(self, node_id: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """List a directory; attributes of a bind path's entries would be out of date at once, so there are none."""
        if not is_bind(node_id):
            return super().readdirplus(node_id, uid, gid, pid, body)
        return self._list_bound(body)

    def _list_bound(self, body: bytes) -> Answer:
        fh, offset, size = wire.read_in(body)
        handle = self._bind_dirs.get(fh)
        if handle is None:
            return None
        node = self._binds.directory(handle.node.id)
        up = node.parent.ino if node.parent is not None else node.bind.parent_ino
        dots = [(b".", node.ino, _DT_DIR), (b"..", up, _DT_DIR)]
        entries = self._binds.read_entries(handle, offset)
        parts: list[bytes] = []
        for at in range(offset, len(entries) + 2):
            name, ino, kind = dots[at] if at < 2 else entries[at - 2]
            packed = wire.NO_ENTRY + wire.dirent(ino, at + 1, name, kind)
            size -= len(packed)
            if size < 0:
                break
            parts.append(packed)
        return b"".join(parts)

    def _packed(self, handle: DirHandle, entry: Entry, position: int, room: int) -> bytes | None:
        root = self._binds.points.get((handle.node.id, entry.name))
        if root is None:
            return super()._packed(handle, entry, position, room)
        packed = wire.dirent(root.ino, position, entry.name, root.fmt >> DT_SHIFT)
        if len(wire.NO_ENTRY) + len(packed) > room:
            return None
        return self._reply(root, self._binds.stat(root)) + packed
