"""The rename matrix: every kind of source on every kind of target, with every flag, against the oracle and on disk."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.posix.table import fails
from tests.support.layers import WHITEOUT, Symlink, Tree, build, is_whiteout, mark, opaque
from tests.support.mounts import MountRefused, Stack
from tests.support.raw import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from tests.support.snapshot import Snapshot, assert_same, snapshot

Oracle = Callable[[Stack], Path]

FILES = ["upper-file", "lower-file", "copied-file", "lower-link"]
DIRECTORIES = [
    "upper-dir",
    "lower-dir",
    "merged-dir",
    "opaque-dir",
    "lower-empty",
    "merged-empty",
    "emptied-dir",
    "renamed-dir",
]
NOTHING = ["absent", "whiteout", "removed"]
SOURCES = FILES + DIRECTORIES
TARGETS = FILES + DIRECTORIES + NOTHING
FLAGS = {"plain": 0, "noreplace": RENAME_NOREPLACE, "exchange": RENAME_EXCHANGE}

LOWER: Tree = {
    "lower-file": b"lower",
    "copied-file": b"to copy",
    "lower-link": Symlink("lower-file"),
    "lower-dir": {"l": b"l", "sub": {"deep": b"d"}},
    "merged-dir": {"l": b"l", "both": b"low", "hidden": b"h"},
    "opaque-dir": {"l": b"l"},
    "lower-empty": {},
    "merged-empty": {"hidden": b""},
    "emptied-dir": {"e": b"e"},
    "before-rename": {"r": b"r"},
    "whiteout": b"hidden",
    "removed": b"removed",
}
UPPER: Tree = {
    "upper-file": b"upper",
    "upper-dir": {"u": b"u"},
    "merged-dir": {"u": b"u", "both": b"up", "hidden": WHITEOUT},
    "opaque-dir": {"u": b"u"},
    "merged-empty": {"hidden": WHITEOUT},
    "whiteout": WHITEOUT,
}


def furnish(lower: Path, upper: Path, wanted: set[str]) -> None:
    """One directory with the wanted kinds of things, in two layers."""
    wanted = wanted | ({"before-rename"} if "renamed-dir" in wanted else set())
    build(lower, {name: thing for name, thing in LOWER.items() if name in wanted})
    build(upper, {name: thing for name, thing in UPPER.items() if name in wanted})
    if "opaque-dir" in wanted:
        opaque(upper / "opaque-dir")


def prepare(room: Path, wanted: set[str]) -> None:
    """Through the mount: what can only be made there."""
    if "copied-file" in wanted:
        os.chmod(room / "copied-file", 0o640)
    if "emptied-dir" in wanted:
        os.unlink(room / "emptied-dir" / "e")
    if "renamed-dir" in wanted:
        os.rename(room / "before-rename", room / "renamed-dir")
    if "removed" in wanted:
        os.unlink(room / "removed")


def act(source: Path, target: Path, flags: int) -> str:
    """Rename, and say what came of it."""
    try:
        renameat2(source, target, flags)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def run_matrix(stack: Stack, across: bool) -> tuple[dict[str, str], dict[str, Snapshot]]:
    """Run every combination, each in a room of its own; outcomes and the tree of every room."""
    pairs = list(itertools.product(SOURCES, TARGETS, FLAGS))
    for number, (source, target, _) in enumerate(pairs):
        if across:
            furnish(stack.lower / f"{number}", stack.up / f"{number}", {source})
            furnish(stack.lower / f"{number}-other", stack.up / f"{number}-other", {target})
        else:
            furnish(stack.lower / f"{number}", stack.up / f"{number}", {source, target})
    root = stack.mount()
    outcomes: dict[str, str] = {}
    trees: dict[str, Snapshot] = {}
    for number, (source, target, flag) in enumerate(pairs):
        room, other = root / f"{number}", root / (f"{number}-other" if across else f"{number}")
        prepare(room, {source} if across else {source, target})
        if across:
            prepare(other, {target})
        label = f"{source} → {target} ({flag})"
        outcomes[label] = act(room / source, other / target, FLAGS[flag])
        trees[label] = snapshot(room, times=False)
        trees[label + " other"] = snapshot(other, times=False)
    return outcomes, trees


@pytest.mark.parametrize("across", [False, True], ids=["within", "across"])
@pytest.mark.fault_seconds(240)
def test_matrix_is_that_of_overlayfs(make_stack: Callable[..., Stack], check_by_overlay: Oracle, across: bool) -> None:
    """Same errno, same trees, seen again after remounting and by kernel overlayfs over our layers."""
    oracle = make_stack("overlay", name="oracle")
    ours = make_stack("union", name="ours")
    want_outcomes, want_trees = run_matrix(oracle, across)
    outcomes, trees = run_matrix(ours, across)
    differing = {label: (want, outcomes[label]) for label, want in want_outcomes.items() if outcomes[label] != want}
    assert differing == {}, "outcome (overlayfs, ours)"
    for label, want in want_trees.items():
        if want != trees[label]:
            assert_same(want, trees[label])
    whole = snapshot(ours.mnt)
    ours.remount()
    assert_same(whole, snapshot(ours.mnt))
    ours.umount()
    assert_same(whole, snapshot(check_by_overlay(ours)))
    oracle.umount()
    done = [str(number) for number, outcome in enumerate(want_outcomes.values()) if outcome == "done"]
    assert_same(upper_marks(oracle, done), upper_marks(ours, done))


def upper_marks(stack: Stack, rooms: list[str]) -> Snapshot:
    """What is in upper but for what names inodes of this one machine; whiteouts are links of one inode, or not.

    Only of the rooms where the rename was done: before it refuses one, the kernel may have set marks already.
    """
    hide = tuple(f"trusted.overlay.{name}" for name in ("origin", "impure", "uuid"))
    whole = snapshot(stack.up, times=False, links=False, hide=hide)
    return {
        path: entry for path, entry in whole.items() if path.split(b"/")[1:2] and path.split(b"/")[1].decode() in rooms
    }


def test_redirects_on_disk(stack: Stack) -> None:
    """A rename in the same parent is written relative, one to another parent absolute."""
    build(stack.lower, {"d": {"x": b"1"}, "p": {"e": {"y": b"2"}, "f": {"z": b"3"}}, "q": {}})
    root = stack.mount()
    os.rename(root / "d", root / "d2")
    os.rename(root / "p" / "e", root / "q" / "e2")
    os.rename(root / "p" / "f", root / "p" / "f2")
    stack.umount()
    assert mark(stack.up / "d2", "redirect") == b"d"
    assert mark(stack.up / "q" / "e2", "redirect") == b"/p/e"
    assert mark(stack.up / "p" / "f2", "redirect") == b"f"
    assert is_whiteout(stack.up / "d")
    assert is_whiteout(stack.up / "p" / "e")
    assert os.listdir(stack.up / "d2") == []
    root = stack.mount()
    assert (root / "d2" / "x").read_bytes() == b"1"
    assert (root / "q" / "e2" / "y").read_bytes() == b"2"
    os.rename(root / "d2", root / "d3")
    stack.umount()
    assert mark(stack.up / "d3", "redirect") == b"d"


def test_redirects_through_renamed_parents_and_layers(stack2: Stack) -> None:
    build(stack2.lowers[1], {"a": {"b": {"c": {"low": b"1"}}}})
    build(stack2.lowers[0], {"a": {"b": {"c": {"mid": b"2"}}}})
    root = stack2.mount()
    os.rename(root / "a", root / "a2")
    os.rename(root / "a2" / "b", root / "b2")
    os.rename(root / "b2" / "c", root / "a2" / "c2")
    (root / "a2" / "c2" / "new").write_bytes(b"3")
    want = {"low": b"1", "mid": b"2", "new": b"3"}
    assert {path.name: path.read_bytes() for path in (root / "a2" / "c2").iterdir()} == want
    stack2.remount()
    assert {path.name: path.read_bytes() for path in (root / "a2" / "c2").iterdir()} == want
    assert os.listdir(root / "b2") == []


def test_redirect_marks_in_lowers_are_followed(stack2: Stack) -> None:
    """An upper with redirects becomes a lower of another mount."""
    build(stack2.lowers[1], {"old": {"x": b"1"}, "deep": {"er": {"y": b"2"}}})
    build(stack2.lowers[0], {"new": {"z": b"3"}, "top": {}, "old": WHITEOUT})
    os.setxattr(stack2.lowers[0] / "new", "trusted.overlay.redirect", b"old")
    os.setxattr(stack2.lowers[0] / "top", "trusted.overlay.redirect", b"/deep/er")
    root = stack2.mount()
    assert sorted(os.listdir(root / "new")) == ["x", "z"]
    assert (root / "top" / "y").read_bytes() == b"2"
    assert sorted(os.listdir(root)) == ["deep", "new", "top"]


@pytest.mark.parametrize(
    "value", [b"../outside", b"/../../outside", b"a/b", b"/", b"", b"..", b".", b"/old/../old", b"/old//x"]
)
def test_malicious_redirects_lead_nowhere(stack2: Stack, value: bytes) -> None:
    """Never out of the layers: an error or nothing merged, as overlayfs answers, but no foreign file."""
    build(stack2.base / "outside", {"secret": b"s"})
    build(stack2.lowers[1], {"old": {"x": b"1"}})
    build(stack2.lowers[0], {"new": {"z": b"3"}})
    os.setxattr(stack2.lowers[0] / "new", "trusted.overlay.redirect", value)
    root = stack2.mount()
    names = names_or_refusal(root / "new")
    assert "secret" not in names
    stack2.umount()
    oracle = stack2.by("overlay")
    oracle.mount()
    try:
        assert names_or_refusal(root / "new") == names
    finally:
        oracle.umount()


def names_or_refusal(directory: Path) -> list[str]:
    """A listing, or one word where the directory can't be had; which errno says so doesn't matter."""
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        assert error.errno in {errno.EIO, errno.EINVAL, errno.EACCES, errno.ESTALE}
        return ["refused"]


def test_redirect_dir_off_gives_exdev(stack: Stack) -> None:
    build(stack.lower, {"d": {"x": b""}, "f": b"1"})
    root = stack.mount("redirect_dir=off,metacopy=off")
    with fails(errno.EXDEV):
        os.rename(root / "d", root / "e")
    os.rename(root / "f", root / "g")
    (root / "up").mkdir()
    os.rename(root / "up", root / "up2")
    assert sorted(os.listdir(root)) == ["d", "g", "up2"]


def test_redirect_dir_nofollow(stack2: Stack) -> None:
    build(stack2.lowers[1], {"old": {"x": b"1"}})
    build(stack2.lowers[0], {"new": {"z": b"3"}})
    os.setxattr(stack2.lowers[0] / "new", "trusted.overlay.redirect", b"old")
    root = stack2.mount("redirect_dir=nofollow,metacopy=off")
    with fails(errno.EPERM):
        os.listdir(root / "new")


def test_redirect_dir_follow(stack2: Stack) -> None:
    build(stack2.lowers[1], {"old": {"x": b"1"}})
    build(stack2.lowers[0], {"new": {"z": b"3"}})
    os.setxattr(stack2.lowers[0] / "new", "trusted.overlay.redirect", b"old")
    try:
        root = stack2.mount("redirect_dir=follow,metacopy=off")
    except MountRefused as refused:
        raise AssertionError(str(refused)) from refused
    assert sorted(os.listdir(root / "new")) == ["x", "z"]
    with fails(errno.EXDEV):
        os.rename(root / "old", root / "older")


def test_long_redirects(stack: Stack) -> None:
    """A path longer than an xattr of 256 bytes (the kernel's limit for relative ones) is written and read."""
    part = "p" * 100
    deep = Path(part) / part / part / part
    build(stack.lower / deep, {"d": {"x": b"1"}})
    root = stack.mount()
    outcome = act(root / deep / "d", root / "d2", 0)
    if stack.kind == "overlay":
        assert outcome == "EXDEV", "the kernel gives up past redirect_max=256"
        return
    assert outcome in {"done", "EXDEV"}
    assert (root / ("d2" if outcome == "done" else deep / "d") / "x").read_bytes() == b"1"


def test_rename_keeps_what_open_directories_show(stack: Stack) -> None:
    build(stack.lower, {"d": {"sub": {"x": b"1"}}})
    root = stack.mount()
    inner = os.open(root / "d" / "sub", os.O_RDONLY | os.O_DIRECTORY)
    os.rename(root / "d", root / "e")
    assert os.listdir(inner) == ["x"]
    os.close(os.open("y", os.O_CREAT | os.O_WRONLY, dir_fd=inner))
    os.close(inner)
    assert sorted(os.listdir(root / "e" / "sub")) == ["x", "y"]
    assert (root / "e" / "sub" / "x").read_bytes() == b"1"


def test_renaming_a_file_over_its_whiteout_and_back(stack: Stack) -> None:
    build(stack.lower, {"f": b"lower", "g": b"other"})
    root = stack.mount()
    os.rename(root / "f", root / "h")
    os.rename(root / "g", root / "f")
    os.rename(root / "h", root / "g")
    want = {"f": b"other", "g": b"lower"}
    assert {path.name: path.read_bytes() for path in root.iterdir()} == want
    stack.remount()
    assert {path.name: path.read_bytes() for path in root.iterdir()} == want
