"""Renaming, with and without flags."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from tests.mount.posix.table import behaviour, fails
from tests.support.layers import FIFO, Symlink
from tests.support.raw import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, renameat2


@behaviour({"f": b"data"})
def rename_file(d: Path) -> None:
    inode = (d / "f").stat().st_ino
    os.rename(d / "f", d / "g")
    assert (d / "g").read_bytes() == b"data"
    assert (d / "g").stat().st_ino == inode
    assert os.listdir(d) == ["g"]
    with fails(errno.ENOENT):
        (d / "f").stat()


@behaviour({"f": b"data", "g": b"victim"})
def rename_over_a_file(d: Path) -> None:
    os.rename(d / "f", d / "g")
    assert (d / "g").read_bytes() == b"data"
    assert os.listdir(d) == ["g"]


@behaviour({"a": {"f": b"data"}, "b": {}})
def rename_into_another_directory(d: Path) -> None:
    os.rename(d / "a" / "f", d / "b" / "g")
    assert os.listdir(d / "a") == []
    assert (d / "b" / "g").read_bytes() == b"data"


@behaviour({"d": {"x": b"1", "sub": {"y": b"2"}}})
def rename_directory(d: Path) -> None:
    inode = (d / "d").stat().st_ino
    os.rename(d / "d", d / "e")
    assert os.listdir(d) == ["e"]
    assert sorted(os.listdir(d / "e")) == ["sub", "x"]
    assert (d / "e" / "sub" / "y").read_bytes() == b"2"
    assert (d / "e").stat().st_ino == inode
    with fails(errno.ENOENT):
        (d / "d").stat()


@behaviour({"d": {"x": b"1", "sub": {"y": b"2"}}})
def rename_directory_then_change_it(d: Path) -> None:
    os.rename(d / "d", d / "e")
    (d / "e" / "x").write_bytes(b"changed")
    os.unlink(d / "e" / "sub" / "y")
    (d / "e" / "sub" / "z").write_bytes(b"new")
    os.rename(d / "e" / "sub", d / "sub")
    assert os.listdir(d / "e") == ["x"]
    assert os.listdir(d / "sub") == ["z"]
    assert (d / "e" / "x").read_bytes() == b"changed"


@behaviour({"d": {"x": b"1"}})
def rename_directory_there_and_back(d: Path) -> None:
    os.rename(d / "d", d / "e")
    os.rename(d / "e", d / "d")
    assert os.listdir(d) == ["d"]
    assert (d / "d" / "x").read_bytes() == b"1"


@behaviour({"d": {"x": b"1"}})
def rename_directory_and_make_its_old_name_anew(d: Path) -> None:
    os.rename(d / "d", d / "e")
    os.mkdir(d / "d")
    assert os.listdir(d / "d") == []
    (d / "d" / "x").write_bytes(b"other")
    assert (d / "e" / "x").read_bytes() == b"1"
    assert (d / "d" / "x").read_bytes() == b"other"


@behaviour({"d": {"x": b"1"}, "e": {}})
def rename_directory_over_an_empty_one(d: Path) -> None:
    os.rename(d / "d", d / "e")
    assert os.listdir(d) == ["e"]
    assert os.listdir(d / "e") == ["x"]


@behaviour({"d": {"x": b"1"}, "e": {"gone": b""}})
def rename_directory_over_an_emptied_one(d: Path) -> None:
    os.unlink(d / "e" / "gone")
    os.rename(d / "d", d / "e")
    assert os.listdir(d / "e") == ["x"]
    assert (d / "e" / "x").read_bytes() == b"1"


@behaviour({"a": {"b": {"c": {"x": b"deep"}}}, "t": {}})
def rename_directory_between_parents_twice(d: Path) -> None:
    os.rename(d / "a" / "b", d / "t" / "b2")
    os.rename(d / "t" / "b2" / "c", d / "c3")
    assert (d / "c3" / "x").read_bytes() == b"deep"
    assert os.listdir(d / "t" / "b2") == []
    assert os.listdir(d / "a") == []


@behaviour({"f": b"", "d": {"x": b""}, "e": {}, "full": {"y": b""}})
def rename_errors(d: Path) -> None:
    with fails(errno.ENOENT):
        os.rename(d / "missing", d / "z")
    with fails(errno.EISDIR):
        os.rename(d / "f", d / "e")
    with fails(errno.ENOTDIR):
        os.rename(d / "d", d / "f")
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        os.rename(d / "d", d / "full")
    with fails(errno.EINVAL):
        os.rename(d / "d", d / "d" / "inside")
    with fails(errno.ENOENT):
        os.rename(d / "f", d / "missing" / "f")
    with fails(errno.ENOTDIR):
        os.rename(d / "f", d / "f" / "f")
    with fails(errno.ENOTEMPTY, errno.EEXIST, errno.EINVAL):
        os.rename(d / "d" / "x", d)


@behaviour({"f": b"1"})
def rename_to_itself(d: Path) -> None:
    os.rename(d / "f", d / "f")
    assert (d / "f").read_bytes() == b"1"
    assert os.listdir(d) == ["f"]


@behaviour({"f": b"1", "g": b"2"})
def rename_noreplace(d: Path) -> None:
    with fails(errno.EEXIST):
        renameat2(d / "f", d / "g", RENAME_NOREPLACE)
    assert ((d / "f").read_bytes(), (d / "g").read_bytes()) == (b"1", b"2")
    renameat2(d / "f", d / "h", RENAME_NOREPLACE)
    assert sorted(os.listdir(d)) == ["g", "h"]


@behaviour({"f": b"1", "g": b"2"})
def rename_noreplace_to_a_removed_name(d: Path) -> None:
    os.unlink(d / "g")
    renameat2(d / "f", d / "g", RENAME_NOREPLACE)
    assert (d / "g").read_bytes() == b"1"
    assert os.listdir(d) == ["g"]


@behaviour({"f": b"1", "g": b"2"})
def exchange_files(d: Path) -> None:
    inodes = (d / "f").stat().st_ino, (d / "g").stat().st_ino
    renameat2(d / "f", d / "g", RENAME_EXCHANGE)
    assert ((d / "f").read_bytes(), (d / "g").read_bytes()) == (b"2", b"1")
    assert ((d / "g").stat().st_ino, (d / "f").stat().st_ino) == inodes


@behaviour({"d": {"x": b"1"}, "e": {"y": b"2"}})
def exchange_directories(d: Path) -> None:
    renameat2(d / "d", d / "e", RENAME_EXCHANGE)
    assert os.listdir(d / "d") == ["y"]
    assert os.listdir(d / "e") == ["x"]
    assert (d / "e" / "x").read_bytes() == b"1"
    (d / "e" / "new").touch()
    assert sorted(os.listdir(d / "e")) == ["new", "x"]


@behaviour({"f": b"1", "d": {"x": b"2"}})
def exchange_file_and_directory(d: Path) -> None:
    renameat2(d / "f", d / "d", RENAME_EXCHANGE)
    assert os.listdir(d / "f") == ["x"]
    assert (d / "d").read_bytes() == b"1"
    assert {entry.name: entry.is_dir() for entry in os.scandir(d)} == {"f": True, "d": False}


@behaviour({"p": {"d": {"x": b"1"}}, "q": {"e": {"y": b"2"}}})
def exchange_across_directories(d: Path) -> None:
    renameat2(d / "p" / "d", d / "q" / "e", RENAME_EXCHANGE)
    assert os.listdir(d / "p" / "d") == ["y"]
    assert os.listdir(d / "q" / "e") == ["x"]


@behaviour({"f": b"1", "d": {"e": {}}})
def exchange_errors(d: Path) -> None:
    with fails(errno.ENOENT):
        renameat2(d / "f", d / "missing", RENAME_EXCHANGE)
    with fails(errno.EINVAL):
        renameat2(d / "f", d / "g", RENAME_EXCHANGE | RENAME_NOREPLACE)
    with fails(errno.EINVAL):
        renameat2(d / "f", d / "g", 64)
    with fails(errno.EINVAL):
        renameat2(d / "d", d / "d" / "e", RENAME_EXCHANGE)


# overlayfs itself refuses the flag (EINVAL); FUSE passes it on.
@behaviour({"f": b"1"}, privileged=True, unlike="overlay-lower overlay-upper overlay-touched")
def rename_whiteout_leaves_the_name_free_or_a_device(d: Path) -> None:
    # On a union the whiteout left behind is the union's own, so nothing shows; below, it is a 0:0 device.
    renameat2(d / "f", d / "g", RENAME_WHITEOUT)
    assert (d / "g").read_bytes() == b"1"
    try:
        status = os.lstat(d / "f")
    except FileNotFoundError:
        return
    assert stat.S_ISCHR(status.st_mode)
    assert status.st_rdev == 0


@behaviour({"l": Symlink("nowhere"), "p": FIFO})
def rename_symlink_and_fifo(d: Path) -> None:
    os.rename(d / "l", d / "l2")
    os.rename(d / "p", d / "p2")
    assert os.readlink(d / "l2") == "nowhere"
    assert stat.S_ISFIFO((d / "p2").stat().st_mode)
    assert sorted(os.listdir(d)) == ["l2", "p2"]


@behaviour({"d": {"x": b""}})
def open_directory_follows_its_rename(d: Path) -> None:
    descriptor = os.open(d / "d", os.O_RDONLY | os.O_DIRECTORY)
    os.rename(d / "d", d / "e")
    os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    assert sorted(os.listdir(descriptor)) == ["new", "x"]
    assert sorted(os.listdir(d / "e")) == ["new", "x"]
    os.close(descriptor)


@behaviour({"a": {"x": b"1"}, "b": {"y": b"2"}})
def rename_chain_of_directories(d: Path) -> None:
    os.rename(d / "a", d / "c")
    os.rename(d / "b", d / "a")
    os.rename(d / "c", d / "b")
    assert os.listdir(d / "a") == ["y"]
    assert os.listdir(d / "b") == ["x"]
    assert (d / "a" / "y").read_bytes() == b"2"
