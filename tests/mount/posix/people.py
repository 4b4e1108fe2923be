"""Who may do what: other users, groups, sticky and setgid directories, suid bits and capabilities."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from tests.mount.posix.table import behaviour, fails
from tests.support import layers
from tests.support.layers import File, acl, capability
from tests.support.people import ALICE, BOB, STAFF, as_user

TEXT = b"text" * 100


def _write(path: Path, data: bytes = b"x") -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


@behaviour({"f": File(TEXT, 0o640), "d": {"x": b""}}, privileged=True)
def others_are_kept_out(d: Path) -> None:
    with fails(errno.EACCES):
        as_user(ALICE, lambda: os.open(d / "f", os.O_RDONLY))
    with fails(errno.EPERM):
        as_user(ALICE, lambda: os.chmod(d / "f", 0o777))
    with fails(errno.EPERM):
        as_user(ALICE, lambda: os.chown(d / "f", ALICE, -1))
    with fails(errno.EACCES):
        as_user(ALICE, lambda: os.mkdir(d / "new"))
    with fails(errno.EACCES):
        as_user(ALICE, lambda: os.unlink(d / "f"))
    with fails(errno.EACCES):
        as_user(ALICE, lambda: os.rename(d / "f", d / "g"))
    with fails(errno.EACCES, errno.EPERM):
        as_user(ALICE, lambda: os.utime(d / "f", (1, 1)))
    os.chmod(d / "d", 0o700)
    with fails(errno.EACCES):
        as_user(ALICE, lambda: os.listdir(d / "d"))
    with fails(errno.EACCES):
        as_user(ALICE, lambda: os.stat(d / "d" / "x"))


@behaviour({"f": File(TEXT, 0o664, ALICE, STAFF)}, privileged=True)
def owner_group_and_others(d: Path) -> None:
    as_user(ALICE, lambda: _write(d / "f"))
    as_user(BOB, lambda: _write(d / "f"), gid=STAFF)
    as_user(BOB, lambda: _write(d / "f"), groups=(STAFF,))
    with fails(errno.EACCES):
        as_user(BOB, lambda: _write(d / "f"))
    as_user(ALICE, lambda: os.chmod(d / "f", 0o060))
    with fails(errno.EACCES):
        as_user(ALICE, lambda: _write(d / "f"))
    as_user(BOB, lambda: _write(d / "f"), groups=(STAFF,))


@behaviour({"open": {}}, privileged=True)
def new_files_belong_to_their_maker(d: Path) -> None:
    os.chmod(d / "open", 0o777)

    def act() -> None:
        (d / "open" / "f").write_bytes(b"alice's")
        os.mkdir(d / "open" / "sub")
        os.symlink("x", d / "open" / "s")
        os.mkfifo(d / "open" / "p")

    as_user(ALICE, act, gid=STAFF)
    for name in ("f", "sub", "s", "p"):
        status = os.lstat(d / "open" / name)
        assert (status.st_uid, status.st_gid) == (ALICE, STAFF), name


@behaviour({"f": File(TEXT, 0o666, ALICE, ALICE), "d": {}}, privileged=True)
def copies_keep_their_owner_whoever_writes(d: Path) -> None:
    as_user(BOB, lambda: _write(d / "f"))
    status = (d / "f").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (ALICE, ALICE, 0o666)


@behaviour({"t": {"f": File(TEXT, 0o666, ALICE, ALICE)}}, privileged=True)
def sticky_directory_protects(d: Path) -> None:
    os.chmod(d / "t", 0o1777)
    with fails(errno.EPERM):
        as_user(BOB, lambda: os.unlink(d / "t" / "f"))
    with fails(errno.EPERM):
        as_user(BOB, lambda: os.rename(d / "t" / "f", d / "t" / "g"))
    as_user(BOB, lambda: (d / "t" / "bob").touch())
    as_user(BOB, lambda: os.unlink(d / "t" / "bob"))
    as_user(ALICE, lambda: os.unlink(d / "t" / "f"))


@behaviour({"d": {}}, privileged=True)
def setgid_directory_for_other_users(d: Path) -> None:
    os.chown(d / "d", -1, STAFF)
    os.chmod(d / "d", 0o2777)

    def act() -> None:
        os.close(os.open(d / "d" / "f", os.O_CREAT | os.O_WRONLY, 0o2775))
        os.mkdir(d / "d" / "sub")

    as_user(ALICE, act)
    status = (d / "d" / "f").stat()
    assert (status.st_uid, status.st_gid) == (ALICE, STAFF)
    assert not status.st_mode & stat.S_ISGID, "an executable of a group the maker isn't in loses setgid"
    assert (d / "d" / "sub").stat().st_gid == STAFF
    assert (d / "d" / "sub").stat().st_mode & stat.S_ISGID


@behaviour({"f": File(TEXT, 0o666, ALICE, STAFF)}, privileged=True)
def chmod_setgid_without_being_in_the_group(d: Path) -> None:
    as_user(ALICE, lambda: os.chmod(d / "f", 0o2770))
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o770
    as_user(ALICE, lambda: os.chmod(d / "f", 0o2770), groups=(STAFF,))
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o2770


# A file system of the kernel's own leaves the bit when an ACL goes.
@behaviour({"f": File(TEXT, 0o2770, ALICE, STAFF)}, privileged=True, unlike="plain-lower bind-lower bind-upper")
def acl_set_or_removed_without_being_in_the_group(d: Path) -> None:
    value = acl((layers.ACL_USER_OBJ, 6), (layers.ACL_GROUP_OBJ, 7), (layers.ACL_OTHER, 1))
    os.setxattr(d / "f", layers.ACL_ACCESS, value)
    for change in (
        lambda: os.setxattr(d / "f", layers.ACL_ACCESS, value),
        lambda: os.removexattr(d / "f", layers.ACL_ACCESS),
    ):
        for groups, bit in (((STAFF,), stat.S_ISGID), ((), 0)):
            os.chmod(d / "f", 0o2671)
            as_user(ALICE, change, groups=groups)
            assert (d / "f").stat().st_mode & stat.S_ISGID == bit


@behaviour({"f": File(TEXT, 0o666, ALICE, ALICE)}, privileged=True)
def chown_to_own_groups_only(d: Path) -> None:
    with fails(errno.EPERM):
        as_user(ALICE, lambda: os.chown(d / "f", -1, STAFF))
    as_user(ALICE, lambda: os.chown(d / "f", -1, STAFF), groups=(STAFF,))
    assert (d / "f").stat().st_gid == STAFF
    with fails(errno.EPERM):
        as_user(ALICE, lambda: os.chown(d / "f", BOB, -1))


@behaviour({"f": File(TEXT, 0o6777, ALICE, ALICE)}, privileged=True)
def write_by_another_clears_suid_and_sgid(d: Path) -> None:
    as_user(BOB, lambda: _write(d / "f"))
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o777
    assert (d / "f").read_bytes() == b"x" + TEXT[1:]


@behaviour({"f": File(TEXT, 0o6777, ALICE, ALICE)}, privileged=True)
def truncate_by_another_clears_suid_and_sgid(d: Path) -> None:
    as_user(BOB, lambda: os.truncate(d / "f", 3))
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o777


@behaviour({"f": File(TEXT, 0o6777, ALICE, ALICE)}, privileged=True)
def open_trunc_by_another_clears_suid_and_sgid(d: Path) -> None:
    as_user(BOB, lambda: os.close(os.open(d / "f", os.O_WRONLY | os.O_TRUNC)))
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o777


@behaviour(
    {
        "f": File(TEXT, 0o6777, ALICE, ALICE),
        "g": File(TEXT, 0o777, ALICE, ALICE),
        "h": File(TEXT, 0o4700, ALICE, ALICE),
        "i": File(TEXT, 0o664, ALICE, ALICE),
    },
    privileged=True,
)
def chown_to_nobody_in_particular(d: Path) -> None:
    """It clears suid and sgid, which is the owner's right alone; where there are none, anyone may."""
    with fails(errno.EPERM):
        as_user(BOB, lambda: os.chown(d / "f", -1, -1))
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o6777
    as_user(BOB, lambda: os.chown(d / "g", -1, -1))
    with open(d / "h", "r+b", buffering=0) as opened:
        as_user(BOB, lambda: opened.write(b"x"))
    assert stat.S_IMODE((d / "h").stat().st_mode) == 0o700
    with open(d / "i", "r+b", buffering=0) as opened:
        os.fchmod(opened.fileno(), 0o2664)
        as_user(BOB, lambda: opened.write(b"x"))
    assert stat.S_IMODE((d / "i").stat().st_mode) == 0o664
    as_user(ALICE, lambda: os.chown(d / "f", -1, -1))
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o777


