"""Kills the daemon before every system call with which it changes something, and looks at what is left.

Chapters of work (`workload`) are done in a union, each in a fresh one and in several modes. First a chapter is done as
it is, which tells how many changing system calls the daemon makes for it, from its start to its end. Then it is done
again and again, and the daemon is killed before one of these calls, another one each time (`gate` tells how), or, in
turns, at a random moment; sometimes the daemon of the next mount is killed, too, while it clears up. Or the call fails
with ENOSPC, EDQUOT, EIO or EROFS, and the daemon has to cope with that.

In the mode `auto-restart` another daemon takes over, and whoever works there must not notice.

After each of them (`trial`) every file must be wholly old or wholly new. All that was finished is there, what was under
way is there or not. Nothing half-made shows or is left over, kernel overlayfs sees the same in the layers as the union
does, and the work can go on where it was ended.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console

from tests.crash import gate
from tests.crash.site import Site
from tests.crash.trial import Outcome, Strike, Trial, Wrong
from tests.crash.workload import CHAPTERS
from tests.support.filesystems import FS_KINDS, file_system, have_own_mounts
from tests.support.losses import report
from tests.support.mounts import AUTO_RESTART, can_restart

MODES: Final = (
    *("default", "passthrough=off", "native=off", "metacopy=off", "whiteout=xattr"),
    *((AUTO_RESTART,) if can_restart() else ()),
)
KINDS: Final = ("calls", "moments", "faults")
FAULTS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_REMOUNT_CALLS: Final = 12
"""About as many changing calls a mount makes."""


@dataclass
class Tally:
    """What a chapter has gone through in a mode."""

    calls: int = 0  # changing system calls from start to end
    killed_before: set[int] = field(default_factory=set)
    faulted: set[int] = field(default_factory=set)
    kills: int = 0
    moments: int = 0  # of these at random
    failures: int = 0  # steps that failed for a fault
    seconds: float = 0.0
    order: list[int] = field(default_factory=list)  # in which the calls are struck
    next: dict[str, int] = field(default_factory=dict)

    def take(self, kind: str) -> int:
        """The number of the next call to strike at."""
        at = self.next.get(kind, 0)
        self.next[kind] = at + 1
        return self.order[at % len(self.order)]

    def is_done(self, kinds: Sequence[str]) -> bool:
        """Whether each call has been struck at."""
        done = {"calls": len(self.killed_before), "faults": len(self.faulted)}
        return self.calls > 0 and all(done.get(kind, self.calls) >= len(self.order) for kind in kinds)


class Run:
    """All trials of a run."""

    def __init__(self, site: Site, options: argparse.Namespace, chance: random.Random) -> None:
        self.site, self.options, self.chance = site, options, chance
        self.tallies = {mode: {chapter: Tally() for chapter in options.chapters} for mode in options.modes}
        self.wrong: list[str] = []

    def trials(self) -> Iterator[str]:
        """Do one trial after the other, and say before each what it is; a round has one of each kind."""
        while True:
            for mode, chapters in self.tallies.items():
                for chapter, tally in chapters.items():
                    kinds = [] if self.options.all and tally.is_done(self.options.kinds) else self.options.kinds
                    for kind in kinds:
                        yield f"{mode}, {chapter}, {kind}"
                        self._one(mode, chapter, tally, kind)
            yield ""

    def is_done(self) -> bool:
        """Whether there is no call left to be struck at."""
        return all(
            tally.is_done(self.options.kinds) for chapters in self.tallies.values() for tally in chapters.values()
        )

    def _one(self, mode: str, chapter: str, tally: Tally, kind: str) -> None:
        if not tally.calls:
            outcome = self._try(mode, chapter, Strike())
            tally.calls, tally.seconds = len(outcome.calls), outcome.seconds
            wanted = [at for at, call in enumerate(outcome.calls, 1) if re.search(self.options.before, call)]
            tally.order = wanted[: self.options.first]
            self.chance.shuffle(tally.order)
        if not tally.order and kind != "moments":
            return
        strike = self._strike(tally, kind)
        outcome = self._try(mode, chapter, strike)
        tally.kills += outcome.kills
        tally.moments += outcome.kills if kind == "moments" else 0
        tally.failures += outcome.failed
        if strike.at:
            (tally.faulted if strike.fault else tally.killed_before).add(strike.at)

    def _strike(self, tally: Tally, kind: str) -> Strike:
        by_overlay = self.chance.random() < 0.5
        if kind == "faults":
            return Strike(at=tally.take(kind), fault=self.chance.choice(FAULTS))
        if kind == "moments":
            return Strike(after=self.chance.uniform(0, tally.seconds), rest_by_overlay=by_overlay)
        twice = self.chance.randint(1, _REMOUNT_CALLS) if self.chance.random() < 0.25 else 0
        return Strike(at=tally.take(kind), remount_at=twice, rest_by_overlay=by_overlay)

    def _try(self, mode: str, chapter: str, strike: Strike) -> Outcome:
        trial = Trial(self.site, chapter, "" if mode == "default" else mode, strike)
        try:
            return trial.run()
        except Wrong as wrong:
            self.wrong.append(f"{mode}, {chapter}, {strike}: {wrong}")
            return trial.outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if nothing was lost, 1 if something was, 2 where it can't be run."""
    options = _parse(arguments)
    console = Console(stderr=True)
    if os.geteuid() != 0 or not gate.works():
        console.print("crash: needs root, and a kernel with seccomp's user notification (Linux 5.5)")
        return 2
    os.umask(0o022)
    have_own_mounts()
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unionfs-crash-", dir=options.dir)))
        base.chmod(0o755)
        ground = stack.enter_context(file_system(options.fs, base, size="2G"))
        status = stack.enter_context(console.status("writing the lower layers"))
        run = Run(Site(base, ground), options, random.Random(options.seed))
        end = time.monotonic() + options.minutes * 60
        rounds = 0
        for what in run.trials():
            rounds += not what
            late = time.monotonic() > end and not options.all
            if (rounds and late) or (options.all and run.is_done()) or len(run.wrong) >= options.most_wrong:
                break
            kills = sum(tally.kills for chapters in run.tallies.values() for tally in chapters.values())
            status.update(f"{what}; {kills} kills, {len(run.wrong)} wrong")
        if run.site.lowers_changed():
            run.wrong.append("the lower layers have changed")
    _report(run, as_json=options.json)
    return 1 if run.wrong else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make crash", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default: 5); at least a round")
    parser.add_argument("--all", action="store_true", help="until every call has been struck at, however long")
    parser.add_argument(
        "--modes", nargs="+", default=list(MODES), help="mount options, `default`, `auto-restart`; default: all"
    )
    parser.add_argument("--chapters", nargs="+", choices=list(CHAPTERS), default=list(CHAPTERS), help="default: all")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what is done; default: all")
    parser.add_argument("--before", default="", help="only calls whose text matches this regular expression")
    parser.add_argument("--first", type=int, default=None, help="only the first so many of these calls")
    parser.add_argument("--fs", choices=FS_KINDS, default="ext4", help="the layers' file system (default: ext4)")
    parser.add_argument("--dir", default="/var/tmp", help="where it lies; 1 GiB free (default: /var/tmp)")
    parser.add_argument("--seed", type=int, default=None, help="for the same trials once more")
    parser.add_argument("--most-wrong", type=int, default=10, help="end after so many losses (default: 10)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(arguments)


def _sum(tallies: Sequence[Tally]) -> dict[str, int]:
    return {
        "calls": sum(tally.calls for tally in tallies),
        "killed before": sum(len(tally.killed_before) for tally in tallies),
        "kills": sum(tally.kills for tally in tallies),
        "at random": sum(tally.moments for tally in tallies),
        "faults": sum(len(tally.faulted) for tally in tallies),
        "failed steps": sum(tally.failures for tally in tallies),
    }


def _report(run: Run, *, as_json: bool) -> None:
    modes = {mode: _sum(list(chapters.values())) for mode, chapters in run.tallies.items()}
    report("The daemon killed at work", modes, run.wrong, as_json=as_json)


if __name__ == "__main__":
    sys.exit(main())
