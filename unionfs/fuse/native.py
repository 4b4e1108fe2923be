"""The native layer, seen from Python.

`unionfs._native` is a C extension (csrc/) whose definitions of some libfuse functions are found before libfuse's own,
if it is loaded first. It asks the kernel for capabilities that pyfuse3 does not know, and serves what concerns only the
data of open files on their host descriptors (a handle number *is* a descriptor). Without it everything works, more
slowly: `active` is False then.

What the layer does by itself once `active` is True:

- READ, WRITE, LSEEK, FALLOCATE, COPY_FILE_RANGE and FLUSH never reach Python; ioctls (inode flags, project) do only
  where `set_ioctl_handler` says so. What may take long (reads that the host has not cached, allocating, copying) is
  done by threads of the layer's own.
- Lookups and listings of one directory come in parallel (FUSE_PARALLEL_DIROPS).
- The kernel does not apply the umask (`FUSE_DONT_MASK`): the operations must, unless a default ACL overrides it.
- Symlink targets are cached, data caches are dropped only on `pyfuse3.invalidate_inode`; see `auto_invalidate`.
- What is missing of a copy whose data follows is copied before it is read or written (`lazy_begin`, csrc/lazy.c).
- What is written through a handle that has O_APPEND goes to the end that the host's file has.
- An entry's `generation`, when not 0, is the `st_ino` to show; `st_ino` is then only the node id.

Who clears suid and sgid (the kernel's file_remove_privs, left to the server by FUSE_HANDLE_KILLPRIV_V2):

===============================  =====================================================================================
WRITE, OPEN with O_TRUNC         this layer, on the descriptor, where the kernel says so; fallocate and
                                 copy_file_range: for every user but root
CREATE with O_TRUNC              nobody if the file is new; `ops.create` if it finds one there: as for SETATTR size
SETATTR size                     `ops.setattr`: if `kill_suidgid(ctx.uid)`, clear what `union.clear_suidgid` does and
                                 return the new mode. Ask before the first `await`
SETATTR uid or gid               nobody: chown(2) on the layer's file clears them, as it does for root
security.capability              nobody: the layer's file system removes it on write, truncate and chown
===============================  =====================================================================================

Without the layer libfuse asks for version 1 of that protocol: the kernel clears nothing and says nothing, so the
operations have to clear both bits on each write, truncation and O_TRUNC as well (`kill_suidgid(uid)` is then True for
every user but root; a write has no uid and must assume another user).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from unionfs.core import sysio
from unionfs.core.inodes import Dir, Node
from unionfs.core.merge import Entry

_module: ModuleType | None = None


def load(*, passthrough: bool = False, old_kernel: bool = False) -> bool:
    """Load the C extension so that pyfuse3 will find its functions first.

    Call this before pyfuse3 is imported; a later first call changes nothing and returns False.

    Args:
        passthrough: whether to ask the kernel for passthrough, if this process may use it. The mount then counts as
            stacked: one overlay can still be mounted over it, a second one over that can't.
        old_kernel: whether to use nothing of the kernel that came after 5.15 or so, to try how that works.

    Returns:
        Whether the extension is loaded and visible to libraries loaded from now on. That the mounted session goes
        through it is what `active` tells, after `pyfuse3.init`.
    """
    global _module
    if _module is None and "pyfuse3" not in sys.modules:
        _module = _import_global()
    # Registering a backing file takes root of the initial user namespace.
    if _module is not None and passthrough and os.geteuid() == 0 and sysio.in_initial_user_namespace():
        _module.ask_passthrough()
    if _module is not None and old_kernel:
        _module.pretend_old_kernel()
    return _module is not None


def _import_global() -> ModuleType | None:
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_GLOBAL)
    try:
        from unionfs import _native
    except ImportError:  # not built, or libfuse is missing
        return None
    finally:
        sys.setdlopenflags(flags)
    return _native if _native.in_scope() else None


def active() -> bool:
    """Whether the session that pyfuse3 mounted goes through the native layer."""
    return _module is not None and bool(_module.active())


def counters() -> dict[str, int]:
    """Requests answered without entering Python, by kind; empty if the layer is not active."""
    return dict(_module.counters()) if _module is not None and active() else {}


def xattr_flags() -> int:
    """The flags of the SETXATTR being handled, 0 where pyfuse3 sees to them itself.

    Valid in a handler up to its first `await`.
    """
    return _module.xattr_flags() if _module is not None and active() else 0


def kill_suidgid(uid: int) -> bool:
    """Whether the request being handled must clear suid and sgid of the file that it changes.

    Valid in a handler up to its first `await`.

    Args:
        uid: the caller's, for when the kernel does not tell.
    """
    if _module is not None and active() and _module.killpriv_v2():
        return bool(_module.kill_suidgid())
    return uid != 0


def set_ioctl_handler(handler: Callable[[object, int, int, int, bytes], None] | None) -> None:
    """Set who answers FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR.

    The handler is called on the loop's thread with a request to answer, the node id, the handle number, the command,
    and the data given (4 bytes of flags, or a struct fsxattr; empty for the reading ones). It must not wait, but may
    start a task. A request that is dropped without an answer fails with EIO. Without a handler the reading ones of
    files are answered on the handle's descriptor, the others fail with ENOTTY, as everything else always does.
    """
    if _module is not None:
        _module.set_ioctl_handler(handler)


def answer_ioctl(request: object, error: int, data: bytes = b"") -> None:
    """Answer a request that an ioctl handler got, once, on the loop's thread.

    Args:
        request: as the handler got it.
        error: an errno, or 0.
        data: what a reading ioctl returns.

    Raises:
        ValueError: it has been answered already.
    """
    if _module is not None:
        _module.answer_ioctl(request, error, data)


def own_attributes(node: int, fd: int, ino: int, timeout: float, *, upper_dir: bool = False) -> None:
    """Have the node's attributes served on `fd`: GETATTR, SETATTR, FSYNC, and GETXATTR of what the kernel asks for
    by itself, the ACL and the capability.

    Only for a file or directory in upper about whose attributes the union has nothing to decide. It lasts until the
    RELEASE of the handle `fd`, or `disown_attributes`, which must come before any other close of `fd`. Harmless if the
    layer is not active.

    Args:
        node: the node id.
        fd: a descriptor of the file; with O_PATH SETATTR is not served.
        ino: the st_ino to show.
        timeout: the attr_timeout to answer, in seconds.
        upper_dir: it is a directory that upper alone makes up: LOOKUPs of what isn't there are answered, too.

    Raises:
        OSError: EBADF.
    """
    if _module is not None:
        _module.own(node, fd, ino, timeout, upper_dir)


def disown_attributes(node: int, fd: int = -1) -> None:
    """Undo `own_attributes` for one descriptor, or for all of the node: if the open fails, or the union must decide."""
    if _module is not None:
        _module.disown(node, fd)


def own_bound(
    node: int,
    fd: int,
    ino: int,
    key: tuple[int, int],
    bind: int,
    *,
    timeout: float,
    handles: int,
    settable: bool,
    root: bool,
) -> None:
    """Serve a bind path's node on `fd`: GETATTR, SETATTR, GETXATTR, and LOOKUPs that lead to it or start there.

    It lasts until `disown_attributes`, which must come before `fd` is closed, and `take_lookups` before that.

    Args:
        node: the node id.
        fd: the ``O_PATH`` descriptor of the object.
        ino: the st_ino to show.
        key: its (st_dev, st_ino) on the host.
        bind: which bind path's it is, counted from 1; names of one never lead to nodes of another.
        timeout: how long the kernel may keep its name and attributes, in seconds.
        handles: how many files are open: then a timeout of 0 is exact.
        settable: whether attributes may be set.
        root: whether it is the bind path's own root, whose name the kernel keeps.
    """
    if _module is not None:
        _module.own_bound(node, fd, ino, *key, bind, timeout, handles, settable, root)


def count_handles(node: int, handles: int) -> None:
    """Say how many files of a bind path's node are open now."""
    if _module is not None:
        _module.count_handles(node, handles)


