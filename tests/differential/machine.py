"""Two mounts over equal layers, and the run of one sequence on both.

The first side is the oracle, kernel overlayfs; the second the subject. After ``swap`` each serves the other's layers, so the
sides change places. A sequence gets a subtree of its own; when none is left, both sides are swapped, the trees that earlier
sequences left are compared once more, and upper and work begin anew.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import deviations, layers, snapshot
from .driver import Driver, View, view_of
from .model import Model
from .operations import MACHINE_KINDS, Fields, Op, Outcome, Sequence, Tree, paths
from .sides import LOWERS, Backing, MountTrouble, Side

_PATIENCE = 60.0


class Difference(AssertionError):
    """The sides disagree after the operations of ``sequence``; the message says where, and how to run it again."""

    def __init__(self, sequence: Sequence, what: str) -> None:
        self.sequence, self.what = sequence, what
        super().__init__(
            f"{what}\n\nafter these operations (python -m tests.differential.replay FILE):\n\n{sequence.text()}\n"
        )


class _Found(Exception):
    """A difference on its way to where the sequence and the step are known."""


class Machine:
    """A pair of sides with a pool of subtrees.

    Arguments: ``root`` an empty directory; ``oracle`` and ``subject`` implementations as of ``Side.mount``; ``kind`` and
    ``split`` as of ``Backing``; ``pool`` how many subtrees; ``options`` for our own mounts, beside those of both.
    """

    def __init__(
        self,
        root: Path,
        subject: str,
        oracle: str = "kernel",
        kind: str = "tmpfs",
        split: bool = False,
        pool: int = 128,
        options: str = "",
    ) -> None:
        self.implementations, self.pool, self.kind = (oracle, subject), pool, kind
        self.sides = [Side(root / name, name, options) for name in ("first", "second")]
        self.backings = [Backing(side.root, kind, split) for side in self.sides]
        self.free: dict[int, list[str]] = {}
        self.finished: list[tuple[Sequence, str, int]] = []
        self.late: list[Difference] = []
        self.drivers: list[Driver] = []
        self.swapped = self.marks_left = False
        self.runs = 0

    # Life of the mounts

    def start(self) -> None:
        """Build the layers and mount both sides."""
        for backing, side in zip(self.backings, self.sides, strict=True):
            backing.mount()
            side.prepare()
            self.listings = layers.build(side, self.pool)
        time.sleep(0.1)  # so that what was built is older than the first sequence, whatever the clock's tick
        self._mount()
        self._refill()

    def stop(self) -> None:
        """Compare what is still to compare, unmount, and remove everything."""
        try:
            self._compare_crossed()
        finally:
            for driver in self.drivers:
                driver.disconnect()
            for side in self.sides:
                try:
                    side.unmount()
                except MountTrouble:
                    side.abort()
            for backing in self.backings:
                backing.unmount()

    def _mount(self) -> None:
        for side, implementation in zip(self.sides, self.implementations, strict=True):
            side.mount(implementation)

    def _unmount(self) -> None:
        for side in self.sides:
            side.unmount()

    def _refill(self) -> None:
        names = [layers.subtree(number) for number in range(self.pool)]
        self.free = {variant: names[variant :: layers.VARIANTS] for variant in range(layers.VARIANTS)}

    def renew(self) -> None:
        """Begin with empty upper layers, after a look at the old ones through the other implementation."""
        try:
            self._compare_crossed()
        finally:
            for side in self.sides:
                try:
                    side.unmount()
                except MountTrouble:
                    side.abort()
                side.wipe()
            self.finished.clear()
            self._mount()
            self._refill()

    def _compare_crossed(self) -> None:
        """Mount each side's layers by the other implementation; the trees of all finished sequences must still be equal."""
        if not self.finished or "fuse-overlayfs" in self.implementations:
            return
        try:
            self._unmount()
            self.sides.reverse()
            self._mount()
        except MountTrouble as trouble:
            self.late.append(Difference(self.finished[-1][0], f"after all sequences, mounted crosswise: {trouble}"))
            return
        for sequence, name, started in self.finished:
            trees = []
            for side in self.sides:
                root = side.path_of("merged", name)
                trees.append(snapshot.merged(root, self._unlabelled(os.lstat(root).st_dev, started)))
            if lines := differences(trees[0], trees[1], swapped=True):
                crossed = Sequence(sequence.variant, sequence.watch, (*sequence.ops, Op("swap", "root", ())))
                self.late.append(Difference(crossed, "mounted crosswise:\n" + "\n".join(lines)))

    def _unlabelled(self, device: int, started: int) -> View:
        view = view_of(self.kind, device, started)
        view.labels = None
        return view

    # One sequence

    def run(self, sequence: Sequence, trace: bool = False) -> None:
        """Run ``sequence`` in a fresh subtree of both sides.

        Difference: the sides disagree; what they hold afterwards is not compared again.
        """
        if not self.free[sequence.variant]:
            self.renew()
        name = self.free[sequence.variant].pop()
        started, done = time.time_ns(), list[Op]()
        self.swapped = self.marks_left = False
        left_before = snapshot.leftovers(os.fsencode(self.sides[1].work))
        model = Model(self.listings[sequence.variant], sequence.focus)
        self.runs += 1

        def so_far() -> Sequence:
            return Sequence(sequence.variant, sequence.watch, tuple(done))

        try:
            self.drivers = [Driver(side.path_of("merged", name), started, self.kind) for side in self.sides]
            for op in sequence.ops:
                args = model.grant(op.args)
                if args is None:
                    continue
                done.append(Op(op.kind, op.user, args))
                if self._step(done[-1], name, trace):
                    model.note(*done[-1])
                if sequence.watch:
                    self._look_at(done)
            self._compare_trees(name)
            self._compare_upper(name)
            self._compare_leftovers(left_before)
            self._read_logs()
        except _Found as found:
            raise Difference(so_far(), str(found)) from None
        except (MountTrouble, OSError) as trouble:
            self._revive()
            raise Difference(so_far(), f"{type(trouble).__name__}: {trouble}") from trouble
        finally:
            for driver in self.drivers:
                driver.disconnect()
            self.drivers = []
        self.finished.append((so_far(), name, started))

    def _revive(self) -> None:
        """Replace mounts of which one is in an unknown state."""
        for driver in self.drivers:
            driver.disconnect()
        for side in self.sides:
            side.abort()
            side.wipe_when_free()
        self.finished.clear()
        self._mount()
        self._refill()

    @contextmanager
    def _watchdog(self) -> Iterator[None]:
        """Abort a mount that doesn't answer, so that the operation under way ends with an error."""
        timer = threading.Timer(_PATIENCE, self.sides[1].abort)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _step(self, op: Op, name: str, trace: bool = False) -> bool:
        """Do one operation on both sides; whether it succeeded."""
        if op.kind in MACHINE_KINDS:
            getattr(self, "_" + op.kind)(name)
            return True
        if op.kind in deviations.BY_DESCRIPTOR:
            named = [driver.look_up(op.args[0]) for driver in self.drivers]
            if not all(named):
                return False
        if op.kind in deviations.WRITING and op.user == "root" and self.drivers[0].has_suidgid(op.args[0]):
            return False
        with self._watchdog():
            expected, got = (driver.run(op) for driver in self.drivers)
        if trace:
            print(f"{tuple(op)!r}\n    {expected}\n    {got}")
        self.marks_left |= op.kind in ("rename", "exchange") and expected[0] == "error"
        if difference := _outcomes(op, expected, got, self.swapped):
            raise _Found(difference)
        if expected[0] == "ok" and deviations.opens_only(op, expected[1]):
            self._allow_for_metacopy(op)
        return expected[0] == "ok"

    def _allow_for_metacopy(self, op: Op) -> None:
        """Overlayfs may have set the time of a file that was opened; then set it here too, so that the rest is comparable."""
        expected, got = (driver.modified(op) for driver in self.drivers)
        if expected == "now" != got:
            self.drivers[1].touch(op)

    def _look_at(self, done: list[Op]) -> None:
        """Compare the status of every path that the last operations named, and of its parent."""
        recent = set[bytes]().union(*map(paths, done[-6:]))
        for path in sorted(recent):
            self._step(Op("stat", "root", (path, False)), "")

    def _check(self, name: str) -> None:
        self._compare_trees(name)

    def _drop_caches(self, name: str) -> None:
        Path("/proc/sys/vm/drop_caches").write_text("2")

    def _remount(self, name: str) -> None:
        self._reconnect(fresh_labels=False)
        self._compare_trees(name)

    def _swap(self, name: str) -> None:
        self._reconnect(fresh_labels=True)
        self._compare_trees(name)

    def _reconnect(self, fresh_labels: bool) -> None:
        """Unmount and mount both; with ``fresh_labels``, crosswise."""
        for driver in self.drivers:
            driver.disconnect()
        self._unmount()
        if fresh_labels:
            self.swapped = True
            self.sides.reverse()
            self.drivers.reverse()
        self._mount()
        for driver in self.drivers:
            driver.connect(fresh_labels)

    # Comparison

    def _compare_trees(self, name: str) -> None:
        with self._watchdog():
            trees = [
                snapshot.merged(side.path_of("merged", name), driver.view)
                for side, driver in zip(self.sides, self.drivers, strict=True)
            ]
        self._report("the merged trees differ", *trees)

    def _report(self, headline: str, expected: Tree, got: Tree) -> None:
        if lines := differences(expected, got, self.swapped):
            raise _Found("\n".join([headline + ":", *lines[:20], *(["..."] if len(lines) > 20 else [])]))

    def _compare_upper(self, name: str) -> None:
        stored, indexes = [], []
        for side, driver in zip(self.sides, self.drivers, strict=True):
            roots = {layer: side.path_of(layer, name) for layer in ("upper", *LOWERS)}
            known = snapshot.handles(roots)
            view = self._unlabelled(side.upper.stat().st_dev, driver.started)
            entries, indexed = snapshot.index(os.fsencode(side.work), view, known)
            indexes.append(entries)
            stored.append(snapshot.on_disk(roots["upper"], view, known, indexed))
        if self.marks_left:
            stored = [deviations.without_marks(tree) for tree in stored]
            indexes = [deviations.without_marks(tree) for tree in indexes]
        self._report("the upper layers differ", *stored)
        self._report("the indexes differ", *indexes)

    def _compare_leftovers(self, before: set[bytes]) -> None:
        """Look for temporary objects that this sequence left; overlayfs leaves some itself after certain errors."""
        if not self.swapped and (left := snapshot.leftovers(os.fsencode(self.sides[1].work)) - before):
            raise _Found(f"left in the work directory: {sorted(left)}")

    def _read_logs(self) -> None:
        for side in self.sides:
            if text := side.complaints():
                raise _Found(f"the daemon's log says:\n{text}")


