"""Translation of owners, by itself."""

from __future__ import annotations

import errno
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.core import acl
from unionfs.errors import UsageError
from unionfs.idmap import AS_STORED, IdMap, Range, parse_id, parse_ranges

ROOTLESS = parse_ranges("uidmapping", "0:1000:1:1:110000:65536")


def test_ranges() -> None:
    assert (Range(0, 1000, 1), Range(1, 110000, 65536)) == ROOTLESS
    assert parse_ranges("x", "0:1000:1,1:110000:65536") == ROOTLESS
    assert parse_ranges("x", ":0:1000:1:1:110000:65536") == ROOTLESS


@pytest.mark.parametrize(
    "text",
    ["", ":", "0", "0:1", "0:1:0", "a:b:c", "0:1:-1", "0:1:2:3", "0:10:5:4:20:1", "0:10:5:5:14:1", f"0:0:{2**32}"],
)
def test_bad_ranges(text: str) -> None:
    with pytest.raises(UsageError, match="option uidmapping="):
        parse_ranges("uidmapping", text)


@pytest.mark.parametrize("text", [None, "", "x", "-1", str(2**32 - 1)])
def test_bad_ids(text: str | None) -> None:
    with pytest.raises(UsageError, match="option squash_to_uid="):
        parse_id("squash_to_uid", text)


def test_translation() -> None:
    ids = IdMap(uids=ROOTLESS)
    assert [ids.shown_uid(uid) for uid in (0, 1, 65536, 65537)] == [1000, 110000, 175535, 65534]
    assert [ids.stored_uid(uid) for uid in (1000, 110000, 175535)] == [0, 1, 65536]
    assert (ids.shown_gid(7), ids.stored_gid(7)) == (7, 7)
    assert ids.creator(1000, 5) == (0, 5)
    assert ids.creator(0, 5) == (65534, 5)
    with pytest.raises(OSError, match="too large") as caught:
        ids.stored_uid(0)
    assert caught.value.errno == errno.EOVERFLOW


def test_squashing_changes_only_what_is_shown() -> None:
    ids = IdMap(squash_uid=0, squash_gid=7)
    assert ids.needed
    assert not AS_STORED.needed
    assert (ids.shown_uid(1000), ids.shown_gid(1000)) == (0, 7)
    assert ids.creator(1000, 1001) == (1000, 1001)
    assert ids.stored_uid(1000) == 1000


def test_everything_else_of_a_stat_result_stays() -> None:
    real = os.stat("/")
    shown = IdMap(uids=(Range(real.st_uid, 1234, 1),), squash_gid=77).shown(real)
    assert (shown.st_uid, shown.st_gid) == (1234, 77)
    names = [name for name in dir(real) if name.startswith("st_") and name not in ("st_uid", "st_gid")]
    assert [getattr(shown, name) for name in names] == [getattr(real, name) for name in names]


@given(st.integers(0, 2**32 - 2), st.lists(st.integers(1, 1000), min_size=1, max_size=5))
def test_what_is_shown_is_stored_again(uid: int, lengths: list[int]) -> None:
    ranges, stored, shown = [], 0, 100_000
    for length in lengths:
        ranges.append(Range(stored, shown, length))
        stored, shown = stored + 2 * length, shown + 3 * length
    ids = IdMap(uids=tuple(ranges))
    if ids.shown_uid(uid) != 65534:
        assert ids.stored_uid(ids.shown_uid(uid)) == uid


def test_acls() -> None:
    entries = [(0x01, 7, 0xFFFFFFFF), (0x02, 6, 5), (0x04, 4, 0xFFFFFFFF), (0x08, 4, 6), (0x20, 0, 0xFFFFFFFF)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    other = acl.translated(value, lambda uid: uid + 100, lambda gid: gid + 200)
    assert acl.translated(other, lambda uid: uid - 100, lambda gid: gid - 200) == value
    assert [entry[2] for entry in struct.iter_unpack("<HHI", other[4:])][1::2] == [105, 206]
    assert acl.translated(b"what", lambda uid: 1, lambda gid: 1) == b"what"
