"""The run: rounds over workloads over subjects, and what they gave."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.compare import machine
from tests.compare.processes import Failed
from tests.compare.stage import IN_SOURCE, Site, Stage
from tests.compare.subjects import Ours, Subject, clear
from tests.compare.workloads import COLD, Pair, Sample, Workload

NOISE = 1.03
"""A goal counts as missed beyond it by more than this factor."""
LIMIT = "limit"


@dataclass
class Result:
    """One row: a workload in one phase, with every value measured and each failure's reason, by subject."""

    workload: Workload
    phase: str
    values: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the row is called."""
        return f"{self.workload.title}, {self.phase}" if len(self.workload.phases) > 1 else self.workload.title

    def median(self, subject: str) -> float | None:
        """The subject's median; None where it failed or was not measured."""
        if subject in self.failures or not self.values.get(subject):
            return None
        return statistics.median(self.values[subject])

    def ratio(self, subject: str, other: str) -> float | None:
        """The median of `subject` over that of `other`; None where one of them is not to be had."""
        above, below = self.median(subject), self.median(other)
        return above / below if above is not None and below else None

    def missed(self, names: Sequence[str]) -> dict[Pair, float]:
        """The goals that are missed: the ratio of a subject to another where it is too large; or to the "limit"."""
        missed: dict[Pair, float] = {}
        for name, other in itertools.permutations(names, 2):
            goal, ratio = self.workload.goal.get((kind(name), kind(other))), self.ratio(name, other)
            if goal is not None and ratio is not None and ratio > NOISE * goal:
                missed[name, other] = ratio
        limit = self.workload.limit
        for name in names if limit else ():
            median = self.median(name)
            if kind(name) == Ours.kind and limit and median and median > limit:
                missed[name, LIMIT] = median / limit
        return missed

    def goal(self, pair: Pair) -> float:
        """What `missed` held the ratio of a pair of names against."""
        return self.workload.goal[kind(pair[0]), kind(pair[1])]


def kind(name: str) -> str:
    """The kind of a subject out of its name, which has options too."""
    return name.split("+", maxsplit=1)[0]


class Bench:
    """Measures `workloads` on `subjects`, sample by sample.

    Args:
        advance: called after each sample with what it was, a line.
        cold: whether cold runs are wanted and possible.
    """

    def __init__(
        self,
        stage: Stage,
        subjects: Sequence[Subject],
        workloads: Sequence[Workload],
        *,
        cold: bool,
        advance: Callable[[str], None],
    ) -> None:
        self._stage = stage
        self._subjects = subjects
        self._workloads = workloads
        self._cold = cold
        self._advance = advance
        self.results = {
            (workload.name, phase): Result(workload, phase)
            for workload in workloads
            for phase in workload.phases
            if cold or phase != COLD
        }

    def samples(self) -> int:
        """How many samples one round takes."""
        return sum(workload.applies(subject) for workload in self._workloads for subject in self._subjects)

    def round(self, number: int) -> None:
        """One sample of everything; who comes first changes from round to round and from workload to workload."""
        for position, workload in enumerate(self._workloads):
            first = (number + position) % len(self._subjects)
            for subject in (*self._subjects[first:], *self._subjects[:first]):
                if workload.applies(subject):
                    self._sample(workload, subject)
                    self._advance(f"round {number + 1}, {workload.title}: {subject.name}")

    def _sample(self, workload: Workload, subject: Subject) -> None:
        rows = [
            self.results[workload.name, phase] for phase in workload.phases if (workload.name, phase) in self.results
        ]
        if any(subject.name in row.failures for row in rows):
            return
        for part in workload.parts:
            self._stage.need(part)
            if not subject.is_mount and part not in IN_SOURCE:
                self._stage.need_bare(part)
        site = self._stage.new_site()
        try:
            machine.sync(self._stage.base)
            found = workload.sample(Sample(subject, site, self._stage, self._cold))
            for row in rows:
                row.values.setdefault(subject.name, []).append(found[row.phase])
        except (Failed, OSError, ValueError, KeyError) as error:
            if _interrupted(error):
                raise KeyboardInterrupt from error
            for row in rows:
                row.failures[subject.name] = _reason(error, site)
        finally:
            clear(site.base)


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error came up in the clean-up after an interrupt, and hides it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _reason(error: Exception, site: Site) -> str:
    """Why a sample failed, the same words for the same failure in every site."""
    return (str(error) or type(error).__name__).replace(str(site.merged), "MERGED").replace(str(site.base), "SITE")
