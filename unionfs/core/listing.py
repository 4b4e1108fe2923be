"""Reading the layers of a directory and merging them into one listing (fs/overlayfs/readdir.c)."""

from __future__ import annotations

import functools
import os
from typing import Final

from unionfs.core import sysio
from unionfs.core.inodes import Dir
from unionfs.core.layers import Layer
from unionfs.core.markers import WH_PREFIX, is_whiteout_device, list_xattrs
from unionfs.core.merge import DT_CHR, DT_REG, DT_UNKNOWN, Entry, merge
from unionfs.core.tree import Tree

_NONE: Final[frozenset[bytes]] = frozenset()
_MAY_BE_DEVICES: Final = frozenset((DT_CHR, DT_UNKNOWN))


class Lister:
    """Lists directories of one mount."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.getdents = sysio.getdents
        """Another one may be put in its place."""

    def entries(self, node: Dir) -> list[Entry]:
        """Return what the union shows in a directory, without ``.`` and ``..``."""
        fds = self._tree.dirfds.fds(node)
        ask = self._tree.layers.door.ask
        listings = []
        for index, dirfd in zip(node.stack, fds, strict=True):
            layer = self._tree.layers.layer(index)
            try:
                raw, whiteouts = ask(dirfd, ("list",), functools.partial(self._listing, layer), keep=False)
            except FileNotFoundError:
                if index == 0:
                    raise
                continue  # somebody has removed it from the lower layer
            listings.append((index, raw, whiteouts))
        return merge(listings)

    def _listing(self, layer: Layer, dirfd: int) -> tuple[list[tuple[bytes, int, int]], frozenset[bytes]]:
        """Return the entries of a layer's directory, and which names are whiteouts; may run in a thread."""
        raw, fd = self._read(layer, dirfd)
        try:
            return raw, self._whiteouts(layer, fd, raw)
        finally:
            os.close(fd)

    def upper_leftovers(self, node: Dir) -> list[bytes]:
        """Return the whiteouts in the upper part of a directory that is empty otherwise (``ovl_check_empty_dir``)."""
        if not node.is_upper:
            return []
        layer = self._tree.layers.layer(0)
        raw, fd = self._read(layer, self._tree.dirfds.upper(node))
        os.close(fd)
        return [name for name, _, _ in raw]

    def _read(self, layer: Layer, dirfd: int) -> tuple[list[tuple[bytes, int, int]], int]:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            fd = os.open(b".", flags | layer.read_noatime, dir_fd=dirfd)
        except PermissionError:
            fd = os.open(b".", flags, dir_fd=dirfd)
        try:
            return self.getdents(fd), fd
        except BaseException:
            os.close(fd)
            raise

    def _whiteouts(self, layer: Layer, fd: int, raw: list[tuple[bytes, int, int]]) -> frozenset[bytes]:
        """Return the names that are whiteouts. Only devices can be, and empty files where the layer has such marks."""
        found: list[bytes] = []
        wh_files = layer.wh_files
        by_xattr = self._may_hold_xattr_whiteouts(layer, fd)
        if not by_xattr and not wh_files:
            raw = [entry for entry in raw if entry[2] in _MAY_BE_DEVICES]
        for name, _, kind in raw:
            if kind in _MAY_BE_DEVICES:
                if is_whiteout_device(os.stat(name, dir_fd=fd, follow_symlinks=False)):
                    found.append(name)
            elif kind == DT_REG and (by_xattr or (wh_files and name.startswith(WH_PREFIX))):
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if st.st_size == 0 and (
                    (wh_files and name.startswith(WH_PREFIX))
                    or self._tree.fmt.whiteout in list_xattrs(sysio.entry_path(fd, name))
                ):
                    found.append(name)
        return frozenset(found) if found else _NONE

    def _may_hold_xattr_whiteouts(self, layer: Layer, fd: int) -> bool:
        if layer.index == 0:
            work = self._tree.work
            return work is not None and work.whiteout_form == "xattr"
        try:
            return os.getxattr(fd, self._tree.fmt.opaque) == b"x"
        except OSError:
            return False
