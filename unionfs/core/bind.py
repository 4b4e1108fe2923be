"""Bind paths that the daemon serves itself: a directory or file of the host at a path of the union, without its logic.

Nothing here walks layers, copies up, or reads whiteouts and overlay attributes: what the host has is what there is. A
bind path is attached like a kernel mount, to a *point*: (directory, name). It follows when ancestors are renamed, and
what it covers can't be reached.

The host changes under us at any time, so nothing is remembered but who is who (`bindnodes`).

All is synchronous, for one thread; what fails raises plain :class:`OSError`. `Binds.node` is where descriptors may be
closed, so call it for all nodes of an operation before the operation itself.

How long the kernel keeps what it was told: names not at all, so each use of a path asks for each name of it. Attributes
are kept until the clock's next tick but one, the least that can be said, so that the use of a path that asked for a
name needn't ask for its attributes too. Of an open file they are not kept: a handle shows the host's changes at once
and asks for no name; neither are a root's, whose name is kept. So only what is reached without name and handle (a
working directory, a directory's descriptor, O_PATH) can show attributes that are some milliseconds old. With the option
`cached` names and attributes are kept for a second.

A way that leads back into the union's own mount (a source that holds its mount point) ends in ELOOP. It is known by its
path; a bind mount of the union elsewhere, below a source, is not and would hang.

What a kernel bind mount does and this does not: statfs(2) tells of the union's file system; locks (flock, fcntl) hold
inside the mount only, not against the host; without passthrough, shared mappings see the host's writes when the file is
next read or opened; access(2) does not know that a bind path is read-only; reading a symbolic link sets its access time
on a read-only one too. Before Linux 6.13 a host's write that leaves size and (coarse) mtime as they are is seen by the
next open, not by the next read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from unionfs.core import acl, protect, sysio
from unionfs.core.bindnodes import Bind, BindNode, BindNodes, Watcher, proof_of
from unionfs.core.caller import Caller, check_clearing, clear_suidgid, in_group, mode_without_suidgid
from unionfs.core.changes import NOTHING, Changes, make_changes

T = TypeVar("T")

CHANGING: Final = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
"""Flags of an open(2) that may change the file."""

_OPEN_KEEPS: Final = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC | os.O_NOATIME | os.O_NONBLOCK
_CREATE_KEEPS: Final = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC

_A_TICK: Final = 1e-6


@dataclass(frozen=True, slots=True)
class BindPoint:
    """One path to attach.

    `target`: names from the union's root, free of symbolic links. `fd`: a descriptor of the source, ``O_PATH`` or
    readable; whoever attaches takes it over. `cached`: whether the host's changes may be seen a little late.
    """

    target: tuple[bytes, ...]
    fd: int
    read_only: bool = False
    cached: bool = False


class BindDirHandle:
    """An open directory: its entries (name, st_ino, ``DT_*``) as they were when reading began."""

    __slots__ = ("entries", "node")

    def __init__(self, node: BindNode) -> None:
        self.node = node
        self.entries: list[tuple[bytes, int, int]] | None = None


class Binds(BindNodes):
    """The bind paths of one mount, and what can be done in them.

    Operations name their place by a directory's node and one path component, and take *mode*, *flags* and *rdev* as the
    system call of their name does; *who* asks, and owns what is made. They raise OSError: what the host says, EROFS in
    a read-only bind path, EEXIST or EBUSY at a point, ESTALE for an object that can't be found again.
    """

    def __init__(
        self,
        map_ino: Callable[[int, int], int],
        mountpoint: bytes,
        *,
        room: int | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """Start without any.

        Args:
            map_ino: gives the st_ino to show for (st_dev, st_ino).
            mountpoint: where the union itself is mounted, without symbolic links: a source may lead there.
            room: how many descriptors nodes may keep.
            watcher: who wants to know of descriptors and names.
        """
        super().__init__(map_ino, room=room, watcher=watcher)
        self.points: dict[tuple[int, bytes], BindNode] = {}  # (parent's node id, name): root
        self.parents: set[int] = set()  # ids of the nodes in which points are
        self.open_files: dict[int, BindNode] = {}
        self._mountpoint = mountpoint
        self._mount_name = os.path.basename(mountpoint)
        self._watcher.reserved(self._mount_name)
        self._attached = 0
        self._me = (os.geteuid(), os.getegid())

    # -- attaching --

    def attach(
        self, parent_id: int, parent_ino: int, name: bytes, fd: int, *, read_only: bool, cached: bool = False
    ) -> BindNode:
        """Attach what *fd* refers to at a point, and take *fd* over; return the root. EBUSY where one is attached."""
        try:
            if (parent_id, name) in self.points:
                raise sysio.error(errno.EBUSY)
            own = os.open(sysio.fd_path(fd), os.O_PATH | os.O_CLOEXEC)
        finally:
            os.close(fd)
        self._watcher.reserved(name)
        self._attached += 1
        bind = Bind(self._attached, read_only=read_only, cached=cached, parent_ino=parent_ino)
        root, _ = self._adopt(bind, own)
        root.nlookup = 1  # never forgotten
        self.points[parent_id, name] = root
        self.parents.add(parent_id)
        self._kept.pop(root)  # no name leads to it: its descriptor stays
        return root

    def hold(self, node: BindNode) -> None:
        """Keep a node and its descriptor for as long as the mount lives: a point is attached in it."""
        self.fd(node)
        self._kept.pop(node, None)
        node.nlookup += 1

    def close(self) -> None:
        """Close every descriptor."""
        for node in {*self._kept, *self.nodes.values()}:
            if node.fd >= 0:
                self._drop_fd(node)
        for fd in self.open_files:
            os.close(fd)
        self._kept.clear()
        self.points.clear()
        self.open_files.clear()
        self.nodes.clear()

    def counters(self) -> dict[str, int]:
        """Return figures for the log and for tools."""
        return {
            "binds": len(self.points),
            "bind_nodes": len(self.nodes),
            "bind_descriptors": len(self._kept),
            "bind_files": len(self.open_files),
        }

    # -- looking --

    def look(self, parent: BindNode, name: bytes) -> tuple[BindNode, os.stat_result] | None:
        """Return the node of an entry and its attributes, None where there is none."""
        if len(self._kept) > self._room:
            self._trim()
        dirfd = self.fd(parent)
        known = parent.children.get(name)
        try:
            if known is not None and known.fd >= 0:
                st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
                if (st.st_dev, st.st_ino) == known.key:
                    known.used = True
                    return known, st
            return self._find(parent, name, dirfd)
        except FileNotFoundError:
            self._unnamed(known)
            return None

    def _find(self, parent: BindNode, name: bytes, dirfd: int) -> tuple[BindNode, os.stat_result]:
        fd = os.open(name, sysio.O_PATH_NOFOLLOW, dir_fd=dirfd)
        if name == self._mount_name and os.readlink(sysio.fd_path(fd)) == self._mountpoint:
            os.close(fd)  # without touching it: it would ask us, who are busy asking
            raise sysio.error(errno.ELOOP)
        node, st = self._adopt(parent.bind, fd)
        self._named(node, parent, name)
        return node, st

    def attributes_last(self, node: BindNode) -> float:
        """Return for how many seconds the kernel may keep a node's attributes (see the head of the module)."""
        bind = node.bind
        return _A_TICK if not (bind.timeout or node.handles or node is bind.root) else bind.timeout

    def stat(self, node: BindNode) -> os.stat_result:
        """Return the object's attributes."""
        return os.fstat(self.fd(node))

    def readlink(self, node: BindNode) -> bytes:
        """Return a symbolic link's target."""
        return os.readlink(b"", dir_fd=self.fd(node))

    def read_entries(self, handle: BindDirHandle, start: int) -> list[tuple[bytes, int, int]]:
        """Return (name, st_ino to show, ``DT_*``) of all entries; a *start* of 0 reads them anew.

        A point attached in the directory is there once, whatever the host has at its name.
        """
        if start == 0 or handle.entries is None:
            handle.entries = self._read_entries(handle.node)
        return handle.entries

    def _read_entries(self, node: BindNode) -> list[tuple[bytes, int, int]]:
        fd = self._open_directory(node)
        try:
            listed = sysio.getdents(fd)
        finally:
            os.close(fd)
        device, map_ino = node.key[0], self.map_ino
        points = self._points_in(node.id)
        entries = [(name, map_ino(device, ino), kind) for name, ino, kind in listed if name not in points]
        return entries + [(name, root.ino, root.fmt >> 12) for name, root in points.items()]

    def _points_in(self, node_id: int) -> dict[bytes, BindNode]:
        if node_id not in self.parents:
            return {}
        return {name: root for (parent, name), root in self.points.items() if parent == node_id}

    def _open_directory(self, node: BindNode) -> int:
        """Open a directory for reading, which takes no permission to search it."""
        return self._without_atime(node, self._path(node), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @staticmethod
    def _without_atime(node: BindNode, path: bytes, flags: int) -> int:
        """Open for reading; what is read-only keeps its access time, as far as this process may ask for that."""
        if node.bind.read_only:
            try:
                return os.open(path, flags | os.O_NOATIME)
            except PermissionError:
                pass
        return os.open(path, flags)

    def open_for_sync(self, node: BindNode) -> int:
        """Return a descriptor for syncing a directory."""
        return self._open_directory(node)

    # -- files --

    def open_file(self, node: BindNode, flags: int, *, kill_for: Caller | None = None) -> int:
        """Open a regular file and return the handle, a descriptor. *kill_for*: whose O_TRUNC clears suid and sgid."""
        if node.fmt == stat.S_IFDIR:
            raise sysio.error(errno.EISDIR)
        if flags & CHANGING:
            _check_writable(node)
        fd = self._without_atime(node, self._path(node), flags & _OPEN_KEEPS | os.O_CLOEXEC)
        if flags & os.O_TRUNC and kill_for is not None:
            clear_suidgid(fd, kill_for)
        self._opened(node, fd)
        return fd

    def _opened(self, node: BindNode, fd: int) -> None:
        self.open_files[fd] = node
        node.handles.append(fd)
        self._watcher.handles(node)

    def close_file(self, fd: int) -> BindNode:
        """Close an open file; return its node."""
        node = self.open_files.pop(fd)
        node.handles.remove(fd)
        self._watcher.handles(node)
        if node.fd < 0 and not node.handles:
            node.proof = proof_of(fd)
        os.close(fd)
        self._bury(node)
        return node

    # -- making --

    def _make(self, who: Caller, call: Callable[..., T], *args: Any, dirfd: int) -> T:
        """Make something for *who*: the host itself applies the umask or the default ACL, and set-group-id."""
        before = os.umask(who.umask)
        try:
            if (who.uid, who.gid) == self._me:
                return call(*args, dir_fd=dirfd)
            with sysio.acting_as(who.uid, who.gid):
                return call(*args, dir_fd=dirfd)
        finally:
            os.umask(before)

    def _place(self, parent: BindNode, name: bytes) -> int:
        """Return the descriptor of a directory in which a name is about to be made."""
        _check_writable(parent)
        if (parent.id, name) in self.points:
            raise sysio.error(errno.EEXIST)
        return self.fd(parent)

    def create_file(
        self, parent: BindNode, name: bytes, mode: int, flags: int, who: Caller, *, kill_for: Caller | None = None
    ) -> tuple[BindNode, os.stat_result, int]:
        """Create a regular file and open it; without O_EXCL one that the host has made meanwhile is opened."""
        dirfd = self._place(parent, name)
        how = flags & _CREATE_KEEPS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = self._make(who, os.open, name, how, stat.S_IMODE(mode), dirfd=dirfd)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            return self._open_existing(parent, name, dirfd, flags, kill_for)
        try:
            node, st = self._adopt(parent.bind, os.open(sysio.fd_path(fd), os.O_PATH | os.O_CLOEXEC))
        except BaseException:
            os.close(fd)
            raise
        self._named(node, parent, name)
        self._opened(node, fd)
        return node, st, fd

    def created(self, parent_id: int, name: bytes, node_id: int, ino: int, key: tuple[int, int], path_fd: int) -> None:
        """Take over a file that was created past us, the watcher knowing of it (see `native.open_bound`)."""
        if len(self._kept) > self._room:
            self._trim()
        parent = self.nodes[parent_id]
        node = BindNode(node_id, parent.bind, key, ino, stat.S_IFREG)
        parent.bind.by_key[key] = self.nodes[node_id] = node  # one that was known by this key is gone from the host
        node.nlookup = 1
        node.used = True
        if path_fd >= 0:
            node.fd = path_fd
            self._kept[node] = None
        node.parent, node.name = parent, name
        parent.children[name] = node

    def opened(self, node_id: int, fd: int) -> None:
        """Take over a handle that was opened past us, the watcher knowing of it (see `native.open_bound`)."""
        node = self.nodes[node_id]
        self.open_files[fd] = node
        node.handles.append(fd)

    def _open_existing(
        self, parent: BindNode, name: bytes, dirfd: int, flags: int, kill_for: Caller | None
    ) -> tuple[BindNode, os.stat_result, int]:
        node, st = self._find(parent, name, dirfd)
        if node.fmt not in (stat.S_IFREG, stat.S_IFDIR):
            raise sysio.error(errno.ESTALE)  # the kernel must follow a link and opens special files itself
        fd = self.open_file(node, flags, kill_for=kill_for)
        return node, os.fstat(fd) if flags & os.O_TRUNC else st, fd

    def mkdir(self, parent: BindNode, name: bytes, mode: int, who: Caller) -> tuple[BindNode, os.stat_result]:
        """Create a directory."""
        dirfd = self._place(parent, name)
        self._make(who, os.mkdir, name, stat.S_IMODE(mode), dirfd=dirfd)
        return self._find(parent, name, dirfd)

    def mknod(
        self, parent: BindNode, name: bytes, mode: int, rdev: int, who: Caller
    ) -> tuple[BindNode, os.stat_result]:
        """Create a special or regular file."""
        dirfd = self._place(parent, name)
        self._make(who, os.mknod, name, mode, rdev, dirfd=dirfd)
        return self._find(parent, name, dirfd)

    def symlink(self, parent: BindNode, name: bytes, target: bytes, who: Caller) -> tuple[BindNode, os.stat_result]:
        """Create a symbolic link."""
        dirfd = self._place(parent, name)
        self._make(who, os.symlink, target, name, dirfd=dirfd)
        return self._find(parent, name, dirfd)

    def link(self, node: BindNode, parent: BindNode, name: bytes) -> os.stat_result:
        """Give a file one more name and return its attributes; EXDEV for a directory of another bind path."""
        if node.bind is not parent.bind:
            raise sysio.error(errno.EXDEV)
        sysio.linkat_fd(self.fd(node), self._place(parent, name), name)
        self._named(node, parent, name)
        return os.fstat(node.fd)

    # -- removing and renaming --

    def unlink(self, parent: BindNode, name: bytes) -> None:
        """Remove a name that is no directory's."""
        self._remove(os.unlink, parent, name)

    def rmdir(self, parent: BindNode, name: bytes) -> None:
        """Remove an empty directory."""
        self._remove(os.rmdir, parent, name)

    def _remove(self, call: Callable[..., None], parent: BindNode, name: bytes) -> None:
        self.check_not_point(parent.id, name)
        _check_writable(parent)
        call(name, dir_fd=self.fd(parent))
        self._unnamed(parent.children.get(name))

    def check_not_point(self, parent_id: int, name: bytes) -> None:
        """Raise EBUSY where a path is attached."""
        if (parent_id, name) in self.points:
            raise sysio.error(errno.EBUSY)

    def rename(self, old_dir: BindNode, old_name: bytes, new_dir: BindNode, new_name: bytes, flags: int) -> None:
        """Rename, with the flags of ``renameat2(2)`` that the host takes; EXDEV between bind paths."""
        self.check_not_point(old_dir.id, old_name)
        self.check_not_point(new_dir.id, new_name)
        if old_dir.bind is not new_dir.bind:
            raise sysio.error(errno.EXDEV)
        _check_writable(old_dir)
        old_fd, new_fd = self.fd(old_dir), self.fd(new_dir)
        if flags:
            sysio.rename(old_fd, old_name, new_fd, new_name, flags)
        else:
            os.rename(old_name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)
        self._moved(old_dir, old_name, new_dir, new_name, exchange=bool(flags & sysio.RENAME_EXCHANGE))

    def _moved(self, old_dir: BindNode, old_name: bytes, new_dir: BindNode, new_name: bytes, *, exchange: bool) -> None:
        moved, other = old_dir.children.get(old_name), new_dir.children.get(new_name)
        self._unnamed(other)
        if moved is not None:
            self._named(moved, new_dir, new_name)
        if exchange and other is not None:
            self._named(other, old_dir, old_name)

    # -- attributes --

    def setattr(
        self, node: BindNode, changes: Changes, fd: int, *, kill_for: Caller | None, who: Caller
    ) -> os.stat_result:
        """Change attributes.

        *fd* is an open handle that a truncation came through, *kill_for* the user for whom it clears suid and sgid.
        *who* asks; the kernel has checked what *changes* say, but not what a change of nothing does.
        """
        _check_writable(node)
        if changes.mode is not None and node.fmt == stat.S_IFLNK:
            raise sysio.error(errno.EOPNOTSUPP)
        path = self._path(node)
        if changes == NOTHING:
            self._change_nothing(node, path, who)
        elif changes.size is not None:
            self._truncate(node, path, fd, changes.size, kill_for)
        make_changes(changes, path, node.fd)
        return os.fstat(node.fd)

    @staticmethod
    def _change_nothing(node: BindNode, path: bytes, who: Caller) -> None:
        """What chown(path, -1, -1) sends: it clears set-user-id all the same."""
        check_clearing(os.fstat(node.fd), who, node.handles)
        os.chown(path, -1, -1)
        if mode := mode_without_suidgid(os.fstat(node.fd), who):
            os.chmod(path, stat.S_IMODE(mode))

    def _truncate(self, node: BindNode, path: bytes, fd: int, size: int, kill_for: Caller | None) -> None:
        """Set the size as the caller did: of the two only ftruncate(2) sets the times where the size stays."""
        if self.open_files.get(fd) is node:
            os.ftruncate(fd, size)
        elif kill_for is None:
            os.truncate(path, size)
            return
        else:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.truncate(path, size)
                clear_suidgid(fd, kill_for)
            finally:
                os.close(fd)
            return
        if kill_for is not None:
            clear_suidgid(fd, kill_for)

    def getxattr(self, node: BindNode, name: str) -> bytes:
        """Return an extended attribute."""
        return os.getxattr(self._path(node), name)

    def listxattr(self, node: BindNode) -> list[str]:
        """Return the names of all extended attributes."""
        try:
            return os.listxattr(self._path(node))
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP:
                return []
            raise

    def setxattr(self, node: BindNode, name: str, value: bytes, flags: int, who: Caller) -> None:
        """Set an extended attribute; *flags* are XATTR_CREATE and XATTR_REPLACE."""
        _check_writable(node)
        path = self._path(node)
        if name == acl.ACCESS and who.uid:
            st = os.fstat(node.fd)
            if st.st_mode & stat.S_ISGID and not in_group(who, st.st_gid):
                os.chmod(path, stat.S_IMODE(st.st_mode) & ~stat.S_ISGID)
        os.setxattr(path, name, value, flags)

    def inode_flags(self, node: BindNode, command: int, data: bytes) -> bytes:
        """Get or set inode flags or project attributes; *command* and *data* are those of ioctl(2)."""
        if command in protect.SET:
            _check_writable(node)
        fd = os.open(self._path(node), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if command in protect.GET:
                return protect.read_flags(fd, command)
            protect.write_flags(fd, command, data)
            return b""
        finally:
            os.close(fd)

    def removexattr(self, node: BindNode, name: str) -> None:
        """Remove an extended attribute."""
        _check_writable(node)
        os.removexattr(self._path(node), name)


def _check_writable(node: BindNode) -> None:
    if node.bind.read_only:
        raise sysio.error(errno.EROFS)
