"""A whole tree as a comparable dictionary: the merged one, or an upper layer as it lies on disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from . import syscalls
from .driver import View, digest
from .operations import Fields, Tree

Handles = dict[tuple[int, bytes], str]

_OVERLAY = "trusted.overlay."
_WHOLE = 1 << 20


def _walk(root: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """(path relative to ``root``, status) of everything in it, in sorted order."""
    pending = [b""]
    while pending:
        relative = pending.pop()
        path = os.path.join(root, relative) if relative else root
        status = os.lstat(path)
        yield relative or b".", status
        if stat.S_ISDIR(status.st_mode):
            pending += sorted((os.path.join(relative, name) for name in os.listdir(path)), reverse=True)


def _content(path: bytes, status: os.stat_result) -> object:
    """What an inode holds: bytes of a file, target of a symlink."""
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(path)
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            return digest(file.read(_WHOLE))
    return None


def _xattrs(path: bytes) -> dict[str, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    assert len(names) == len(set(names)), f"{path!r} lists an xattr twice: {names}"
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


def _entries(path: bytes) -> object:
    """What is wrong in a listing: each entry's type and inode number must be those that lstat tells."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    wrong: list[tuple[bytes, str]] = []
    names: list[bytes] = []
    try:
        for entry in syscalls.all_dents(fd):
            names.append(entry.name)
            if entry.name == b"..":
                continue  # overlayfs itself tells the lower directory's number in some
            status = os.lstat(entry.name, dir_fd=fd)
            if entry.ino != status.st_ino:
                wrong.append((entry.name, "d_ino"))
            if entry.kind != stat.S_IFMT(status.st_mode) >> 12:
                wrong.append((entry.name, f"d_type {entry.kind}"))
    finally:
        os.close(fd)
    return sorted(wrong), len(names) - len(set(names)), b"." in names and b".." in names


def merged(root: bytes, view: View) -> Tree:
    """The tree of a mount, with hard link groups, and each listing checked against lstat."""
    tree: Tree = {}
    first: dict[int, bytes] = {}
    for relative, status in _walk(root):
        path = os.path.join(root, relative)
        fields = view.fields(status)
        fields["same file as"] = first.setdefault(status.st_ino, relative)
        fields["content"] = _content(path, status)
        fields["xattrs"] = _xattrs(path)
        if stat.S_ISDIR(status.st_mode):
            fields["listing"] = _entries(path)
        tree[relative] = fields
    return tree


def handles(layers: dict[str, bytes]) -> Handles:
    """File handle of everything in the subtrees ``layers`` (name: path) → a name for it that both sides share."""
    found: Handles = {}
    for layer, root in layers.items():
        if os.path.lexists(root):
            for relative, _ in _walk(root):
                found.setdefault(syscalls.file_handle(os.path.join(root, relative)), f"{layer}:{os.fsdecode(relative)}")
    return found


def _origin(value: bytes, known: Handles) -> object:
    """What a stored overlayfs file handle (struct ovl_fb) means, without its numbers."""
    if len(value) < 21:
        return value
    version, magic, length, flags, kind = value[:5]
    name = known.get((kind, value[21:]), "unknown") if length == len(value) else "wrong length"
    return version, hex(magic), flags, name, "no uuid" if value[5:21] == bytes(16) else "uuid"


def _disk_xattrs(path: bytes, known: Handles) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in _xattrs(path).items():
        bare = name.removeprefix(_OVERLAY)
        if bare in ("origin", "upper"):
            found[name] = _origin(value, known)
        elif bare == "uuid":
            found[name] = len(value)
        else:
            found[name] = value
    return found


def _extents(path: bytes) -> list[tuple[int, int]]:
    """Where the data of a sparse file lies."""
    fd = os.open(path, os.O_RDONLY)
    extents, position, size = [], 0, os.fstat(fd).st_size
    try:
        while position < size:
            start = os.lseek(fd, position, os.SEEK_DATA)
            position = os.lseek(fd, start, os.SEEK_HOLE)
            extents.append((start, position))
    except OSError:
        pass
    finally:
        os.close(fd)
    return extents


def is_whiteout(status: os.stat_result) -> bool:
    """Whether ``status`` is that of a character device 0:0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def on_disk(root: bytes, view: View, known: Handles, indexed: dict[int, str]) -> Tree:
    """An upper layer's subtree as it is stored.

    Arguments: ``known`` gives meaning to the file handles in it, ``indexed`` are the inodes that the index has, with the
    lower file that each stands for.
    """
    tree: Tree = {}
    first: dict[int, bytes] = {}
    if not os.path.lexists(root):
        return tree
    for relative, status in _walk(root):
        path = os.path.join(root, relative)
        if is_whiteout(status):
            tree[relative] = {"type": "whiteout", "xattrs": _disk_xattrs(path, known)}
            continue
        tree[relative] = _stored(path, status, view, known)
        tree[relative]["same file as"] = indexed.get(status.st_ino) or first.setdefault(status.st_ino, relative)
    return tree


def _stored(path: bytes, status: os.stat_result, view: View, known: Handles) -> Fields:
    """One object of an upper layer or an index."""
    fields = view.fields(status)
    fields["content"] = _content(path, status)
    fields["xattrs"] = _disk_xattrs(path, known)
    if stat.S_ISREG(status.st_mode) and view.count_blocks:
        fields["extents"] = _extents(path)
    return fields


def index(work: bytes, view: View, known: Handles) -> tuple[Tree, dict[int, str]]:
    """The index directory of a work directory, entries named by the lower file that they stand for; and their inodes.

    Entries of other subtrees, whose handles ``known`` lacks, are left out.
    """
    root, tree, inodes = os.path.join(work, b"index"), Tree(), dict[int, str]()
    for name in os.listdir(root) if os.path.isdir(root) else ():
        path = os.path.join(root, name)
        if name.startswith(b"#"):
            continue
        try:
            value = bytes.fromhex(os.fsdecode(name))
        except ValueError:
            tree[name] = {"type": "not an index entry"}
            continue
        origin = known.get((value[4], value[21:])) if len(value) > 21 else "malformed"
        if origin:
            status = os.lstat(path)
            inodes[status.st_ino] = origin
            tree[os.fsencode(origin)] = (
                {"type": "whiteout"} if is_whiteout(status) else _stored(path, status, view, known)
            )
    return tree, inodes


def leftovers(work: bytes) -> set[bytes]:
    """Temporary objects in the work directory, but for the whiteout that overlayfs keeps there to link from.

    With an index, overlayfs builds in the index directory; names of temporary objects begin with ``#``.
    """
    found = set[bytes]()
    for place in (b"work", b"index"):
        root = os.path.join(work, place)
        for name in os.listdir(root) if os.path.isdir(root) else ():
            status = os.lstat(os.path.join(root, name))
            if (place == b"work" or name.startswith(b"#")) and not is_whiteout(status):
                found.add(os.path.join(place, name))
    return found
