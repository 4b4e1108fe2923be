"""The facade: a union as a set of synchronous operations on nodes, in plain types.

It knows neither pyfuse3 nor trio and can be used on directories without a mount. All of it runs in one thread; each
operation is atomic to the others, since nothing here awaits. There are no locks to order. The one thing that may run
elsewhere is the data of a :class:`~unionfs.core.copyup.DataCopy`, during which the node's ``job`` keeps other changes
of that node away, unless it follows: then writing through handles is the driver's to look after.

Operations raise plain :class:`OSError`, and :class:`~unionfs.core.copyup.DataCopyPending` before anything was changed.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import stat
from collections.abc import Sequence
from typing import Final, Self

from unionfs.config import MountConfig
from unionfs.core import acl, index, sysio
from unionfs.core.caller import Caller, check_clearing, clear_suidgid, in_group, mode_without_suidgid
from unionfs.core.changes import NOTHING, Changes, make_changes
from unionfs.core.copyup import CopyUp, DataCopy
from unionfs.core.dirfds import DirFds
from unionfs.core.dirhandle import DirHandle, Listings
from unionfs.core.dirops import DirOps
from unionfs.core.inodes import IMPURE, PLAIN, PLAIN_MASK, Dir, InodeTable, Node
from unionfs.core.layers import LayerStack
from unionfs.core.listing import Lister
from unionfs.core.markers import Format
from unionfs.core.merge import Entry
from unionfs.core.metadata import CAPABILITY
from unionfs.core.protect import Protection
from unionfs.core.resolve import Resolver
from unionfs.core.slow import close_anyway
from unionfs.core.tree import Tree
from unionfs.core.workdir import WorkDir
from unionfs.errors import LayerError

log = logging.getLogger(__name__)

_WRITE: Final = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_FINISHED: Final = os.O_TRUNC | os.O_SYNC | os.O_DSYNC  # to open with these a copy whose data follows must be there

_OF_EACH_USE: Final = frozenset((CAPABILITY, acl.ACCESS, acl.DEFAULT, "security.selinux"))


class Union:
    """One union. Create it with :meth:`open`."""

    make_inodes: type[InodeTable] = InodeTable

    def __init__(
        self, config: MountConfig, layers: LayerStack, work: WorkDir | None, fmt: Format, index_fd: int
    ) -> None:
        self.config = config
        self.fmt = fmt
        self.layers = layers
        self.door = layers.door
        self.work = work
        self.inodes = self.make_inodes()
        for layer in (layers.upper, *layers.lowers):
            self.inodes.know_device(layer.device if layer is not None else -1)
        self.dirfds = DirFds(layers, _descriptor_room(len(layers.by_index)))
        resolver = Resolver(config, layers, self.dirfds, fmt, self.inodes, index_fd)
        self.resolver = resolver
        self.tree = Tree(config, layers, self.dirfds, self.inodes, resolver, work, fmt)
        self.up = CopyUp(self.tree, metacopy=config.metacopy, volatile=config.volatile)
        self.lister = Lister(self.tree)
        self.read_entries = Listings(self.lister).read
        self.protection = Protection(self.tree, self.up)
        self.dirs = DirOps(config, self.tree, self.up, self.lister, self.protection)
        self.open_files: dict[int, Node] = {}
        self._closed = False
        self.absent: set[tuple[int, str]] = set()
        """Layer and attribute: what plain files of a layer are known to lack (`getxattr_of_unchanging`)."""

    @classmethod
    def open(cls, config: MountConfig, held: Sequence[int] = ()) -> Self:
        """Open the layers of *config* and prepare the work directory; *held* is as of `LayerStack.take_over`.

        Raises LayerError and BusyError for layers that can't be used.
        """
        layers = LayerStack.take_over(config, held) if held else LayerStack.open(config)
        work: WorkDir | None = None
        try:
            userxattr = config.userxattr if config.userxattr is not None else not _may_set_trusted(layers)
            config = config.with_userxattr(userxattr)
            fmt = Format(userxattr=userxattr)
            if layers.upper is not None and not config.read_only and config.work is not None:
                work = WorkDir(os.dup(layers.work_fd), fmt)
                work.prepare(config.work, config.whiteout, volatile=config.volatile)
                layers.upper.wh_files = work.whiteout_form == "wh"
                index.set_uuid(layers, fmt, config.uuid)
            index_fd = _open_index(config, layers, work, fmt)
            union = cls(config, layers, work, fmt, index_fd)
            if work is not None and index_fd >= 0:
                index.clean(union.resolver, work, fmt)
        except OSError as exc:
            _close(layers, work)
            raise LayerError(f"{config.upper or config.lowers[0]}: can't prepare the layers: {exc.strerror}") from exc
        except BaseException:
            _close(layers, work)
            raise
        return union

    def open_to_sync(self) -> int:
        """Return a descriptor for ``syncfs(2)`` of the file system of upper, -1 where nothing is to be synced."""
        if self.work is None or self.config.volatile:
            return -1
        return os.dup(self.work.fd)

    def close(self) -> None:
        """Close every descriptor; the locks on the layers go with them."""
        if self._closed:
            return
        self._closed = True
        for fd in self.open_files:
            close_anyway(fd)
        self.open_files.clear()
        for node in list(self.inodes.nodes.values()):
            self.tree.bury(node)
        _close(self.layers, self.work)

    # -- looking --

    def node(self, node_id: int) -> Node:
        """Return a living node; raises ESTALE for an id that is not known."""
        try:
            return self.inodes.nodes[node_id]
        except KeyError:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None

    def directory(self, node_id: int) -> Dir:
        """Return a living directory; raises ENOTDIR for another node."""
        node = self.node(node_id)
        if not isinstance(node, Dir):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return node

    def readlink(self, node: Node) -> bytes:
        """Return the target of a symbolic link."""
        return self.tree.readlink(node)

    def look_at(self, handle: DirHandle, entry: Entry) -> tuple[Node, os.stat_result] | None:
        """Return the node and stat result of a listed entry, None where it is gone."""
        node = handle.node
        return self.tree.look(node, entry.name, entry.layer if handle.version == node.version else 0)

    def places(self, handle: DirHandle) -> dict[int, tuple[int, int, int]]:
        """Return where a listing's entries can be looked at at once, each in the layer that it comes from.

        By layer: a descriptor of the directory, good until the next request, what the ``st_ino`` shown have above the
        real ones, and the device. Empty where more is to be asked than the layer.
        """
        node = handle.node
        if self.door.is_slow or (handle.version != node.version and node.is_merged):
            return {}
        places = {}
        fds = self.tree.dirfds.fds(node)  # may find the layers of the directory anew
        for number, fd in zip(node.stack, fds, strict=True):
            device = self.layers.layer(number).device
            base = self.inodes.number_base(device)
            if base is not None:
                places[number] = fd, base, device
        return places

    def number_bases(self, node: Dir) -> dict[int, int]:
        """Return by layer what `listed_ino` adds to listed numbers, without the layers of which more is to be asked."""
        bases = {}
        for number in node.stack:
            if number or (node.is_pure_upper and not node.flags & IMPURE):
                base = self.inodes.number_base(self.layers.layer(number).device)
                if base is not None:
                    bases[number] = base
        return bases

    def listed_ino(self, node: Dir, entry: Entry) -> int | None:
        """Return the ``st_ino`` of a listed entry if the listing is enough to tell, else None.

        Upper objects that were copied up show the number of their origin, merge directories that of their lower part.
        """
        child = node.children.get(entry.name)
        if child is not None:
            return child.ino
        if entry.layer == 0 and (not node.is_pure_upper or node.flags & IMPURE):
            return None
        layer = self.layers.by_index[entry.layer]
        return None if layer is None else self.inodes.map_ino(layer.device, entry.ino)

    def statfs(self) -> os.statvfs_result:
        """Return the file system's figures: upper's, or those of the topmost lower (``ovl_statfs``)."""
        return self.door.ask((self.layers.upper or self.layers.lowers[0]).fd, ("statfs",), os.fstatvfs, keep=False)

    # -- files --

    def open_file(self, node: Node, flags: int, *, kill_for: Caller | None = None) -> int:
        """Open a regular file and return a descriptor of its data, good for as long as the handle lives.

        *flags* are those of open(2), *kill_for* is the user for whom O_TRUNC clears suid and sgid. Raises OSError:
        EISDIR, EPERM for what is immutable or append-only, what copy-up and open(2) say; DataCopyPending.
        """
        if node.is_dir:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if self.config.volatile:
            flags &= ~(os.O_SYNC | os.O_DSYNC)
        if flags & _WRITE:
            self.protection.check_open(node, flags)
        job = node.job
        if isinstance(job, DataCopy) and job.follows and not flags & _FINISHED:
            fd = job.open(flags)
        elif flags & os.O_TRUNC:
            fd = self.up.truncated(node, flags)
        else:
            if flags & _WRITE:
                self.up.node(node, data=True)
            fd = self.tree.open_real(node, flags)
        if flags & os.O_TRUNC and kill_for is not None:
            clear_suidgid(fd, kill_for)
            self.up.notify_changed.append(node)
        self._opened(node, fd)
        return fd

    def _opened(self, node: Node, fd: int) -> None:
        self.open_files[fd] = node
        if node.handles is None:
            node.handles = [fd]
        else:
            node.handles.append(fd)

    def create_file(
        self, parent: Dir, name: bytes, mode: int, flags: int, who: Caller
    ) -> tuple[Node, os.stat_result, int]:
        """Create a regular file and open it, as `DirOps.create`; return its node, attributes and descriptor."""
        if self.config.volatile:
            flags &= ~(os.O_SYNC | os.O_DSYNC)
        node, st, fd = self.dirs.create(parent, name, mode, flags, who)
        self._opened(node, fd)
        return node, st, fd

    def close_file(self, fd: int) -> None:
        """Close an open file."""
        node = self.open_files.pop(fd)
        assert node.handles is not None
        at = node.handles.index(fd)
        opened = node.handles.pop(at)
        if not node.handles:
            node.handles = None
        self.door.close_file(opened)
        if node.nlookup <= 0:
            self.tree.forget(node, 0)

    def syncable(self, fd: int) -> bool:
        """Tell whether fsync of an open file has anything to do."""
        return not self.config.volatile and self.open_files[fd].is_upper

    def written_nodes(self) -> set[int]:
        """Return the ids of the files in upper that somebody has open for writing."""
        return {node.id for fd, node in self.open_files.items() if node.is_upper and sysio.may_write(fd)}

    def open_for_sync(self, node: Node) -> int:
        """Return a descriptor for syncing what upper has of a directory, or of a file of which it has no data.

        -1 where there is nothing to sync. Raises OSError.
        """
        if self.config.volatile or not node.is_upper:
            return -1
        if not isinstance(node, Dir):
            return self.up.open_upper(node, os.O_RDONLY)
        return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.dirfds.upper(node))

    # -- attributes --

    def setattr(
        self,
        node: Node,
        changes: Changes,
        fd: int = -1,
        *,
        kill_for: Caller | None = None,
        who: Caller | None = None,
    ) -> os.stat_result:
        """Change attributes.

        *fd* is an open handle that a truncation came through, *kill_for* the user for whom it clears suid and sgid.
        *who* asks; the kernel has checked what *changes* say, but not what a change of nothing does.

        Raises OSError: EPERM for what is immutable or append-only, what copy-up and the system calls say;
        DataCopyPending.
        """
        if changes == NOTHING and who is not None:
            check_clearing(self.tree.stat(node), who, node.handles or ())
        elif changes.size is None and (fresh := self.up.plain_file(node)) >= 0:
            try:
                make_changes(changes, fresh, fresh)
                return os.fstat(fresh)
            finally:
                os.close(fresh)
        self._check_protection(node, changes, by_handle=fd in self.open_files)
        self.up.node(node, data=changes.size is not None, size=changes.size)
        path, follow = self.tree.path(node), self.tree.follow(node)
        if changes.size is not None:
            self._truncate(node, fd, changes.size, kill_for=kill_for)
        if changes.uid is not None or changes.gid is not None or changes == NOTHING:
            # Nothing to change is what chown(path, -1, -1) sends: it clears set-user-id all the same.
            uid = -1 if changes.uid is None else changes.uid
            gid = -1 if changes.gid is None else changes.gid
            os.chown(path, uid, gid, follow_symlinks=follow)
            if changes == NOTHING and who is not None and (mode := mode_without_suidgid(self.tree.stat(node), who)):
                self._chmod(node, mode)
        if changes.mode is not None:
            self._chmod(node, changes.mode)
        if changes.atime is not None or changes.mtime is not None:
            if follow:
                sysio.utimens_at(sysio.AT_FDCWD, path, changes.atime, changes.mtime, follow=True)
            else:
                dirfd, name = self.tree.place(node)
                sysio.utimens_at(dirfd, name, changes.atime, changes.mtime)
        return self.tree.stat(node)

    def _check_protection(self, node: Node, changes: Changes, *, by_handle: bool) -> None:
        if changes.mode is not None or changes.uid is not None or changes.gid is not None:
            self.protection.check_change(node)
        if changes.size is not None:
            self.protection.check_size(node, by_handle=by_handle)
        elif changes.touched:
            self.protection.check_write(node)
        elif changes.atime is not None or changes.mtime is not None:
            self.protection.check_change(node)

    def _chmod(self, node: Node, mode: int) -> None:
        bits = stat.S_IMODE(mode)
        if self.tree.follow(node):
            os.chmod(self.tree.path(node), bits)
        else:
            dirfd, name = self.tree.place(node)
            sysio.chmod_at(dirfd, name, bits)

    def _truncate(self, node: Node, fd: int, size: int, *, kill_for: Caller | None) -> None:
        """Set the size as the caller did: of the two only ftruncate(2) sets the times where the size stays."""
        if fd in self.open_files:
            os.ftruncate(fd, size)
            if kill_for is not None:
                clear_suidgid(fd, kill_for)
            return
        fd = self.tree.open_real(node, os.O_WRONLY)
        try:
            self._truncate_path(fd, size)
            if kill_for is not None:
                clear_suidgid(fd, kill_for)
        finally:
            os.close(fd)

    @staticmethod
    def _truncate_path(fd: int, size: int) -> None:
        try:
            os.truncate(sysio.fd_path(fd), size)
        except OSError:
            if os.fstat(fd).st_size != size:
                raise
            # The copy-up has left out the rest already: an error would say that nothing has changed.

    def getxattr(self, node: Node, name: str) -> bytes:
        """Return an extended attribute; the union's own ones are hidden, a user's escaped ones are found."""
        return self.door.getxattr(self.tree.path(node), self.fmt.to_disk(name), follow_symlinks=self.tree.follow(node))

    def getxattr_of_unchanging(self, node: Node, name: str) -> bytes:
        """The same where lower layers don't change: what has no attributes at all is not asked for those of each use.

        A layer has said ENODATA once before, or else it might have another error for what it doesn't support.
        """
        lacking = node.flags & PLAIN_MASK == PLAIN and name in _OF_EACH_USE
        if lacking and (node.layer, name) in self.absent:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        try:
            return self.getxattr(node, name)
        except OSError as exc:
            if lacking and exc.errno == errno.ENODATA:
                self.absent.add((node.layer, name))
            raise

    def listxattr(self, node: Node) -> list[str]:
        """Return the names of the extended attributes that users may see."""
        try:
            names = self.door.listxattr(self.tree.path(node), follow_symlinks=self.tree.follow(node))
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP:
                return []
            raise
        return [shown for name in names if (shown := self.fmt.to_user(name)) is not None]

    def setxattr(self, node: Node, name: str, value: bytes, flags: int, who: Caller) -> None:
        """Set an extended attribute; *flags* are XATTR_CREATE and XATTR_REPLACE."""
        self.protection.check_change(node)
        self._need_upper(node)
        if name == acl.ACCESS and not who.is_root:
            self._drop_foreign_sgid(node, who)
        disk = self.fmt.to_disk(name)
        if len(os.fsencode(disk)) > 255:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        os.setxattr(self.tree.path(node), disk, value, flags, follow_symlinks=self.tree.follow(node))

    def _need_upper(self, node: Node) -> None:
        """Copy a node up; one that is up is left at that, also if it lacks this name (``ovl_xattr_set``)."""
        if node.is_upper:
            self.up.idle(node)
        else:
            self.up.node(node, data=False)

    def _drop_foreign_sgid(self, node: Node, who: Caller) -> None:
        """An access ACL set or removed by an owner outside the file's group takes set-group-id (``ovl_set_acl``)."""
        st = self.tree.stat(node)
        if st.st_mode & stat.S_ISGID and not in_group(who, st.st_gid):
            self._chmod(node, st.st_mode & ~stat.S_ISGID)

    def removexattr(self, node: Node, name: str, who: Caller) -> None:
        """Remove an extended attribute; a lower object that hasn't got it isn't copied up (ENODATA)."""
        self.protection.check_change(node)
        disk = self.fmt.to_disk(name)
        if not node.is_upper:
            self.door.getxattr(self.tree.path(node), disk, follow_symlinks=self.tree.follow(node))
        self._need_upper(node)
        if name == acl.ACCESS and not who.is_root:
            self._drop_foreign_sgid(node, who)
        os.removexattr(self.tree.path(node), disk, follow_symlinks=self.tree.follow(node))


