"""Mounts that show other owners than their layers have; with the native layer and without."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.conftest import StackMaker
from tests.support.cli import program, refused, unionfs
from tests.support.mounts import Stack
from tests.support.people import as_user

# Stored 0 is shown as 1000, 1 to 65536 as 110000 and on.
MAP = ",".join(f"{kind}mapping=0:1000:1:1:110000:65536" for kind in ("uid", "gid"))
ROOT, ONE, TWO = 1000, 110000, 110001


@pytest.fixture(params=["on", "off"])
def native(request: pytest.FixtureRequest) -> str:
    return f"native={request.param}"


@pytest.fixture
def union(make_stack: StackMaker, native: str) -> Stack:
    """Files of stored owners 0, 1 and 70000, and a directory of 1, in the lower; not yet mounted."""
    stack = make_stack("union", options=native)
    for name, owner in (("root", 0), ("one", 1), ("none", 70000)):
        (stack.lower / name).write_text(name)
        os.chown(stack.lower / name, owner, owner)
    (stack.lower / "dir").mkdir()
    os.chown(stack.lower / "dir", 1, 1)
    return stack


def owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


def test_what_is_shown(union: Stack) -> None:
    mnt = union.mount(MAP)
    assert owner(mnt / "root") == (ROOT, ROOT)
    assert owner(mnt / "one") == owner(mnt / "dir") == (ONE, ONE)
    assert owner(mnt / "none") == (65534, 65534)
    with os.scandir(mnt) as entries:
        shown = {entry.name: entry.stat(follow_symlinks=False).st_uid for entry in entries}
    assert shown == {"root": ROOT, "one": ONE, "none": 65534, "dir": ONE}
    with (mnt / "one").open() as file:
        assert os.fstat(file.fileno()).st_uid == ONE


def test_what_somebody_makes_is_stored_as_theirs(union: Stack) -> None:
    mnt = union.mount(MAP)

    def make() -> None:
        directory = mnt / "dir"
        (directory / "file").write_text("mine")
        (directory / "sub").mkdir()
        (directory / "link").symlink_to("file")
        os.mkfifo(directory / "fifo")
        with (directory / "open").open("w+") as file:
            assert os.fstat(file.fileno()).st_uid == ONE
            file.write("more")
            file.flush()
            os.fchmod(file.fileno(), 0o600)
            assert (os.fstat(file.fileno()).st_uid, os.fstat(file.fileno()).st_size) == (ONE, 4)

    as_user(ONE, make)
    for name in ("file", "sub", "link", "fifo", "open"):
        assert owner(mnt / "dir" / name) == (ONE, ONE)
        assert owner(union.up / "dir" / name) == (1, 1)
    union.remount(MAP)
    assert owner(mnt / "dir" / "sub") == (ONE, ONE)


def test_who_has_no_number_makes_what_is_nobodys(union: Stack) -> None:
    mnt = union.mount(MAP)
    (mnt / "by root").touch()
    assert owner(union.up / "by root") == (65534, 65534)
    assert owner(mnt / "by root") == (175533, 175533)


def test_chown(union: Stack) -> None:
    mnt = union.mount(MAP)
    os.chown(mnt / "root", TWO, ONE)
    assert (owner(mnt / "root"), owner(union.up / "root")) == ((TWO, ONE), (2, 1))
    os.chown(mnt / "root", -1, ROOT)
    assert (owner(mnt / "root"), owner(union.up / "root")) == ((TWO, ROOT), (2, 0))
    with (mnt / "one").open("r+") as file:
        os.fchown(file.fileno(), ROOT, ROOT)
        assert owner(union.up / "one") == (0, 0)
    os.symlink("x", mnt / "link")
    os.chown(mnt / "link", ONE, TWO, follow_symlinks=False)
    assert (owner(mnt / "link"), owner(union.up / "link")) == ((ONE, TWO), (1, 2))
    with pytest.raises(OSError, match="too large") as caught:
        os.chown(mnt / "one", 5, -1)
    assert caught.value.errno == errno.EOVERFLOW
    assert owner(union.up / "one") == (0, 0)


def test_permissions_are_those_of_the_owner_shown(union: Stack) -> None:
    mnt = union.mount(MAP)
    os.chmod(mnt / "one", 0o600)
    assert as_user(ONE, (mnt / "one").read_text) == "one"
    for stranger in (1, TWO):
        with pytest.raises(PermissionError):
            as_user(stranger, (mnt / "one").read_text)


def test_copy_up_keeps_the_owner_stored(union: Stack) -> None:
    mnt = union.mount(MAP)
    (mnt / "one").write_text("other")
    os.chmod(mnt / "none", 0o640)
    assert owner(union.up / "one") == (1, 1)
    assert owner(union.up / "none") == (70000, 70000)
    assert owner(mnt / "none") == (65534, 65534)


def test_set_group_id_directories_pass_their_group_on(union: Stack) -> None:
    mnt = union.mount(MAP)
    os.chmod(mnt / "dir", 0o2777)
    as_user(TWO, (mnt / "dir" / "sub").mkdir)
    assert owner(mnt / "dir" / "sub") == (TWO, ONE)
    assert owner(union.up / "dir" / "sub") == (2, 1)


def test_set_group_id_stays_for_who_is_in_the_group(union: Stack) -> None:
    """The groups of a process are shown ones."""
    mnt = union.mount(MAP)
    os.chown(mnt / "one", TWO, ONE)

    def open_and_change() -> int:
        os.chmod(mnt / "one", 0o2755)
        return stat.S_IMODE((mnt / "one").stat().st_mode)

    assert as_user(TWO, open_and_change, groups=(ONE,)) == 0o2755


def test_a_write_clears_set_user_id(union: Stack) -> None:
    mnt = union.mount(MAP)
    (mnt / "suid").touch()
    os.chown(mnt / "suid", ONE, ONE)
    os.chmod(mnt / "suid", 0o4777)

    def write() -> None:
        with (mnt / "suid").open("a") as file:
            file.write("x")

    as_user(TWO, write)
    assert (mnt / "suid").stat().st_mode & 0o7777 == 0o777


def test_root_may_what_root_may(union: Stack) -> None:
    """Also root of the machine, who has no number there."""
    mnt = union.mount(MAP)
    os.chown(mnt / "one", TWO, ONE)
    os.chmod(mnt / "one", 0o6755)
    os.chown(mnt / "one", -1, -1)
    os.chmod(mnt / "one", 0o6755)
    as_user(ROOT, lambda: (mnt / "root").write_text("x"))
    assert program(["setfacl", "-m", f"u:{TWO}:r", str(mnt / "one")]).status == 0
    assert (mnt / "one").stat().st_mode & stat.S_ISGID


def test_acls_are_translated(union: Stack) -> None:
    program(["setfacl", "-m", "u:5:r,g:6:rw", str(union.lower / "root")])
    mnt = union.mount(MAP)
    shown = program(["getfacl", "-nc", str(mnt / "root")]).out
    assert "user:110004:r--" in shown
    assert "group:110005:rw-" in shown
    assert program(["setfacl", "-m", "u:110008:rwx", str(mnt / "root")]).status == 0
    assert "user:9:rwx" in program(["getfacl", "-nc", str(union.up / "root")]).out
    assert program(["setfacl", "-m", "u:8:rwx", str(mnt / "root")]).status != 0


def test_default_acls_are_inherited(union: Stack) -> None:
    program(["setfacl", "-d", "-m", "u:5:rwx", str(union.lower / "dir")])
    mnt = union.mount(MAP)
    as_user(ONE, (mnt / "dir" / "new").touch)
    assert "user:110004:rwx" in program(["getfacl", "-nc", str(mnt / "dir" / "new")]).out
    assert "user:5:rwx" in program(["getfacl", "-nc", str(union.up / "dir" / "new")]).out


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ("squash_to_root", (0, 0)),
        ("squash_to_uid=5,squash_to_gid=6", (5, 6)),
        ("squash_to_root,squash_to_gid=6", (0, 6)),
        ("squash_to_gid=6,squash_to_root", (0, 6)),
        (f"{MAP},squash_to_uid=7", (7, ONE)),
    ],
)
def test_squashing(union: Stack, options: str, shown: tuple[int, int]) -> None:
    mnt = union.mount(options)
    assert owner(mnt / "one") == owner(mnt / "dir") == shown
    os.chmod(mnt / "one", 0o600)
    assert owner(mnt / "one") == shown
    assert owner(union.up / "one") == (1, 1)


def test_squashed_creations_are_stored_as_theirs(union: Stack) -> None:
    (union.lower / "dir").chmod(0o777)
    mnt = union.mount("squash_to_root")
    as_user(ONE, (mnt / "dir" / "new").touch)
    assert owner(mnt / "dir" / "new") == (0, 0)
    assert owner(union.up / "dir" / "new") == (ONE, ONE)


def test_static_nlink(union: Stack) -> None:
    os.link(union.lower / "one", union.lower / "two")
    mnt = union.mount("static_nlink")
    (mnt / "new").mkdir()
    (mnt / "new" / "sub").mkdir()
    assert [path.stat().st_nlink for path in (mnt, mnt / "dir", mnt / "new", mnt / "one")] == [1, 1, 1, 2]
    fd = os.open(mnt / "new", os.O_RDONLY)
    assert os.fstat(fd).st_nlink == 1
    os.close(fd)


def test_noacl(union: Stack) -> None:
    program(["setfacl", "-m", "u:5:r", str(union.lower / "root")])
    mnt = union.mount("noacl")
    assert "system.posix_acl_access" not in os.listxattr(mnt / "root")
    for call in (
        lambda: os.getxattr(mnt / "root", "system.posix_acl_access"),
        lambda: os.setxattr(mnt / "root", "system.posix_acl_access", b"\2\0\0\0"),
    ):
        with pytest.raises(OSError, match="not supported") as caught:
            call()
        assert caught.value.errno == errno.EOPNOTSUPP
    with (mnt / "new").open("w") as file, pytest.raises(OSError, match="not supported"):
        os.getxattr(file.fileno(), "system.posix_acl_access")
    os.setxattr(mnt / "root", "user.x", b"y")
    assert os.getxattr(mnt / "root", "user.x") == b"y"


def test_what_is_refused(union: Stack) -> None:
    words = [union.lower, union.up, union.mnt]
    for option in ("uidmapping=0:1", "gidmapping=x", "squash_to_uid=x", "squash_to_root=1", "noacl=1"):
        refused(unionfs("mount", "-o", option, *words), 2, option.partition("=")[0])
    volume = ["--root", union.base / "store", "mount", "--bind-mode", "fuse", "-v", f"{union.base / 'host'}:/v"]
    refused(unionfs(*volume, "-o", MAP, *words), 2, "volumes")
