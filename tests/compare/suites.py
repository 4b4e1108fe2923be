"""What can be measured, in three suites, and what of it a command line asks for.

`unions` is the comparison with others; `volumes` compares places in and beside one union of ours; `podman` what podman does over
the one or the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.compare.podman import STORES, podman_workloads
from tests.compare.stage import Sizes, Stage
from tests.compare.subjects import SUBJECTS, Subject, Unavailable
from tests.compare.volumes import PLACES, volume_workloads
from tests.compare.workloads import Pair, Workload, workloads


class Refused(Exception):
    """The comparison can't be run as it was asked for; one line says why."""


@dataclass(frozen=True)
class Suite:
    """Subjects and workloads that go together.

    Attributes:
        ratios: the pairs of kinds whose ratio the table shows.
        full: whether it takes so long that only --full or its names select it.
    """

    title: str
    subjects: Sequence[type[Subject]]
    workloads: Callable[[Sizes], list[Workload]]
    ratios: Sequence[Pair]
    full: bool = False

    def pairs(self, names: Sequence[str]) -> list[Pair]:
        """The pairs of subject names whose ratio is shown: each kind stands for its first subject."""
        first: dict[str, str] = {}
        for name in names:
            first.setdefault(name.split("+", maxsplit=1)[0], name)
        return [(first[name], first[other]) for name, other in self.ratios if name in first and other in first]


SUITES = (
    Suite("Unions", SUBJECTS, workloads, (("unionfs", "overlayfs"), ("unionfs", "fuse-overlayfs"))),
    Suite(
        "Volumes",
        PLACES,
        volume_workloads,
        (
            *(("bind-kernel", "host"), ("bind-fuse", "upper"), ("bind-fuse", "copy-up")),
            *(("bind-cached", "upper"), ("bind-cached", "copy-up")),
        ),
    ),
    Suite(
        "Podman",
        STORES,
        podman_workloads,
        (("podman-unionfs", "podman-overlayfs"), ("podman-unionfs", "podman-fuse-overlayfs")),
        full=True,
    ),
)


@dataclass
class Chosen:
    """What of a suite is to be run; `left_out` says what can't be, and why, one line for each reason."""

    suite: Suite
    subjects: dict[Subject, str] = field(default_factory=dict)
    workloads: list[Workload] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Note what can't be run: reasons by name."""
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, why in reasons.items() if why == reason]
            self.left_out.append(f"{', '.join(names)}: {reason}")

    @property
    def is_left(self) -> bool:
        """Whether there is something to run."""
        return bool(self.subjects and self.workloads)


def choose(
    stage: Stage, subjects: Sequence[str] | None, only: Sequence[str] | None, *, full: bool, rootless: bool
) -> list[Chosen]:
    """What is to be run, by suite; suites of which nothing is, but for a reason, are among them.

    Args:
        subjects: names, with options after a `+`; None for all.
        only: names of workloads or groups; None for all but those that take long.
        full: with those too.

    Raises:
        Refused: a name is not known, or nothing is left.
    """
    _check_names("subject", [name.split("+", maxsplit=1)[0] for name in subjects or ()], subject_names())
    everything = [workload for suite in SUITES for workload in suite.workloads(stage.sizes)]
    _check_names("workload or group", only or (), {name for each in everything for name in (each.name, each.group)})
    chosen = [Chosen(suite) for suite in SUITES]
    for each in chosen:
        _choose_workloads(each, stage.sizes, only, full=full)
        if each.workloads:
            _choose_subjects(each, stage, subjects, rootless=rootless)
    if not any(each.is_left for each in chosen):
        reasons = [line for each in chosen for line in each.left_out]
        raise Refused(f"nothing is left to measure; {'; '.join(reasons) or '--list has the names of all'}")
    return [each for each in chosen if each.is_left or each.left_out]


def subject_names() -> set[str]:
    """The kinds of all subjects."""
    return {kind.kind for suite in SUITES for kind in suite.subjects}


def _check_names(what: str, names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise Refused(f"no {what} is called {name!r}; --list has their names")


def _choose_workloads(chosen: Chosen, sizes: Sizes, only: Sequence[str] | None, *, full: bool) -> None:
    missing = {}
    for each in chosen.suite.workloads(sizes):
        by_name = each.name in (only or ()) or (each.group in (only or ()) and not each.full)
        wanted = by_name if only else full or not (each.full or chosen.suite.full)
        if wanted and each.missing():
            missing[each.name] = each.missing()
        elif wanted:
            chosen.workloads.append(each)
    chosen.leave_out(missing)


def _choose_subjects(chosen: Chosen, stage: Stage, names: Sequence[str] | None, *, rootless: bool) -> None:
    kinds = {kind.kind: kind for kind in chosen.suite.subjects}
    missing = {}
    for name in kinds if names is None else names:
        kind, *options = name.split("+")
        if kind in kinds:
            subject = kinds[kind](stage, options, rootless=rootless)
            try:
                chosen.subjects[subject] = subject.version()
            except Unavailable as why:
                missing[name] = str(why)
    chosen.leave_out(missing)