def _descriptor_room(layers: int) -> int:
    """Return how many descriptors directories may keep: half of what the process may have, bounded."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16 * layers, min(soft // 2, 16384))


def _may_set_trusted(layers: LayerStack) -> bool:
    """Tell whether ``trusted.*`` attributes can be used: it takes CAP_SYS_ADMIN in the initial user namespace."""
    fd = layers.work_fd
    if fd < 0:
        return os.geteuid() == 0 and sysio.in_initial_user_namespace()
    name = "trusted.overlay.probe"
    try:
        os.setxattr(sysio.fd_path(fd), name, b"")
        os.removexattr(sysio.fd_path(fd), name)
    except OSError as exc:
        return exc.errno not in (errno.EPERM, errno.EACCES)
    return True


def _open_index(config: MountConfig, layers: LayerStack, work: WorkDir | None, fmt: Format) -> int:
    """Return the descriptor of the index directory, -1 where there is no index."""
    if work is None or not config.index or not layers.lowers:
        return -1
    if not index.usable(layers):
        if "index" in config.explicit:
            log.warning("index=on needs file handles on every layer: hard links of lower files will be separated")
        return -1
    work.open_index()
    if index.belongs(layers, work, fmt, uuid=config.uuid != "off"):
        return work.index_fd
    if "index" in config.explicit:
        raise LayerError(f"the index in {config.work} was made with other layers: mount those, or pass -o index=off")
    log.warning("the index in %s was made with other layers and is not used", config.work)
    return -1


def _close(layers: LayerStack, work: WorkDir | None) -> None:
    if work is not None:
        work.close()
    layers.close()