def take_lookups(node: int) -> int:
    """Return how many LOOKUPs were answered with a node of a bind path since the last call: the kernel counts them."""
    return int(_module.take_lookups(node)) if _module is not None else 0


def know_name(parent: int, name: bytes, node: int) -> None:
    """Say which node of a bind path was seen at a name: a hint, the host is asked each time."""
    if _module is not None:
        _module.know_name(parent, name, node)


def forget_name(parent: int, name: bytes) -> None:
    """Undo `know_name`."""
    if _module is not None:
        _module.forget_name(parent, name)


def reserve_name(name: bytes) -> None:
    """Leave LOOKUPs of a name to Python, in all directories of bind paths."""
    if _module is not None:
        _module.reserve_name(name)


def open_bound(
    first_id: int,
    number: Callable[[int, int], int],
    created: Callable[[int, bytes, int, int, tuple[int, int], int], None],
    opened: Callable[[int, int, int], None],
) -> None:
    """Have plain OPEN and CREATE requests of bind paths' nodes answered natively, and be told afterwards.

    Args:
        first_id: the node id of the first new file; the next ones count up from there.
        number: gives the st_ino to show for (st_dev, st_ino).
        created: called with the parent's node id, the name, the new node's id, its st_ino to show, its (st_dev,
            st_ino), and an ``O_PATH`` descriptor of it, for which the layer has done what `own_bound` and `know_name`
            do; -1: there is none.
        opened: called with the node id, the handle, and the backing id (0: not passed through), also after `created`.
            The layer has done what `count_handles` and `own_attributes` do. The handle is the node's only one.
    """
    if _module is not None:
        _module.open_bound(first_id, number, created, opened)


