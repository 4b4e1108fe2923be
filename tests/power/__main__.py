"""Cuts the power at any moment, and looks at what the disk has then.

The layers lie on a disk that remembers in which order it was written (`tests.support.disks`). A chapter of work (those of
`make crash`) is done in a union on it. Half of the times the file system is synced all the while, so that as many of its
states as possible come to the disk; else only the steps' own fsyncs do that, which take along what they must. Then the disk is made what it may have been at some moment (`cuts`): with all that
was flushed, and all, nothing or some of what was written after it. Its file system recovers, as after any power cut, and

- the union shows a state that the chapter leads through: none before the last step that an fsync or a sync has confirmed, none
  after the last one that had begun. Only data that was written and not yet synced may be there in part;
- nothing half-made shows or is left over, and kernel overlayfs shows the same in the layers.

Once the daemon has ended after an unmount, all is there.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from rich.console import Console

from tests.crash.site import Site, State, fits, layer_faults, leftovers, seen, touched
from tests.crash.workload import CHAPTERS, Hand
from tests.power.cuts import Cut, Replay, Write, choose, may_hold, read_log, remove
from tests.support import raw
from tests.support.disks import disk
from tests.support.filesystems import have_own_mounts, run
from tests.support.losses import report
from tests.support.mounts import BAD_LOG, MountRefused, wait_gone
from tests.support.repeating import repeating
from tests.support.snapshot import Snapshot, differences

MODES: Final = ("default", "passthrough=off", "native=off", "metacopy=off")
MKFS: Final = {
    "ext4": (["mkfs.ext4", "-q", "-F", "-E", "nodiscard"], "320M"),
    "xfs": (["mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1"], "320M"),
    "btrfs": (["mkfs.btrfs", "-q", "-f", "-K"], "512M"),
}
IN_ORDER: Final = {"btrfs": "notreelog"}
"""What to mount it with so that an fsync takes along all that was done before; that of btrfs takes one file alone."""


class Wrong(Exception):
    """Something was lost, half done or left over; the text says what."""


@dataclass
class Tally:
    """What a mode has gone through."""

    recordings: int = 0
    flushes: int = 0
    writes: int = 0
    cuts: int = 0


@dataclass
class Recording:
    """How the log of the disk grew while a chapter was done.

    Attributes:
        begun: how long it was when each step began.
        confirmed: (how long it was, how many steps had been done by then and are on the disk for sure, whose data is, "": all).
        begin: how long it was before the union was mounted.
    """

    begin: int = 0
    begun: list[int] = field(default_factory=list)
    confirmed: list[tuple[int, int, str]] = field(default_factory=list)

    def confirmed_at(self, position: int) -> list[tuple[int, str]]:
        """How many steps were done for sure, and whose data is, each time, when the log was so long."""
        return [(steps, path) for grown, steps, path in self.confirmed if grown <= position]

    def between(self, position: int) -> tuple[int, int]:
        """How many steps were done for sure when the log was so long, and how many may have been."""
        first = max((steps for steps, _ in self.confirmed_at(position)), default=0)
        # A step that had nothing to write has begun and ended where the one before it had.
        return first, max(first, sum(begun < position for begun in self.begun))


class Ground:
    """The place where the disk's file system, of one kind, is mounted with some options, and images of it."""

    def __init__(self, base: Path, kind: str, options: str = "") -> None:
        self.base, self.kind, self.options = base, kind, options or "rw"
        self.mounted = base / "ground"
        self.mounted.mkdir()
        self.baseline, self.image = base / "baseline", base / "image-after-the-cut"
        make, size = MKFS[kind]
        run("truncate", "-s", size, str(self.baseline))
        run(*make, str(self.baseline))

    @contextmanager
    def on(self, what: Path) -> Iterator[None]:
        """Mount an image or a device. An image has a loop device of its own, which nobody has read before."""
        if self.kind == "btrfs":
            run("btrfs", "device", "scan", "--forget")  # the same file system on another device, maybe as it was before
        device = run("losetup", "--find", "--show", str(what)).strip() if what.is_file() else str(what)
        try:
            run("mount", "-o", self.options, device, str(self.mounted))
            try:
                yield
            finally:
                run("umount", str(self.mounted))
                wait_until_free(device)
        finally:
            if what.is_file():
                run("losetup", "--detach", device)


def wait_until_free(device: str, seconds: float = 60) -> None:
    """Wait until a file system that was unmounted is gone: a namespace that somebody made meanwhile keeps it alive."""
    end = time.monotonic() + seconds
    while True:
        try:
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return


