"""On-disk formats: what is written is what overlayfs writes, and garbage is told from it."""

from __future__ import annotations

import errno

import pytest

from unionfs.core.markers import (
    Format,
    decode_handle,
    decode_nlink,
    decode_protattr,
    encode_handle,
    encode_nlink,
    encode_protattr,
    parse_redirect,
)
from unionfs.core.sysio import FS_APPEND, FS_IMMUTABLE

UUID = bytes(range(16))


def test_handle_has_the_bytes_of_ovl_fb() -> None:
    value = encode_handle(1, b"\xaa\xbb\xcc\xdd\x01\x02\x03\x04", UUID)
    assert value == bytes((0, 0xFB, 29, 0, 1)) + UUID + b"\xaa\xbb\xcc\xdd\x01\x02\x03\x04"
    assert decode_handle(value) == (1, b"\xaa\xbb\xcc\xdd\x01\x02\x03\x04", UUID)
    assert encode_handle(1, b"1234", UUID, is_upper=True)[3] == 0x04


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\x00" * 20,
        encode_handle(1, b"1234", UUID)[:-1],
        b"\x01" + encode_handle(1, b"1234", UUID)[1:],
        b"\x00\xfa" + encode_handle(1, b"1234", UUID)[2:],
        encode_handle(1, b"1234", UUID)[:3] + b"\x80" + encode_handle(1, b"1234", UUID)[4:],
        encode_handle(1, b"1234", UUID)[:3] + b"\x01" + encode_handle(1, b"1234", UUID)[4:],
    ],
    ids=["empty", "short", "cut", "version", "magic", "flags", "byte order"],
)
def test_other_handles_are_unknown_origins(value: bytes) -> None:
    assert decode_handle(value) is None


@pytest.mark.parametrize("value", [b"name", b"/a", b"/a/b c", b"\xff", b"...", b"/.a/..b"])
def test_redirects(value: bytes) -> None:
    assert parse_redirect(value) == value


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (b"", errno.EINVAL),
        (b"/", errno.EINVAL),
        (b"a/b", errno.EINVAL),
        (b"//a", errno.EINVAL),
        (b"/a/", errno.EINVAL),
        (b"a\0b", errno.EINVAL),
        (b".", errno.EACCES),
        (b"..", errno.EACCES),
        (b"/a/../b", errno.EACCES),
        (b"/./b", errno.EACCES),
    ],
)
def test_bad_redirects(value: bytes, code: int) -> None:
    with pytest.raises(OSError, match="redirect") as caught:
        parse_redirect(value)
    assert caught.value.errno == code


def test_link_counts() -> None:
    assert encode_nlink("U", 1) == b"U+1"
    assert encode_nlink("L", -2) == b"L-2"
    assert decode_nlink(b"U+1", upper_nlink=1, lower_nlink=9) == 2
    assert decode_nlink(b"L-1", upper_nlink=9, lower_nlink=3) == 2
    for value in (b"", b"X+1", b"U", b"U+x", b"U-5"):
        assert decode_nlink(value, upper_nlink=2, lower_nlink=2) is None


def test_own_attributes_are_hidden_and_a_users_are_escaped() -> None:
    fmt = Format(userxattr=False)
    assert fmt.opaque == "trusted.overlay.opaque"
    assert fmt.is_private("trusted.overlay.opaque")
    assert not fmt.is_private("trusted.overlay.overlay.opaque")
    assert fmt.to_disk("trusted.overlay.opaque") == "trusted.overlay.overlay.opaque"
    assert fmt.to_user("trusted.overlay.overlay.opaque") == "trusted.overlay.opaque"
    assert fmt.to_user("trusted.overlay.origin") is None
    for other in ("user.overlay.opaque", "trusted.overlayx", "user.a"):
        assert fmt.to_disk(other) == fmt.to_user(other) == other
    assert Format(userxattr=True).to_user("user.overlay.origin") is None


def test_protattr() -> None:
    for flags, value in ((0, b""), (FS_APPEND, b"a"), (FS_IMMUTABLE, b"i"), (FS_APPEND | FS_IMMUTABLE, b"ai")):
        assert encode_protattr(flags) == value
        assert decode_protattr(value) == flags
    assert decode_protattr(b"ia") == FS_APPEND | FS_IMMUTABLE
    assert decode_protattr(b"az") == 0, "of another version"
