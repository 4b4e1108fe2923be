"""Odd names and long paths."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from pathlib import Path

from tests.mount.posix.table import behaviour, fails

LONG = "n" * 255


@behaviour({LONG: b"long", "d": {LONG[:-1] + "m": {}}})
def names_of_255_bytes(d: Path) -> None:
    assert (d / LONG).read_bytes() == b"long"
    with open(d / LONG, "ab") as stream:
        stream.write(b"er")
    assert (d / LONG).read_bytes() == b"longer"
    assert LONG in os.listdir(d)
    other = "o" * 255
    os.rename(d / LONG, d / other)
    os.mkdir(d / LONG)
    os.rmdir(d / LONG)
    os.unlink(d / other)
    assert os.listdir(d) == ["d"]


@behaviour({"f": b""})
def names_of_256_bytes_are_too_long(d: Path) -> None:
    name = "n" * 256
    for act in (
        lambda: os.stat(d / name),
        lambda: os.mkdir(d / name),
        lambda: os.close(os.open(d / name, os.O_CREAT | os.O_WRONLY)),
        lambda: os.rename(d / "f", d / name),
        lambda: os.unlink(d / name),
        lambda: os.symlink("x", d / name),
        lambda: os.link(d / "f", d / name),
    ):
        with fails(errno.ENAMETOOLONG):
            act()


@behaviour({"caf\udcff": b"latin", "new\nline": b"", "tab\t": {}, " ": b"", "ü→漢": b"utf", "\\:,=": b"punct"})
def names_of_odd_bytes(d: Path) -> None:
    directory = os.fsencode(d)
    assert sorted(os.listdir(directory)) == sorted(
        [b"caf\xff", b"new\nline", b"tab\t", b" ", "ü→漢".encode(), b"\\:,="]
    )
    for name in os.listdir(directory):
        path = directory + b"/" + name
        if os.path.isdir(path):
            os.rename(path, path + b"-renamed")
            continue
        with open(path, "ab") as stream:
            stream.write(b"+")
        os.rename(path, path + b"\xfe")
        with open(path + b"\xfe", "rb") as stream:
            assert stream.read().endswith(b"+")
    assert b"caf\xff\xfe" in os.listdir(directory)


@behaviour({"f": b"1", "F": b"2"})
def names_keep_their_case(d: Path) -> None:
    (d / "f").unlink()
    assert os.listdir(d) == ["F"]


@behaviour()
def paths_longer_than_path_max(d: Path) -> None:
    part = "p" * 200
    with ExitStack() as stack:
        descriptor = os.open(d, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, descriptor)
        chain = [descriptor]
        for _ in range(40):
            os.mkdir(part, dir_fd=descriptor)
            descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY, dir_fd=descriptor)
            stack.callback(os.close, descriptor)
            chain.append(descriptor)
        deep = os.open("f", os.O_CREAT | os.O_RDWR, dir_fd=descriptor)
        os.write(deep, b"deep down")
        os.close(deep)
        os.rename("f", "g", src_dir_fd=descriptor, dst_dir_fd=descriptor)
        assert os.listdir(descriptor) == ["g"]
        assert os.stat("g", dir_fd=descriptor).st_size == 9
        os.unlink("g", dir_fd=descriptor)
        for parent in reversed(chain[:-1]):
            os.rmdir(part, dir_fd=parent)


@behaviour()
def path_of_more_than_path_max_bytes_is_refused(d: Path) -> None:
    with fails(errno.ENAMETOOLONG):
        os.stat(str(d) + "/x" * 2500)


@behaviour({".hidden": b"", ".wh": b"", "..x": b"", "-dash": b""})
def names_with_dots(d: Path) -> None:
    assert sorted(os.listdir(d)) == ["-dash", "..x", ".hidden", ".wh"]
    os.rename(d / "..x", d / "...")
    assert (d / "...").exists()