def _outcomes(op: Op, expected: Outcome, got: Outcome, swapped: bool) -> str:
    """The difference between two outcomes in words, of two dictionaries only what differs; empty when there is none."""
    if expected == got:
        return ""
    one, two = expected[1], got[1]
    if isinstance(one, dict) and isinstance(two, dict):
        if deviations.nameless(op, two):
            two["nlink"] = one.get("nlink")
        lines = _fields_differ(one, two, swapped)
        return f"{op.kind} {op.args!r} by {op.user}: " + "; ".join(lines) if lines else ""
    return f"{op.kind} {op.args!r} by {op.user}: expected {expected}, got {got}"


def differences(expected: Tree, got: Tree, swapped: bool) -> list[str]:
    """One line for each difference, sorted by path; ``swapped``: each side was served by both implementations."""
    lines = []
    for path in sorted(expected.keys() | got.keys()):
        if path not in got:
            lines.append(f"{path!r}: missing; expected {expected[path]}")
        elif path not in expected:
            lines.append(f"{path!r}: should not exist, is {got[path]}")
        else:
            lines += [f"{path!r}: {line}" for line in _fields_differ(expected[path], got[path], swapped)]
    return lines


def _fields_differ(expected: Fields, got: Fields, swapped: bool) -> list[str]:
    """One line for each field that differs and may not."""
    lines = []
    for key in expected | got:
        one, two = expected.get(key), got.get(key)
        if one == two or deviations.tolerable(key, one, two) or (swapped and deviations.tolerable(key, two, one)):
            continue
        lines.append(f"{key}: expected {one!r}, got {two!r}")
    return lines
