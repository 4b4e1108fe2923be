"""metacopy and data-only lowers: attributes change without data, data follows on the first write."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.posix.table import fails
from tests.support.layers import File, build, mark
from tests.support.mounts import MountRefused, Stack
from tests.support.snapshot import assert_same, snapshot

Oracle = Callable[[Stack], Path]
StackMaker = Callable[..., Stack]
BIG = os.urandom(3 << 20)


def allocated(path: Path) -> int:
    """Bytes that a file takes on disk, once it is written out."""
    os.sync()
    return os.stat(path).st_blocks * 512


@pytest.mark.parametrize("change", ["chmod", "chown", "utime", "xattr", "link", "rename"])
def test_changes_of_attributes_copy_no_data(stack: Stack, change: str) -> None:
    build(stack.lower, {"f": File(BIG, xattrs={"user.a": b"1"})})
    root = stack.mount()
    path = root / "f"
    match change:
        case "chmod":
            os.chmod(path, 0o600)
        case "chown":
            os.chown(path, 5, 6)
        case "utime":
            os.utime(path, (1, 1))
        case "xattr":
            os.setxattr(path, "user.b", b"2")
        case "link":
            os.link(path, root / "g")
        case "rename":
            os.rename(path, root / "g")
            path = root / "g"
    assert path.read_bytes() == BIG
    assert path.stat().st_size == len(BIG)
    name = path.name
    stack.umount()
    assert mark(stack.up / name, "metacopy") is not None
    assert allocated(stack.up / name) < 100_000
    assert (stack.up / name).stat().st_size == len(BIG)
    assert os.getxattr(stack.up / name, "user.a") == b"1"
    stack.mount()
    assert path.read_bytes() == BIG


def test_blocks_are_those_of_the_data(stack: Stack) -> None:
    build(stack.lower, {"f": BIG})
    root = stack.mount()
    before = (root / "f").stat()
    os.chmod(root / "f", 0o600)
    after = (root / "f").stat()
    assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)


@pytest.mark.parametrize("how", ["write", "append", "truncate", "open for writing", "mmap"])
def test_data_follows_on_the_first_write(stack: Stack, how: str) -> None:
    build(stack.lower, {"f": BIG})
    root = stack.mount()
    os.chmod(root / "f", 0o600)
    os.setxattr(root / "f", "user.k", b"v")
    inode = (root / "f").stat().st_ino
    stack.remount()
    expected = bytearray(BIG)
    reader = os.open(root / "f", os.O_RDONLY)
    assert os.pread(reader, 4, 0) == BIG[:4]
    match how:
        case "write":
            with open(root / "f", "r+b") as stream:
                stream.seek(1000)
                stream.write(b"new")
            expected[1000:1003] = b"new"
        case "append":
            with open(root / "f", "ab") as appender:
                appender.write(b"new")
            expected += b"new"
        case "truncate":
            os.truncate(root / "f", 12345)
            del expected[12345:]
        case "open for writing":
            os.close(os.open(root / "f", os.O_WRONLY))
        case "mmap":
            import mmap

            with open(root / "f", "r+b") as stream, mmap.mmap(stream.fileno(), 0) as view:
                view[5:8] = b"new"
            expected[5:8] = b"new"
    assert os.pread(reader, len(expected) + 10, 0) == expected
    os.close(reader)
    assert (root / "f").read_bytes() == expected
    status = (root / "f").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_ino) == (0o600, inode)
    assert os.getxattr(root / "f", "user.k") == b"v"
    stack.umount()
    assert mark(stack.up / "f", "metacopy") is None
    assert (stack.up / "f").read_bytes() == expected
    assert (stack.lower / "f").read_bytes() == BIG


def test_metacopy_moved_keeps_finding_its_data(stack: Stack) -> None:
    build(stack.lower, {"d": {"f": BIG}, "e": {}, "g": BIG[:1000]})
    root = stack.mount()
    os.chmod(root / "d" / "f", 0o600)
    os.rename(root / "d" / "f", root / "e" / "f2")
    os.chmod(root / "g", 0o600)
    os.rename(root / "g", root / "g2")
    stack.umount()
    assert mark(stack.up / "e" / "f2", "redirect") == b"/d/f"
    assert mark(stack.up / "g2", "redirect") == b"g"
    root = stack.mount()
    assert (root / "e" / "f2").read_bytes() == BIG
    assert (root / "g2").read_bytes() == BIG[:1000]
    os.rename(root / "e", root / "e3")
    os.rename(root / "e3" / "f2", root / "f3")
    stack.remount()
    assert (root / "f3").read_bytes() == BIG
    with open(root / "f3", "ab") as stream:
        stream.write(b"+")
    stack.umount()
    assert (stack.up / "f3").read_bytes() == BIG + b"+"
    assert mark(stack.up / "f3", "metacopy") is None


def test_metacopies_through_three_layers(stack2: Stack) -> None:
    """An upper of metacopies becomes the middle layer of another union, and is changed there again."""
    first = Stack.make("overlay", stack2.base / "first")
    build(stack2.lowers[1], {"d": {"f": BIG}, "g": BIG})
    first.lowers = [stack2.lowers[1]]
    first.upper = stack2.lowers[0]
    first.mount()
    os.chmod(first.mnt / "d" / "f", 0o600)
    os.rename(first.mnt / "d", first.mnt / "d2")
    os.chmod(first.mnt / "g", 0o640)
    os.rename(first.mnt / "g", first.mnt / "d2" / "h")
    first.umount()
    root = stack2.mount("index=off")
    assert (root / "d2" / "f").read_bytes() == BIG
    assert (root / "d2" / "h").read_bytes() == BIG
    assert stat.S_IMODE((root / "d2" / "f").stat().st_mode) == 0o600
    os.chown(root / "d2" / "f", 7, 8)
    os.rename(root / "d2" / "h", root / "h2")
    assert (root / "h2").read_bytes() == BIG
    stack2.remount("index=off")
    assert (root / "d2" / "f").read_bytes() == BIG
    assert (root / "h2").read_bytes() == BIG
    with open(root / "h2", "r+b") as stream:
        stream.write(b"Z")
    assert (root / "h2").read_bytes() == b"Z" + BIG[1:]


def test_metacopy_off_reads_no_metacopy(stack: Stack) -> None:
    """overlayfs without metacopy refuses what it can't follow, rather than show empty data."""
    build(stack.lower, {"f": BIG})
    root = stack.mount()
    os.chmod(root / "f", 0o600)
    stack.remount("metacopy=off")
    with fails(errno.EIO, errno.EPERM):
        (root / "f").read_bytes()


