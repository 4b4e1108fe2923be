"""A tree copied exactly, on real file systems, while others change it, and as somebody without privilege."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import FileSystemMaker, StackMaker
from tests.support import people
from tests.support.filesystems import FS_KINDS, FsKind, run
from tests.support.snapshot import assert_same, snapshot
from tests.support.trees import access_times, assert_equal, rich_tree
from unionfs.archives.copytree import copy_tree
from unionfs.archives.dirstack import KEPT, DirStack


@contextmanager
def few_descriptors(count: int = 200) -> Iterator[None]:
    """Let this process have no more than `count` descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def deep_tree(root: Path, depth: int, name: bytes) -> None:
    """A chain of directories with a file in each; the files of the first and the last are one."""
    root.mkdir()
    at = os.open(root, os.O_RDONLY)
    first = os.open(root, os.O_RDONLY)
    for number in range(depth):
        os.mkdir(name, dir_fd=at)
        below = os.open(name, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
        with open(os.open(b"file", os.O_WRONLY | os.O_CREAT, dir_fd=at), "wb") as file:
            file.write(b"%d" % number)
        os.utime(at, ns=(number, number))
    with open(os.open(b"one", os.O_WRONLY | os.O_CREAT, dir_fd=at), "wb") as file:
        file.write(b"one file")
    os.link(b"one", b"one", src_dir_fd=at, dst_dir_fd=first)
    os.close(at)
    os.close(first)


def chain(root: Path, name: bytes) -> list[tuple[int, bytes, int]]:
    """What `deep_tree` made: of each directory its time, of its file the content, and the link count of `one`."""
    found = []
    at = os.open(root, os.O_RDONLY)
    while True:
        try:
            below = os.open(name, os.O_RDONLY, dir_fd=at)
        except FileNotFoundError:
            found.append((0, b"", os.stat(b"one", dir_fd=at).st_nlink))
            os.close(at)
            return found
        os.close(at)
        at = below
        with open(os.open(b"file", os.O_RDONLY, dir_fd=at), "rb") as file:
            found.append((os.fstat(at).st_mtime_ns, file.read(), 0))


@pytest.mark.parametrize("where", FS_KINDS)
@pytest.mark.parametrize("there", [True, False], ids=["to", "from"])
def test_everything_is_copied(ground: Path, on_file_system: FileSystemMaker, where: FsKind, there: bool) -> None:
    other = on_file_system(where)
    source = rich_tree((ground if there else other) / "source")
    times = access_times(source)
    target = empty((other if there else ground) / "target")
    counted: list[int] = []
    copy_tree(source, target, progress=counted.append)
    copied = access_times(target)
    del times[b""], copied[b""]
    files = {path for path in times if stat.S_ISREG(os.lstat(os.fsencode(source) + path).st_mode)}
    assert {path: times[path] for path in files} == {path: copied[path] for path in files}
    assert_equal(source, target)
    inodes = {path.stat().st_ino: path.stat().st_size for path in source.rglob("*") if path.is_file()}
    seen = sum(inodes.values()) - (source / "links" / "out").stat().st_size
    assert sum(counted) == seen


@pytest.mark.parametrize("where", ["xfs", "btrfs"])
def test_data_is_shared_where_the_file_system_can(on_file_system: FileSystemMaker, where: FsKind) -> None:
    base = on_file_system(where)
    (base / "source").mkdir()
    (base / "source" / "big").write_bytes(os.urandom(8 << 20))
    os.sync()
    copy_tree(base / "source", empty(base / "target"))
    assert (base / "source" / "big").read_bytes() == (base / "target" / "big").read_bytes()
    assert "shared" in run("filefrag", "-v", str(base / "target" / "big"))


def test_descriptors_as_places(ground: Path) -> None:
    source = rich_tree(ground / "source")
    target = empty(ground / "target")
    fds = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in (source, target)]
    try:
        copy_tree(*fds)
    finally:
        for fd in fds:
            os.close(fd)
    assert_equal(source, target)


def test_depth_is_no_matter(ground: Path) -> None:
    name = b"n" * 200
    deep_tree(ground / "source", 1500, name)
    with few_descriptors():
        copy_tree(ground / "source", empty(ground / "target"))
    made = chain(ground / "target", name)
    assert len(made) == 1501
    assert made[-1][2] == 2
    assert made == chain(ground / "source", name)
    for path in ("source", "target"):
        subprocess.run(["rm", "-rf", str(ground / path)], check=True)


def test_what_is_mounted_below_stays_out(ground: Path) -> None:
    source = ground / "source"
    (source / "other").mkdir(parents=True)
    (source / "bound").mkdir()
    (source / "own").write_bytes(b"own")
    (source / "file").write_bytes(b"hidden")
    (ground / "host").mkdir()
    (ground / "host" / "secret").write_bytes(b"secret")
    run("mount", "-t", "tmpfs", "tmpfs", str(source / "other"))
    run("mount", "--bind", str(ground / "host"), str(source / "bound"))
    try:
        (source / "other" / "foreign").write_bytes(b"foreign")
        run("mount", "--bind", str(source / "other" / "foreign"), str(source / "file"))
        copy_tree(source, empty(ground / "target"))
        copy_tree(source, empty(ground / "all"), one_file_system=False)
    finally:
        subprocess.run(["umount", str(source / "file")], check=False)
        run("umount", str(source / "bound"))
        run("umount", str(source / "other"))
    assert {path.name for path in (ground / "target").rglob("*")} == {"other", "bound", "own"}
    assert (ground / "all" / "file").read_bytes() == b"foreign"
    assert (ground / "all" / "bound" / "secret").read_bytes() == b"secret"


