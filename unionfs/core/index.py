"""The index at mount time: what must be true of it before it may be trusted (``ovl_get_indexdir``).

The index ties the names of a lower hard link together after copy-up. It is only valid for the layers that it was made
with, so the upper root remembers the first lower root (``origin``) and the index directory the upper root (``upper``).

File handles are stored with the UUID of their file system, which old kernels don't tell of every one
(`sysio.file_system_uuid`). Then nothing is noted about the roots: overlayfs, which knows, would refuse layers with a
wrong note. It makes its own note at its first mount, from which the UUID is learned.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat

from unionfs.core import sysio
from unionfs.core.layers import Layer, LayerStack
from unionfs.core.markers import Format, decode_handle, decode_nlink, encode_handle, get_xattr, is_whiteout_device
from unionfs.core.resolve import Resolver, can_decode_handles
from unionfs.core.workdir import WorkDir

log = logging.getLogger(__name__)

NO_UUID = bytes(16)


def usable(layers: LayerStack) -> bool:
    """Tell whether every layer has file handles that can be opened, and no two file systems one UUID."""
    upper = layers.upper
    if upper is None or not can_decode_handles(upper):
        return False
    uuids = {layer.device: layer.uuid for layer in layers.lowers}
    distinct = len(set(uuids.values())) == len(uuids)
    return distinct and all(can_decode_handles(layer) for layer in layers.lowers)


def belongs(layers: LayerStack, work: WorkDir, fmt: Format, *, uuid: bool) -> bool:
    """Check, or on the first mount note, which layers the index is for; False for others'."""
    upper, lower = layers.upper, layers.lowers[0]
    if upper is None:
        return False
    if uuid:
        _learn_uuid(layers, upper.fd, fmt.origin, lower)
        _learn_uuid(layers, work.index_fd, fmt.upper, upper)
    return _verify(upper.fd, fmt.origin, lower, uuid=uuid, is_upper=False) and _verify(
        work.index_fd, fmt.upper, upper, uuid=uuid, is_upper=True
    )


def _learn_uuid(layers: LayerStack, fd: int, name: str, target: Layer) -> None:
    """Take the UUID of the target's file system, if nobody tells it, from the note that overlayfs made of its root."""
    if target.uuid != NO_UUID:
        return
    known = decode_handle(get_xattr(sysio.fd_path(fd), name) or b"")
    if known is not None and (known.kind, known.handle) == sysio.file_handle(target.fd, b""):
        for layer in (*layers.lowers, *([layers.upper] if layers.upper else [])):
            if layer.device == target.device:
                layer.uuid = known.uuid


def _verify(fd: int, name: str, target: Layer, *, uuid: bool, is_upper: bool) -> bool:
    path = sysio.fd_path(fd)
    kind, handle = sysio.file_handle(target.fd, b"")
    value = encode_handle(kind, handle, target.uuid if uuid else NO_UUID, is_upper=is_upper)
    known = get_xattr(path, name)
    if known is None:
        if uuid and target.uuid == NO_UUID:
            return True
        try:
            os.setxattr(path, name, value)
        except OSError as exc:
            log.warning("can't store %s: %s", name, exc.strerror)
            return False
        return True
    return known == value


def clean(resolver: Resolver, work: WorkDir, fmt: Format) -> None:
    """Remove index entries that lead nowhere any more (``ovl_indexdir_cleanup``)."""
    for name, _, _ in sysio.getdents(work.index_fd):
        if _is_orphan(resolver, work.index_fd, name, fmt):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=work.index_fd)


def _is_orphan(resolver: Resolver, index_fd: int, name: bytes, fmt: Format) -> bool:
    if name.startswith(b"#"):
        return True
    try:
        wanted = bytes.fromhex(name.decode("ascii"))
    except ValueError:
        return False
    st = os.stat(name, dir_fd=index_fd, follow_symlinks=False)
    if decode_handle(wanted) is None or stat.S_ISDIR(st.st_mode) or is_whiteout_device(st):
        return False
    path = sysio.entry_path(index_fd, name)
    if get_xattr(path, fmt.origin) != wanted:
        return True
    if st.st_nlink > 1:
        return False
    lower = resolver.decode_origin(wanted)
    value = get_xattr(path, fmt.nlink)
    return lower is None or (value is not None and decode_nlink(value, st.st_nlink, lower.st_nlink) is None)


def set_uuid(layers: LayerStack, fmt: Format, mode: str) -> None:
    """Give a fresh upper root the union's own UUID, as overlayfs does with uuid=auto and uuid=on."""
    if layers.upper is None or mode not in ("auto", "on"):
        return
    path = sysio.fd_path(layers.upper.fd)
    if get_xattr(path, fmt.uuid) is not None or (mode == "auto" and get_xattr(path, fmt.impure) is not None):
        return
    try:
        os.setxattr(path, fmt.uuid, os.urandom(16))
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EPERM):
            raise
