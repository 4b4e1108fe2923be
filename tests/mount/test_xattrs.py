"""Extended attributes of overlayfs's own: hidden in the merged view, escaped where users set them."""

from __future__ import annotations

import errno
import os

import pytest

from tests.mount.posix.table import fails
from tests.support.layers import TRUSTED, File, Symlink, build, mark, marks
from tests.support.mounts import Stack


def test_own_xattrs_are_hidden(stack: Stack) -> None:
    build(stack.lower, {"d": {"f": b"x" * 5000, "s": Symlink("f")}, "g": b""})
    root = stack.mount()
    os.chmod(root / "d" / "f", 0o600)
    os.lchown(root / "d" / "s", 1, 1)
    os.rename(root / "d", root / "e")
    (root / "d").mkdir()
    for path in (root, root / "e", root / "e" / "f", root / "e" / "s", root / "d"):
        assert os.listxattr(path, follow_symlinks=False) == [], path
        for name in ("origin", "opaque", "metacopy", "redirect", "impure", "nlink", "uuid"):
            with fails(errno.ENODATA):
                os.getxattr(path, TRUSTED + name, follow_symlinks=False)
    stack.umount()
    assert {"origin", "metacopy"} <= marks(stack.up / "e" / "f")
    assert {"origin", "redirect"} <= marks(stack.up / "e")


def test_xattrs_set_by_users_are_escaped(stack: Stack) -> None:
    build(stack.lower, {"d": {"f": b""}, "g": b""})
    root = stack.mount()
    os.setxattr(root / "d", "trusted.overlay.opaque", b"y")
    os.setxattr(root / "g", "trusted.overlay.metacopy", b"")
    os.setxattr(root / "g", "trusted.overlay.overlay.deep", b"z")
    os.setxattr(root / "g", "user.overlay.opaque", b"u")
    for _ in range(2):
        assert os.listxattr(root / "d") == ["trusted.overlay.opaque"]
        assert os.getxattr(root / "d", "trusted.overlay.opaque") == b"y"
        assert sorted(os.listxattr(root / "g")) == [
            "trusted.overlay.metacopy",
            "trusted.overlay.overlay.deep",
            "user.overlay.opaque",
        ]
        assert os.getxattr(root / "g", "user.overlay.opaque") == b"u"
        assert os.listdir(root / "d") == ["f"], "an escaped mark has no effect here"
        assert (root / "g").read_bytes() == b""
        stack.remount()
    os.removexattr(root / "g", "trusted.overlay.metacopy")
    with fails(errno.ENODATA):
        os.getxattr(root / "g", "trusted.overlay.metacopy")
    with fails(errno.ENODATA):
        os.removexattr(root / "g", "trusted.overlay.metacopy")
    stack.umount()
    assert mark(stack.up / "d", "overlay.opaque") == b"y"
    assert mark(stack.up / "d", "opaque") is None
    assert mark(stack.up / "g", "overlay.overlay.deep") == b"z"


def test_escaped_xattrs_in_lowers_are_shown_and_copied(stack: Stack) -> None:
    build(stack.lower, {"f": File(b"x", xattrs={"trusted.overlay.overlay.origin": b"nested"}), "d": {}})
    os.setxattr(stack.lower / "d", "trusted.overlay.overlay.opaque", b"y")
    root = stack.mount()
    assert os.getxattr(root / "f", "trusted.overlay.origin") == b"nested"
    os.chmod(root / "f", 0o600)
    os.chmod(root / "d", 0o700)
    assert os.getxattr(root / "f", "trusted.overlay.origin") == b"nested"
    assert os.getxattr(root / "d", "trusted.overlay.opaque") == b"y"
    stack.umount()
    assert mark(stack.up / "f", "overlay.origin") == b"nested"


def test_stray_overlay_xattrs_in_lowers_are_not_copied(stack: Stack) -> None:
    """A lower that was an upper once: its marks stay its own."""
    build(stack.lower, {"f": File(b"x", xattrs={"trusted.overlay.origin": b"old", "user.keep": b"1"})})
    root = stack.mount()
    os.chmod(root / "f", 0o600)
    assert os.listxattr(root / "f") == ["user.keep"]
    stack.umount()
    assert mark(stack.up / "f", "origin") != b"old"


