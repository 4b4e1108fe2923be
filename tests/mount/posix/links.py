"""Hard links, symbolic links and special files."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from tests.mount.posix.table import behaviour, fails
from tests.support.layers import FIFO, File, HardLink, Node, Symlink
from tests.support.raw import link_fd


@behaviour({"f": b"data"})
def link_makes_a_second_name(d: Path) -> None:
    os.link(d / "f", d / "g")
    one, two = (d / "f").stat(), (d / "g").stat()
    assert (one.st_ino, one.st_nlink) == (two.st_ino, two.st_nlink) == (one.st_ino, 2)
    with open(d / "g", "ab") as stream:
        stream.write(b"+")
    assert (d / "f").read_bytes() == b"data+"
    os.unlink(d / "f")
    assert (d / "g").stat().st_nlink == 1
    assert (d / "g").read_bytes() == b"data+"


@behaviour({"f": b"data", "g": HardLink("f"), "sub": {"h": HardLink("f")}})
def hard_links_that_were_there_stay_one_file(d: Path) -> None:
    assert (d / "f").stat().st_nlink == 3
    with open(d / "f", "ab") as stream:
        stream.write(b"+")
    assert (d / "g").read_bytes() == (d / "sub" / "h").read_bytes() == b"data+"
    os.chmod(d / "sub" / "h", 0o600)
    stats = [os.stat(d / name) for name in ("f", "g", "sub/h")]
    assert len({status.st_ino for status in stats}) == 1
    assert {status.st_nlink for status in stats} == {3}
    assert {stat.S_IMODE(status.st_mode) for status in stats} == {0o600}
    os.unlink(d / "g")
    assert (d / "f").stat().st_nlink == 2
    os.link(d / "sub" / "h", d / "i")
    assert (d / "f").stat().st_nlink == 3
    with open(d / "i", "ab") as stream:
        stream.write(b"!")
    assert (d / "f").read_bytes() == b"data+!"


@behaviour({"f": b"data", "g": HardLink("f")})
def unlink_of_one_of_two_names(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDONLY)
    os.unlink(d / "f")
    assert os.fstat(descriptor).st_nlink == 1
    os.unlink(d / "g")
    assert os.fstat(descriptor).st_nlink == 0
    os.close(descriptor)


@behaviour({"f": b"data", "g": HardLink("f")})
def rename_of_one_hard_link_over_the_other_does_nothing(d: Path) -> None:
    os.rename(d / "f", d / "g")
    assert sorted(os.listdir(d)) == ["f", "g"]


@behaviour({"f": b"data", "d": {}})
def link_errors(d: Path) -> None:
    with fails(errno.EEXIST):
        os.link(d / "f", d / "d")
    with fails(errno.EPERM):
        os.link(d / "d", d / "d2")
    with fails(errno.ENOENT):
        os.link(d / "missing", d / "x")
    with fails(errno.ENOENT):
        os.link(d / "f", d / "missing" / "x")


@behaviour({"f": b"data", "gone": b""})
def link_onto_a_removed_name(d: Path) -> None:
    os.unlink(d / "gone")
    os.link(d / "f", d / "gone")
    assert (d / "gone").read_bytes() == b"data"


@behaviour({"s": Symlink("target"), "target": b"seen"})
def link_to_a_symlink_itself(d: Path) -> None:
    os.link(d / "s", d / "s2", follow_symlinks=False)
    assert os.readlink(d / "s2") == "target"
    assert os.lstat(d / "s").st_nlink == 2


@behaviour({"s": Symlink("target"), "target": b"seen", "up": Symlink("../up/x"), "dir": {"x": b""}})
def symlinks_resolve(d: Path) -> None:
    assert (d / "s").read_bytes() == b"seen"
    assert os.readlink(d / "s") == "target"
    assert os.lstat(d / "s").st_size == len("target")
    with fails(errno.ENOENT):
        (d / "up").read_bytes()
    os.symlink("dir", d / "ds")
    assert os.listdir(d / "ds") == ["x"]
    os.symlink("loop", d / "loop")
    with fails(errno.ELOOP):
        (d / "loop").read_bytes()
    with fails(errno.ELOOP):
        os.open(d / "s", os.O_RDONLY | os.O_NOFOLLOW)
    with fails(errno.EINVAL):
        os.readlink(d / "target")
    with fails(errno.EEXIST):
        os.symlink("x", d / "target")


@behaviour({"s": Symlink("target")})
def writing_through_a_dangling_symlink_makes_its_target(d: Path) -> None:
    (d / "s").write_bytes(b"made")
    assert (d / "target").read_bytes() == b"made"
    assert os.readlink(d / "s") == "target"


@behaviour({"s": Symlink("x" * 1000)})
def long_symlink(d: Path) -> None:
    assert os.readlink(d / "s") == "x" * 1000
    os.symlink("y" * 1023, d / "t")
    assert os.readlink(d / "t") == "y" * 1023


@behaviour({"s": Symlink("target")})
def symlink_owner_and_times(d: Path) -> None:
    os.utime(d / "s", ns=(10**9, 2 * 10**9 + 5), follow_symlinks=False)
    assert os.lstat(d / "s").st_mtime_ns == 2 * 10**9 + 5
    assert os.readlink(d / "s") == "target"


@behaviour({"s": Symlink("target"), "target": File(b"", 0o600)}, privileged=True)
def symlink_lchown_leaves_the_target(d: Path) -> None:
    os.lchown(d / "s", 77, 88)
    assert (os.lstat(d / "s").st_uid, os.lstat(d / "s").st_gid) == (77, 88)
    assert (d / "target").stat().st_uid == 0


@behaviour({"p": FIFO})
def fifos_connect(d: Path) -> None:
    reader = os.open(d / "p", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(d / "p", os.O_WRONLY)
    os.write(writer, b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    os.close(writer)
    os.chmod(d / "p", 0o600)
    assert os.lstat(d / "p").st_mode == stat.S_IFIFO | 0o600
    os.mkfifo(d / "q", 0o640)
    assert stat.S_IMODE(os.lstat(d / "q").st_mode) == 0o640


@behaviour(
    {"n": Node(stat.S_IFCHR | 0o666, os.makedev(1, 3)), "b": Node(stat.S_IFBLK | 0o600, os.makedev(7, 99))},
    privileged=True,
)
def devices_keep_their_numbers(d: Path) -> None:
    os.chmod(d / "n", 0o640)
    status = os.lstat(d / "n")
    assert (status.st_mode, status.st_rdev) == (stat.S_IFCHR | 0o640, os.makedev(1, 3))
    os.chmod(d / "b", 0o640)
    status = os.lstat(d / "b")
    assert (status.st_mode, status.st_rdev) == (stat.S_IFBLK | 0o640, os.makedev(7, 99))
    os.mknod(d / "z", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    assert os.lstat(d / "z").st_rdev == os.makedev(1, 5)
    os.rename(d / "n", d / "n2")
    assert os.lstat(d / "n2").st_rdev == os.makedev(1, 3)


@behaviour({"n": Node(stat.S_IFCHR | 0o666, os.makedev(1, 3))}, privileged=True)
def devices_open(d: Path) -> None:
    with open(d / "n", "r+b", buffering=0) as null:
        assert null.write(b"into the void") == 13
        assert null.read(1) == b""


@behaviour({"s": Node(stat.S_IFSOCK | 0o644)})
def sockets_bind_and_connect(d: Path) -> None:
    here = os.open(d, os.O_RDONLY | os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(f"/proc/self/fd/{here}/bound")
        server.listen(1)
        client.connect(f"/proc/self/fd/{here}/bound")
    assert stat.S_ISSOCK(os.lstat(d / "bound").st_mode)
    os.close(here)
    os.chmod(d / "s", 0o600)
    assert os.lstat(d / "s").st_mode == stat.S_IFSOCK | 0o600


@behaviour()
def mknod_of_a_regular_file(d: Path) -> None:
    os.mknod(d / "f", stat.S_IFREG | 0o640)
    assert os.lstat(d / "f").st_mode == stat.S_IFREG | 0o640
    with fails(errno.EEXIST):
        os.mknod(d / "f", stat.S_IFREG | 0o640)


@behaviour({"f": b"x"})
def unlinked_open_file_can_not_be_linked_back_by_name(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDONLY)
    os.unlink(d / "f")
    with fails(errno.ENOENT):
        link_fd(descriptor, d / "back")
    os.close(descriptor)