def test_metacopy_off_copies_data_at_once(stack: Stack) -> None:
    build(stack.lower, {"f": BIG})
    root = stack.mount("metacopy=off")
    os.chmod(root / "f", 0o600)
    stack.umount()
    assert (stack.up / "f").read_bytes() == BIG
    assert mark(stack.up / "f", "metacopy") is None


def test_metacopy_without_data_below(stack: Stack) -> None:
    build(stack.up, {"f": b""})
    os.truncate(stack.up / "f", 1000)
    os.setxattr(stack.up / "f", "trusted.overlay.metacopy", b"")
    root = stack.mount()
    with fails(errno.EIO, errno.ENOENT, errno.ESTALE):
        (root / "f").read_bytes()


@pytest.mark.parametrize("value", [b"../secret", b"/../secret", b"..", b"/", b"a/../../secret"])
def test_metacopy_redirects_never_leave_the_layers(stack: Stack, value: bytes) -> None:
    (stack.base / "secret").write_bytes(b"s" * 1000)
    build(stack.lower, {"d": {}})
    build(stack.up, {"f": b"", "d": {"f": b""}})
    for path in (stack.up / "f", stack.up / "d" / "f"):
        os.truncate(path, 1000)
        os.setxattr(path, "trusted.overlay.metacopy", b"")
        os.setxattr(path, "trusted.overlay.redirect", value)
    root = stack.mount()
    for path in (root / "f", root / "d" / "f"):
        try:
            assert b"s" not in path.read_bytes()
        except OSError as error:
            assert error.errno in {errno.EIO, errno.ENOENT, errno.ESTALE, errno.EACCES, errno.EINVAL}


