"""Copy-up: how a lower object becomes an upper one (fs/overlayfs/copy_up.c).

Parents first. Each object is built in work, complete, and published with one rename or link; a crash leaves the
lower object showing. The order within an object matters: data, then owner (both clear security.capability), then
attributes and ACLs, then mode (chown clears suid), then times.

Data is synced before it is published, and the name that it gets, or the mark that goes, comes to the disk when the file
system likes, or with the next fsync of the file. With fdatasync too (`CopyUp.tie_name`): the file had its name before.

A regular file whose data isn't needed yet (chmod, rename, ...) is copied *metadata only*: an upper file with the
``metacopy`` attribute and the right size. Its data follows at the first write, in place, and the attribute goes last.

A lower hard link with the index on is copied up into ``index/`` under the name of its lower file handle, and linked
from there to its name in upper: its other names find it through the index and stay the same file.

Copies of more than `OFFLOAD_BYTES`, or from a slow layer, don't run here: :class:`DataCopyPending` is raised *before
anything of the operation was done*, carrying a :class:`DataCopy`. Whoever drives the core runs it (in a thread), calls
``finish`` and tries the operation again. While a copy is under way, operations that would change that node raise it
too.

A driver that can see to it that nobody reads what isn't there yet may let the data *follow* (:meth:`DataCopy.follow`):
from then on all handles of the file are descriptors of the unpublished copy, opening it for writing is answered at
once, and the lower file goes on showing below until ``finish``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Final

from unionfs.core import sysio
from unionfs.core.inodes import (
    BROKEN_LINK,
    IMPURE,
    INDEXED,
    META,
    ORIGIN,
    PLAIN,
    PROTECTION_KNOWN,
    UNLINKED,
    UPPER,
    Dir,
    Node,
)
from unionfs.core.markers import encode_nlink, get_xattr, list_xattrs
from unionfs.core.metadata import CAPABILITY, COPIED_FLAGS, Metadata, inode_flags, set_mode_and_times
from unionfs.core.slow import SlowFd, WouldBlock
from unionfs.core.tree import STRIP_OPEN, Tree
from unionfs.core.workdir import WorkDir, set_impure

OFFLOAD_BYTES: Final = 4 << 20

_SECOND: Final = 1_000_000_000
_CLOCK_REALTIME_COARSE: Final = 5  # the `time` module has no name for it
# Flags that say how the file system stores a file (extents, inline data): not anybody's wish.
_STORAGE_FLAGS: Final = 0x80000 | 0x10000000
_EXT4: Final = 0xEF53

# `native.copy_plain`, which is above this module.
CopyPlain = Callable[[int, bytes, int, int, int, bytes | None, str, str | None], tuple[int, int, int] | bool | None]


class DataCopyPending(Exception):
    """A long copy must end before the operation can be done; see the module's head."""

    def __init__(self, job: DataCopy) -> None:
        super().__init__()
        self.job = job


