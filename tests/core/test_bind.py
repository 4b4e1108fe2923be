"""The core of bind paths on plain directories: who is who when descriptors are few and the host moves things about."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.posix.table import fails
from unionfs.core import sysio
from unionfs.core.bind import Binds
from unionfs.core.bindnodes import ID_PREFIX, ID_SHIFT, BindNode, is_bind
from unionfs.core.caller import Caller
from unionfs.core.changes import NOTHING, Changes

Maker = Callable[..., tuple[Binds, BindNode]]
ME = Caller(os.geteuid(), os.getegid(), 0o022, os.getpid())


@pytest.fixture
def host(ground: Path) -> Path:
    """A directory on a disk file system: one that uses inode numbers again."""
    (ground / "host").mkdir()
    return ground / "host"


@pytest.fixture
def bind(host: Path) -> Iterator[Maker]:
    """Attach `host`; descriptors must not leak."""
    made: list[Binds] = []
    before = set(os.listdir("/proc/self/fd"))

    def make(room: int = 100, *, read_only: bool = False) -> tuple[Binds, BindNode]:
        binds = Binds(lambda _, ino: ino, b"/nowhere", room=room)
        made.append(binds)
        return binds, binds.attach(1, 1, b"bind", os.open(host, os.O_RDONLY), read_only=read_only)

    yield make
    for binds in made:
        binds.close()
    assert set(os.listdir("/proc/self/fd")) == before


def found(binds: Binds, parent: BindNode, name: bytes) -> BindNode:
    """Look a name up as the kernel does, which then holds the node."""
    looked = binds.look(parent, name)
    assert looked is not None
    looked[0].nlookup += 1
    return looked[0]


def test_node_ids_are_apart_from_the_unions(bind: Maker) -> None:
    _, root = bind()
    assert is_bind(root.id)
    assert ID_PREFIX << ID_SHIFT < root.id < 1 << 64
    for other in (1, 2**55 * 255, 1 << 63 | 5, 1 << 63 | 1 << 62 | 7):
        assert not is_bind(other)


def test_one_node_for_all_names_of_a_file(host: Path, bind: Maker) -> None:
    binds, root = bind()
    (host / "a").touch()
    (host / "d").mkdir()
    os.link(host / "a", host / "d/b")
    node = found(binds, root, b"a")
    assert found(binds, found(binds, root, b"d"), b"b") is node
    assert found(binds, root, b"a") is node
    binds.forget(node.id, 2)
    assert binds.node(node.id) is node
    binds.forget(node.id, 1)
    with fails(errno.ESTALE):
        binds.node(node.id)
    assert found(binds, root, b"a") is not node
    assert found(binds, root, b"a").id == node.id, "without the native layer this is the number that users see"


def test_descriptors_stay_below_the_limit(host: Path, bind: Maker) -> None:
    binds, root = bind(room=10)
    deep = host
    for level in range(30):
        deep /= f"d{level}"
    deep.mkdir(parents=True)
    node, chain = root, []
    for level in range(30):
        node = found(binds, node, b"d%d" % level)
        chain.append(node)
    nodes = []
    for number in range(100):
        (host / f"f{number}").write_text(str(number))
        nodes.append(found(binds, root, b"f%d" % number))
        assert binds.counters()["bind_descriptors"] <= 12
    for number, one in enumerate(nodes):
        assert binds.stat(binds.node(one.id)).st_ino == (host / f"f{number}").stat().st_ino
    assert binds.stat(binds.node(chain[-1].id)).st_ino == deep.stat().st_ino, "the whole way was opened again"
    for _ in range(4):
        binds.node(root.id)
    assert binds.counters()["bind_descriptors"] <= 12


def test_an_evicted_node_that_moved_on_the_host_is_stale(host: Path, bind: Maker) -> None:
    binds, root = bind(room=2)
    (host / "f").write_text("f")
    node = found(binds, root, b"f")
    evict(binds, root, host)
    assert node.fd < 0
    (host / "f").rename(host / "g")
    with fails(errno.ESTALE):
        binds.stat(binds.node(node.id))
    assert found(binds, root, b"g") is node, "found again under its new name"
    assert binds.stat(node).st_size == 1


@pytest.mark.parametrize("what", ["nothing", "mode", "flags"])
def test_an_evicted_node_is_opened_again_for_its_attributes(host: Path, bind: Maker, what: str) -> None:
    binds, root = bind(room=2)
    (host / "f").write_text("f")
    (host / "f").chmod(0o4755)
    node = found(binds, root, b"f")
    evict(binds, root, host)
    assert node.fd < 0
    if what == "flags":
        assert len(binds.inode_flags(binds.node(node.id), sysio.FS_IOC_GETFLAGS, b"")) == 4
        return
    changes, mode = (NOTHING, 0o755) if what == "nothing" else (Changes(mode=0o600, mtime=5), 0o600)
    st = binds.setattr(binds.node(node.id), changes, -1, kill_for=None, who=ME)
    assert stat.S_IMODE(st.st_mode) == stat.S_IMODE((host / "f").stat().st_mode) == mode
    assert what == "nothing" or st.st_mtime_ns == 5


def evict(binds: Binds, root: BindNode, host: Path) -> None:
    """Have the descriptors of all that was used before closed."""
    (host / "more").mkdir(exist_ok=True)
    more = found(binds, root, b"more")
    for number in range(20):
        (host / f"more/{number}").touch()
        binds.look(more, b"%d" % number)
    for number in range(20):
        binds.look(more, b"%d" % number)


def test_a_number_that_was_used_again(host: Path, bind: Maker) -> None:
    binds, root = bind(room=2)
    for _ in range(20):
        os.symlink("one", host / "l")
        old = found(binds, root, b"l")
        evict(binds, root, host)
        assert old.fd < 0
        number = (host / "l").lstat().st_ino
        (host / "l").unlink()
        os.symlink("two", host / "l")
        if (host / "l").lstat().st_ino == number:
            break
        (host / "l").unlink()
        binds.forget(old.id, 1)
    else:
        pytest.fail("this file system never uses a number again")
    new = found(binds, root, b"l")
    assert new is not old
    assert binds.readlink(new) == b"two"
    with fails(errno.ESTALE):
        binds.readlink(old)
    binds.forget(old.id, 1)
    assert found(binds, root, b"l") is new


def test_what_is_open_is_reached_through_its_handle(host: Path, bind: Maker) -> None:
    binds, root = bind(room=2)
    (host / "f").write_text("text")
    node = found(binds, root, b"f")
    fd = binds.open_file(node, os.O_RDWR)
    evict(binds, root, host)
    assert node.fd < 0
    (host / "f").unlink()
    (host / "f").write_text("another")
    assert binds.stat(binds.node(node.id)).st_nlink == 0
    second = binds.open_file(node, os.O_RDONLY)
    assert os.read(second, 10) == b"text"
    for handle in (fd, second):
        binds.close_file(handle)
    assert found(binds, root, b"f") is not node


def test_a_lost_object_without_handle_keeps_its_descriptor(host: Path, bind: Maker) -> None:
    """A working directory, say: nothing but the descriptor leads there."""
    binds, root = bind(room=4)
    (host / "d").mkdir()
    node = found(binds, root, b"d")
    (host / "d").rmdir()
    evict(binds, root, host)
    assert binds.stat(binds.node(node.id)).st_nlink == 0


def test_names_follow_a_rename(host: Path, bind: Maker) -> None:
    binds, root = bind(room=2)
    for name in ("a", "b"):
        (host / name).mkdir()
        (host / name / "f").write_text(name)
    a, b = found(binds, root, b"a"), found(binds, root, b"b")
    f, g = found(binds, a, b"f"), found(binds, b, b"f")
    binds.rename(root, b"a", b, b"A", 0)
    binds.rename(a, b"f", b, b"f", sysio.RENAME_EXCHANGE)
    evict(binds, root, host)
    assert f.fd < 0
    assert (binds.stat(f).st_ino, binds.stat(g).st_ino) == (
        (host / "b/f").stat().st_ino,
        (host / "b/A/f").stat().st_ino,
    )
    with fails(errno.EEXIST):
        binds.rename(b, b"f", a, b"f", sysio.RENAME_NOREPLACE)


def test_create_takes_what_the_host_has_made_meanwhile(host: Path, bind: Maker) -> None:
    binds, root = bind()
    (host / "f").write_text("text")
    with fails(errno.EEXIST):
        binds.create_file(root, b"f", 0o644, os.O_RDWR | os.O_EXCL, ME)
    _, st, fd = binds.create_file(root, b"f", 0o644, os.O_RDWR, ME)
    assert st.st_size == 4
    assert os.pread(fd, 10, 0) == b"text"
    binds.close_file(fd)
    _, st, fd = binds.create_file(root, b"f", 0o644, os.O_RDWR | os.O_TRUNC, ME)
    assert st.st_size == 0
    binds.close_file(fd)
    os.symlink("f", host / "l")
    with fails(errno.ESTALE):
        binds.create_file(root, b"l", 0o644, os.O_RDWR, ME)
    (host / "d").mkdir()
    with fails(errno.EISDIR):
        binds.create_file(root, b"d", 0o644, os.O_RDWR, ME)
    assert not binds.open_files


def test_another_users_file_is_theirs_from_the_start(host: Path, bind: Maker) -> None:
    binds, root = bind()
    host.chmod(0o700)
    who = Caller(12001, 12002, 0o077, os.getpid())
    _, st, fd = binds.create_file(root, b"f", 0o4666, os.O_RDWR, who)
    binds.close_file(fd)
    assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (12001, 12002, 0o4600)
    _, st = binds.mknod(root, b"n", stat.S_IFCHR | 0o666, os.makedev(1, 3), who)
    assert (st.st_uid, st.st_rdev) == (12001, os.makedev(1, 3))
    node, st = binds.symlink(root, b"l", b"target", who)
    assert (st.st_uid, st.st_gid) == (12001, 12002)
    assert binds.readlink(node) == b"target"
    (host / "own").touch()
    assert ((host / "own").stat().st_uid, os.umask(0o022)) == (os.geteuid(), 0o022), "all is as before"


def test_points(host: Path, bind: Maker) -> None:
    binds, root = bind()
    (host / "d").mkdir()
    (host / "e").mkdir()
    inner = binds.attach(root.id, root.ino, b"d", os.open(host, os.O_PATH), read_only=True)
    with fails(errno.EBUSY):
        binds.attach(root.id, root.ino, b"d", os.open(host, os.O_PATH), read_only=True)
    with fails(errno.EBUSY):
        binds.rmdir(root, b"d")
    with fails(errno.EBUSY):
        binds.rename(root, b"e", root, b"d", 0)
    with fails(errno.EXDEV):
        binds.rename(root, b"e", inner, b"x", 0)
    with fails(errno.EEXIST):
        binds.mkdir(root, b"d", 0o755, ME)
    with fails(errno.EROFS):
        binds.mkdir(inner, b"x", 0o755, ME)
