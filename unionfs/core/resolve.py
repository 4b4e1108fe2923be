"""(parent, name) → what exists where. Read-only; mirrors ``ovl_lookup`` (fs/overlayfs/namei.c).

The walk goes through the parent's layers from the top. What it meets decides how it goes on:

- nothing: on to the next layer;
- a whiteout: stop, nothing below counts;
- a file: found; stop unless it is a metacopy, whose data is further down;
- a directory: found; stop if it is opaque, else merge with the directories below;
- a *redirect* on a directory or metacopy file: go on below under another name, or from the root of the layers.

Values of redirects are data from a layer, maybe a stranger's: each component is opened with ``O_NOFOLLOW`` relative
to a descriptor, ``..`` is refused, so nothing outside the layers can be reached.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from typing import Final

from unionfs.config import MountConfig
from unionfs.core import sysio
from unionfs.core.dirfds import DirFds
from unionfs.core.inodes import Dir, InodeTable
from unionfs.core.layers import Layer, LayerStack
from unionfs.core.markers import (
    METACOPY_LEAST,
    WH_OPAQUE,
    WH_PREFIX,
    Format,
    decode_handle,
    encode_handle,
    get_xattr,
    is_whiteout_device,
    list_xattrs,
    parse_redirect,
)

# Only these errors mean "not there" in one layer.
_ABSENT: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG))

# The longest redirect that an attribute can hold; the redirects of many directories must not add up to more.
_MOST_REDIRECT: Final = 1 << 16


class Found:
    """What a walk found. `layer` and `st` describe the topmost real object."""

    __slots__ = (
        "data",
        "index_name",
        "layer",
        "lower_nlink",
        "metacopy",
        "opaque",
        "origin",
        "redirect",
        "st",
        "stack",
        "top_lower",
        "where",
        "xattrs",
    )

    def __init__(self, layer: int, st: os.stat_result) -> None:
        self.layer = layer
        self.st = st
        self.stack: list[int] = [layer]
        self.where: list[bytes | None] = [None]
        self.opaque = False
        self.redirect: bytes | None = None
        self.metacopy = False
        self.data: tuple[int, bytes | None] | None = None  # layer and place of a metacopy's data
        self.top_lower: os.stat_result | None = None  # topmost lower object below an upper one
        self.origin: tuple[int, int] | None = None  # (st_dev, st_ino) of the lower origin of an upper object
        self.lower_nlink = 0
        self.index_name = b""
        self.xattrs: list[str] = []

    @property
    def is_dir(self) -> bool:
        """Tell whether a directory was found."""
        return stat.S_ISDIR(self.st.st_mode)


class _Walk:
    """Where a walk stands (``struct ovl_lookup_data``)."""

    __slots__ = ("absolute", "found", "is_dir", "metacopy", "missed", "name", "redirect", "stop", "whiteout")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.absolute = False
        self.stop = False
        self.whiteout = False
        self.is_dir = False
        self.metacopy = False
        self.redirect: bytes | None = None
        self.found: Found | None = None
        self.missed: list[int] = []  # directories of wh_files layers where the name was absent


class Resolver:
    """Looks names up over the layers of one mount."""

    def __init__(
        self,
        config: MountConfig,
        layers: LayerStack,
        dirfds: DirFds,
        fmt: Format,
        inodes: InodeTable,
        index_fd: int,
    ) -> None:
        self._layers = layers
        self._door = door = layers.door
        self._look, self._stat, self._list_xattrs = door.look, door.stat, door.list_xattrs
        self._entry_path = door.entry_path
        self._dirfds = dirfds
        self._fmt = fmt
        self._inodes = inodes
        self.index_fd = index_fd
        self._follow = config.redirect_dir in ("on", "follow")
        self._check_redirect = self._follow or bool(layers.data)
        self._metacopy = config.metacopy
        self.uuid_in_handles = config.uuid != "off"
        self._decodable: list[Layer] = [layer for layer in layers.lowers if can_decode_handles(layer)]
        dirfds.refresh = self.refresh

    # -- the walk --

    def lookup(self, parent: Dir, name: bytes, first: int = 0) -> Found | None:
        """Find *name* in *parent*; None where it does not exist. Layers above *first* are known not to have it.

        Raises EINVAL for a malformed redirect, EPERM for one that may not be followed, EIO for a metacopy
        without data, and whatever a layer fails with.
        """
        fds = self._dirfds.fds(parent)
        walk = _Walk(name)
        last_lower = parent.stack[-1]
        from_root = False
        for at, index in enumerate(parent.stack):
            if index < first:
                continue
            self._visit(walk, self._layers.layer(index), fds[at], index == last_lower and not self._check_redirect)
            if walk.stop or walk.absolute:
                from_root = walk.absolute and not walk.stop
                break
        if from_root:
            self._walk_from_root(walk)
        found = walk.found
        if found is None:
            return None
        if walk.redirect is not None and not self._follow and len(found.stack) > 1 and not self._layers.data:
            raise OSError(errno.EPERM, "redirect may not be followed", name)
        if found.metacopy and found.data is None:
            self._find_data_only(walk, found)
        if not found.is_dir:
            self._finish_file(parent, name, found)
        return found

    def plain_file(self, parent: Dir, name: bytes, first: int) -> tuple[int, os.stat_result] | None:
        """Return (layer, stat result) of a name about which there is nothing to find out, as of most files.

        That is a regular file with no other name and no extended attribute, in a lower layer that is the only one to
        have the name: *first*, or the parent's only one. None for anything else, which `lookup` must see to.
        """
        stack = parent.stack
        index = first or (stack[0] if len(stack) == 1 else 0)
        if not index or self._door.is_slow or name.startswith(WH_PREFIX):
            return None
        dirfd = self._dirfds.fds(parent)[stack.index(index)]
        try:
            st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        except OSError:
            return None
        if st.st_nlink != 1 or not stat.S_ISREG(st.st_mode) or self._list_xattrs(self._entry_path(dirfd, name)):
            return None
        return index, st

    def _walk_from_root(self, walk: _Walk) -> None:
        """Go on with an absolute redirect, in the layers below the one that said so."""
        found = walk.found
        start = found.stack[-1] if found is not None and found.data is None else 0
        for layer in self._layers.lowers:
            if layer.index <= start:
                continue
            self._visit_path(walk, layer)
            if walk.stop:
                return

    def _visit_path(self, walk: _Walk, layer: Layer) -> None:
        """Look up an absolute name in one layer, obeying marks on the way (``ovl_lookup_layer``)."""
        here = self._door.dup(layer.fd)
        rest = walk.name[1:]
        place = b""
        try:
            while True:
                part, _, rest = rest.partition(b"/")
                if not rest:
                    place = (place + b"/" + part)[1:]
                    prefix = walk.name[: len(walk.name) - len(part)]
                    self._visit(walk, layer, here, last=False, part=part, place=place, prefix=prefix)
                    return
                below = self._step_into(walk, layer, here, part, rest)
                if below < 0:
                    return
                place = place + b"/" + part
                os.close(here)
                here = below
        finally:
            os.close(here)

    def _step_into(self, walk: _Walk, layer: Layer, here: int, part: bytes, rest: bytes) -> int:
        """Open an intermediate directory of an absolute redirect; -1 where the way ends."""
        try:
            st = self._look(part, dir_fd=here, follow_symlinks=False)
        except OSError as exc:
            if exc.errno in _ABSENT:
                return -1
            raise
        if not stat.S_ISDIR(st.st_mode):
            walk.stop = True
            return -1
        path = self._entry_path(here, part)
        if self._opaque_value(path) == b"y":
            walk.stop = True
        elif (value := self._door.get_xattr(path, self._fmt.redirect)) is not None and self._check_redirect:
            redirect = parse_redirect(value)
            # Below this layer the way leads through the redirect.
            if redirect.startswith(b"/"):
                walk.name = redirect + b"/" + rest
            else:
                prefix = walk.name[: len(walk.name) - len(rest) - 1 - len(part)]
                walk.name = prefix + redirect + b"/" + rest
            if len(walk.name) > _MOST_REDIRECT:
                raise OSError(errno.ENAMETOOLONG, "redirects lead too far", part)
        return self._door.open(part, sysio.O_PATH_DIR, dir_fd=here)

    def _visit(
        self,
        walk: _Walk,
        layer: Layer,
        dirfd: int,
        last: bool,
        *,
        part: bytes | None = None,
        place: bytes | None = None,
        prefix: bytes = b"",
    ) -> None:
        """Look at one name in one layer's directory (``ovl_lookup_single``)."""
        name = walk.name if part is None else part
        try:
            st = self._look(name, dir_fd=dirfd, follow_symlinks=False)
        except OSError as exc:
            if exc.errno not in _ABSENT:
                raise
            if layer.wh_files and place is None:
                walk.missed.append(dirfd)
            elif layer.wh_files and self.is_wh_file(dirfd, name):
                walk.stop = walk.whiteout = True
            return
        if walk.missed and self._hidden_by_wh_file(walk, name):
            walk.stop = walk.whiteout = True
            return
        mode = st.st_mode
        path = self._entry_path(dirfd, name)
        xattrs: list[str] | None = None
        if is_whiteout_device(st):
            walk.stop = walk.whiteout = True
            return
        if stat.S_ISREG(mode):
            xattrs = self._list_xattrs(path, follow=False)
            if st.st_size == 0 and self._fmt.whiteout in xattrs:
                walk.stop = walk.whiteout = True
                return
        if layer.wh_files and name.startswith(WH_PREFIX) and stat.S_ISREG(mode) and st.st_size == 0:
            return  # not a file of the union but somebody's mark
        if stat.S_ISDIR(mode):
            self._visit_dir(walk, layer, dirfd, name, path, st, last, place, prefix)
        else:
            self._visit_file(walk, layer, path, st, xattrs, place, prefix)

    def _visit_file(
        self,
        walk: _Walk,
        layer: Layer,
        path: bytes,
        st: os.stat_result,
        xattrs: list[str] | None,
        place: bytes | None,
        prefix: bytes,
    ) -> None:
        walk.stop = True
        if walk.is_dir or (walk.metacopy and not stat.S_ISREG(st.st_mode)):
            return
        found = walk.found
        metacopy = xattrs is not None and self._fmt.metacopy in xattrs
        if found is None:
            found = walk.found = Found(layer.index, st)
            found.where = [place if place is not None else self._sibling(walk)]
            found.xattrs = xattrs or []
            found.metacopy = metacopy
        else:
            if found.top_lower is None and found.layer == 0:
                found.top_lower = st
                found.origin = (st.st_dev, st.st_ino)
                found.lower_nlink = st.st_nlink
            if not metacopy:
                found.data = (layer.index, place if place is not None else self._sibling(walk))
        if metacopy:
            self._check_metacopy(path)
            if not self._metacopy and not self._layers.data:
                raise OSError(errno.EPERM, "metacopy=off: the data may not be followed")
            walk.metacopy = True
            walk.stop = False
            found.stack[-1:] = [layer.index]
            self._redirect(walk, path, prefix, xattrs)

    def _check_metacopy(self, path: bytes) -> None:
        """Refuse a mark that is neither empty nor long enough for a digest's head (``ovl_check_metacopy_xattr``)."""
        value = self._door.get_xattr(path, self._fmt.metacopy)
        if value is not None and 0 < len(value) < METACOPY_LEAST:
            raise OSError(errno.EIO, "metacopy mark of a size that has no meaning")

    @staticmethod
    def _sibling(walk: _Walk) -> bytes | None:
        """A relative redirect leads to another name in the same directory: remember it as `/NAME`."""
        return b"/" + walk.name if walk.redirect is not None and not walk.absolute else None

    def _visit_dir(
        self,
        walk: _Walk,
        layer: Layer,
        dirfd: int,
        name: bytes,
        path: bytes,
        st: os.stat_result,
        last: bool,
        place: bytes | None,
        prefix: bytes,
    ) -> None:
        if walk.metacopy:
            walk.stop = True
            return
        found = walk.found
        where = place if place is not None else self._sibling(walk)
        if found is None:
            found = walk.found = Found(layer.index, st)
            found.where = [where]
        else:
            found.stack.append(layer.index)
            found.where.append(where)
            if found.top_lower is None and found.layer == 0:
                found.top_lower = st
        walk.is_dir = True
        xattrs = self._list_xattrs(path, follow=False)
        if layer.index == found.layer:
            found.xattrs = xattrs
        value = self._opaque_value(path) if self._fmt.opaque in xattrs else None
        if value == b"y":
            walk.stop = True
            if layer.index == found.layer:
                found.opaque = True
            return
        if layer.wh_files and self._has_wh_opaque(dirfd, name):
            walk.stop = True
            return
        if not last:
            self._redirect(walk, path, prefix, xattrs)

    def _redirect(self, walk: _Walk, path: bytes, prefix: bytes, xattrs: list[str] | None) -> None:
        if not xattrs or self._fmt.redirect not in xattrs:
            return
        value = self._door.get_xattr(path, self._fmt.redirect)
        if value is None:
            return
        redirect = parse_redirect(value)
        if not self._check_redirect:
            raise OSError(errno.EPERM, "redirect may not be followed")
        walk.redirect = redirect
        found = walk.found
        if found is not None and found.redirect is None:
            found.redirect = redirect
        if redirect.startswith(b"/"):
            walk.name, walk.absolute, walk.stop = redirect, True, False
        else:
            walk.name = prefix + redirect

    def _opaque_value(self, path: bytes) -> bytes | None:
        value = self._door.get_xattr(path, self._fmt.opaque)
        return value if value is not None and len(value) == 1 else None

    def _has_wh_opaque(self, dirfd: int, name: bytes) -> bool:
        mark = name + b"/" + WH_OPAQUE
        try:
            self._door.ask(dirfd, ("beneath", mark), functools.partial(_stat_beneath, mark))
        except OSError:
            return False
        return True

    def _hidden_by_wh_file(self, walk: _Walk, name: bytes) -> bool:
        """Tell whether a layer above, where the name is absent, holds a `.wh.` file for it."""
        missed, walk.missed = walk.missed, []
        return any(self.is_wh_file(dirfd, name) for dirfd in missed)

    def is_wh_file(self, dirfd: int, name: bytes) -> bool:
        """Tell whether a directory holds an image-layer whiteout for *name*."""
        try:
            st = self._stat(WH_PREFIX + name, dir_fd=dirfd, follow_symlinks=False)
        except OSError:
            return False
        return stat.S_ISREG(st.st_mode) and st.st_size == 0

    def _find_data_only(self, walk: _Walk, found: Found) -> None:
        """Look for a metacopy's data in the data-only layers (``ovl_maybe_lookup_lowerdata``).

        Where it is missing there, only opening the file fails; a metacopy that can't have data there is EIO at once.
        """
        redirect = walk.redirect
        in_lower = found.stack[-1] != 0
        if not self._layers.data or not in_lower or redirect is None or not redirect.startswith(b"/"):
            raise OSError(errno.EIO, "metacopy without data", walk.name)
        for layer in self._layers.data:
            try:
                st = self._door.ask(layer.fd, ("beneath", redirect), functools.partial(_stat_beneath, redirect[1:]))
            except OSError as exc:
                if exc.errno in _ABSENT or exc.errno in (errno.ELOOP, errno.EXDEV):
                    continue
                raise
            if stat.S_ISREG(st.st_mode):
                found.data = (layer.index, redirect[1:])
                return

    @property
    def decodes_handles(self) -> bool:
        """Tell whether file handles of lowers can be opened."""
        return bool(self._decodable)

    # -- origin and index --

    def _finish_file(self, parent: Dir, name: bytes, found: Found) -> None:
        """Find the origin of an upper file, and the index entry of a lower hard link."""
        if found.layer == 0:
            path = sysio.entry_path(self._dirfds.fds(parent)[0], name)
            xattrs = found.xattrs if stat.S_ISREG(found.st.st_mode) else list_xattrs(path, follow=False)
            if self._fmt.origin in xattrs:
                self._read_origin(path, found)
            if self.index_fd >= 0 and found.origin is not None and found.lower_nlink > 1:
                self._match_index(path, found)
        elif self.index_fd >= 0 and found.st.st_nlink > 1:
            self._find_index(parent, name, found)

    def _read_origin(self, path: bytes, found: Found) -> None:
        value = get_xattr(path, self._fmt.origin)
        st = self.decode_origin(value) if value else None
        if st is not None and stat.S_IFMT(st.st_mode) == stat.S_IFMT(found.st.st_mode):
            found.origin = (st.st_dev, st.st_ino)
            found.lower_nlink = st.st_nlink

    def decode_origin(self, value: bytes) -> os.stat_result | None:
        """Return the stat result of the lower object that an origin names; None when it can't be found."""
        handle = decode_handle(value)
        if handle is None:
            return None
        for layer in self._decodable:
            if handle.uuid != (layer.uuid if self.uuid_in_handles else bytes(16)):
                continue
            try:
                return self._door.ask(
                    layer.read_fd, ("handle", handle), functools.partial(_stat_handle, handle.kind, handle.handle)
                )
            except OSError:
                continue
        return None

    def encode_origin(self, layer: Layer, dirfd: int, name: bytes) -> bytes | None:
        """Return the origin value of a lower object, None where its file system has no file handles."""
        try:
            kind, handle = self._door.ask(dirfd, ("handle", name), lambda fd: sysio.file_handle(fd, name))
        except OSError as exc:
            if exc.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EOVERFLOW, errno.EPERM):
                return None
            raise
        return encode_handle(kind, handle, self._uuid(layer))

    def origin_head(self, layer: Layer) -> bytes:
        """Return an origin value without the handle, to which length and type are to be added."""
        return encode_handle(0, b"", self._uuid(layer))

    def _uuid(self, layer: Layer) -> bytes:
        return layer.uuid if self.uuid_in_handles else bytes(16)

    def _match_index(self, path: bytes, found: Found) -> None:
        """An upper file is indexed if the index entry of its origin is the very same inode."""
        value = get_xattr(path, self._fmt.origin)
        if not value:
            return
        try:
            st = os.stat(value.hex(), dir_fd=self.index_fd, follow_symlinks=False)
        except OSError as exc:
            if exc.errno in _ABSENT:
                return
            raise
        if st.st_ino == found.st.st_ino and st.st_dev == found.st.st_dev:
            found.index_name = value.hex().encode()

    def _find_index(self, parent: Dir, name: bytes, found: Found) -> None:
        """A lower hard link that was copied up under another name: its upper object is in the index."""
        layer = self._layers.layer(found.layer)
        dirfd = self._dirfds.fd(parent, found.layer)
        value = self.encode_origin(layer, dirfd, name)
        if value is None:
            return
        entry = value.hex().encode()
        try:
            st = os.stat(entry, dir_fd=self.index_fd, follow_symlinks=False)
        except OSError as exc:
            if exc.errno in _ABSENT:
                return
            raise
        if stat.S_IFMT(st.st_mode) != stat.S_IFMT(found.st.st_mode):
            raise OSError(errno.EIO, "bad index entry", entry)
        xattrs = list_xattrs(sysio.entry_path(self.index_fd, entry))
        found.metacopy = self._fmt.metacopy in xattrs
        if found.metacopy:
            # Its data is what this name shows in the lower layer, or what that one's metacopy leads to.
            found.data = found.data or (found.layer, found.where[0])
        found.origin = (found.st.st_dev, found.st.st_ino)
        found.lower_nlink = found.st.st_nlink
        found.layer, found.st = 0, st
        found.stack = [0]
        found.index_name = entry

    # -- for the rest of the core --

    def lower_positive(self, parent: Dir, name: bytes) -> bool:
        """Tell whether a lower layer would show *name* if upper had nothing there (``ovl_lower_positive``)."""
        fds = self._dirfds.fds(parent)
        missed: list[int] = []
        for at, index in enumerate(parent.stack):
            if index == 0:
                continue
            try:
                st = self._stat(name, dir_fd=fds[at], follow_symlinks=False)
            except OSError as exc:
                if exc.errno not in _ABSENT:
                    return True
                missed.append(fds[at])
                continue
            if is_whiteout_device(st):
                return False
            if stat.S_ISREG(st.st_mode) and st.st_size == 0:
                if self._fmt.whiteout in self._list_xattrs(self._entry_path(fds[at], name)):
                    return False
                if name.startswith(WH_PREFIX):
                    continue
            return not any(self.is_wh_file(fd, name) for fd in missed)
        return False

    def refresh(self, node: Dir) -> None:
        """Find the layers of a renamed directory again."""
        if node.parent is None:
            return
        found = self.lookup(node.parent, node.name)
        if found is None or not found.is_dir:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), node.name)
        node.stack, node.where = tuple(found.stack), where_tuple(found)
        node.stale = False


def _stat_beneath(path: bytes, root_fd: int) -> os.stat_result:
    fd = sysio.open_beneath(root_fd, path, sysio.O_PATH_NOFOLLOW)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _stat_handle(kind: int, handle: bytes, mount_fd: int) -> os.stat_result:
    fd = sysio.open_by_handle(mount_fd, kind, handle)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def can_decode_handles(layer: Layer) -> bool:
    """Tell whether file handles of a layer can be opened: CAP_DAC_READ_SEARCH, and a file system that has them."""
    if layer.read_fd < 0:
        return False
    try:
        os.close(sysio.open_by_handle(layer.read_fd, *sysio.file_handle(layer.fd, b"")))
    except OSError:
        return False
    return True


def where_tuple(found: Found) -> tuple[bytes | None, ...] | None:
    """Return `Dir.where` for a found directory: None when every layer has it at the plain place."""
    return tuple(found.where) if any(place is not None for place in found.where) else None