@behaviour(privileged=True)
def chown_of_a_fifo_to_nobody_in_particular(d: Path) -> None:
    for mode, left in ((0o4777, 0o777), (0o2755, 0o755), (0o2666, 0o2666), (0o666, 0o666)):
        fifo = d / f"{mode:o}"
        os.mkfifo(fifo)
        os.chown(fifo, ALICE, ALICE)
        os.chmod(fifo, mode)
        if mode & 0o6000:
            with fails(errno.EPERM):
                as_user(BOB, lambda fifo=fifo: os.chown(fifo, -1, -1))
        else:
            as_user(BOB, lambda fifo=fifo: os.chown(fifo, -1, -1))
        assert stat.S_IMODE(fifo.stat().st_mode) == mode
        as_user(ALICE, lambda fifo=fifo: os.chown(fifo, -1, -1))
        assert stat.S_IMODE(fifo.stat().st_mode) == left


@behaviour({"f": File(TEXT, 0o4777, ALICE, ALICE)}, privileged=True)
def write_by_root_keeps_suid(d: Path) -> None:
    _write(d / "f")
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o4777


@behaviour({"f": File(TEXT, 0o6755, ALICE, ALICE)}, privileged=True)
def chown_by_the_owner_clears_suid(d: Path) -> None:
    as_user(ALICE, lambda: os.chown(d / "f", -1, STAFF), groups=(STAFF,))
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o755