def test_nothing_is_inherited_from_the_target(ground: Path) -> None:
    source = rich_tree(ground / "source")
    target = empty(ground / "target")
    subprocess.run(["setfacl", "-m", "u:77:rwx", "-d", "-m", "u:78:rwx", str(target)], check=True)
    os.chmod(target, 0o2777)
    os.chown(target, -1, 99)
    copy_tree(source, target)
    assert_equal(source, target)


def test_a_union_as_the_source(ground: Path, make_stack: StackMaker) -> None:
    stack = make_stack("union")
    rich_tree(stack.lower)
    mnt = stack.mount()
    (mnt / "plain").write_bytes(b"copied up")
    os.rename(mnt / "suid", mnt / "renamed")
    (mnt / "empty").unlink()
    copy_tree(mnt, empty(ground / "target"))
    assert_same(snapshot(mnt), snapshot(ground / "target"))


def test_without_privilege(ground: Path) -> None:
    source = ground / "source"
    source.mkdir()
    target = empty(ground / "target")
    os.chown(target, people.ALICE, people.STAFF)
    (source / "theirs").write_bytes(b"suid")
    os.chown(source / "theirs", people.BOB, people.STAFF)
    os.chmod(source / "theirs", 0o6755)
    os.setxattr(source / "theirs", "trusted.x", b"")
    os.setxattr(source / "theirs", "user.x", b"kept")
    closed = source / "closed"
    closed.mkdir()
    (closed / "file").write_bytes(b"content")
    os.chmod(closed, 0o555)
    os.mkfifo(source / "fifo")
    people.as_user(people.ALICE, lambda: copy_tree(source, target), groups=(people.STAFF,))
    st = (target / "theirs").stat()
    assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (people.ALICE, people.STAFF, 0o755)
    assert os.listxattr(target / "theirs") == ["user.x"]
    assert stat.S_IMODE((target / "closed").stat().st_mode) == 0o555
    assert (target / "closed" / "file").read_bytes() == b"content"
    assert (target / "closed" / "file").stat().st_mtime_ns == (closed / "file").stat().st_mtime_ns


@pytest.mark.parametrize("what", ["device", "unreadable"])
def test_what_can_not_be_copied_is_named(ground: Path, what: str) -> None:
    source = ground / "source" / "sub"
    source.mkdir(parents=True)
    if what == "device":
        os.mknod(source / "the-one", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    else:
        (source / "the-one").write_bytes(b"secret")
        os.chmod(source / "the-one", 0o600)
    target = empty(ground / "target")
    os.chown(target, people.ALICE, people.ALICE)
    with pytest.raises(OSError, match=r"\S") as caught:
        people.as_user(people.ALICE, lambda: copy_tree(ground / "source", target))
    assert caught.value.filename == "sub/the-one"
    assert "root" in str(caught.value) or caught.value.errno == errno.EACCES


def test_a_depth_without_privilege(ground: Path) -> None:
    """The way up leads through directories that nobody may search, at a depth where descriptors are given up."""
    source = ground / "source"
    at = source
    for _ in range(3 * KEPT):
        at = at / "d"
    at.mkdir(parents=True)
    for path in (at, *at.parents):
        if path == ground:
            break
        os.chmod(path, 0o555)
    target = empty(ground / "target")
    os.chown(target, people.ALICE, people.ALICE)
    people.as_user(people.ALICE, lambda: copy_tree(source, target))
    assert len(list(target.rglob("*"))) == 3 * KEPT


def test_an_interrupt_leaves_no_descriptor(ground: Path) -> None:
    source = rich_tree(ground / "source")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_tree(source, empty(ground / "target"), progress=interrupt)


def test_a_source_that_is_changed_leads_nowhere(ground: Path) -> None:
    """Directories become links to somewhere else and back, files vanish: nothing from outside is ever copied."""
    outside = ground / "outside"
    outside.mkdir()
    for number in range(20):
        (outside / f"f{number}").write_bytes(b"OUTSIDE")
    source = ground / "source"
    for number in range(12):
        (source / f"d{number}").mkdir(parents=True)
        for file in range(20):
            (source / f"d{number}" / f"f{file}").write_bytes(b"inside")
    stop = threading.Event()

    def disturb() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 1) % 12
            victim = source / f"d{number}"
            with suppress(OSError):
                os.rename(victim, ground / "hidden")
                victim.symlink_to(outside)
                os.unlink(victim)
                os.rename(ground / "hidden", victim)
            for file in range(0, 20, 7):
                with suppress(OSError):
                    path = victim / f"f{file}"
                    path.unlink()
                    path.symlink_to(outside / "f1")
                    path.unlink()
                    path.write_bytes(b"inside")

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for number in range(5):
            target = empty(ground / f"target{number}")
            copy_tree(source, target)
            for path in target.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    assert path.read_bytes() in (b"inside", b"")
    finally:
        stop.set()
        thread.join()


def test_the_way_back_is_checked(ground: Path) -> None:
    deep = ground / "root" / Path(*"a" * (KEPT + 4))
    deep.mkdir(parents=True)
    fd = os.open(ground / "root", os.O_PATH)
    stack = DirStack(fd)
    try:
        stack.go([b"a"] * (KEPT + 4))
        # The parent whose descriptor was given up is another one now.
        (ground / "elsewhere").mkdir()
        os.rename(ground / "root" / Path(*"a" * 3), ground / "elsewhere" / "a")
        with pytest.raises(OSError, match=r"\S") as caught:
            stack.go([])
    finally:
        stack.close()
        os.close(fd)
    assert caught.value.errno == errno.ESTALE