def ignore_sync(on: bool) -> None:
    """Let FSYNC of files whose attributes are owned do nothing (a volatile union)."""
    if _module is not None:
        _module.ignore_sync(on)


def cache_directories(on: bool) -> None:
    """Let the kernel keep directory listings (FOPEN_CACHE_DIR) until something in the directory changes through it.

    Right as long as every change of a listing comes through this mount, or is followed by an invalidation.
    """
    if _module is not None:
        _module.cache_directories(on)


def auto_invalidate() -> None:
    """Have the kernel drop a file's cached data when it learns of another size or mtime than it knew.

    Needed where files change behind the mount. Whoever reads a file whose attributes have timed out then asks for them
    first; a file's own writes count as a change, too. Call it before the kernel's INIT is answered.
    """
    if _module is not None:
        _module.auto_invalidate()


def lazy_reserve(source: int, target: int, size: int) -> bool:
    """Take the room that a copy of a file will need, as many holes as there are left out. May be called in any thread.

    Args:
        source: a descriptor of the file.
        target: one of an empty file for the copy; it gets its size.
        size: that, in bytes.

    Returns:
        Whether the data is worth following: not where it can be cloned, or room can't be reserved in advance.

    Raises:
        OSError: ENOSPC, EDQUOT, EFBIG, EIO.
    """
    return _module is not None and bool(_module.lazy_reserve(source, target, size))


def lazy_begin(node: int, source: int, target: int, size: int) -> None:
    """Have what is read and written of a node's handles, from now on descriptors of *target*, copied first.

    Args:
        node: the node id.
        source: a descriptor of the file that is copied; the layer makes its own of both.
        target: one of what `lazy_reserve` prepared.
        size: bytes to copy.

    Raises:
        OSError: EMFILE.
    """
    assert _module is not None
    _module.lazy_begin(node, source, target, size)


def lazy_copy(node: int) -> None:
    """Copy what is still missing of a node's data; to be called in a thread. Raises the OSError that stops it."""
    assert _module is not None
    _module.lazy_copy(node)


def lazy_written(node: int) -> int:
    """When the data of a node was last changed since `lazy_begin`, in nanoseconds since the epoch; 0: not at all."""
    assert _module is not None
    return int(_module.lazy_written(node))


def lazy_end(node: int) -> None:
    """Undo `lazy_begin`: all is there, or nobody uses the node's handles any more."""
    assert _module is not None
    _module.lazy_end(node)


Handler = Callable[[int, int, int, int, bytes], bytes | int | None]


def answer_directly(handlers: dict[int, Handler], failed: Callable[[BaseException], None]) -> None:
    """Have requests answered past pyfuse3; `direct` says how. It works only while `readiness` is in force.

    Args:
        handlers: by opcode: called with node id, uid, gid, pid and the request's body.
        failed: is told of exceptions that are no OSError.
    """
    if _module is not None:
        _module.set_direct_failed(failed)
        for opcode, handler in handlers.items():
            _module.set_direct(opcode, handler)


def pack_entry(
    node: int, ino: int, entry_timeout: float, timeout: float, nlink: int, blocks: int, st: os.stat_result
) -> bytes:
    """Build ``struct fuse_entry_out``.

    Args:
        node: the node id.
        ino: the st_ino to show.
        entry_timeout: for the name, in seconds.
        timeout: for the attributes, in seconds.
        nlink: the st_nlink to show; negative: that of *st*.
        blocks: the st_blocks to show; negative: that of *st*.
        st: everything else.
    """
    assert _module is not None
    packed: bytes = _module.pack_entry(node, ino, entry_timeout, timeout, nlink, blocks, st)
    return packed