@pytest.mark.parametrize("prefix", ["trusted.overlay.", "user.overlay."])
def test_prefix_of_the_other_kind_is_the_users(stack: Stack, prefix: str) -> None:
    """Without userxattr, user.overlay.* is like any other name; with it, trusted.overlay.* is."""
    build(stack.lower, {"f": b""})
    root = stack.mount("userxattr" if prefix.startswith("trusted") else "")
    os.setxattr(root / "f", prefix + "own", b"1")
    assert os.listxattr(root / "f") == [prefix + "own"]
    stack.umount()
    assert os.getxattr(stack.up / "f", prefix + "own") == b"1"


def test_userxattr_marks(stack: Stack) -> None:
    build(stack.lower, {"d": {"f": b""}, "g": b""})
    root = stack.mount("userxattr")
    os.unlink(root / "d" / "f")
    os.rmdir(root / "d")
    (root / "d").mkdir()
    os.chmod(root / "g", 0o600)
    os.setxattr(root / "g", "user.overlay.opaque", b"nested")
    assert os.listxattr(root / "d") == []
    assert os.listxattr(root / "g") == ["user.overlay.opaque"]
    stack.umount()
    assert mark(stack.up / "d", "opaque", "user.overlay.") == b"y"
    assert marks(stack.up / "d", TRUSTED) == set()
    assert mark(stack.up / "g", "overlay.opaque", "user.overlay.") == b"nested"


def test_impure_marks(stack: Stack) -> None:
    """A directory that has entries copied up or moved in is marked, so that listings know to translate numbers."""
    build(stack.lower, {"d": {"f": b""}, "g": b""})
    root = stack.mount()
    (root / "new").mkdir()
    (root / "pure").mkdir()
    (root / "pure" / "x").touch()
    os.chmod(root / "d" / "f", 0o600)
    os.rename(root / "g", root / "new" / "g")
    stack.umount()
    assert mark(stack.up / "d", "impure") == b"y"
    assert mark(stack.up / "new", "impure") == b"y"
    assert mark(stack.up / "pure", "impure") is None


def test_xattr_list_with_escapes_fits_its_size(stack: Stack) -> None:
    root = stack.mount()
    (root / "f").touch()
    names = [f"user.number-{number}" for number in range(40)]
    for name in names:
        os.setxattr(root / "f", name, name.encode())
    os.setxattr(root / "f", "trusted.overlay.x", b"1")
    assert sorted(os.listxattr(root / "f")) == sorted([*names, "trusted.overlay.x"])


def test_xattrs_of_the_root(stack: Stack) -> None:
    build(stack.lower, {"f": b""})
    os.setxattr(stack.up, "user.root", b"1")
    root = stack.mount()
    assert os.getxattr(root, "user.root") == b"1"
    os.setxattr(root, "user.more", b"2")
    os.chmod(root, 0o750)
    assert sorted(os.listxattr(root)) == ["user.more", "user.root"]
    stack.umount()
    assert os.getxattr(stack.up, "user.more") == b"2"


def test_what_lower_files_lack_is_told_without_python(ours: Stack) -> None:
    """Until they have it: in upper, where they are copied to, or in a lower layer beside those that lack it."""
    label, acl = "security.selinux", "system.posix_acl_access"
    build(
        ours.lower,
        {"d": {f"f{number}": b"x" for number in range(20)}, "rich": File(b"r", xattrs={label: b"of lower"})},
    )
    root = ours.mount()
    bare = [root / "d", *(root / "d" / f"f{number}" for number in range(20))]

    def lacking() -> None:
        for path in bare:
            for name in (label, acl):
                with fails(errno.ENODATA):
                    os.getxattr(path, name)

    names = os.listdir(root / "d")
    assert len(names) == 20
    lacking()
    before = ours.counter("native_getxattr"), ours.counter("native_direct")
    lacking()
    assert ours.counter("native_getxattr") >= before[0] + 20  # at least the labels: ACLs the kernel may keep
    assert ours.counter("native_direct") <= before[1] + 2  # the directory's own
    assert os.getxattr(root / "rich", label) == b"of lower"
    for path in bare[:3]:
        os.setxattr(path, label, b"of upper")
        assert os.getxattr(path, label) == b"of upper"
        for name in (acl, "user.other"):
            with fails(errno.ENODATA):
                os.getxattr(path, name)
    os.link(bare[4], root / "second")
    os.setxattr(root / "second", label, b"by another name")
    assert os.getxattr(bare[4], label) == b"by another name"
    os.replace(root / "rich", bare[5])
    assert os.getxattr(bare[5], label) == b"of lower"