@behaviour({"f": File(TEXT, 0o755, xattrs={"security.capability": capability()})}, privileged=True)
def write_clears_capabilities(d: Path) -> None:
    assert os.getxattr(d / "f", "security.capability") == capability()
    _write(d / "f")
    assert "security.capability" not in os.listxattr(d / "f")


@behaviour({"f": File(TEXT, 0o755, xattrs={"security.capability": capability()})}, privileged=True)
def truncate_clears_capabilities(d: Path) -> None:
    os.truncate(d / "f", 5)
    assert "security.capability" not in os.listxattr(d / "f")


@behaviour({"f": File(TEXT, 0o755, xattrs={"security.capability": capability()})}, privileged=True)
def chown_clears_capabilities(d: Path) -> None:
    os.chown(d / "f", ALICE, -1)
    assert "security.capability" not in os.listxattr(d / "f")


@behaviour({"f": File(TEXT, 0o755, xattrs={"security.capability": capability()})}, privileged=True)
def chmod_and_rename_keep_capabilities(d: Path) -> None:
    os.chmod(d / "f", 0o750)
    os.utime(d / "f", (1, 1))
    os.rename(d / "f", d / "g")
    assert os.getxattr(d / "g", "security.capability") == capability()


@behaviour({"f": File(TEXT, 0o600)}, privileged=True)
def acl_lets_one_more_user_in(d: Path) -> None:
    os.setxattr(
        d / "f",
        layers.ACL_ACCESS,
        acl(
            (layers.ACL_USER_OBJ, 6),
            (layers.ACL_USER, 6, ALICE),
            (layers.ACL_GROUP_OBJ, 0),
            (layers.ACL_GROUP, 4, STAFF),
            (layers.ACL_MASK, 6),
            (layers.ACL_OTHER, 0),
        ),
    )
    as_user(ALICE, lambda: _write(d / "f"))
    assert as_user(BOB, (d / "f").read_bytes, groups=(STAFF,)) == b"x" + TEXT[1:]
    with fails(errno.EACCES):
        as_user(BOB, lambda: _write(d / "f"), groups=(STAFF,))
    with fails(errno.EACCES):
        as_user(BOB, (d / "f").read_bytes)
    with fails(errno.EPERM):
        as_user(ALICE, lambda: os.removexattr(d / "f", layers.ACL_ACCESS))


@behaviour({"f": File(TEXT, 0o644)}, privileged=True)
def xattrs_by_others(d: Path) -> None:
    with fails(errno.EACCES, errno.EPERM):
        as_user(ALICE, lambda: os.setxattr(d / "f", "user.x", b""))
    with fails(errno.EPERM):
        as_user(ALICE, lambda: os.setxattr(d / "f", "trusted.x", b""))
    os.setxattr(d / "f", "trusted.x", b"secret")
    os.setxattr(d / "f", "user.x", b"open")
    assert as_user(ALICE, lambda: os.listxattr(d / "f")) == ["user.x"]
    with fails(errno.ENODATA, errno.EPERM):
        as_user(ALICE, lambda: os.getxattr(d / "f", "trusted.x"))


@behaviour({"d": {"f": File(TEXT, 0o644, ALICE, ALICE)}}, privileged=True)
def search_permission_on_the_way(d: Path) -> None:
    os.chmod(d / "d", 0o711)
    assert as_user(ALICE, (d / "d" / "f").read_bytes) == TEXT
    with fails(errno.EACCES):
        as_user(ALICE, lambda: os.listdir(d / "d"))
    os.chmod(d / "d", 0o744)
    assert as_user(ALICE, lambda: os.listdir(d / "d")) == ["f"]
    with fails(errno.EACCES):
        as_user(ALICE, (d / "d" / "f").read_bytes)


@behaviour({"f": File(TEXT, 0o600, ALICE, ALICE)}, privileged=True)
def descriptor_outlives_permission(d: Path) -> None:
    descriptor = as_user(ALICE, lambda: os.open(d / "f", os.O_RDWR))
    os.chmod(d / "f", 0)
    as_user(BOB, lambda: os.pwrite(descriptor, b"x", 0))
    assert as_user(BOB, lambda: os.pread(descriptor, 4, 0)) == b"xext"
    os.close(descriptor)


@behaviour({"f": File(TEXT, 0o400, ALICE, ALICE)}, privileged=True)
def owner_of_a_read_only_file(d: Path) -> None:
    with fails(errno.EACCES):
        as_user(ALICE, lambda: _write(d / "f"))
    as_user(ALICE, lambda: os.utime(d / "f", (1, 2)))
    assert (d / "f").stat().st_mtime == 2
    as_user(ALICE, lambda: os.chmod(d / "f", 0o600))
    as_user(ALICE, lambda: _write(d / "f"))


@behaviour({"f": File(TEXT, 0o666)}, privileged=True)
def utime_now_needs_write_permission_only(d: Path) -> None:
    as_user(BOB, lambda: os.utime(d / "f"))
    with fails(errno.EPERM):
        as_user(BOB, lambda: os.utime(d / "f", (1, 2)))