class DataCopy:
    """The bytes of one file on their way up. ``run`` may be called in any thread, the rest where the core runs.

    *source*, *target* and *size* are the lower file, the copy and how much of it is wanted. *cut* says that this is not
    all of it: then the file counts as changed now. *in_place* says that the copy is a metacopy in upper, otherwise it
    is a new file in work, with a *name* or without.
    """

    def __init__(
        self,
        up: CopyUp,
        node: Node,
        source: int,
        target: int,
        name: bytes | None,
        size: int,
        *,
        cut: bool,
        in_place: bool = False,
        may_follow: bool = False,
    ) -> None:
        self.up = up
        self.node = node
        self.waiters: object | None = None  # whatever the driver needs to let others wait
        self.source = source
        self.target = target
        self.size = size
        self.may_follow = may_follow
        self.follows = False
        self._lost: OSError | None = None
        self._written: Callable[[], int] = _now if cut else lambda: 0
        self._name = name
        self._in_place = in_place
        # Writing data in place changes the times and drops capabilities: both are put back.
        self._before = up.tree.stat(node) if in_place else None
        self._capability = get_xattr(sysio.fd_path(target), CAPABILITY, follow=True) if in_place else None

    def run(self) -> None:
        """Copy, and sync what was copied, but for a reflink (as ``ovl_copy_up_file``)."""
        if not sysio.copy_data(self.source, self.target, self.size):
            self.sync()

    def sync(self) -> None:
        """Sync what was copied; in any thread.

        After an fsync that has failed the next one says nothing of what was lost before it, so this fails for good.
        """
        if self._lost is not None:
            raise OSError(self._lost.errno, self._lost.strerror)
        if self.size and not self.up.volatile:
            try:
                os.fsync(self.target)
            except OSError as exc:
                self._lost = exc
                raise

    def finish(self) -> None:
        """Publish the copy. Where that fails the copy is abandoned, unless its data follows: then it may be retried.

        Raises WouldBlock before anything was done, and gives up nothing then.
        """
        try:
            if self.node.anchor < 0:
                self.up.tree.place(self.node)  # all that could block later
            if self._in_place:
                self.up.tie_name(self.target)
                self._restore(self._written())
                self.up.complete_meta(self.node, self.target)
            else:
                self._publish(self._written())
        except WouldBlock:
            raise
        except BaseException:
            if not self.follows:
                self.abandon()
            raise
        self._close()

    def _publish(self, mtime: int) -> None:
        node, up, work = self.node, self.up, self.up.work
        with contextlib.nullcontext() if self.follows else up.exchanging_handles(node, self.target):
            if not node.flags & UPPER:
                up.publish_regular(node, self.target, self._name, metacopy=False, mtime=mtime)
            else:
                if self._name is None:
                    assert work is not None
                    name = work.temp_name()
                    sysio.linkat_fd(self.target, work.fd, name)
                    self._name = name
                up.replace_meta(node, self.target, self._name, mtime=mtime)
        up.name_indexed(node)

    def publish(self) -> None:
        """End the node's waiting for this copy and finish it."""
        self.node.job = None
        try:
            self.finish()
        except WouldBlock:
            self.node.job = self  # no other copy may begin
            raise

    # -- data that follows --

    def follow(self, written: Callable[[], int]) -> None:
        """Let all handles, from now on, be descriptors of the copy.

        Args:
            written: tells when the data was last written, in nanoseconds; 0: never.
        """
        fresh = self.open(os.O_RDONLY)
        self._written = written
        self.follows = True
        for fd in self.node.handles or ():
            os.dup2(fresh, fd, inheritable=False)
        os.close(fresh)

    def open(self, flags: int) -> int:
        """Open the copy with the access mode and status flags of an ``open(2)``."""
        return open_copy(self.target, flags)

    def shown(self, st: os.stat_result) -> os.stat_result:
        """Return what the file shows meanwhile: the lower attributes, but size, blocks and times of what is written."""
        if not self.follows:
            return st
        now = os.fstat(self.target)
        written = self._written()
        mtime, ctime = (written, written) if written else (st.st_mtime_ns, st.st_ctime_ns)
        seconds = (int(st.st_atime), mtime // _SECOND, ctime // _SECOND)
        return os.stat_result(
            (*st[:6], now.st_size, *seconds),
            {
                "st_atime_ns": st.st_atime_ns,
                "st_mtime_ns": mtime,
                "st_ctime_ns": ctime,
                "st_blksize": st.st_blksize,
                "st_blocks": now.st_blocks,
                "st_rdev": st.st_rdev,
            },
        )

    def _restore(self, mtime: int) -> None:
        """Put back what writing data in place has changed beside it; *mtime* is when it really changed, 0: never."""
        if self._capability is not None:
            os.setxattr(self.target, CAPABILITY, self._capability)
        if self._before is not None:
            sysio.utimens_fd(self.target, self._before.st_atime_ns, mtime or self._before.st_mtime_ns)

    def abandon(self) -> None:
        """Give up: remove what is unpublished, and let a metacopy look as before.

        What could not be written to a metacopy must leave the page cache: the next copy might not write it either.
        """
        if self._before is not None and self.target >= 0:
            with contextlib.suppress(OSError):
                sysio.punch_hole(self.target, self._before.st_size)
            with contextlib.suppress(OSError):
                os.ftruncate(self.target, self._before.st_size)
                self._restore(0)
        if self._name is not None and self.up.work is not None:
            self.up.work.discard(self._name)
        self._close()

    def _close(self) -> None:
        if self.source >= 0:
            self.up.tree.door.close_file(self.source)
        if self.target >= 0:
            os.close(self.target)
        self.source = self.target = -1


def open_copy(target: int, flags: int) -> int:
    """Open a file of which there is a descriptor with the access mode and status flags of an ``open(2)``."""
    return os.open(sysio.fd_path(target), (flags & ~STRIP_OPEN) | os.O_CLOEXEC)


def _now() -> int:
    """Return the time by the clock of file systems, in nanoseconds."""
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


class CopyUp:
    """Copies nodes up."""

    def __init__(self, tree: Tree, *, metacopy: bool, volatile: bool) -> None:
        self.tree = tree
        self.metadata = Metadata(tree)
        self.metacopy = metacopy
        self.volatile = volatile
        self.offload = False  # set by a driver that can run DataCopy elsewhere
        self.follow_from: int | None = None  # and by one that lets data follow: from how many bytes on
        # Nodes whose cached attributes, and listings, the kernel should ask for again.
        self.notify_changed: list[Node] = []
        self.copies = 0
        self.copy_plain: CopyPlain | None = None  # set by a driver that can copy plain files up in one step
        self._opens: int | None = None  # flags with which to open a copy before it is published
        self._opened = -1  # the descriptor
        self._unshared: set[int] = set()  # layers whose files can't share data with upper's
        self._ties_names = tree.work is not None and not volatile and sysio.file_system_type(tree.work.fd) == _EXT4

    @property
    def work(self) -> WorkDir | None:
        """The work directory, None in a read-only union."""
        return self.tree.work

    def _work(self) -> WorkDir:
        if self.tree.work is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self.tree.work

    # -- what operations ask for --

    def idle(self, node: Node) -> None:
        """Make sure that no copy of this node is under way; raises DataCopyPending."""
        if node.job is not None:
            assert isinstance(node.job, DataCopy)
            raise DataCopyPending(node.job)

    def directory(self, node: Dir) -> None:
        """Make sure that a directory, and so all above it, is in upper."""
        chain: list[Dir] = []
        at: Dir | None = node
        while at is not None and at.stack[0] != 0:
            chain.append(at)
            at = at.parent
        self._work()
        for below in reversed(chain):
            self._copy_directory(below)

    def node(self, node: Node, *, data: bool, size: int | None = None) -> None:
        """Make sure that a node is in upper, with its data if *data*; of that only *size* bytes if given.

        Raises DataCopyPending for a long copy, EROFS in a read-only union, ENOMEM where the copy could be left half
        done, else what the layers raise.
        """
        self._work()
        self.idle(node)
        if node.flags & UPPER:
            self.name_indexed(node)
            if data and node.flags & META:
                self._complete(node, size)
            return
        self.tree.inodes.reserve.before_change()
        if isinstance(node, Dir):
            self.directory(node)
        elif node.fmt == stat.S_IFREG:
            self._copy_regular(node, data=data or not self.metacopy or bool(node.flags & UNLINKED), size=size)
        else:
            self._copy_special(node)

    def truncated(self, node: Node, flags: int) -> int:
        """Make sure that a regular file is in upper, and open it, with O_TRUNC among *flags*, those of open(2).

        Where that cuts data off that is in a lower layer the copy is opened before it is published: if it can't be,
        the file is as before. Returns a descriptor of the data. Raises as `node` and open(2) do.
        """
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if not writes or node.flags & (UPPER | META) == UPPER or not self.tree.stat(node).st_size:
            self.node(node, data=True, size=0)
            return self.tree.open_real(node, flags)
        fd = self._opened_before(node, flags & ~os.O_TRUNC)
        if fd < 0:
            return self.tree.open_real(node, flags)
        try:
            os.ftruncate(fd, 0)  # most are cut already, and only get their times
        except OSError:
            if os.fstat(fd).st_size:
                os.close(fd)
                raise
        return fd

    def _opened_before(self, node: Node, flags: int) -> int:
        """Copy a file up without its data; returns what was opened of the copy before publishing it, -1 if nothing."""
        self._opens = flags
        try:
            try:
                self.node(node, data=True, size=0)
            except OSError:
                if self._opened < 0 or node.flags & (UPPER | META) != UPPER:
                    raise
                # It is up but for its name, which it gets with its next change (`name_indexed`).
            fd, self._opened = self._opened, -1
            return fd
        finally:
            self._opens = None
            if self._opened >= 0:
                os.close(self._opened)
                self._opened = -1

    def plain_file(self, node: Node) -> int:
        """Copy up a lower file about which nothing is special, without copying data, if that can be done in one step.

        Whether it may be changed at all comes out with that step. So nothing is done where its directory would have to
        be copied up before.

        Returns a descriptor of the copy, for the caller to use and close; -1: nothing was done. Raises as `node` does,
        but not DataCopyPending.
        """
        lower = node.flags & (PLAIN | UPPER | UNLINKED) == PLAIN and node.fmt == stat.S_IFREG
        if not lower or self.tree.work is None or node.job is not None:
            return -1
        parent = node.parent
        if parent is None or parent.stack[0] != 0:
            return -1
        self.tree.inodes.reserve.before_change()
        return self._copy_plain(node, parent, data=not self.metacopy)

    def alias(self, node: Node, parent: Dir, name: bytes) -> None:
        """Make sure that an indexed file has this very name in upper too (``ovl_link_up``)."""
        if not node.flags & INDEXED:
            return
        self.directory(parent)
        to_fd = self.tree.dirfds.upper(parent)
        try:
            os.stat(name, dir_fd=to_fd, follow_symlinks=False)
        except FileNotFoundError:
            self._link_up(node, parent, name)

    # -- directories and special files --

    def _copy_directory(self, node: Dir) -> None:
        parent = node.parent
        assert parent is not None
        work, dirfds = self._work(), self.tree.dirfds
        fds = dirfds.fds(node)
        source = self.tree.door.fd_path(fds[0])
        st = self.tree.door.fstat(fds[0])
        to_fd = dirfds.upper(parent)
        self.metadata.foresee(node, source, st)
        with work.temp_entry() as temp, self._parent_times(to_fd):
            os.mkdir(temp, 0o700, dir_fd=work.fd)
            upper = os.open(temp, sysio.O_PATH_DIR, dir_fd=work.fd)
            try:
                target = sysio.fd_path(upper)
                self.metadata.copy(source, st, target, follow_source=True, follow=True)
                self.metadata.set_origin(node.stack[0], fds[0], b"", target)
                set_mode_and_times(st, upper)
                self._mark_impure(parent, to_fd)
                sysio.rename(work.fd, temp, to_fd, node.name, sysio.RENAME_NOREPLACE)
            except BaseException:
                os.close(upper)
                raise
        places = node.where or (None,) * len(node.stack)
        node.where = (None, *places) if node.where else None
        kept = tuple(self.tree.door.dup(fd) for fd in fds)
        node.stack = (0, *node.stack)
        dirfds.set(node, (upper, *kept))
        self._became_upper(node, os.fstat(upper).st_ino)
        node.default_acl = False

    def _copy_special(self, node: Node) -> None:
        work = self._work()
        source = self.tree.path(node)
        follow_source = self.tree.follow(node)
        st = self.tree.stat(node)
        self.metadata.foresee(node, source, st)
        link = self.tree.readlink(node) if stat.S_ISLNK(st.st_mode) else b""
        with work.temp_entry() as temp:
            if link:
                os.symlink(link, temp, dir_fd=work.fd)
            else:
                os.mknod(temp, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, dir_fd=work.fd)
            target = sysio.entry_path(work.fd, temp)
            rino = self.metadata.copy(source, st, target, follow_source=follow_source, follow=False)
            if not stat.S_ISLNK(st.st_mode):
                sysio.chmod_at(work.fd, temp, stat.S_IMODE(st.st_mode))
            sysio.utimens_at(work.fd, temp, st.st_atime_ns, st.st_mtime_ns)
            origin = self.metadata.mark_origin(node, st, target, follow=False)
            self._place(node, st, rino, work.fd, temp, origin)
        self.name_indexed(node)

    # -- regular files --

    def _copy_regular(self, node: Node, *, data: bool, size: int | None) -> None:
        parent = node.parent
        if parent is not None and not node.flags & UNLINKED:
            self.directory(parent)
            if size is None and (fd := self._copy_plain(node, parent, data=data)) >= 0:
                os.close(fd)
                return
        st = self.tree.stat(node)
        whole = st.st_size
        wanted = whole if size is None else min(size, whole)
        self.metadata.foresee(node, self.tree.path(node), st)
        if data and wanted:
            cut = wanted < whole
            self._copy_to_temp(node, wanted, cut=cut, may_follow=not cut and self._may_follow(node, whole))
            return
        target, name = self._work().open_temp()
        size, mtime = (wanted, _now() if wanted < whole else 0) if data else (whole, 0)
        try:
            with self.exchanging_handles(node, target) if data else contextlib.nullcontext():
                self.publish_regular(node, target, name, metacopy=not data, size=size, mtime=mtime, st=st)
        except BaseException:
            if name is not None:
                self._work().discard(name)
            raise
        finally:
            os.close(target)
        self.name_indexed(node)

    def _copy_plain(self, node: Node, parent: Dir, *, data: bool) -> int:
        """Copy a file up in one step, if nothing about it is special; *parent* is in upper. With *data* it is shared.

        Returns a descriptor of the copy; -1: nothing was done.
        """
        work, tree = self._work(), self.tree
        if self.copy_plain is None or not node.flags & PLAIN or tree.door.is_slow or not work.makes_nameless:
            return -1
        if data and (node.layer in self._unshared or node.handles):  # these need a descriptor of the copy before
            return -1
        to_fd = tree.dirfds.upper(parent)
        self._mark_impure(parent, to_fd)
        head = self.metadata.origin_head(node.layer) if tree.resolver.decodes_handles else None
        source_fd = tree.dirfds.fd(parent, node.layer)
        mark = None if data else tree.fmt.metacopy
        made = self.copy_plain(source_fd, node.name, node.rino, to_fd, work.fd, head, tree.fmt.origin, mark)
        if made is None or isinstance(made, bool):
            if made is not None:
                self._unshared.add(node.layer)
            return -1
        fd, rino, blocks = made
        node.flags |= PROTECTION_KNOWN
        if data:
            self.copies += 1
        else:
            node.flags |= META
            tree.data_blocks[node] = blocks
        self._became_upper(node, rino)
        return fd

    def _complete(self, node: Node, size: int | None) -> None:
        """Bring the data of a metacopy file up (``ovl_copy_up_meta_inode_data``).

        That happens in place, unless the data may follow or not all is wanted: then the metacopy is left alone until
        another file takes its place. Its size is that of the lower file as long as it has the mark. Where it can't be
        replaced all is copied, and cut afterwards.
        """
        whole = self.tree.stat(node).st_size
        wanted = whole if size is None else min(size, whole)
        follows = wanted == whole and self._may_follow(node, whole)
        if follows or (wanted < whole and self._may_replace(node)):
            self._copy_to_temp(node, wanted, cut=wanted < whole, may_follow=follows)
            return
        source = self.tree.open_real(node, os.O_RDONLY)
        try:
            target = self.open_upper(node, os.O_RDWR)
        except BaseException:
            self.tree.door.close_file(source)
            raise
        self._start(DataCopy(self, node, source, target, None, whole, cut=False, in_place=True), whole)

    def _may_follow(self, node: Node, size: int) -> bool:
        """Tell whether the data of a file may follow."""
        return self.follow_from is not None and size >= self.follow_from and self._may_replace(node)

    def _may_replace(self, node: Node) -> bool:
        """Tell whether the copy of a file can be made apart from it, whatever upper has of it.

        Left out is what writing would clear (suid, capabilities), which would have to be kept apart from the lower
        file's, hard links, and files without a name; and metacopies whose number is that of the upper file, or that
        have flags of their own, since another one is to take its place.
        """
        if node.flags & (UNLINKED | INDEXED):
            return False
        st = self.tree.stat(node)
        if st.st_nlink > 1 or st.st_mode & (stat.S_ISUID | stat.S_ISGID) or node.parent is None:
            return False
        if node.flags & UPPER and node.ino == self.tree.inodes.map_ino(self.tree.layers.layer(0).device, node.rino):
            return False
        if node.flags & UPPER and inode_flags(self.tree.path(node)) & ~(COPIED_FLAGS | _STORAGE_FLAGS):
            return False
        return CAPABILITY not in self.tree.door.list_xattrs(self.tree.path(node))

    def _copy_to_temp(self, node: Node, size: int, *, cut: bool, may_follow: bool) -> None:
        source = self.tree.open_real(node, os.O_RDONLY)
        try:
            target, name = self._work().open_temp()
        except BaseException:
            self.tree.door.close_file(source)
            raise
        self._start(DataCopy(self, node, source, target, name, size, cut=cut, may_follow=may_follow), size)

    def _start(self, job: DataCopy, size: int) -> None:
        self.copies += 1
        if self.offload and (size > OFFLOAD_BYTES or isinstance(job.source, SlowFd)):
            job.node.job = job
            raise DataCopyPending(job)
        try:
            job.run()
        except BaseException:
            job.abandon()
            raise
        try:
            job.finish()
        except WouldBlock:
            job.abandon()
            raise

    def publish_regular(
        self,
        node: Node,
        target: int,
        name: bytes | None,
        *,
        metacopy: bool,
        size: int | None = None,
        mtime: int = 0,
        st: os.stat_result | None = None,
    ) -> None:
        """Finish a regular file built in work: metadata, marks, and its place in upper or the index.

        The caller sees to open handles where it has data (`exchanging_handles`), and then to `name_indexed`.
        *mtime* is when it was written meanwhile, in nanoseconds; 0: it was not. *st* is the lower file's stat result.
        """
        source = self.tree.path(node)
        st = st or self.tree.stat(node)
        path = sysio.fd_path(target)
        if size is not None and size:
            os.ftruncate(target, size)
        if not metacopy:
            self.tie_name(target)
        rino = self.metadata.copy(source, st, path, follow_source=self.tree.follow(node), follow=True)
        # Origin first: where an inode has room for one attribute, the one that stays should be in it.
        origin = self.metadata.mark_origin(node, st, path, follow=True)
        if metacopy:
            os.setxattr(target, self.tree.fmt.metacopy, b"")
        os.fchmod(target, stat.S_IMODE(st.st_mode))
        sysio.utimens_fd(target, st.st_atime_ns, mtime or st.st_mtime_ns)
        self._place(node, st, rino, target, name, origin)
        if metacopy:
            if not node.flags & META:
                self.tree.data_blocks[node] = st.st_blocks
            node.flags |= META
        else:
            self._forget_lower_data(node)

    def complete_meta(self, node: Node, target: int) -> None:
        """End the data copy of a metacopy file by taking its mark away."""
        with self.exchanging_handles(node, target):
            os.removexattr(sysio.fd_path(target), self.tree.fmt.metacopy)
        self._forget_lower_data(node)
        self.notify_changed.append(node)

    def replace_meta(self, node: Node, target: int, name: bytes, *, mtime: int) -> None:
        """Let a whole file, *name* in work, take the place of a metacopy of which it has the data.

        *mtime* is when it was written meanwhile, in nanoseconds; 0: it was not.
        """
        parent = node.parent
        assert parent is not None
        source, st = self.tree.path(node), self.tree.stat(node)
        self.tie_name(target)
        os.fchown(target, st.st_uid, st.st_gid)
        for attribute in list_xattrs(source):
            if attribute != self.tree.fmt.metacopy:
                os.setxattr(target, attribute, os.getxattr(source, attribute, follow_symlinks=False))
        self.metadata.copy_inode_flags(source, st, sysio.fd_path(target))
        os.fchmod(target, stat.S_IMODE(st.st_mode))
        sysio.utimens_fd(target, st.st_atime_ns, mtime or st.st_mtime_ns)
        to_fd = self.tree.dirfds.upper(parent)
        with self._parent_times(to_fd):
            sysio.rename(self._work().fd, name, to_fd, node.name, 0)
        self.tree.inodes.renumber_upper(node, os.fstat(target).st_ino)
        self._forget_lower_data(node)
        self.notify_changed.append(node)

    def tie_name(self, target: int) -> None:
        """Have fdatasync of a file that is about to be published make durable that it was. Changes its times.

        On ext4 fdatasync waits for the last transaction that the data needs, to which a link, a rename or an attribute
        doesn't belong: what it confirms would be gone after a power cut, because the lower file shows again. So it is
        with O_DSYNC and msync, which don't come by here. An allocation does belong to it (`ext4_alloc_file_blocks`),
        also that of a block which is there already; and what follows at once is in the same transaction, but for the
        rare case that this one ends just then. Where there is no data nothing was synced on the way, and whoever writes
        allocates.
        """
        if not self._ties_names:
            return
        with contextlib.suppress(OSError):
            sysio.allocate_again(target, os.lseek(target, 0, os.SEEK_DATA))

    def _forget_lower_data(self, node: Node) -> None:
        node.flags &= ~META
        self.tree.data_blocks.pop(node, None)
        data = self.tree.data_anchors.pop(node, -1)
        if data >= 0:
            os.close(data)

    def open_upper(self, node: Node, flags: int) -> int:
        """Open the upper inode of a metacopy file itself; *flags* are those of ``open(2)``. Raises OSError."""
        if node.anchor >= 0:
            return os.open(sysio.fd_path(node.anchor), flags | os.O_CLOEXEC)
        dirfd, name = self.tree.place(node)
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)

    @contextlib.contextmanager
    def exchanging_handles(self, node: Node, target: int) -> Iterator[None]:
        """Let descriptors that were opened for reading before the copy-up see what is written after it.

        Kernel overlayfs looks at each read whether the file was copied up (``ovl_real_fdget``); here the number of
        the descriptor stays and what is behind it is exchanged, once the copy *target* has been published in this
        context. What could fail of that is done before, and so is what `truncated` opens: raises OSError, EMFILE.
        """
        fresh = open_copy(target, os.O_RDONLY) if node.handles else -1
        try:
            if self._opens is not None:
                self._opened = open_copy(target, self._opens)
            yield
            for fd in node.handles or ():
                os.dup2(fresh, fd, inheritable=False)
        finally:
            if fresh >= 0:
                os.close(fresh)

    # -- steps --

    def _place(self, node: Node, st: os.stat_result, rino: int, fd: int, name: bytes | None, origin: bytes) -> None:
        """Give a finished object its place. *fd* is the object, or the work directory of *name*; *rino* its number.

        One that has come into the index is up from then on; `name_indexed` gives it its name.
        """
        parent = node.parent
        if node.flags & UNLINKED or parent is None:
            self._keep_nameless(node, fd, name)
            self._became_upper(node, rino)
            return
        self.directory(parent)
        to_fd = self.tree.dirfds.upper(parent)
        if origin and st.st_nlink > 1:
            self._to_index(node, st, rino, fd, name, origin)
            return
        with self._parent_times(to_fd):
            self._mark_impure(parent, to_fd)
            self._publish(fd, name, to_fd, node.name)
        self._became_upper(node, rino)

    def _publish(self, fd: int, name: bytes | None, to_fd: int, to: bytes) -> None:
        if name is None:
            sysio.linkat_fd(fd, to_fd, to)
        else:
            sysio.rename(self._work().fd, name, to_fd, to, sysio.RENAME_NOREPLACE)

    def _keep_nameless(self, node: Node, fd: int, name: bytes | None) -> None:
        """A file that has no name any more lives on in its upper copy as long as it is open."""
        work = self._work()
        anchor = os.open(
            sysio.fd_path(fd) if name is None else sysio.entry_path(work.fd, name), os.O_PATH | os.O_CLOEXEC
        )
        if name is not None:
            os.unlink(name, dir_fd=work.fd)
        if node.anchor >= 0:
            os.close(node.anchor)
        node.anchor = anchor

    def _to_index(self, node: Node, st: os.stat_result, rino: int, fd: int, name: bytes | None, origin: bytes) -> None:
        entry = origin.hex().encode()
        index_fd = self.tree.resolver.index_fd
        if self.tree.door.is_slow:
            self.tree.resolver.decode_origin(origin)  # `_link_up` will, when it is too late to wait
        # Once it is in the index it is all names' file: from then on its own count, 1, is not what they show.
        path = sysio.fd_path(fd) if name is None else sysio.entry_path(self._work().fd, name)
        count = encode_nlink("U", st.st_nlink - 1)
        os.setxattr(path, self.tree.fmt.nlink, count, follow_symlinks=name is None)
        self._publish(fd, name, index_fd, entry)
        self.tree.index_names[node] = entry
        node.flags |= INDEXED
        node.nlink = st.st_nlink
        self._became_upper(node, rino)

    def name_indexed(self, node: Node) -> None:
        """Give a file that has come into the index the name that it was copied up by; harmless for others.

        Comes last: if it fails the file is up all the same, and gets its name with the next change.
        """
        if node.flags & INDEXED and node.parent is not None:
            self.alias(node, node.parent, node.name)

    def _link_up(self, node: Node, parent: Dir, name: bytes) -> None:
        index_fd, entry = self.tree.resolver.index_fd, self.tree.index_names[node]
        to_fd = self.tree.dirfds.upper(parent)
        # The union's count does not change, upper's does: until both are right again it is kept relative to lower.
        path = sysio.entry_path(index_fd, entry)
        lower = self._lower_nlink(path)
        if lower:
            os.setxattr(path, self.tree.fmt.nlink, encode_nlink("L", node.nlink - lower), follow_symlinks=False)
        with self._parent_times(to_fd):
            self._mark_impure(parent, to_fd)
            os.link(entry, name, src_dir_fd=index_fd, dst_dir_fd=to_fd, follow_symlinks=False)
        self.set_nlink(node)

    def _lower_nlink(self, path: bytes) -> int:
        value = os.getxattr(path, self.tree.fmt.origin, follow_symlinks=False)
        st = self.tree.resolver.decode_origin(value)
        return st.st_nlink if st is not None else 0

    def set_nlink(self, node: Node) -> None:
        """Store the union's link count relative to upper's (``ovl_set_nlink_upper``), before or after a change."""
        if node.flags & INDEXED:
            index_fd, entry = self.tree.resolver.index_fd, self.tree.index_names[node]
            real = os.stat(entry, dir_fd=index_fd, follow_symlinks=False).st_nlink
            path = sysio.entry_path(index_fd, entry)
            os.setxattr(path, self.tree.fmt.nlink, encode_nlink("U", node.nlink - real), follow_symlinks=False)

    def _became_upper(self, node: Node, rino: int) -> None:
        node.layer, node.rino = 0, rino
        node.flags |= UPPER | ORIGIN
        if node.flags & BROKEN_LINK:
            # Separated from its other names: from now on it is a file of its own.
            node.flags &= ~(BROKEN_LINK | ORIGIN)
            upper = self.tree.layers.layer(0)
            node.ino = self.tree.inodes.map_ino(upper.device, rino)
            if node.parent is not None:
                self.notify_changed.append(node.parent)  # its listing has the number, too
        if node.parent is not None:
            node.parent.version += 1
        self.tree.inodes.note_upper(node)
        self.notify_changed.append(node)

    def _mark_impure(self, parent: Dir, to_fd: int) -> None:
        set_impure(parent, to_fd, self.tree.fmt, IMPURE)

    @contextlib.contextmanager
    def _parent_times(self, fd: int) -> Iterator[None]:
        """Copy-up does not change what a directory holds, so its times stay."""
        st = os.fstat(fd)
        yield
        with contextlib.suppress(OSError):
            sysio.utimens_fd(fd, st.st_atime_ns, st.st_mtime_ns)
