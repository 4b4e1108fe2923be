"""Making, listing and removing directories."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from tests.mount.posix.table import behaviour, fails
from tests.support.layers import FIFO, Symlink
from tests.support.raw import DirStream

MANY = {f"name-{number:04}": b"" for number in range(700)}


@behaviour({"d": {"a": b"", "b": b"", "sub": {}}})
def listing_shows_each_name_once(d: Path) -> None:
    with DirStream(d / "d") as stream:
        names = [name for name, _, _ in stream]
    assert sorted(names) == [b".", b"..", b"a", b"b", b"sub"]


@behaviour({"f": b"", "d": {}, "l": Symlink("f"), "p": FIFO})
def listing_types_and_inodes_are_those_of_stat(d: Path) -> None:
    with DirStream(d) as stream:
        found = {os.fsdecode(name): (inode, kind) for name, inode, kind in stream}
    for name in ("f", "d", "l", "p"):
        status = os.lstat(d / name)
        assert found[name] == (status.st_ino, stat.S_IFMT(status.st_mode) >> 12)
    assert found["."] == (d.stat().st_ino, 4)


@behaviour({"d": dict(MANY)})
def listing_of_many_names_is_complete(d: Path) -> None:
    names = os.listdir(d / "d")
    assert len(names) == len(set(names)) == 700
    assert set(names) == set(MANY)


@behaviour({"d": dict(MANY)})
def telldir_and_seekdir_go_back(d: Path) -> None:
    with DirStream(d / "d") as stream:
        seen: list[tuple[int, bytes]] = []
        while True:
            position = stream.tell()
            entry = stream.read()
            if entry is None:
                break
            seen.append((position, entry[0]))
        for position, name in seen[::37]:
            stream.seek(position)
            again = stream.read()
            assert again is not None
            assert again[0] == name
        stream.rewind()
        assert sum(1 for _ in stream) == 702


@behaviour({"d": dict(MANY)})
def listing_goes_on_while_names_are_removed(d: Path) -> None:
    with DirStream(d / "d") as stream:
        seen: list[bytes] = []
        for name, _, _ in stream:
            if name not in (b".", b".."):
                seen.append(name)
                os.unlink(os.fsencode(d / "d") + b"/" + name)
    assert len(seen) == len(set(seen)) == 700
    assert os.listdir(d / "d") == []
    os.rmdir(d / "d")


@behaviour({"d": dict(MANY)})
def listing_goes_on_while_names_are_added(d: Path) -> None:
    with DirStream(d / "d") as stream:
        seen: list[bytes] = []
        for number, (name, _, _) in enumerate(stream):
            seen.append(name)
            if number % 7 == 0 and number < 700:
                (d / "d" / f"added-{number}").touch()
    old = [name for name in seen if name.startswith(b"name-")]
    assert len(old) == len(set(old)) == 700
    assert len(seen) == len(set(seen))


@behaviour({"d": dict(MANY)})
def seekdir_holds_while_others_add_and_remove(d: Path) -> None:
    with DirStream(d / "d") as stream:
        for _ in range(350):
            stream.read()
        position = stream.tell()
        rest = {name for name, _, _ in stream}
        for number in range(50):
            (d / "d" / f"added-{number}").touch()
        victims = sorted(rest)[:20]
        for name in victims:
            os.unlink(os.fsencode(d / "d") + b"/" + name)
        stream.seek(position)
        again = [name for name, _, _ in stream]
    assert len(again) == len(set(again))
    assert rest - set(victims) <= set(again)


@behaviour({"d": {"a": b"", "b": b""}})
def rewinddir_sees_what_changed(d: Path) -> None:
    with DirStream(d / "d") as stream:
        assert {name for name, _, _ in stream} == {b".", b"..", b"a", b"b"}
        (d / "d" / "c").touch()
        os.unlink(d / "d" / "a")
        stream.rewind()
        assert {name for name, _, _ in stream} == {b".", b"..", b"b", b"c"}


@behaviour({"d": {}})
def a_second_listing_sees_changes(d: Path) -> None:
    assert os.listdir(d / "d") == []
    (d / "d" / "x").touch()
    assert os.listdir(d / "d") == ["x"]
    os.rename(d / "d" / "x", d / "d" / "y")
    assert os.listdir(d / "d") == ["y"]
    os.unlink(d / "d" / "y")
    assert os.listdir(d / "d") == []


@behaviour()
def mkdir_makes_an_empty_directory(d: Path) -> None:
    os.mkdir(d / "new", 0o750)
    status = (d / "new").stat()
    assert stat.S_ISDIR(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o750
    assert os.listdir(d / "new") == []
    assert (d / "new").stat().st_nlink in (1, 2)


@behaviour({"f": b"", "d": {"x": b""}})
def mkdir_errors(d: Path) -> None:
    with fails(errno.EEXIST):
        os.mkdir(d / "f")
    with fails(errno.EEXIST):
        os.mkdir(d / "d")
    with fails(errno.ENOENT):
        os.mkdir(d / "missing" / "x")
    with fails(errno.ENOTDIR):
        os.mkdir(d / "f" / "x")


@behaviour({"empty": {}, "full": {"x": b""}, "f": b""})
def rmdir_and_its_errors(d: Path) -> None:
    with fails(errno.ENOTEMPTY):
        os.rmdir(d / "full")
    with fails(errno.ENOTDIR):
        os.rmdir(d / "f")
    with fails(errno.ENOENT):
        os.rmdir(d / "missing")
    with fails(errno.EISDIR):
        os.unlink(d / "empty")
    os.rmdir(d / "empty")
    with fails(errno.ENOENT):
        (d / "empty").stat()
    os.unlink(d / "full" / "x")
    os.rmdir(d / "full")
    assert os.listdir(d) == ["f"]


@behaviour({"d": {"x": b"old"}})
def directory_removed_and_made_anew_is_empty(d: Path) -> None:
    os.unlink(d / "d" / "x")
    os.rmdir(d / "d")
    os.mkdir(d / "d")
    assert os.listdir(d / "d") == []
    with fails(errno.ENOENT):
        (d / "d" / "x").stat()
    (d / "d" / "x").write_bytes(b"new")
    assert (d / "d" / "x").read_bytes() == b"new"


@behaviour({"d": {"x": b"old"}})
def file_replaced_by_a_directory_and_back(d: Path) -> None:
    os.unlink(d / "d" / "x")
    os.mkdir(d / "d" / "x")
    (d / "d" / "x" / "inner").touch()
    assert os.listdir(d / "d" / "x") == ["inner"]
    os.unlink(d / "d" / "x" / "inner")
    os.rmdir(d / "d" / "x")
    (d / "d" / "x").write_bytes(b"file again")
    assert (d / "d" / "x").read_bytes() == b"file again"
    assert os.listdir(d / "d") == ["x"]


@behaviour({"d": {"x": b""}})
def open_directory_lives_on_after_rmdir(d: Path) -> None:
    descriptor = os.open(d / "d", os.O_RDONLY | os.O_DIRECTORY)
    os.unlink(d / "d" / "x")
    os.rmdir(d / "d")
    assert os.listdir(descriptor) == []
    assert stat.S_ISDIR(os.fstat(descriptor).st_mode)
    with fails(errno.ENOENT):
        os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)


@behaviour({"d": {"e": {"f": {"x": b"deep"}}}})
def removal_of_a_whole_tree(d: Path) -> None:
    import shutil

    shutil.rmtree(d / "d")
    assert os.listdir(d) == []


@behaviour({"d": {"sub": {}, "x": b""}})
def dot_and_dotdot(d: Path) -> None:
    assert os.stat(d / "d" / "sub" / ".." / "x").st_ino == os.stat(d / "d" / "x").st_ino
    assert os.stat(d / "d" / ".").st_ino == os.stat(d / "d").st_ino
    with fails(errno.EINVAL, errno.ENOTEMPTY):
        os.rmdir(str(d / "d") + "/.")
    with fails(errno.ENOTEMPTY):
        os.rmdir(d / "d" / "sub" / "..")


@behaviour({"d": {}})
def trailing_slashes(d: Path) -> None:
    os.mkdir(str(d / "made") + "/")
    assert stat.S_ISDIR(os.stat(str(d / "made") + "/").st_mode)
    (d / "f").touch()
    with fails(errno.ENOTDIR):
        os.stat(str(d / "f") + "/")
    with fails(errno.EISDIR):
        os.open(str(d / "new") + "/", os.O_CREAT | os.O_WRONLY)


@behaviour({"d": {"x": b""}})
def directory_times_change_with_its_entries(d: Path) -> None:
    os.utime(d / "d", (1, 1))
    assert (d / "d").stat().st_mtime == 1
    (d / "d" / "new").touch()
    assert (d / "d").stat().st_mtime > 1
    os.utime(d / "d", (1, 1))
    os.unlink(d / "d" / "x")
    assert (d / "d").stat().st_mtime > 1
    os.utime(d / "d", (1, 1))
    os.rename(d / "d" / "new", d / "d" / "newer")
    assert (d / "d").stat().st_mtime > 1
