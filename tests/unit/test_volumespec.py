"""How volumes are written: Docker's -v and --mount."""

from __future__ import annotations

from pathlib import Path

import pytest

from unionfs.errors import UsageError
from unionfs.volumespec import (
    VolumeSpec,
    check_targets,
    from_fields,
    merge_volumes,
    parse_mount_words,
    parse_name,
    parse_volume,
)

GOOD = {
    "/data": VolumeSpec("volume", "", "/data"),
    "/srv/data:/data": VolumeSpec("bind", "/srv/data", "/data", create=True),
    "/srv/data/:/data/": VolumeSpec("bind", "/srv/data", "/data", create=True),
    "/srv/../x:/a/../b//c": VolumeSpec("bind", "/x", "/b/c", create=True),
    "/srv/data:/data:ro": VolumeSpec("bind", "/srv/data", "/data", read_only=True, create=True),
    "/srv/data:/data:rw,z": VolumeSpec("bind", "/srv/data", "/data", create=True),
    "/srv/data:/data:rslave": VolumeSpec("bind", "/srv/data", "/data", create=True, propagation="rslave"),
    r"/a\:b:/c": VolumeSpec("bind", "/a:b", "/c", create=True),
    "/srv/data:/data:cached": VolumeSpec("bind", "/srv/data", "/data", create=True, cached=True),
    "/srv/data:/data:ro,delegated": VolumeSpec("bind", "/srv/data", "/data", read_only=True, create=True, cached=True),
    "/srv/data:/data:cached,consistent": VolumeSpec("bind", "/srv/data", "/data", create=True),
    "cache:/var/cache": VolumeSpec("volume", "cache", "/var/cache"),
    "cache:/var/cache:nocopy,ro": VolumeSpec("volume", "cache", "/var/cache", read_only=True, nocopy=True),
    "//srv:/data": VolumeSpec("bind", "/srv", "/data", create=True),
}

BAD = {
    "": "SOURCE:TARGET",
    ":/data": "SOURCE:TARGET",
    "/a:/b:ro:x": "SOURCE:TARGET",
    "data": "absolute path",
    "/a:b": "absolute path",
    "/a:/": "root of the union",
    "/a:/..": "root of the union",
    "a/b:/c": "no absolute path and no volume name",
    "x:/c": "no absolute path and no volume name",
    "/a:/b:rx": "unknown option 'rx'",
    "/a:/b:nocopy": "nocopy is for volumes",
}


@pytest.mark.parametrize("text", GOOD)
def test_short(text: str) -> None:
    assert parse_volume(text) == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_short_refused(text: str) -> None:
    with pytest.raises(UsageError, match=BAD[text]):
        parse_volume(text)


def test_short_relative_path_starts_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_volume("./data:/data").source == f"{tmp_path}/data"


LONG = {
    "type=bind,source=/srv/data,target=/data": VolumeSpec("bind", "/srv/data", "/data"),
    "type=bind,src=/srv/data,dst=/data,readonly": VolumeSpec("bind", "/srv/data", "/data", read_only=True),
    "type=bind,src=/a,destination=/b,ro=true,bind-propagation=shared": VolumeSpec(
        "bind", "/a", "/b", read_only=True, propagation="shared"
    ),
    "type=bind,src=/a,dst=/b,bind-nonrecursive=true": VolumeSpec("bind", "/a", "/b", recursive=False),
    "type=bind,src=/a,dst=/b,consistency=cached": VolumeSpec("bind", "/a", "/b", cached=True),
    "type=bind,src=/a,dst=/b,consistency=default": VolumeSpec("bind", "/a", "/b"),
    "source=cache,target=/c": VolumeSpec("volume", "cache", "/c"),
    "type=volume,target=/c": VolumeSpec("volume", "", "/c"),
    "type=volume,src=cache,dst=/c,volume-nocopy,readonly=false": VolumeSpec("volume", "cache", "/c", nocopy=True),
    'type=bind,"src=/a,b",dst=/c': VolumeSpec("bind", "/a,b", "/c"),
}

LONG_BAD = {
    "": "source= and target=",
    "type=bind,source=/a": "target=",
    "type=bind,target=/b": "absolute path",
    "type=bind,source=a,target=/b": "absolute path",
    "type=tmpfs,target=/b": "tmpfs is not supported",
    "type=npipe,target=/b": "use bind or volume",
    "type=volume,source=/a,target=/b": "no volume name",
    "type=bind,source=/a,target=/b,colour=red": "unknown key 'colour=red'",
    "type=bind,source=/a,target=b": "absolute path",
    "type=bind,source=/a,target=/b,readonly=maybe": "use true or false",
    "type=bind,source=/a,target=/b,bind-propagation=x": "use one of",
    "type=bind,source=/a,target=/b,consistency=soon": "use one of consistent, default, cached, delegated",
    "type=bind,source=/a,target=/b,volume-nocopy": "nocopy is for volumes",
}


@pytest.mark.parametrize("text", LONG)
def test_long(text: str) -> None:
    assert parse_mount_words(text) == LONG[text]


@pytest.mark.parametrize("text", LONG_BAD)
def test_long_refused(text: str) -> None:
    with pytest.raises(UsageError, match=LONG_BAD[text]):
        parse_mount_words(text)


def test_fields_of_a_table() -> None:
    assert from_fields({"source": "/a", "target": "/b", "create": True}, "x").create
    with pytest.raises(UsageError, match="x: unknown key 'colour'"):
        from_fields({"target": "/b", "colour": "red"}, "x")


def test_targets_are_taken_once() -> None:
    one, two = parse_volume("/a:/x"), parse_volume("/b:/x/")
    with pytest.raises(UsageError, match="the target /x"):
        check_targets([one, two])
    other = parse_volume("/c:/y")
    check_targets([one, other])
    assert merge_volumes([one], [two, other]) == (one, other)


def test_names() -> None:
    assert parse_name("web-1") == "web-1"
    for name in ("", "x", "-a", "a/b", "a b"):
        with pytest.raises(UsageError, match="--name"):
            parse_name(name)
