"""Semantics, judged by the host's own kernel: the table of POSIX behaviours, and layers exchanged with overlayfs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.host.host import Host, LeftOut, Wrong, has_file_system, need, overlay, run, shell
from tests.support.rootless import outcomes, worse_than
from tests.support.snapshot import Snapshot, assert_same, snapshot
from tests.support.trees import rich_tree

_MARKS = ("trusted.overlay.",)
TABLE_SECONDS = 3600.0


def table(host: Host, room: Path) -> str:
    """Some two hundred behaviours, on overlayfs and on ours: what holds there holds here."""
    if not has_file_system("overlay"):
        raise LeftOut("this kernel has no overlayfs")
    return beside_overlayfs(host, room, {"overlay": (), "union": ()}, as_root=True)


def beside_overlayfs(host: Host, room: Path, under: Mapping[str, Sequence[str]], *, as_root: bool = False) -> str:
    """Run the table on overlayfs and on ours, both at once: in an emulated machine either takes minutes.

    Args:
        under: "overlay" and "union", and the command that runs the table on it as somebody else.
        as_root: whether to try also what needs privilege. Seeds are not made through an ordinary user's mount: some of them
            want owners.

    Returns:
        How many behaviours held. Raises Wrong where ours could not do what overlayfs could.
    """
    with ThreadPoolExecutor(len(under)) as pool:
        tables = pool.map(lambda kind: _run_table(host, room, kind, under[kind], as_root=as_root), under)
        return _compare({kind: found for table in tables for kind, found in table.items()})


def _run_table(host: Host, room: Path, kind: str, under: Sequence[str], *, as_root: bool) -> dict[str, dict[str, str]]:
    """Run the table on a kind of mount, in a process of its own; outcomes by kind and behaviour, empty where it held."""
    places = "lower" if host.quick else "lower upper touched" if as_root else "lower touched"
    settings = [f"{name}={value}" for name, value in host.python_environment().items() if name.startswith("PYTHON")]
    settings += [f"UFS_PLACES={places}", *(["UFS_PRIVILEGED=1"] if as_root else [])]
    python = [host.program("python"), "-m", "tests.support.rootless", kind, str(room)]
    return outcomes(run([*under, "env", *settings, *python], cwd=host.checks, seconds=TABLE_SECONDS))


def _compare(found: dict[str, dict[str, str]]) -> str:
    """Raise Wrong where ours could not do what overlayfs could; else how many behaviours held."""
    held = sum(not said for said in found["union"].values())
    worse = worse_than(found, "overlay")
    if worse:
        raise Wrong(f"{len(worse)} behaviours hold on overlayfs and not here\n" + "\n".join(worse))
    if held < 50:
        raise Wrong(f"only {held} behaviours held at all\n{json.dumps(found, indent=1)[:4000]}")
    here_only = sum(bool(said) and not found["union"].get(name, "x") for name, said in found["overlay"].items())
    return f"{held} of {len(found['union'])} behaviours hold" + (
        f", {here_only} of them only here" if here_only else ""
    )


CHANGES = (
    # One after the other, each on layers that the other side has just left.
    """
    rm plain a-first-name; mv links moved; chmod 700 shared; chown 7:8 suid; echo more >>odd-size; mkdir -p new/deep
    echo new >new/deep/file; ln new/deep/file new/hard; ln -s file new/deep/soft; mv dev new/dev; rm -r names; mkdir names
    echo again >names/file; touch -d '2020-02-02 02:02:02' empty; mv shared/inherits moved/inherited
    """,
    """
    mv moved links; rm -r new/dev; mv new/deep deep-too; echo x >>deep-too/file; mv names new/names; rm -r closed
    truncate -s 10 holes/middle; chmod 600 holes/*; setfattr -n user.mine -v 1 odd-size; rm suid; mkdir suid; echo in >suid/in
    """,
    """
    rm -r links; mv deep-too links; mkdir closed; mv holes closed/holes; mv new/names names; ln capable capable-too
    echo more >>capable-too; rm -r suid; echo file >suid; cp -a closed copy; mv closed/holes/start closed/holes/begin
    """,
)


def exchange(host: Host, room: Path) -> str:
    """Both start from equal layers and change them in turns, mounting what the other one left; trees stay the same."""
    need("setfacl", "setfattr")
    if not has_file_system("overlay"):
        raise LeftOut("this kernel has no overlayfs")
    sides = [room / "left", room / "right"]
    _equal_lowers(room)
    for number, changes in enumerate(CHANGES):
        trees = [_changed(host, side, changes, ours=(number + which) % 2 == 0) for which, side in enumerate(sides)]
        _same(trees, f"after the changes of turn {number + 1}")
    for ours in (True, False):
        trees = [_changed(host, side, ":", ours=ours) for side in sides]
        _same(trees, f"at the end, both mounted by {'unionfs' if ours else 'overlayfs'}")
    _same([snapshot(side / "lower") for side in sides], "the lower layers")
    return f"{len(CHANGES)} turns, {len(trees[0])} files at the end"


def _equal_lowers(room: Path) -> None:
    """The same rich tree as the lower layer of both sides, to the last attribute."""
    rich_tree(room / "left/lower", sockets=False)
    (room / "right").mkdir()
    shell("cp -a left/lower right/lower", cwd=room)


def _changed(host: Host, side: Path, changes: str, *, ours: bool) -> Snapshot:
    with host.union(side, [side / "lower"]) if ours else overlay(side, [side / "lower"]) as merged:
        shell(changes, cwd=merged)
        return snapshot(merged, times=False, hide=_MARKS)


def _same(trees: Sequence[Snapshot], when: str) -> None:
    try:
        assert_same(trees[0], trees[1])
    except AssertionError as error:
        raise Wrong(f"{when}, {error}") from None


def upper_moves(host: Host, room: Path) -> str:
    """An upper that was written here is copied with its attributes, and mounted by overlayfs as a lower."""
    need("tar", "setfacl")
    if not has_file_system("overlay"):
        raise LeftOut("this kernel has no overlayfs")
    rich_tree(room / "lower", sockets=False)
    with host.union(room, [room / "lower"], "-o", "metacopy=off,redirect_dir=off") as merged:
        shell(
            "rm plain; echo x >>odd-size; rm -r names; mkdir names; touch names/one; rm -r dev; mkdir other", cwd=merged
        )
        shown = snapshot(merged, times=False, links=False, hide=_MARKS)
    (room / "copied").mkdir()
    shell(
        "tar --xattrs --xattrs-include='*' --acls -c . | tar --xattrs --xattrs-include='*' --acls -x -C ../copied",
        cwd=room / "upper",
    )
    shutil.rmtree(room / "upper")
    shutil.rmtree(room / "work")
    with overlay(room, [room / "copied", room / "lower"]) as merged:
        assert_same(shown, snapshot(merged, times=False, links=False, hide=_MARKS))
    return "upper packed by tar, unpacked elsewhere"