def pack_attributes(ino: int, timeout: float, nlink: int, blocks: int, st: os.stat_result) -> bytes:
    """Build ``struct fuse_attr_out``; the arguments are those of `pack_entry`."""
    assert _module is not None
    packed: bytes = _module.pack_attributes(ino, timeout, nlink, blocks, st)
    return packed


Place = tuple[int, int, int]
Record = tuple[int, int, bytes]


def number_bits(bits: int) -> None:
    """Tell how many bits of the numbers that files show are their own; once, before `pack_listed`."""
    assert _module is not None
    _module.number_bits(bits)


def pack_listed(
    places: dict[int, Place],
    children: Mapping[bytes, object],
    positions: list[int],
    entries: Sequence[tuple[bytes, int, int, int]],
    first: int,
    room: int,
    timeout: float,
) -> list[Record | None]:
    """Look at entries of a listing, and pack those that are regular files with one name and no extended attribute.

    Args:
        places: by layer: a descriptor of the directory, what its objects' st_ino show above their own bits, and its
            device. Entries of other layers are left alone.
        children: names that are left alone, too.
        positions: the positions of all entries.
        entries: all entries of the listing, as `merge.Entry`.
        first: the first one to look at.
        room: about how many bytes are wanted.
        timeout: for name and attributes, in seconds.

    Returns:
        For each entry from the first on the st_ino to show (also the node id), its own one and
        ``struct fuse_direntplus``; None for one that was left alone.
    """
    assert _module is not None
    packed: list[Record | None] = _module.pack_listed(places, children, positions, entries, first, room, timeout)
    return packed


def pack_names(
    bases: dict[int, int],
    children: dict[bytes, Node],
    positions: list[int],
    entries: list[Entry],
    first: int,
    room: int,
) -> tuple[bytes, int]:
    """Pack entries of a listing with their names alone.

    Args:
        bases: by layer, what its objects' st_ino show above their own bits. Entries of other layers end it.
        children: names that end it, too.
        positions: the positions of all entries.
        entries: all entries of the listing.
        first: the first one to pack.
        room: how many bytes there are.

    Returns:
        What was packed, as ``struct fuse_direntplus``, and the index of the first one that was not.
    """
    assert _module is not None
    packed: tuple[bytes, int] = _module.pack_names(bases, children, positions, entries, first, room)
    return packed


def getdents(fd: int) -> list[tuple[bytes, int, int]]:
    """Do what `sysio.getdents` does, much faster. Raises OSError."""
    assert _module is not None
    entries: list[tuple[bytes, int, int]] = _module.getdents(fd)
    return entries


def tell_lacking(nodes: dict[int, Node], absent: set[tuple[int, str]], mask: int, plain: int) -> None:
    """Have GETXATTR of what isn't there answered without Python.

    Args:
        nodes: all nodes, by id.
        absent: pairs of a layer's index and an attribute that plain files of it lack; may grow.
        mask: which bits of `Node.flags` count.
        plain: what these are where a node is plain.
    """
    assert _module is not None
    _module.tell_lacking(nodes, absent, mask, plain)


def copy_plain(
    dirfd: int, name: bytes, ino: int, to_fd: int, work_fd: int, head: bytes | None, origin: str, metacopy: str | None
) -> tuple[int, int, int] | bool | None:
    """Copy a lower file up in one step, its metadata only or sharing its data: publish it or do nothing at all.

    It is done for a regular file with one name, without extended attributes, and without inode flags that a copy
    keeps. Nothing here raises OSError: whoever gets None does it step by step, and sees what is wrong.

    Args:
        dirfd: the lower directory.
        name: the file's name in both directories.
        ino: its st_ino; another file is left alone.
        to_fd: the directory in upper, which must have the mark for entries with an origin already.
        work_fd: the work directory.
        head: the origin's head (``struct ovl_fb``) without length and type; None for an empty origin.
        origin: the name of the attribute with the origin.
        metacopy: the name of the attribute that marks a copy without data; None: data is shared (FICLONE).

    Returns:
        A descriptor of the copy, for the caller to close, its st_ino, and the number of blocks of the lower file. False
        where no file of this directory can share data with upper.
    """
    assert _module is not None
    copied: tuple[int, int, int] | bool | None = _module.copy_plain(
        dirfd, name, ino, to_fd, work_fd, head, origin, metacopy
    )
    return copied


def sync_later(fd: int) -> bool:
    """Sync and close a descriptor in a thread of the layer, and answer the request being handled with the outcome.

    Returns True, for the direct handler to return.
    """
    assert _module is not None
    return bool(_module.sync_later(fd))