def test_metacopy_redirect_does_not_follow_symlinks_out(stack: Stack) -> None:
    build(stack.base / "outside", {"secret": b"s" * 1000})
    (stack.lower / "link").symlink_to(stack.base / "outside")
    build(stack.up, {"f": b""})
    os.truncate(stack.up / "f", 1000)
    os.setxattr(stack.up / "f", "trusted.overlay.metacopy", b"")
    os.setxattr(stack.up / "f", "trusted.overlay.redirect", b"/link/secret")
    root = stack.mount()
    with fails(errno.EIO, errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
        (root / "f").read_bytes()


def test_our_metacopies_are_read_by_the_kernel(ours: Stack, check_by_overlay: Oracle) -> None:
    build(ours.lower, {"d": {"f": BIG, "h": BIG}, "g": BIG})
    root = ours.mount()
    os.chmod(root / "d" / "f", 0o600)
    os.rename(root / "d" / "f", root / "f2")
    os.setxattr(root / "g", "user.x", b"y")
    os.rename(root / "d", root / "d2")
    os.utime(root / "d2" / "h", (1, 1))
    view = snapshot(root)
    ours.umount()
    assert_same(view, snapshot(check_by_overlay(ours)))


def test_the_kernels_metacopies_are_read_by_ours(make_stack: StackMaker) -> None:
    kernel = make_stack("overlay")
    build(kernel.lower, {"d": {"f": BIG, "h": BIG}, "g": BIG})
    root = kernel.mount()
    os.chmod(root / "d" / "f", 0o600)
    os.rename(root / "d" / "f", root / "f2")
    os.rename(root / "d", root / "d2")
    os.utime(root / "d2" / "h", (1, 1))
    view = snapshot(root)
    kernel.umount()
    ours = kernel.by("union")
    ours.mount()
    try:
        assert_same(view, snapshot(root))
        with open(root / "f2", "ab") as stream:
            stream.write(b"+")
        view = snapshot(root)
    finally:
        ours.umount()
    kernel.mount()
    assert_same(view, snapshot(root))


def furnish_data_only(stack: Stack) -> None:
    """A lower of metacopy files that point by absolute redirect into data-only layers, as composefs makes."""
    stack.data = [stack.base / "data0", stack.base / "data1"]
    build(stack.data[0], {"aa": {"blob": BIG}})
    build(stack.data[1], {"bb": {"blob": BIG[:5000]}, "aa": {"blob": b"shadowed"}})
    build(stack.lower, {"one": b"", "sub": {"two": b""}, "plain": b"plain", "lost": b""})
    for path, size, where in (
        (stack.lower / "one", len(BIG), b"/aa/blob"),
        (stack.lower / "sub" / "two", 5000, b"/bb/blob"),
        (stack.lower / "lost", 10, b"/cc/none"),
    ):
        os.truncate(path, size)
        os.setxattr(path, "trusted.overlay.metacopy", b"")
        os.setxattr(path, "trusted.overlay.redirect", where)


def test_data_only_layers(stack: Stack) -> None:
    furnish_data_only(stack)
    root = stack.mount()
    assert sorted(os.listdir(root)) == ["lost", "one", "plain", "sub"], "data-only layers show no names"
    assert (root / "one").read_bytes() == BIG
    assert (root / "sub" / "two").read_bytes() == BIG[:5000]
    assert (root / "lost").stat().st_size == 10
    with fails(errno.EIO, errno.ENOENT):
        (root / "lost").read_bytes()
    with fails(errno.ENOENT):
        (root / "aa").stat()


def test_changes_over_data_only_layers(stack: Stack) -> None:
    furnish_data_only(stack)
    root = stack.mount()
    os.chmod(root / "one", 0o600)
    assert (root / "one").read_bytes() == BIG
    os.rename(root / "one", root / "sub" / "one2")
    with open(root / "sub" / "two", "ab") as stream:
        stream.write(b"+")
    before = snapshot(root / "sub")
    stack.remount()
    assert_same(before, snapshot(root / "sub"))
    assert (root / "sub" / "one2").read_bytes() == BIG
    assert (root / "sub" / "two").read_bytes() == BIG[:5000] + b"+"
    with open(root / "sub" / "one2", "r+b") as stream:
        stream.write(b"Z")
    assert (root / "sub" / "one2").read_bytes() == b"Z" + BIG[1:]
    assert (stack.data[0] / "aa" / "blob").read_bytes() == BIG


def test_kernel_reads_our_upper_over_data_only_layers(ours: Stack, check_by_overlay: Oracle) -> None:
    furnish_data_only(ours)
    os.unlink(ours.lower / "lost")
    root = ours.mount()
    os.chmod(root / "one", 0o600)
    os.rename(root / "sub", root / "sub2")
    view = snapshot(root)
    ours.umount()
    assert_same(view, snapshot(check_by_overlay(ours)))


def test_read_only_union_of_lower_and_data(stack: Stack) -> None:
    furnish_data_only(stack)
    stack.upper = None
    try:
        root = stack.mount()
    except MountRefused as refused:
        raise AssertionError(str(refused)) from refused
    assert (root / "one").read_bytes() == BIG
    with fails(errno.EROFS):
        os.chmod(root / "one", 0o600)


@pytest.mark.parametrize("mode", [0o600, 0o4755], ids=["replaced", "in place"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_metacopy_that_is_cut(ours: Stack, check_by_overlay: Oracle, size: int, mode: int) -> None:
    """Its size may not change as long as it has its mark: a kill in between would leave what nobody reads alike."""
    data = bytes(range(256)) * 40
    (ours.lower / "f").write_bytes(data)
    root = ours.mount()
    with open(root / "f", "rb", buffering=0) as before:
        os.chmod(root / "f", mode)
        marked = (ours.up / "f").stat().st_ino
        os.truncate(root / "f", size)
        assert before.read() == data[:size]
        with open(root / "f", "ab") as stream:
            stream.write(b"tail")
        assert before.read() == b"tail"
    assert ((ours.up / "f").stat().st_ino == marked) == (mode == 0o4755)
    ours.remount()
    assert (root / "f").read_bytes() == data[:size] + b"tail"
    ours.umount()
    assert (ours.up / "f").read_bytes() == data[:size] + b"tail"
    assert os.listdir(ours.work / "work") == []
    assert (check_by_overlay(ours) / "f").read_bytes() == data[:size] + b"tail"


def furnish_of_all_kinds(root: Path) -> None:
    """Files that are copied in one step, and such as are not."""
    build(
        root,
        {
            "plain": b"p" * 5000,
            "empty": b"",
            "owned": File(b"o" * 100, 0o4711, 1234, 5678, {}, -(10**17) - 7),
            "attributes": File(b"a" * 100, xattrs={"user.a": b"1", "trusted.b": b"2"}),
            "linked": b"l",
            "flags": b"f" * 100,
            "d": {"e": {"f": b"f", "g": b"g" * 70000}},
        },
    )
    os.link(root / "linked", root / "d" / "link")
    subprocess.run(["chattr", "+S", str(root / "flags")], check=True)


def change_attributes(root: Path) -> None:
    """Change each file's mode, owner or times, all in one directory alike."""
    for base, _, names in os.walk(root):
        for number, name in enumerate(sorted(names)):
            path = os.path.join(base, name)
            if number % 3 == 0:
                os.chown(path, 7, -1)
            elif number % 3 == 1:
                os.chmod(path, 0o2751)
            else:
                os.utime(path, ns=(10**18 + 5, 10**18 + 3))


@pytest.mark.parametrize(("options", "host"), [("", "ext4"), ("metacopy=off", "xfs"), ("metacopy=off", "ext4")])
def test_upper_is_left_as_overlayfs_leaves_it(
    make_stack: StackMaker, on_file_system: Callable[[str], Path], options: str, host: str
) -> None:
    """Marks, origins, owners, modes, times: all that is in upper after the same changes over the very same lower."""
    base = on_file_system(host)
    ours = make_stack("union", name="ours", base=base, options=options)
    furnish_of_all_kinds(ours.lower)
    oracle = make_stack("overlay", name="theirs", base=base, options=options)
    oracle.lowers = ours.lowers
    for stack in (ours, oracle):
        change_attributes(stack.mount())
        stack.umount()
    left, right = snapshot(ours.up), snapshot(oracle.up)
    del left[b""], right[b""]  # the root has a random UUID, and overlayfs's names its lower, for the index
    assert_same(left, right)
    assert (mark(ours.up / "d" / "e" / "g", "metacopy") is None) == bool(options)
    assert os.listdir(ours.work / "work") == []
    ours.mount()
    oracle.mount()
    assert_same(snapshot(ours.mnt), snapshot(oracle.mnt))
    ours.umount()
    oracle.umount()


@pytest.mark.parametrize("change", [lambda path: os.chmod(path, 0o640), lambda path: open(path, "ab").close()])
def test_a_copy_that_shares_its_data(
    make_stack: StackMaker, on_file_system: Callable[[str], Path], change: Callable[[Path], None]
) -> None:
    """It takes no room; who had the file open before sees what is written to it, and the lower file stays as it is."""
    base = on_file_system("xfs")
    ours = make_stack("union", base=base, options="metacopy=off")
    data = os.urandom(32 << 20)
    build(ours.lower, {"f": data, "g": b"g"})
    root = ours.mount()
    os.sync()
    free = os.statvfs(base).f_bavail
    with open(root / "f", "rb", buffering=0) as before:
        assert before.read(4) == data[:4]
        change(root / "f")
        assert ours.counter("copy_ups") == 1
        assert (free - os.statvfs(base).f_bavail) * os.statvfs(base).f_frsize < 4 << 20
        with open(root / "f", "r+b", buffering=0) as stream:
            stream.write(b"new!")
        before.seek(0)
        assert before.read(4) == b"new!"
    assert (root / "f").read_bytes() == b"new!" + data[4:]
    assert (ours.lower / "f").read_bytes() == data
    os.rename(root / "g", root / "moved")
    ours.umount()
    assert (ours.up / "f").read_bytes() == b"new!" + data[4:]
    assert (ours.up / "moved").read_bytes() == b"g"


def test_an_immutable_file_stays_as_it_is(ours: Stack) -> None:
    """What may not be changed is not copied up for it either."""
    build(ours.lower, {"f": b"f"})
    root = ours.mount()
    subprocess.run(["chattr", "+i", str(ours.lower / "f")], check=True)
    try:
        for change in (lambda: os.chmod(root / "f", 0o600), lambda: os.chown(root / "f", 1, 1)):
            with fails(errno.EPERM):
                change()
    finally:
        subprocess.run(["chattr", "-i", str(ours.lower / "f")], check=True)
    ours.umount()
    assert os.listdir(ours.up) == []