class Run:
    """All recordings and cuts of a run."""

    def __init__(self, base: Path, options: argparse.Namespace) -> None:
        self.options, self.chance = options, random.Random(options.seed)
        self.ground = Ground(base, options.fs, IN_ORDER.get(options.fs, ""))
        with self.ground.on(self.ground.baseline):
            self.site = Site(base, self.ground.mounted)
            self.site.renew()
            for chapter in options.chapters:
                self.site.states(chapter)
        self.tallies = {mode: Tally() for mode in options.modes}
        self.wrong: list[str] = []

    def one(self, mode: str, chapter: str, end: float) -> None:
        """Record a chapter, and cut."""
        tally = self.tallies[mode]
        words = "" if mode == "default" else mode
        recording, writes = self.record(chapter, words, syncing=self.chance.random() < 0.5)
        tally.recordings += 1
        tally.flushes += sum(write.is_flush for write in writes)
        tally.writes += sum(not write.is_flush for write in writes)
        durable = self.ground.base / "durable"
        run("cp", "--sparse=always", str(self.ground.baseline), str(durable))
        replay = Replay(durable, writes, self.chance)
        for cut in choose(writes, recording.begin, self.options.cuts, self.chance):
            replay.image(cut, self.ground.image)
            tally.cuts += 1
            try:
                Look(self, chapter, words, recording, writes, cut).look()
            except (Wrong, AssertionError, MountRefused, OSError) as error:
                self.wrong.append(f"{mode}, {chapter}, {cut}: {type(error).__name__}: {error}{self._kept()}")
                if len(self.wrong) >= self.options.most_wrong:
                    return
            if time.monotonic() > end and self.options.cuts is None:
                break
        remove(durable, self.ground.image)

    def _kept(self) -> str:
        """Keep the image of a cut after which something was wrong, if that is asked for; say where."""
        if self.options.keep is None:
            return ""
        kept = self.options.keep / f"wrong-{len(self.wrong)}.image"
        run("cp", "--sparse=always", str(self.ground.image), str(kept))
        return f"; {kept}"

    def record(self, chapter: str, words: str, *, syncing: bool) -> tuple[Recording, list[Write]]:
        """Do a chapter on a disk that remembers; *syncing*: and sync its file system all the while."""
        directory = self.ground.base / "recorded"
        directory.mkdir()
        run("cp", "--sparse=always", str(self.ground.baseline), str(directory / "image"))
        recording = Recording()
        with disk(directory) as made, self.ground.on(made.device):
            recorder = _Recorder(recording, made.log, self.ground.mounted)
            raw_sync(self.ground.mounted)
            recording.begin = recorder.position()
            union = self.site.union(chapter, words)
            union.mount()
            try:
                with repeating(recorder.sync, 0.005) if syncing else nullcontext():
                    self._work(chapter, recorder)
            finally:
                pid = union.daemon()
                union.umount()
                wait_gone(pid)
            recorder.confirm(len(CHAPTERS[chapter]), "")
        writes = read_log(directory / "log")
        remove(directory)
        return recording, writes

    def _work(self, chapter: str, recorder: _Recorder) -> None:
        hand = Hand(self.site.mnt)
        try:
            for number, step in enumerate(CHAPTERS[chapter]):
                recorder.begin()
                step.act(hand)
                recorder.done = number + 1
                if step.text.startswith("fsync "):
                    recorder.confirm(number + 1, step.settles)
                time.sleep(self.chance.uniform(0, 0.01))
        finally:
            hand.close_all()


class _Recorder:
    """Notes how long the log is, in the work's thread and in one that syncs."""

    def __init__(self, recording: Recording, log: Path, mounted: Path) -> None:
        self._recording, self._log, self._mounted = recording, log, mounted
        self.done = 0

    def position(self) -> int:
        return self._log.stat().st_size

    def begin(self) -> None:
        self._recording.begun.append(self.position())

    def confirm(self, steps: int, path: str) -> None:
        self._recording.confirmed.append((self.position(), steps, path))

    def sync(self) -> None:
        """Sync the file system, and what was done before is on the disk."""
        done = self.done
        raw_sync(self._mounted)
        self.confirm(done, "")


def raw_sync(mounted: Path) -> None:
    """Sync a file system."""
    fd = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY)
    try:
        raw.syncfs(fd)
    finally:
        os.close(fd)


