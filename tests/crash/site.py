"""The layers of a run, on a file system of their own, and the states that each chapter leads through.

The layers have a file system for themselves, so that a call concerns them if and only if it concerns that file system.
Mount point, logs and the directory on which the steps are done for comparison lie elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.crash.workload import CHAPTERS, LOWER_TIME, Hand, Step, build_lowers
from tests.support.mounts import AUTO_RESTART, MANY_CRASHES, Stack, environment
from tests.support.snapshot import Entry, Snapshot, snapshot

_RECENT = (LOWER_TIME + 1_000_000) * 1_000_000_000
_MOST_KEPT = 1 << 20


@dataclass
class State:
    """What must be found when so many steps of a chapter have been done.

    Attributes:
        tree: all that there is.
        loose: of files whose data may still follow, what they were before.
        data: the content of the file that the next step writes to, or the last one has written to.
    """

    tree: Snapshot
    loose: Snapshot = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)


class Site:
    """All directories of a run.

    Args:
        base: an empty directory.
        ground: another, on a file system that has nothing else.
    """

    def __init__(self, base: Path, ground: Path) -> None:
        self.base, self.ground = base, ground
        self.device = ground.stat().st_dev
        self.mnt = base / "mnt"
        self.mnt.mkdir()
        self.logs = 0
        self._states: dict[str, list[State]] = {}
        build_lowers(ground)
        self._lowers = self._lower_snapshot()

    def lowers(self, chapter: str) -> list[Path]:
        """The lower layers of a chapter, the topmost first."""
        return [self.ground / name for name in ("lower0", "lower1", *(["big"] if chapter == "big" else []))]

    @property
    def upper(self) -> Path:
        return self.ground / "upper"

    @property
    def work(self) -> Path:
        return self.ground / "work"

    def renew(self) -> None:
        """An empty upper layer and work directory."""
        for directory in (self.upper, self.work):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()

    def union(self, chapter: str, options: str) -> Stack:
        """Ours over the layers, without a supervisor."""
        options = mount_options(options)
        return Stack("union", self.base, self.lowers(chapter), self.upper, self.work, self.mnt, options=options)

    def overlay(self, chapter: str, options: str) -> Stack:
        """Kernel overlayfs over the layers, with those of our options that it has."""
        words = [word for word in options.split(",") if word.partition("=")[0] in ("index", "metacopy", "redirect_dir")]
        layers = (self.lowers(chapter), self.upper, self.work, self.mnt)
        return Stack("overlay", self.base, *layers, options=",".join(words))

    def mount_command(self, chapter: str, options: str) -> list[str]:
        """The command that mounts ours."""
        self.logs += 1
        words = [sys.executable, "-m", "unionfs", "mount", "--log-file", str(self.base / f"killed-{self.logs}.log")]
        lowers = ":".join(map(str, self.lowers(chapter)))
        layers = ["--work", str(self.work), lowers, str(self.upper), str(self.mnt)]
        words += ["--auto-restart"] if restarts(options) else []
        options = mount_options(options)
        return [*words, *(["-o", options] if options else []), *layers]

    def environment(self) -> dict[str, str]:
        """The environment of that command: it changes nothing but what it must."""
        return environment() | MANY_CRASHES | {"PYTHONDONTWRITEBYTECODE": "1"}

    def lowers_changed(self) -> bool:
        """Whether anything in the lower layers is not what it was."""
        return self._lower_snapshot() != self._lowers

    def _lower_snapshot(self) -> list[Snapshot]:
        return [snapshot(self.ground / name) for name in ("lower0", "lower1", "big")]

    def states(self, chapter: str) -> list[State]:
        """The states before the first step of a chapter, after it, and so on."""
        if chapter not in self._states:
            self._states[chapter] = self._walk_through(chapter)
        return self._states[chapter]

    def _walk_through(self, chapter: str) -> list[State]:
        plain = self.base / "plain"
        plain.mkdir()
        for lower in reversed(self.lowers(chapter)):
            subprocess.run(["cp", "-a", f"{lower}/.", str(plain)], check=True)
        hand = Hand(plain)
        states = [State(seen(plain))]
        for step in CHAPTERS[chapter]:
            before = states[-1]
            if step.writes:
                before.data = _contents(plain, step.writes)
            step.act(hand)
            states.append(State(seen(plain), _loose(step, before), _contents(plain, step.writes)))
        hand.close_all()
        shutil.rmtree(plain)
        return states


def restarts(mode: str) -> bool:
    """Whether another daemon takes over in this mode."""
    return AUTO_RESTART in mode.split(",")


def mount_options(mode: str) -> str:
    """The mount options of a mode."""
    return ",".join(word for word in mode.split(",") if word != AUTO_RESTART)


def seen(root: Path) -> Snapshot:
    """A snapshot in which all that was changed in this run has the same time."""
    tree = snapshot(root)
    return {path: replace(entry, mtime=min(entry.mtime, _RECENT)) for path, entry in tree.items()}


def _loose(step: Step, before: State) -> Snapshot:
    loose = {path: entry for path, entry in before.loose.items() if path != _key(step.settles)}
    if step.follows:
        loose[_key(step.follows)] = before.tree[_key(step.follows)]
    return loose


def _contents(root: Path, path: str) -> dict[str, bytes]:
    if not path or (root / path).stat().st_size > _MOST_KEPT:
        return {}
    return {path: (root / path).read_bytes()}


def _key(path: str) -> bytes:
    return b"/" + os.fsencode(path)


def has(state: State, path: str) -> bool:
    """Whether there is something at a path."""
    return _key(path) in state.tree


def fits(tree: Snapshot, state: State) -> bool:
    """Whether a tree is in this state."""
    wanted = state.tree
    if tree.keys() != wanted.keys():
        return False
    return all(_alike(entry, wanted[path], state.loose.get(path)) for path, entry in tree.items())


def _alike(found: Entry, wanted: Entry, before: Entry | None) -> bool:
    return found in (wanted, before)


def touched(state: State, path: str) -> State:
    """The same state, but for the time of a file: that is now."""
    names = state.tree[_key(path)].group
    return State({**state.tree, **{name: replace(state.tree[name], mtime=_RECENT) for name in names}}, state.loose)


def without(tree: Snapshot, path: str) -> Snapshot:
    """What there is but for a path and what is below it."""
    key = _key(path)
    kept = {at for at in tree if at != key and not at.startswith(key + b"/")}
    return {at: replace(tree[at], group=tuple(name for name in tree[at].group if name in kept)) for at in kept}


def half_written(root: Path, tree: Snapshot, before: State, after: State, path: str) -> bool:
    """Whether only the first part of a write to a file has come there, and all else is as before."""
    if path not in before.data:
        return False
    key = _key(path)
    if key not in tree:
        return False
    old, new = before.data[path], after.data[path]
    if not fits({**tree, key: before.tree[key]}, before):
        return False
    found = (root / path).read_bytes()
    written = next((at for at, (one, other) in enumerate(zip(found, new, strict=False)) if one != other), len(found))
    return found[written:] == old[written:]


_ON = {"opaque": "d", "redirect": "df", "metacopy": "f", "origin": "dfo", "impure": "d", "protattr": "df", "uuid": "d"}
_ON |= {"nlink": "f", "whiteout": "f"}


def leftovers(work: Path) -> list[str]:
    """What is left in a work directory in which nothing is under way."""
    return [f"work/{name} is left" for name in os.listdir(work / "work")]


def layer_faults(upper: Path, work: Path) -> list[str]:
    """What is wrong with upper and index as a layer: temporary objects, and marks where they have no meaning."""
    found: list[str] = []
    for directory, directories, files in os.walk(upper):
        for name in (*directories, *files):
            path = Path(directory, name)
            found += [f"{path.relative_to(upper)}: {fault}" for fault in _faults(path)]
    if (work / "index").is_dir():
        for entry in (work / "index").iterdir():
            origin = os.getxattr(entry, "trusted.overlay.origin", follow_symlinks=False)
            if origin.hex() != entry.name:
                found.append(f"index/{entry.name} is that of {origin.hex()}")
    return found


def _faults(path: Path) -> list[str]:
    faults = ["a temporary object"] if path.name.startswith("#") else []
    kind = "l" if path.is_symlink() else "d" if path.is_dir() else "f" if path.is_file() else "o"
    for attribute in os.listxattr(path, follow_symlinks=False):
        if not attribute.startswith("trusted.overlay."):
            continue
        name = attribute.removeprefix("trusted.overlay.")
        if kind not in _ON.get(name, "") and not (name == "origin" and kind == "l"):
            faults.append(f"has {name}")
    return faults
