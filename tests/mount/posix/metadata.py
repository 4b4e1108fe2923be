"""Modes, owners, times, extended attributes and ACLs."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

from tests.mount.posix.table import behaviour, fails
from tests.support import layers
from tests.support.layers import File, Symlink, acl
from tests.support.people import STAFF

TEXT = b"text" * 1000
OPEN_ACL = acl(
    (layers.ACL_USER_OBJ, 6),
    (layers.ACL_USER, 4, 12345),
    (layers.ACL_GROUP_OBJ, 4),
    (layers.ACL_MASK, 6),
    (layers.ACL_OTHER, 0),
)


@behaviour({"f": TEXT, "d": {}})
def chmod_keeps_data_and_sets_ctime(d: Path) -> None:
    before = (d / "f").stat()
    time.sleep(0.02)
    os.chmod(d / "f", 0o6751)
    os.chmod(d / "d", 0o1777)
    after = (d / "f").stat()
    assert stat.S_IMODE(after.st_mode) == 0o6751
    assert stat.S_IMODE((d / "d").stat().st_mode) == 0o1777
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert after.st_ctime_ns > before.st_ctime_ns
    assert (d / "f").read_bytes() == TEXT


@behaviour({"f": TEXT})
def chmod_then_write(d: Path) -> None:
    os.chmod(d / "f", 0o600)
    with open(d / "f", "r+b") as stream:
        stream.write(b"W")
    assert (d / "f").read_bytes() == b"W" + TEXT[1:]
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o600


@behaviour({"f": TEXT, "d": {}}, privileged=True)
def chown_keeps_the_rest(d: Path) -> None:
    os.chown(d / "f", 77, -1)
    os.chown(d / "f", -1, 88)
    os.chown(d / "d", 5, 6)
    status = (d / "f").stat()
    assert (status.st_uid, status.st_gid, status.st_size) == (77, 88, len(TEXT))
    assert ((d / "d").stat().st_uid, (d / "d").stat().st_gid) == (5, 6)
    assert (d / "f").read_bytes() == TEXT


@behaviour({"f": File(TEXT, 0o6755)}, privileged=True)
def chown_clears_suid(d: Path) -> None:
    os.chown(d / "f", 77, 88)
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o755


@behaviour({"f": File(TEXT, mtime=1_000_000_000_123_456_789), "d": {"x": b""}})
def utimens_to_the_nanosecond(d: Path) -> None:
    assert (d / "f").stat().st_mtime_ns == 1_000_000_000_123_456_789
    os.utime(d / "f", ns=(123_456_789, 987_654_321_987_654_321))
    status = (d / "f").stat()
    assert (status.st_atime_ns, status.st_mtime_ns) == (123_456_789, 987_654_321_987_654_321)
    os.utime(d / "d", ns=(5, 6))
    assert (d / "d").stat().st_mtime_ns == 6
    os.utime(d / "f", ns=(0, 4_000_000_000 * 10**9))
    assert (d / "f").stat().st_mtime == 4_000_000_000
    assert (d / "f").read_bytes() == TEXT


@behaviour({"f": TEXT})
def utime_now(d: Path) -> None:
    before = time.time()
    os.utime(d / "f")
    assert before - 1 <= (d / "f").stat().st_mtime <= time.time() + 1


@behaviour({"f": TEXT})
def what_is_touched_keeps_its_place_in_time(d: Path) -> None:
    """What make(1) goes by: a file is not older than one that was touched before it, and touching makes it newest."""
    for number in range(20):
        (d / f"earlier{number}").write_bytes(b"")
        os.utime(d / "f")
        (d / f"later{number}").write_bytes(b"")
        times = [(d / name).stat().st_mtime_ns for name in (f"earlier{number}", "f", f"later{number}")]
        assert times == sorted(times)
        assert (d / "f").stat().st_atime_ns == times[1]
        time.sleep(0.0007)


@behaviour({"f": File(TEXT, mtime=10**18)})
def write_sets_mtime_and_chmod_does_not(d: Path) -> None:
    os.chmod(d / "f", 0o600)
    assert (d / "f").stat().st_mtime_ns == 10**18
    with open(d / "f", "r+b") as stream:
        stream.write(b"x")
    assert (d / "f").stat().st_mtime_ns > 10**18


# The kernel forgets mtime when the data follows a metacopy.
@behaviour({"f": File(TEXT, mtime=10**18)}, unlike="overlay-touched")
def opening_for_writing_alone_keeps_mtime(d: Path) -> None:
    os.close(os.open(d / "f", os.O_RDWR))
    assert (d / "f").stat().st_mtime_ns == 10**18


@behaviour({"f": File(TEXT, mtime=10**18)})
def truncate_to_the_same_size_sets_mtime(d: Path) -> None:
    os.truncate(d / "f", len(TEXT))
    assert (d / "f").stat().st_mtime_ns > 10**18


@behaviour({"f": File(TEXT, mtime=10**18), "empty": File(b"", mtime=10**18)})
def ftruncate_to_the_same_size_sets_mtime(d: Path) -> None:
    for name, size in ("f", len(TEXT)), ("empty", 0):
        descriptor = os.open(d / name, os.O_RDWR)
        os.utime(descriptor, ns=(7, 10**18))
        os.ftruncate(descriptor, size)
        assert os.fstat(descriptor).st_mtime_ns > 10**18
        os.close(descriptor)


@behaviour({"f": TEXT})
def fchmod_and_futimens_through_a_read_only_descriptor(d: Path) -> None:
    descriptor = os.open(d / "f", os.O_RDONLY)
    os.fchmod(descriptor, 0o640)
    os.utime(descriptor, ns=(7, 8))
    assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o640
    assert os.fstat(descriptor).st_mtime_ns == 8
    os.close(descriptor)
    assert (d / "f").stat().st_mtime_ns == 8
    assert (d / "f").read_bytes() == TEXT


@behaviour({"f": File(TEXT, xattrs={"user.was": b"here"}), "d": {}})
def user_xattrs(d: Path) -> None:
    assert os.getxattr(d / "f", "user.was") == b"here"
    os.setxattr(d / "f", "user.new", b"\0binary\xff")
    os.setxattr(d / "d", "user.dir", b"")
    assert sorted(os.listxattr(d / "f")) == ["user.new", "user.was"]
    assert os.getxattr(d / "f", "user.new") == b"\0binary\xff"
    assert os.getxattr(d / "d", "user.dir") == b""
    os.removexattr(d / "f", "user.was")
    assert os.listxattr(d / "f") == ["user.new"]
    assert (d / "f").read_bytes() == TEXT
    with fails(errno.ENODATA):
        os.getxattr(d / "f", "user.was")
    with fails(errno.ENODATA):
        os.removexattr(d / "f", "user.was")


@behaviour({"f": TEXT})
def xattr_flags_and_sizes(d: Path) -> None:
    with fails(errno.ENODATA):
        os.setxattr(d / "f", "user.x", b"1", os.XATTR_REPLACE)
    os.setxattr(d / "f", "user.x", b"1", os.XATTR_CREATE)
    with fails(errno.EEXIST):
        os.setxattr(d / "f", "user.x", b"2", os.XATTR_CREATE)
    os.setxattr(d / "f", "user.x", b"3", os.XATTR_REPLACE)
    os.setxattr(d / "f", "user.long", b"v" * 2000)
    assert os.getxattr(d / "f", "user.long") == b"v" * 2000
    with fails(errno.EOPNOTSUPP, errno.EINVAL):
        os.setxattr(d / "f", "nonsense.x", b"")


@behaviour({"s": Symlink("x")})
def user_xattrs_not_on_symlinks(d: Path) -> None:
    with fails(errno.EPERM, errno.EOPNOTSUPP):
        os.setxattr(d / "s", "user.x", b"", follow_symlinks=False)
    assert os.listxattr(d / "s", follow_symlinks=False) == []


@behaviour({"f": TEXT, "s": Symlink("x")}, privileged=True)
def trusted_and_security_xattrs(d: Path) -> None:
    os.setxattr(d / "f", "trusted.own", b"t")
    os.setxattr(d / "f", "security.own", b"s")
    assert os.getxattr(d / "f", "trusted.own") == b"t"
    assert os.getxattr(d / "f", "security.own") == b"s"
    os.setxattr(d / "s", "trusted.link", b"l", follow_symlinks=False)
    assert os.getxattr(d / "s", "trusted.link", follow_symlinks=False) == b"l"
    assert sorted(os.listxattr(d / "f")) == ["security.own", "trusted.own"]


@behaviour({"f": File(TEXT, xattrs={layers.ACL_ACCESS: OPEN_ACL}), "d": {}})
def access_acls(d: Path) -> None:
    assert os.getxattr(d / "f", layers.ACL_ACCESS) == OPEN_ACL
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o660
    os.chmod(d / "f", 0o640)
    changed = os.getxattr(d / "f", layers.ACL_ACCESS)
    assert changed == OPEN_ACL.replace(acl((layers.ACL_MASK, 6))[4:], acl((layers.ACL_MASK, 4))[4:])
    os.setxattr(d / "d", layers.ACL_ACCESS, OPEN_ACL)
    assert stat.S_IMODE((d / "d").stat().st_mode) == 0o660
    os.removexattr(d / "f", layers.ACL_ACCESS)
    assert layers.ACL_ACCESS not in os.listxattr(d / "f")


@behaviour({"f": TEXT})
def an_acl_that_says_no_more_than_the_mode(d: Path) -> None:
    os.setxattr(
        d / "f",
        layers.ACL_ACCESS,
        acl((layers.ACL_USER_OBJ, 6), (layers.ACL_GROUP_OBJ, 4), (layers.ACL_OTHER, 4)),
    )
    assert stat.S_IMODE((d / "f").stat().st_mode) == 0o644
    assert layers.ACL_ACCESS not in os.listxattr(d / "f")
    with fails(errno.EINVAL, errno.EOPNOTSUPP):
        os.setxattr(d / "f", layers.ACL_ACCESS, b"nonsense")
    with fails(errno.EACCES):
        os.setxattr(d / "f", layers.ACL_DEFAULT, OPEN_ACL)


@behaviour({"d": {}})
def default_acls_are_inherited_and_mask_the_umask(d: Path) -> None:
    default = acl(
        (layers.ACL_USER_OBJ, 7),
        (layers.ACL_USER, 7, 12345),
        (layers.ACL_GROUP_OBJ, 5),
        (layers.ACL_MASK, 7),
        (layers.ACL_OTHER, 0),
    )
    os.setxattr(d / "d", layers.ACL_DEFAULT, default)
    old = os.umask(0o077)
    try:
        os.close(os.open(d / "d" / "f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(d / "d" / "sub", 0o777)
        os.mkfifo(d / "d" / "p", 0o666)
        os.symlink("x", d / "d" / "s")
    finally:
        os.umask(old)
    assert stat.S_IMODE((d / "d" / "f").stat().st_mode) == 0o660
    assert stat.S_IMODE((d / "d" / "sub").stat().st_mode) == 0o770
    assert stat.S_IMODE((d / "d" / "p").stat().st_mode) == 0o660
    assert os.getxattr(d / "d" / "sub", layers.ACL_DEFAULT) == default
    expected = acl(
        (layers.ACL_USER_OBJ, 6),
        (layers.ACL_USER, 7, 12345),
        (layers.ACL_GROUP_OBJ, 5),
        (layers.ACL_MASK, 6),
        (layers.ACL_OTHER, 0),
    )
    assert os.getxattr(d / "d" / "f", layers.ACL_ACCESS) == expected
    assert os.getxattr(d / "d" / "p", layers.ACL_ACCESS) == expected


@behaviour({"d": {"x": b""}})
def umask_applies_without_default_acl(d: Path) -> None:
    old = os.umask(0o027)
    try:
        os.close(os.open(d / "d" / "f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(d / "d" / "sub", 0o777)
        os.mkfifo(d / "d" / "p", 0o666)
    finally:
        os.umask(old)
    assert stat.S_IMODE((d / "d" / "f").stat().st_mode) == 0o640
    assert stat.S_IMODE((d / "d" / "sub").stat().st_mode) == 0o750
    assert stat.S_IMODE((d / "d" / "p").stat().st_mode) == 0o640


@behaviour({"d": {}}, privileged=True)
def setgid_directory_hands_on_its_group(d: Path) -> None:
    os.chown(d / "d", -1, STAFF)
    os.chmod(d / "d", 0o2775)
    (d / "d" / "f").touch()
    os.mkdir(d / "d" / "sub")
    os.symlink("x", d / "d" / "s")
    os.mkfifo(d / "d" / "p")
    assert (d / "d" / "f").stat().st_gid == STAFF
    assert os.lstat(d / "d" / "s").st_gid == STAFF
    assert os.lstat(d / "d" / "p").st_gid == STAFF
    assert (d / "d" / "sub").stat().st_gid == STAFF
    assert (d / "d" / "sub").stat().st_mode & stat.S_ISGID
    assert not (d / "d" / "f").stat().st_mode & stat.S_ISGID


@behaviour({"f": TEXT})
def access_checks(d: Path) -> None:
    assert os.access(d / "f", os.R_OK | os.W_OK)
    os.chmod(d / "f", 0o644)
    assert not os.access(d / "f", os.X_OK)
    os.chmod(d / "f", 0o755)
    assert os.access(d / "f", os.X_OK)
    assert not os.access(d / "missing", os.F_OK)


@behaviour({"f": TEXT})
def statvfs_makes_sense(d: Path) -> None:
    found = os.statvfs(d)
    assert found.f_bsize > 0
    assert found.f_blocks >= found.f_bfree >= found.f_bavail
    assert found.f_namemax == 255
    assert os.statvfs(d / "f").f_blocks == found.f_blocks