def keep_idle(count: int) -> None:
    """Say how many shared handles to keep that nobody uses; none, unless this is called."""
    if _module is not None:
        _module.keep_idle(count)


def shared_flags() -> int:
    """Return the flags that the open(2) of a handle may have that others get, too; with any other it is one's own."""
    return int(_module.shared_flags()) if _module is not None else 0


def share(node: int, fh: int) -> None:
    """Let the native layer give a handle to others who read the file, too, and keep it a while when all have closed it.

    It comes back as one RELEASE: when there are too many of them, or before a request in which the node's open handles
    have a say (an open that is not for reading, SETATTR, FORGET). The beginning of the file is read ahead.

    Args:
        node: the node id; one that has such a handle already keeps that one.
        fh: the handle, as answered to its OPEN. It must be open for reading alone, and not passed through.
    """
    if _module is not None:
        _module.share(node, fh)


def keep_listing(directory: Dir, *, reopens: bool = False, taken_over: bool = False) -> None:
    """Say that the kernel may keep what it reads through a handle, which is to be answered with FOPEN_CACHE_DIR.

    Args:
        directory: what it is a handle of.
        reopens: whether the native layer gives handles of its own to readers that come later.
        taken_over: whether another daemon has opened it.
    """
    assert _module is not None
    _module.keep_listing(directory.id, directory, reopens, taken_over)


def ask_again(node: int) -> None:
    """Have the next OPENDIR of a directory come to Python: what was decided of it holds no more."""
    if _module is not None:
        _module.ask_again(node)


def opened_again(node: int, fh: int) -> bool:
    """Tell whether the native layer gave a handle by itself. It is for the caller to close then (`close_listing`)."""
    assert _module is not None
    return bool(_module.opened_again(node, fh))


def close_listing(node: int, fh: int, *, known: bool) -> bool:
    """Say that a handle is closed through which the kernel kept what it read.

    Args:
        node: the directory's node id.
        fh: the handle.
        known: whether it was given to `keep_listing`, or `opened_again` has told of it.

    Returns:
        Whether there is such a handle.
    """
    assert _module is not None
    return bool(_module.close_listing(node, fh, known))


def shares_listing(node: int) -> bool:
    """Tell whether several readers may have filled in what the kernel keeps of a directory."""
    assert _module is not None
    return bool(_module.shares_listing(node))


def end_listing(node: int) -> bool:
    """Say that a reader is about to be told that a listing ends.

    Returns:
        Whether what the kernel keeps of it may be of different times. The caller has it dropped first.
    """
    assert _module is not None
    return bool(_module.end_listing(node))


def take_backing(fd: int) -> int:
    """Return the backing id that `IoModes.opened` announced for a handle, for an answer made directly; 0: none."""
    return int(_module.take_backing(fd)) if _module is not None else 0


def unique() -> int:
    """Return the number of the request being handled; valid in a handler up to its first `await`."""
    return int(_module.unique()) if _module is not None else 0


def device() -> int:
    """Return the descriptor through which the kernel is talked to, -1 without a session."""
    return int(_module.device()) if _module is not None else -1


def init_message() -> bytes:
    """Return the kernel's INIT, empty before it has come."""
    return bytes(_module.init_message()) if _module is not None else b""


def resends() -> bool:
    """Whether the kernel sends again what a daemon has not answered (FUSE_NOTIFY_RESEND); known after INIT."""
    return _module is not None and bool(_module.resends())


def resume(message: bytes) -> None:
    """Take INIT as answered, as the daemon did from which the mount is taken over.

    Call it when `pyfuse3.init` has got that mount's descriptor, or a copy of it, in place of a mount point.

    Args:
        message: that daemon's `init_message`.

    Raises:
        OSError: libfuse does not take it.
    """
    assert _module is not None
    _module.resume(message)


def fork_sharing_files() -> int:
    """Do as `os.fork`, but both processes share one table of descriptors: what one opens, the other has.

    The caller must have no other thread, and have called `load`.

    Raises:
        OSError: as fork(2).
    """
    assert _module is not None
    return int(_module.fork_sharing_files())


