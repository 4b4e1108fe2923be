"""Trees that hold one of everything a file system can, and their comparison to the last detail."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.layers import capability
from tests.support.snapshot import assert_same, snapshot

NS = 1_500_000_000_123_456_789


def rich_tree(root: Path, *, sockets: bool = True, weird_names: bool = True) -> Path:
    """Build in `root` one of everything: kinds, owners, modes, times, attributes, ACLs, links, holes, names."""
    root.mkdir(parents=True, exist_ok=True)
    plain = root / "plain"
    plain.write_bytes(os.urandom(100_000))
    (root / "empty").touch()
    (root / "odd-size").write_bytes(b"x" * 513)
    suid = root / "suid"
    suid.write_bytes(b"#!/bin/true\n")
    os.chown(suid, 1234, 4321)
    os.chmod(suid, 0o6755)
    capable = root / "capable"
    capable.write_bytes(b"elf")
    os.setxattr(capable, "security.capability", capability())
    os.chown(root / "odd-size", 3_000_000_000, 2_999_999_999)
    os.setxattr(plain, "user.text", b"value")
    os.setxattr(plain, "user.a=b%c%3Dd", b"x=y\nz\0\xff")
    os.setxattr(plain, "user.empty", b"")
    os.setxattr(plain, "trusted.secret", b"\0=%\n\xff")
    subprocess.run(["setfacl", "-m", "u:daemon:rw,u:54321:r,g:12:-", str(plain)], check=True)
    shared = root / "shared"
    shared.mkdir()
    subprocess.run(["setfacl", "-m", "g:54321:rwx", "-d", "-m", "u:54321:rwx,g:12:rx", str(shared)], check=True)
    (shared / "inherits").write_bytes(b"acl")
    os.chmod(shared, 0o2771)
    _links(root)
    _holes(root)
    _specials(root, sockets=sockets)
    _names(root, weird=weird_names)
    closed = root / "closed" / "inner"
    closed.mkdir(parents=True)
    (closed / "file").write_bytes(b"in a read-only directory")
    os.chmod(closed, 0o555)
    os.chmod(root / "closed", 0o500)
    _times(root)
    return root


def _links(root: Path) -> None:
    (root / "links").mkdir()
    os.link(root / "plain", root / "links" / "plain-too")
    os.link(root / "plain", root / "a-first-name")
    (root / "links" / "to").symlink_to("../plain")
    (root / "links" / "out").symlink_to("/etc/passwd")
    (root / "links" / "up").symlink_to("../../../../..")
    (root / "links" / "loop").symlink_to("loop")
    (root / "links" / "long").symlink_to("x" * 150 + "/" + "é" * 100)
    os.link(root / "links" / "to", root / "links" / "to-too", follow_symlinks=False)
    os.lchown(root / "links" / "out", 77, 88)


def _holes(root: Path) -> None:
    (root / "holes").mkdir()
    for name, size, pieces in (
        ("middle", 3 << 20, (0, 2 << 20)),
        ("start", 1 << 20, (512 << 10,)),
        ("all", 5_000_001, ()),
        ("end", (1 << 20) + 5, (0,)),
        ("many", 4 << 20, tuple(range(0, 4 << 20, 64 << 10))),
    ):
        with open(root / "holes" / name, "wb") as file:
            for at in pieces:
                os.pwrite(file.fileno(), b"data" * 1024, at)
            file.truncate(size)


def _specials(root: Path, *, sockets: bool) -> None:
    (root / "dev").mkdir()
    os.mknod(root / "dev" / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "dev" / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    os.mknod(root / "dev" / "whiteout", stat.S_IFCHR | 0o600, 0)
    os.mkfifo(root / "dev" / "fifo", 0o640)
    os.chmod(root / "dev" / "null", 0o666)
    os.setxattr(root / "dev" / "fifo", "trusted.on-a-fifo", b"1")
    os.setxattr(root / "links" / "to", "trusted.on-a-link", b"1", follow_symlinks=False)
    if sockets:
        here = os.getcwd()
        os.chdir(root / "dev")
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind("socket")
        finally:
            os.chdir(here)


def _names(root: Path, *, weird: bool) -> None:
    names = [b"sp ace", b"-dash", b"n" * 255, "grün-日本".encode(), b"*?[x]", b"back\\slash", b"#hash", b"%41", b"a=b"]
    if weird:
        names += [b"new\nline", b"\xff\xfe no utf-8 \x80", b"\x01\x02\x7f", b"\\101"]
    base = os.fsencode(root) + b"/names"
    os.mkdir(base)
    for name in names:
        os.mkdir(base + b"/" + name)
        with open(base + b"/" + name + b"/" + name, "wb") as file:
            file.write(name)
    deep = root / "deep"
    for _ in range(6):
        deep = deep / ("d" * 90)
    deep.mkdir(parents=True)
    (deep / "leaf").write_bytes(b"leaf")


def _times(root: Path) -> None:
    for number, path in enumerate(sorted(_below(root), key=lambda path: -len(path))):
        os.utime(path, ns=(NS + number * 7, NS + number * 1_000_000_007), follow_symlinks=False)
    os.utime(root / "empty", ns=(-1_500_000_000, -2_000_000_001))
    os.utime(root / "odd-size", ns=(0, 10_000_000_000 * 1_000_000_000 + 1))


def _below(root: Path) -> Iterator[bytes]:
    yield os.fsencode(root)
    for where, directories, files in os.walk(os.fsencode(root)):
        for name in directories + files:
            yield os.path.join(where, name)


def directory_times(root: Path) -> dict[bytes, int]:
    """Modification times of all directories, which snapshots leave out."""
    base = os.fsencode(root)
    found = {base: os.stat(base).st_mtime_ns}
    for where, directories, _ in os.walk(base):
        for name in directories:
            path = os.path.join(where, name)
            found[path] = os.lstat(path).st_mtime_ns
    return {path.removeprefix(base): when for path, when in found.items()}


def access_times(root: Path) -> dict[bytes, int]:
    """Access times of everything; to be taken before anything is read."""
    base = os.fsencode(root)
    return {path.removeprefix(base): os.lstat(path).st_atime_ns for path in _below(root)}


def extents(path: Path) -> list[tuple[int, int]]:
    """Where a file has data: start and end of each piece."""
    found: list[tuple[int, int]] = []
    with open(path, "rb") as file:
        at, size = 0, os.fstat(file.fileno()).st_size
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, at))
    return found


def assert_equal(left: Path, right: Path) -> None:
    """Fail where two trees differ: owners, modes, times in ns, attributes, ACLs, link groups, content, holes."""
    # Before anything is read: what xfs allocated in advance in a hole counts as data once it is in the page cache.
    for path in (left / "holes").glob("*"):
        assert (path.name, extents(path)) == (path.name, extents(right / "holes" / path.name))
    # xfs shows root its ACLs a second time, as it stores them.
    hide = ("trusted.SGI_ACL_",)
    assert_same(snapshot(left, hide=hide), snapshot(right, hide=hide))
    assert directory_times(left) == directory_times(right)
