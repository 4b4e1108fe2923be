"""The lower layers that both sides start from: many equal subtrees, each a small world of its own.

Lower layers may not change while mounted and mounting takes time, so a mount serves many sequences, each in a fresh subtree.
``l3`` and ``l2`` are written directly, whiteouts and opaque directories included. ``l1`` was the upper layer of a kernel
overlayfs over the two, so it holds what a real upper layer holds: redirects, metacopy files, origins, opaque directories.
Times are set to values that depend on the name alone, so that both sides agree in them.
"""

from __future__ import annotations

import os
import random
import socket
import stat
import struct
import subprocess
import zlib
from pathlib import Path

from .sides import LOWERS, OPTIONS, Side

Kinds = dict[bytes, int]

VARIANTS = 4
SPARSE_SIZE = 262144
LONG_NAME = b"L" * 255
RAW_NAME = b"raw-\xff\xfe\x80"
CAPABILITY = struct.pack("<IIIII", 0x02000001, 0x400, 0, 0, 0)
_MIX = [b"mix/" + first + second for first in (b"a", b"b", b"c") for second in (b"", b"/a", b"/b", b"/c")]


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The xattr form of a POSIX ACL out of (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


_NO_ID = 0xFFFFFFFF
ACL_U2 = acl((1, 6, _NO_ID), (2, 4, 1002), (4, 4, _NO_ID), (0x10, 6, _NO_ID), (0x20, 0, _NO_ID))
ACL_G2000 = acl((1, 7, _NO_ID), (4, 5, _NO_ID), (8, 7, 2000), (0x10, 7, _NO_ID), (0x20, 1, _NO_ID))
ACL_PLAIN = acl((1, 6, _NO_ID), (4, 4, _NO_ID), (0x20, 4, _NO_ID))
ACL_BAD = acl((1, 6, _NO_ID), (2, 4, 1002), (0x20, 0, _NO_ID))


def pattern(seed: int, length: int) -> bytes:
    """``length`` bytes in which a misplaced block shows."""
    block = bytes((seed + 7 * i) % 251 for i in range(251))
    return (block * (length // 251 + 1))[:length]


class Builder:
    """Writes one layer of one subtree; paths are relative to its root."""

    def __init__(self, root: bytes) -> None:
        self.root = root
        os.makedirs(root, exist_ok=True)

    def at(self, path: bytes) -> bytes:
        """The absolute form of ``path``."""
        return os.path.join(self.root, path) if path else self.root

    def own(self, path: bytes, mode: int | None, owner: int, group: int) -> None:
        """Set owner, then mode (chown clears suid)."""
        os.chown(self.at(path), owner, group, follow_symlinks=False)
        if mode is not None:
            os.chmod(self.at(path), mode)

    def dir(self, path: bytes, mode: int = 0o755, owner: int = 0, group: int = 0, opaque: bytes = b"") -> None:
        """A directory; ``opaque`` is the value of its overlay.opaque, if any."""
        os.makedirs(self.at(path), exist_ok=True)
        self.own(path, mode, owner, group)
        if opaque:
            self.xattr(path, b"trusted.overlay.opaque", opaque)

    def file(self, path: bytes, data: bytes = b"", mode: int = 0o644, owner: int = 0, group: int = 0) -> None:
        """A regular file, with its parents."""
        os.makedirs(os.path.dirname(self.at(path)), exist_ok=True)
        with open(self.at(path), "wb") as file:
            file.write(data)
        self.own(path, mode, owner, group)

    def sparse(self, path: bytes) -> None:
        """256 KiB with two islands of data and a hole at the end."""
        self.file(path)
        with open(self.at(path), "r+b") as file:
            for offset in (65536, 196608):
                file.seek(offset)
                file.write(pattern(offset >> 12, 4096))
            file.truncate(SPARSE_SIZE)

    def node(self, path: bytes, mode: int, device: tuple[int, int] = (0, 0)) -> None:
        """A fifo, socket or device node; a character device 0:0 is a whiteout."""
        os.makedirs(os.path.dirname(self.at(path)), exist_ok=True)
        if stat.S_ISSOCK(mode):
            with socket.socket(socket.AF_UNIX) as sock:
                os.chdir(os.path.dirname(self.at(path)))
                sock.bind(os.path.basename(path))
        else:
            os.mknod(self.at(path), mode, os.makedev(*device))
        os.chmod(self.at(path), stat.S_IMODE(mode))

    def whiteout(self, path: bytes) -> None:
        """Hide ``path`` of the layers below."""
        self.node(path, stat.S_IFCHR)

    def symlink(self, path: bytes, target: bytes, owner: int = 0) -> None:
        """A symbolic link."""
        os.makedirs(os.path.dirname(self.at(path)), exist_ok=True)
        os.symlink(target, self.at(path))
        self.own(path, None, owner, owner)

    def link(self, old: bytes, new: bytes) -> None:
        """A hard link."""
        os.makedirs(os.path.dirname(self.at(new)), exist_ok=True)
        os.link(self.at(old), self.at(new))

    def xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        """An extended attribute, of a symlink itself."""
        os.setxattr(self.at(path), name, value, follow_symlinks=False)

    def merges(self, path: bytes, below: Builder) -> bool:
        """Whether the directory ``path`` is merged with one in ``below``."""
        opaque = "trusted.overlay.opaque" in os.listxattr(self.at(path))
        return not opaque and os.path.isdir(below.at(path)) and not os.path.islink(below.at(path))


def _bottom(b: Builder) -> None:
    """Layer l3."""
    b.dir(b"d")
    for number, name in enumerate((b"f1", b"f2", b"f3")):
        b.file(b"d/" + name, pattern(number, 100 * (number + 1)))
    b.file(b"d/sub/x", pattern(10, 10))
    b.file(b"d/sub/y", pattern(11, 5000), mode=0o600)
    b.file(b"d/deep/e/f", pattern(12, 50))
    b.file(b"m/a", b"bottom a")
    b.file(b"m/b", b"bottom b", mode=0o664)
    b.file(b"m/sub/a", b"bottom sub a")
    b.file(b"m/sub/b", b"bottom sub b")
    b.dir(b"home", 0o755, 1001, 1001)
    b.file(b"home/f", pattern(13, 300), 0o640, 1001, 1001)
    b.file(b"home/x", b"#!/bin/sh\n", 0o4755, 1001, 1001)
    b.dir(b"home/dir", 0o750, 1001, 2000)
    b.file(b"home/dir/g", pattern(14, 20), 0o660, 1001, 2000)
    b.dir(b"home/locked", 0o500, 1001, 1001)
    b.file(b"home/locked/r", b"read me", 0o400, 1001, 1001)
    b.symlink(b"home/s", b"f", 1001)
    b.dir(b"tmp", 0o1777)
    b.file(b"tmp/one", b"one", 0o666, 1001, 1001)
    b.file(b"tmp/two", b"two", 0o644, 1002, 1002)
    b.dir(b"tmp/open", 0o777, 1002, 1002)
    b.file(b"tmp/open/z", b"z", 0o666, 1002, 1002)
    b.dir(b"sgid", 0o2775, 0, 2000)
    b.file(b"sgid/f", b"sgid f", 0o2755, 1001, 2000)
    b.file(b"sgid/n", b"no exec", 0o2664, 1001, 2000)
    b.dir(b"acl", 0o775, 1001, 2000)
    b.file(b"acl/f", b"acl f", 0o660, 1001, 1001)
    b.xattr(b"acl/f", b"system.posix_acl_access", ACL_U2)
    b.xattr(b"acl", b"system.posix_acl_default", ACL_G2000)
    b.file(b"links/h1", pattern(15, 700), 0o666, 1001, 1001)
    for name in (b"links/h2", b"links/h3", b"d/h4", b"tmp/h5"):
        b.link(b"links/h1", name)
    b.symlink(b"links/s1", b"h1")
    b.link(b"links/s1", b"links/s2")
    b.node(b"sp/fifo", stat.S_IFIFO | 0o644)
    b.node(b"sp/sock", stat.S_IFSOCK | 0o755)
    b.node(b"sp/null", stat.S_IFCHR | 0o666, (1, 3))
    b.node(b"sp/blk", stat.S_IFBLK | 0o660, (7, 99))
    b.symlink(b"sp/todir", b"../d")
    b.symlink(b"sp/dangling", b"nowhere")
    b.symlink(b"sp/loop", b"loop")
    b.symlink(b"sp/far", b"../m/./sub/../a")
    b.file(b"x/cap", b"with capability", 0o755)
    b.xattr(b"x/cap", b"security.capability", CAPABILITY)
    b.file(b"x/attrs", b"with xattrs", 0o666)
    b.xattr(b"x/attrs", b"user.one", b"1")
    b.xattr(b"x/attrs", b"user.empty", b"")
    b.xattr(b"x/attrs", b"trusted.two", b"2" * 300)
    b.xattr(b"x/attrs", b"trusted.overlay.overlay.esc", b"escaped")
    b.xattr(b"x", b"user.dir", b"of dir")
    b.sparse(b"x/sparse")
    b.file(b"x/big", pattern(16, 150000), 0o644, 1001, 1001)
    b.file(b"x/old", pattern(17, 9000), 0o644)
    b.file(b"x/gone", b"gone", 0o000)
    b.file(b"n/" + RAW_NAME, b"raw name")
    b.file(b"n/" + LONG_NAME, b"long name")
    b.file(b"n/sp ace\n", b"odd name")
    b.file(b"o/below", b"hidden by an opaque directory")
    b.file(b"o/both", b"hidden too")
    b.file(b"t/f2d", b"file below, directory above")
    b.file(b"t/d2f/inside", b"directory below, file above")
    b.file(b"t/d2l/inside", b"directory below, link above")
    b.file(b"w/whited", b"whited out in l2")
    b.file(b"xw/marked", b"whited out by xattr in l2")
    b.file(b"xw/seen", b"beside it")
    b.file(b"w/back", b"whited out in l2, back in l1")
    b.file(b"e/only", b"whited out in l2: the directory is empty")
    b.file(b"r/one/p", b"p")
    b.file(b"r/two/q", b"q")


def _middle(b: Builder) -> None:
    """Layer l2."""
    b.dir(b"d")
    b.file(b"d/f2", pattern(30, 222), 0o640)
    b.file(b"d/mid", pattern(31, 33))
    b.dir(b"m", 0o711)
    b.file(b"m/b", b"middle b", mode=0o600, owner=1001)
    b.file(b"m/sub/b", b"middle sub b")
    b.file(b"m/sub/c", b"middle sub c")
    b.whiteout(b"m/sub/a")
    b.dir(b"o", 0o755, opaque=b"y")
    b.file(b"o/both", b"in the opaque directory")
    b.file(b"t/f2d/inside", b"in the directory above")
    b.file(b"t/d2f", b"now a file")
    b.symlink(b"t/d2l", b"../d")
    b.whiteout(b"w/whited")
    b.dir(b"xw", opaque=b"x")
    b.file(b"xw/marked")
    b.xattr(b"xw/marked", b"trusted.overlay.whiteout", b"y")
    b.whiteout(b"w/back")
    b.whiteout(b"e/only")
    b.file(b"k/l1", pattern(32, 44), 0o666)
    b.link(b"k/l1", b"k/l2")


def _top(b: Builder) -> None:
    """Layer l1, through a kernel overlayfs mounted over the other two."""
    os.rename(b.at(b"r/one"), b.at(b"r/uno"))
    os.rename(b.at(b"r/two"), b.at(b"m/due"))
    os.rename(b.at(b"m/sub"), b.at(b"m/moved"))
    b.file(b"m/moved/d", b"top d")
    os.chmod(b.at(b"x/old"), 0o755)
    os.rename(b.at(b"x/old"), b.at(b"x/renamed"))
    b.file(b"m/c", b"top c")
    b.file(b"w/back", b"back again")
    os.unlink(b.at(b"d/f3"))
    os.chmod(b.at(b"links/h3"), 0o646)
    os.unlink(b.at(b"links/h2"))
    os.unlink(b.at(b"t/f2d/inside"))
    os.rmdir(b.at(b"t/f2d"))
    b.file(b"t/f2d/again", b"in an opaque directory made by overlayfs")
    b.file(b"k/top", b"top", 0o644, 1002)


def _mix(b: Builder, below: Builder | None, rng: random.Random) -> None:
    """The names below ``mix`` in one layer, each of a random kind: what merges with what.

    A whiteout is only put where overlayfs would make one, into a directory that is merged with one in the layer ``below``.
    """
    b.dir(b"mix")
    for path in _MIX:
        parent = os.path.dirname(path)
        if rng.random() < 0.45 or not os.path.isdir(b.at(parent)) or os.path.islink(b.at(parent)):
            continue
        kind = rng.choice(("file", "dir", "dir", "dir", "opaque", "whiteout", "symlink", "fifo"))
        owner = rng.choice((0, 0, 1001, 1002))
        if kind == "file":
            b.file(path, pattern(rng.randrange(200), rng.randrange(200)), rng.choice((0o644, 0o666)), owner)
        elif kind == "dir" or (kind == "opaque" and below is None):
            b.dir(path, rng.choice((0o755, 0o777, 0o1777)), owner)
        elif kind == "opaque":
            b.dir(path, 0o755, owner, opaque=b"y")
        elif kind == "whiteout" and below and b.merges(parent, below):
            b.whiteout(path)
        elif kind == "symlink":
            b.symlink(path, rng.choice((b"a", b"../d", b"../c/a")), owner)
        elif kind == "fifo":
            b.node(path, stat.S_IFIFO | 0o644)


def subtree(number: int) -> str:
    """Name of a subtree; its variant is ``number % VARIANTS``."""
    return f"s{number:04d}"


def listing(root: bytes) -> Kinds:
    """Path relative to ``root`` → file type, of everything below it."""
    found: Kinds = {}
    for directory, directories, files in os.walk(root):
        for name in directories + files:
            path = os.path.join(directory, name)
            found[os.path.relpath(path, root)] = stat.S_IFMT(os.lstat(path).st_mode)
    return found


def build(side: Side, count: int) -> list[Kinds]:
    """Write ``count`` subtrees into the lower layers of ``side``; the merged listing of each variant."""
    for number in range(count):
        name, variant = subtree(number), number % VARIANTS
        bottom, middle = (Builder(side.path_of(layer, name)) for layer in ("l3", "l2"))
        _bottom(bottom)
        _mix(bottom, None, random.Random(f"bottom {variant}"))
        _middle(middle)
        _mix(middle, bottom, random.Random(f"middle {variant}"))
    listings = _build_top(side, count)
    os.chdir("/")
    for layer in LOWERS:
        _set_times(side.lower(layer))
    return listings


def _build_top(side: Side, count: int) -> list[Kinds]:
    """Mount kernel overlayfs with l1 as its upper layer, and let ``_top`` change things; what is there then, by variant."""
    lowers = [side.lower(name) for name in ("l2", "l3")]
    work = side.root / "l1/work"
    work.mkdir()
    layers = f"lowerdir={lowers[0]}:{lowers[1]},upperdir={side.lower('l1')},workdir={work},{OPTIONS}"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", str(side.merged)], check=True)
    try:
        for number in range(count):
            _top(Builder(side.path_of("merged", subtree(number))))
        return [listing(side.path_of("merged", subtree(variant))) for variant in range(VARIANTS)]
    finally:
        os.chdir("/")
        subprocess.run(["umount", str(side.merged)], check=True)
        subprocess.run(["rm", "-rf", str(work)], check=True)


def _set_times(layer: Path) -> None:
    """Give everything in ``layer`` times in the past, made of its (last) path within the layer."""
    root = os.fsencode(layer)
    for directory, directories, files in os.walk(root):
        directories.sort()
        files.sort()
        for path in (directory, *(os.path.join(directory, name) for name in directories + files)):
            seconds = 1_000_000_000 + zlib.crc32(os.path.relpath(path, root)) % 100_000_000
            os.utime(path, ns=(seconds * 10**9 + 111, seconds * 10**9 + 222), follow_symlinks=False)


def directories() -> list[bytes]:
    """Directories of the fixture that a sequence can dwell in."""
    return rb"d d/sub d/deep m m/moved m/due home home/dir tmp tmp/open sgid acl links sp x n o t t/f2d w e k r mix mix/a".split()


def paths() -> list[bytes]:
    """Every path of the fixture worth doing something to, sorted; the root is ``b"."``."""
    fixed = rb"""
        . d d/f1 d/f2 d/mid d/sub d/sub/x d/sub/y d/deep d/deep/e d/deep/e/f d/h4 d/f3 m m/a m/b m/c m/sub m/moved
        m/moved/b m/moved/c m/moved/d m/due m/due/q home home/f home/x home/dir home/dir/g home/locked home/locked/r home/s
        tmp tmp/one tmp/two tmp/open tmp/open/z tmp/h5 sgid sgid/f sgid/n acl acl/f links links/h1 links/h2 links/h3
        links/s1 links/s2 sp sp/fifo sp/sock sp/null sp/blk sp/todir sp/todir/f1 sp/dangling sp/loop sp/far x x/cap x/attrs
        x/sparse x/big x/renamed x/old x/gone n o o/below o/both t t/f2d t/f2d/again t/f2d/inside t/d2f t/d2l
        w w/whited w/back e e/only k k/l1 k/l2 k/top r r/one r/uno r/uno/p mix""".split()
    odd = [b"n/" + RAW_NAME, b"n/" + LONG_NAME, b"n/sp ace\n"]
    return fixed + odd + _MIX
