"""The command line's grammar and overlayfs's rules for options, without a mount."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.config import (
    MAX_LOWERS,
    MountConfig,
    as_json,
    default_work,
    escape_lower,
    given_settings,
    parse_lowers,
    parse_mount,
    split_options,
    unescape,
)
from unionfs.errors import EXIT_CODES, UnionError, UsageError, from_exit_code
from unionfs.idmap import IdMap, Range


def config(*options: str, upper: bool = True, **more: Any) -> MountConfig:
    """A configuration over /l, with /u where `upper`, from `-o` texts."""
    return parse_mount(["/l", "/u", "/m"] if upper else ["/l", "/m"], options, **more)


# --- layer lists ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lowers", "data"),
    [
        ("/a", ["/a"], []),
        ("/a:/b", ["/a", "/b"], []),
        (r"/a\:b:/c", ["/a:b", "/c"], []),
        (r"/a\\:/c", ["/a\\", "/c"], []),
        (r"/a\,b", ["/a,b"], []),
        ("/a::/d", ["/a"], ["/d"]),
        ("/a:/b::/d::/e", ["/a", "/b"], ["/d", "/e"]),
        ("/a\\", ["/a\\"], []),
        ("/with space:/b", ["/with space", "/b"], []),
        ("/\udcff:/b", ["/\udcff", "/b"], []),
    ],
)
def test_lowers(text: str, lowers: list[str], data: list[str]) -> None:
    assert parse_lowers(text) == (lowers, data)


@pytest.mark.parametrize("text", ["", ":", ":/a", "::/a", "/a:", "/a::", "/a:::/b", "/a::/d:/b", "/a::/d:"])
def test_lowers_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_lowers(text)


@given(st.lists(st.text(min_size=1), min_size=1), st.lists(st.text(min_size=1)))
def test_lowers_round_trip(lowers: list[str], data: list[str]) -> None:
    text = ":".join(map(escape_lower, lowers)) + "".join(f"::{escape_lower(path)}" for path in data)
    assert parse_lowers(text) == (lowers, data)


@given(st.text())
def test_any_lowers_parse_or_are_refused(text: str) -> None:
    try:
        lowers, data = parse_lowers(text)
    except UsageError:
        return
    assert lowers
    assert all(lowers + data)


def test_too_many_lowers() -> None:
    assert len(parse_mount([":".join(["/l"] * MAX_LOWERS), "/m"]).lowers) == MAX_LOWERS
    with pytest.raises(UsageError, match="limit"):
        parse_mount([":".join(["/l"] * (MAX_LOWERS + 1)), "/m"])


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", []),
        ("ro", ["ro"]),
        ("ro,noatime", ["ro", "noatime"]),
        (",ro,,noatime,", ["ro", "noatime"]),
        (r"upperdir=/a\,b,ro", [r"upperdir=/a\,b", "ro"]),
        (r"a\\,b", [r"a\\", "b"]),
        ("a\\", ["a\\"]),
    ],
)
def test_split_options(text: str, options: list[str]) -> None:
    assert split_options(text) == options


@given(st.text())
def test_unescape_undoes_escapes(text: str) -> None:
    escaped = "".join("\\" + char for char in text)
    assert unescape(escaped) == text


def test_defaults() -> None:
    made = config()
    assert made.lowers == ("/l",)
    assert (made.upper, made.work, made.mountpoint) == ("/u", "/.u.unionfs-work", "/m")
    assert (made.redirect_dir, made.metacopy, made.index, made.xino) == ("on", True, True, "on")
    assert (made.volatile, made.userxattr, made.timeout, made.read_only) == (False, None, None, False)
    assert not made.allow_other
    assert made.explicit == frozenset()


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("redirect_dir=off", "redirect_dir", "off"),
        ("redirect_dir=follow", "redirect_dir", "follow"),
        ("metacopy=off", "metacopy", False),
        ("metacopy", "metacopy", True),
        ("index=off", "index", False),
        ("xino=auto", "xino", "auto"),
        ("uuid=null", "uuid", "null"),
        ("volatile", "volatile", True),
        ("userxattr", "userxattr", True),
        ("whiteout=wh", "whiteout", "wh"),
        ("timeout=0", "timeout", 0.0),
        ("timeout=1.5", "timeout", 1.5),
        ("ro", "read_only", True),
        ("fsname=base", "fsname", "base"),
        (r"fsname=a\,b", "fsname", "a,b"),
        ("native=off", "native", False),
        ("passthrough=off", "passthrough", "off"),
        ("allow_other", "allow_other", True),
        ("noatime", "mount_options", ("noatime",)),
        ("nosuid,nodev,noexec", "mount_options", ("nosuid", "nodev", "noexec")),
    ],
)
def test_option(option: str, field: str, value: object) -> None:
    assert getattr(config(option), field) == value


@pytest.mark.parametrize(
    "option",
    [
        "redirect_dir=maybe",
        "redirect_dir",
        "metacopy=yes",
        "xino=1",
        "volatile=on",
        "userxattr=off",
        "timeout",
        "timeout=-1",
        "timeout=nan",
        "timeout=inf",
        "timeout=soon",
        "fsname=",
        "fsname=né",
        "ro=1",
        "noatime=1",
        "nfs_export=on",
        "verity=require",
        "lowerdir",
        "upperdir=",
        "no_such_option",
        "context=x",
    ],
)
def test_option_refused(option: str) -> None:
    with pytest.raises(UsageError, match=option.partition("=")[0]):
        config(option)


def test_unknown_option_suggests_a_known_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'redirect_dir'"):
        config("redirectdir=on")


def test_options_that_only_mount8_cares_for_are_ignored() -> None:
    assert config("defaults,rw,noauto,user,nofail,_netdev,x-systemd.automount,default_permissions") == config()


def test_sloppy_leaves_out_what_is_unknown() -> None:
    assert config("no_such=1,ro,other", sloppy=True) == config("ro")
    with pytest.raises(UsageError):
        config("timeout=x", sloppy=True)


def test_owners() -> None:
    ids = config("uidmapping=0:10:5,squash_to_gid=7,gidmapping=1:2:3").ids
    assert (ids.uids, ids.gids, ids.squash_uid, ids.squash_gid) == (((0, 10, 5),), ((1, 2, 3),), None, 7)
    assert not config("uidmapping=0:10:5").shows_as_stored
    assert not config("noacl").shows_as_stored
    assert not config("static_nlink").shows_as_stored
    assert config("timeout=1").shows_as_stored


def test_settings_by_themselves() -> None:
    """As they stand in the record of a mount, from which remount sees whether they change anything."""
    given = given_settings(["lowerdir=/a:/b::/d,upperdir=/u,metacopy=off", "noexec,allow_other,squash_to_root,x-a=b"])
    assert given.pop("ids").squash_uid == 0
    layers = {"lowers": ["/a", "/b"], "data_lowers": ["/d"], "upper": "/u"}
    assert given == {**layers, "metacopy": False, "allow_other": True}
    with pytest.raises(UsageError):
        given_settings(["no_such"])


def test_settings_as_json() -> None:
    mapping = IdMap(uids=(Range(0, 1, 2),))
    assert as_json(mapping) == {"uids": [[0, 1, 2]], "gids": [], "squash_uid": None, "squash_gid": None}
    assert as_json(("a", 1)) == ["a", 1]


def test_later_options_win() -> None:
    assert config("metacopy=off,metacopy=on").metacopy
    assert not config("ro", "rw").read_only
    assert config("rw,ro").read_only
    assert config("noexec,exec").mount_options == ()
    assert config("nosuid", "suid").mount_options == ("suid",)


def test_a_privileged_mount_honours_suid_and_devices() -> None:
    assert set(config(privileged=True).mount_options) == {"suid", "dev"}
    assert set(config("nosuid", privileged=True).mount_options) == {"nosuid", "dev"}


def test_allow_other_has_a_default_that_options_override() -> None:
    assert config(allow_other_default=True).allow_other
    assert not config("noallow_other", allow_other_default=True).allow_other


# --- layers from options, work, paths -------------------------------------------------------------


def test_layers_from_options() -> None:
    made = parse_mount(["/m"], [r"lowerdir=/a\:1:/b::/d,upperdir=/u\,1,workdir=/w"])
    assert (made.lowers, made.data_lowers) == (("/a:1", "/b"), ("/d",))
    assert (made.upper, made.work, made.mountpoint) == ("/u,1", "/w", "/m")


def test_layers_appended_one_by_one() -> None:
    made = parse_mount(["/m"], ["lowerdir+=/a:1,lowerdir+=/b,datadir+=/d"])
    assert (made.lowers, made.data_lowers, made.upper) == (("/a:1", "/b"), ("/d",), None)


@pytest.mark.parametrize(
    ("positionals", "options"),
    [
        ([], []),
        (["/l"], []),
        (["/l", "/u", "/m", "/x"], []),
        (["/l", "/m"], ["lowerdir=/l"]),
        (["/l", "/u", "/m"], ["upperdir=/u"]),
        (["/m"], ["datadir+=/d"]),
        (["/m"], ["lowerdir+=/l,datadir+=/d,lowerdir+=/k"]),
        (["/l", "", "/m"], []),
        (["/l", "/u", ""], []),
    ],
)
def test_layers_refused(positionals: list[str], options: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_mount(positionals, options)


def test_work_given_twice() -> None:
    assert config("workdir=/w", work="/w").work == "/w"
    with pytest.raises(UsageError, match="--work"):
        config(work="")
    with pytest.raises(UsageError, match="workdir"):
        config("workdir=/w", work="/v")


def test_default_work_is_beside_upper() -> None:
    assert default_work("/a/b") == "/a/.b.unionfs-work"
    with pytest.raises(UsageError, match="--work"):
        default_work("/")


def test_a_given_work_is_remembered() -> None:
    assert "work" in config(work="/w").explicit
    assert "work" not in config().explicit


def test_paths_become_absolute_and_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    made = parse_mount(["link/l:.", "link/u", "m/"])
    here = os.path.realpath(tmp_path)
    assert made.lowers == (f"{here}/real/l", here)
    assert (made.upper, made.work) == (f"{here}/real/u", f"{here}/real/.u.unionfs-work")
    assert made.mountpoint == f"{here}/m"


# --- conflicts: ovl_fs_params_verify --------------------------------------------------------------


def test_without_upper_nothing_is_written() -> None:
    made = config("volatile,index=on", upper=False)
    assert (made.upper, made.work, made.read_only) == (None, None, True)
    assert (made.volatile, made.index, made.redirect_dir, made.metacopy) == (False, False, "follow", True)


@pytest.mark.parametrize("mode", ["off", "follow", "nofollow"])
def test_metacopy_needs_redirects(mode: str) -> None:
    assert not config(f"redirect_dir={mode}").metacopy
    with pytest.raises(UsageError, match="metacopy"):
        config(f"redirect_dir={mode},metacopy=on")


def test_userxattr_turns_redirects_and_metacopy_off() -> None:
    made = config("userxattr")
    assert (made.userxattr, made.redirect_dir, made.metacopy) == (True, "nofollow", False)
    assert config("userxattr,redirect_dir=nofollow").redirect_dir == "nofollow"


@pytest.mark.parametrize("option", ["redirect_dir=on", "redirect_dir=follow", "redirect_dir=off", "metacopy=on"])
def test_userxattr_refuses_what_was_asked_for(option: str) -> None:
    with pytest.raises(UsageError, match="userxattr"):
        config("userxattr", option)


def test_userxattr_decided_later() -> None:
    assert config().with_userxattr(False).userxattr is False
    assert config().with_userxattr(False).metacopy
    made = config().with_userxattr(True)
    assert (made.userxattr, made.redirect_dir, made.metacopy) == (True, "nofollow", False)
    with pytest.raises(UsageError, match="privilege"):
        config("metacopy=on").with_userxattr(True)


# --- errors ---------------------------------------------------------------------------------------


def test_every_exit_status_is_documented() -> None:
    used = {cls.exit_code for cls in [UnionError, *UnionError.__subclasses__()]}
    assert used | {0} == set(EXIT_CODES)


def test_errors_cross_a_process_border() -> None:
    for cls in UnionError.__subclasses__():
        error = from_exit_code(cls.exit_code, "what happened")
        assert type(error) is cls
        assert str(error) == "what happened"


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=3))
def test_any_command_line_parses_or_is_refused(positionals: list[str], options: list[str]) -> None:
    try:
        made = parse_mount([text.replace("\0", "") for text in positionals], options)
    except UsageError:
        return
    assert os.path.isabs(made.mountpoint)