def readiness(spin: float, linger: float, slice_seconds: float, loop_fd: int) -> ModuleType | None:
    """Make receiving non-blocking and return its controls (`may_receive`, `drained`, `new_slice`), for `dispatch`.

    Args:
        spin: seconds to look for the next request before sleeping.
        linger: seconds to sleep until a request comes, before the device counts as drained; less than one.
        loop_fd: a descriptor that becomes readable when the loop has something to do for other tasks, which ends
            the sleep; -1: none.
        slice_seconds: seconds for which `may_receive` stays true after `new_slice`.

    Returns:
        None if the layer is not active.
    """
    if _module is None or not active():
        return None
    _module.drive(spin, linger, slice_seconds, loop_fd)
    return _module


def passthrough() -> bool:
    """Whether the kernel has granted passthrough to the mounted session."""
    return _module is not None and active() and bool(_module.passthrough())


@dataclass(slots=True)
class _Mode:
    handles: int = 0
    backing_id: int = 0


class IoModes:
    """Which nodes the kernel serves from a backing file while they are open (mirrors fs/fuse/iomode.c).

    The kernel holds an inode in one of three states, and fails an open that does not fit with EIO:

    - *closed*: any open may come next; it decides.
    - *cached*: as long as a cached handle is open (or mapped), every further open must be cached.
    - *passthrough*: as long as a passthrough handle is open (or mapped), every further open must be passthrough, with
      the same backing id: READ, WRITE and mmap then go to the backing file, whatever the union decides meanwhile.

    A handle counts from the answer to OPEN or CREATE until its RELEASE arrives. The kernel's own count is never higher,
    so an open that fits this table fits the kernel's.

    What the caller has to see to, since the kernel keeps a passthrough inode on the file it was opened with:

    - Allow passthrough for upper files only. A lower file that is read through would go on showing the lower data
      after a copy-up.
    - Don't allow it for a file that has suid or sgid. One may be set later: as long as `passed`, give the attributes of
      a file that has either with attr_timeout 0 (LOOKUP, GETATTR and SETATTR alike). The host clears the bit on the
      next write without a word to us, and the kernel must ask for the mode before it executes the file.
    - Writes change size and times without a request, too; the kernel asks for them with GETATTR. It does not when a
      shared mapping is written: as long as a passed handle allows such mappings (O_RDWR), give attr_timeout 0, and
      invalidate what it knows when that handle is opened.
    """

    def __init__(self) -> None:
        self._modes: dict[int, _Mode] = {}
        self._refused = False

    def opened(self, node: int, fd: int, *, allowed: bool) -> bool:
        """Decide how the handle `fd` of `node` is opened, and count it. Call it just before returning it to pyfuse3.

        Args:
            node: the node id of the answer.
            fd: the host descriptor that becomes the handle number; its file is the backing file.
            allowed: whether passthrough may be chosen if the node is closed.

        Returns:
            Whether the handle is a passthrough one.
        """
        mode = self._modes.get(node)
        if mode is None:
            mode = self._modes[node] = _Mode(backing_id=self._register(fd) if allowed else 0)
        mode.handles += 1
        if _module is not None:
            _module.announce_backing(fd, mode.backing_id)
        return mode.backing_id != 0

    def backing_id(self, node: int) -> int:
        """Return the backing id of an open node, 0 where it is not passed through."""
        mode = self._modes.get(node)
        return 0 if mode is None else mode.backing_id

    def take_over(self, node: int, backing_id: int) -> None:
        """Count a handle that the kernel got from another daemon: backing ids belong to the connection."""
        self._modes.setdefault(node, _Mode(backing_id=backing_id)).handles += 1

    def opened_natively(self, node: int, backing_id: int) -> None:
        """Count the first handle of a node, opened by the native layer, with its backing id; 0: none."""
        self._modes[node] = _Mode(handles=1, backing_id=backing_id)

    def _register(self, fd: int) -> int:
        if _module is None or self._refused or not passthrough():
            return 0
        try:
            return int(_module.backing_open(fd))
        except OSError as error:
            # ELOOP: on a stacked file system, so are its neighbours. EOPNOTSUPP, EINVAL: only this file can't be one.
            self._refused = error.errno in (errno.EPERM, errno.ELOOP)
            return 0

    def released(self, node: int) -> None:
        """Count a handle of `node` as gone: on RELEASE, or if its open failed after `opened`."""
        mode = self._modes[node]
        mode.handles -= 1
        if mode.handles:
            return
        del self._modes[node]
        if mode.backing_id and _module is not None:
            with contextlib.suppress(OSError):  # unmounted: the ids went with the connection
                _module.backing_close(mode.backing_id)

    def passed(self, node: int) -> bool:
        """Whether `node` is open in passthrough mode."""
        mode = self._modes.get(node)
        return mode is not None and mode.backing_id != 0