class Look:
    """What is looked at after a cut."""

    def __init__(
        self, of: Run, chapter: str, words: str, recording: Recording, writes: Sequence[Write], cut: Cut
    ) -> None:
        self.site, self.ground, self.chapter, self.words = of.site, of.ground, chapter, words
        self.steps, self.states = CHAPTERS[chapter], of.site.states(chapter)
        position = writes[cut.after - 1].end if cut.after else 0
        self.confirmed = recording.confirmed_at(position)
        self.first, self.last = recording.between(position)
        self.dirty = self._dirty()

    def _dirty(self) -> set[str]:
        """The files of which not all data that was written is on the disk for sure."""
        dirty: set[str] = set()
        for number, step in enumerate(self.steps[: self.last]):
            words = step.text.split()
            if step.writes and not any(steps > number and path in ("", step.writes) for steps, path in self.confirmed):
                dirty.add(step.writes)
            if words[0] == "rename" and words[1] in dirty:
                dirty.add(words[2])
        return dirty

    def look(self) -> None:
        """Raises Wrong."""
        with self.ground.on(self.ground.image):
            union = self.site.union(self.chapter, self.words)
            union.mount()
            try:
                if left := leftovers(self.site.work):
                    raise Wrong("; ".join(left))
                tree = seen(self.site.mnt)
                self._must_be_allowed(tree)
            finally:
                union.umount()
            if bad := [line for line in union.log.read_text().splitlines() if BAD_LOG.search(line)]:
                raise Wrong(f"the mount says: {bad}")
            if faults := leftovers(self.site.work) + layer_faults(self.site.upper, self.site.work):
                raise Wrong("; ".join(faults))
            overlay = self.site.overlay(self.chapter, self.words)
            overlay.mount()
            try:
                if lines := differences(tree, seen(self.site.mnt)):
                    raise Wrong(f"kernel overlayfs shows {len(lines)} differences: {lines}")
            finally:
                overlay.umount()

    def _must_be_allowed(self, tree: Snapshot) -> None:
        states = self.states[self.first : self.last + 1]
        if any(self._fits(tree, number) for number in range(self.first, self.last + 1)):
            return
        lines = [differences(tree, state.tree) for state in states]
        nearest = min(lines, key=len, default=[])
        begun = self.steps[self.last - 1].text if self.last else "nothing"
        raise Wrong(
            f"between {self.first} and {self.last} steps (the last begun: {begun}), not synced: {sorted(self.dirty)}; "
            f"{len(nearest)} differences from the nearest state: {nearest}"
        )

    def _fits(self, tree: Snapshot, number: int) -> bool:
        state = self.states[number]
        if fits(tree, state):
            return True
        dirty = {os.fsencode("/" + path) for path in self.dirty}
        loose = dirty.union(*(some[path].group for some in (tree, state.tree) for path in dirty if path in some))
        if not all(self._is_mixed(path, tree) for path in self.dirty):
            return False
        tree, state = _without(tree, loose), State(_without(state.tree, loose), state.loose)
        completes = self.steps[number].completes if number < self.last else ""
        if fits(tree, state):
            return True
        return (
            bool(completes) and "/" + completes not in map(os.fsdecode, loose) and fits(tree, touched(state, completes))
        )

    def _is_mixed(self, path: str, tree: Snapshot) -> bool:
        """Whether the content of a file is made of what was written to it since it was synced."""
        if os.fsencode("/" + path) not in tree:
            return True
        synced = max((steps for steps, what in self.confirmed if what in ("", path)), default=0)
        had = [(at, state.data[path]) for at, state in enumerate(self.states[: self.last + 1]) if path in state.data]
        versions = [data for at, data in had if at <= synced][-1:] + [data for at, data in had if at > synced]
        return not versions or may_hold((self.site.mnt / path).read_bytes(), versions)


def _without(tree: Snapshot, paths: set[bytes]) -> Snapshot:
    """A snapshot without what is not certain about some files: size, content and time."""
    return {
        path: replace(entry, size=0, digest="", mtime=0) if path in paths else entry for path, entry in tree.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if nothing was lost, 1 if something was, 2 where it can't be run."""
    options = _parse(arguments)
    console = Console(stderr=True)
    if os.geteuid() != 0:
        console.print("powercut: it mounts file systems: run it as root")
        return 2
    os.umask(0o022)
    have_own_mounts()
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unionfs-power-", dir=options.dir)))
        base.chmod(0o755)
        status = stack.enter_context(console.status("writing the lower layers"))
        of = Run(base, options)
        end = time.monotonic() + options.minutes * 60
        rounds = 0
        while (not rounds or time.monotonic() < end) and len(of.wrong) < options.most_wrong:
            for mode in options.modes:
                for chapter in options.chapters:
                    if (rounds and time.monotonic() > end) or len(of.wrong) >= options.most_wrong:
                        break
                    cuts = sum(tally.cuts for tally in of.tallies.values())
                    status.update(f"{mode}, {chapter}; {cuts} cuts, {len(of.wrong)} wrong")
                    of.one(mode, chapter, end)
            rounds += 1
    _report(of, as_json=options.json)
    return 1 if of.wrong else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make powercut", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10); at least a round")
    parser.add_argument("--cuts", type=int, default=12, help="how many of a recording (default: 12); 0: all")
    parser.add_argument("--modes", nargs="+", default=list(MODES), help="mount options, or `default`; default: several")
    parser.add_argument("--chapters", nargs="+", choices=list(CHAPTERS), default=list(CHAPTERS), help="default: all")
    parser.add_argument("--fs", choices=list(MKFS), default="ext4", help="the disk's file system (default: ext4)")
    parser.add_argument("--dir", default="/dev/shm", help="where the images lie; 2 GiB free (default: /dev/shm)")
    parser.add_argument("--seed", type=int, default=None, help="for the same choices once more")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="where to keep the disk after a cut that lost something"
    )
    parser.add_argument("--most-wrong", type=int, default=10, help="end after so many losses (default: 10)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    options.cuts = options.cuts or None
    return options


def _report(of: Run, *, as_json: bool) -> None:
    modes = {mode: vars(tally) for mode, tally in of.tallies.items()}
    report(f"Power cuts, {of.options.fs}", modes, of.wrong, as_json=as_json)


if __name__ == "__main__":
    sys.exit(main())
