"""What the comparison says: a table on the terminal, one in Markdown, and JSON with every single value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.compare.bench import LIMIT, Result
from tests.compare.workloads import Pair


@dataclass(frozen=True)
class Comparison:
    """The results of some subjects and what they are held against.

    Attributes:
        title: of the table.
        subjects: their names, in the order of the columns.
        ratios: the pairs of names whose ratio has a column.
    """

    title: str
    subjects: Sequence[str]
    ratios: Sequence[Pair]
    results: Sequence[Result]


def value(number: float, unit: str) -> str:
    """A measured value with three digits and a unit that suits its size."""
    steps = {"s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")), "B": ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))}
    factor, name = next((step for step in steps[unit] if number >= step[0]), steps[unit][-1])
    scaled = number / factor
    return f"{scaled:.{0 if scaled >= 99.5 else 1 if scaled >= 9.95 else 2}f} {name}"


def cell(result: Result, subject: str) -> str:
    """What a subject's column shows."""
    if subject in result.failures:
        return "fails"
    median = result.median(subject)
    return "–" if median is None else value(median, result.workload.unit)


def terminal(comparison: Comparison, console: Console) -> None:
    """Print the table: medians, ratios, and which goals are missed."""
    table = Table(title=comparison.title, title_justify="left")
    table.add_column("workload", no_wrap=True)
    for name in comparison.subjects:
        table.add_column(name, justify="right", no_wrap=True)
    for pair in comparison.ratios:
        table.add_column(f"{pair[0]} / {pair[1]}", justify="right")
    group = None
    for result in comparison.results:
        if group not in {None, result.workload.group}:
            table.add_section()
        group = result.workload.group
        table.add_row(result.title, *_cells(comparison, result))
    console.print(table)
    for line in remarks(comparison):
        console.print(Text(line), soft_wrap=True)


def _cells(comparison: Comparison, result: Result) -> Iterable[Text]:
    for subject in comparison.subjects:
        yield Text(cell(result, subject), style="red" if subject in result.failures else "")
    missed = result.missed(comparison.subjects)
    for pair in comparison.ratios:
        ratio = result.ratio(*pair)
        yield Text(_ratio(ratio), style="red" if pair in missed else "green" if ratio is not None else "")


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def remarks(comparison: Comparison) -> list[str]:
    """One line for each row that misses a goal, and for each failure."""
    lines = []
    for result in comparison.results:
        parts = [_missed(result, pair, ratio) for pair, ratio in result.missed(comparison.subjects).items()]
        if parts:
            lines.append(f"goal missed: {result.title}: {', '.join(parts)}")
    for result in comparison.results:
        for reason in dict.fromkeys(result.failures.values()):
            names = [name for name, why in result.failures.items() if why == reason]
            lines.append(f"fails: {result.title}: {', '.join(names)}: {reason}")
    return lines


def _missed(result: Result, pair: Pair, ratio: float) -> str:
    name, other = pair
    if other == LIMIT:
        return f"{name} {ratio:.2f} × {value(result.workload.limit or 0, result.workload.unit)}"
    return f"{name} {ratio:.2f} × {other} (goal: {result.goal(pair):g})"


def markdown(comparison: Comparison) -> str:
    """The table for a README."""
    heads = ["workload", *comparison.subjects, *(f"{name} / {other}" for name, other in comparison.ratios)]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for result in comparison.results:
        cells = [cell(result, subject) for subject in comparison.subjects]
        cells += [_ratio(result.ratio(*pair)) for pair in comparison.ratios]
        lines.append(f"| {' | '.join([result.title, *cells])} |")
    return "\n".join(lines) + "\n"


def as_json(comparison: Comparison) -> dict[str, object]:
    """All of one comparison, as JSON has it."""
    return {
        "title": comparison.title,
        "subjects": list(comparison.subjects),
        "measurements": [_measurement(comparison, result) for result in comparison.results],
    }


def _measurement(comparison: Comparison, result: Result) -> dict[str, object]:
    workload = result.workload
    return {
        "workload": workload.name,
        "phase": result.phase,
        "title": result.title,
        "group": workload.group,
        "unit": workload.unit,
        "values": result.values,
        "medians": {name: result.median(name) for name in comparison.subjects if result.median(name) is not None},
        "ratios": _pairs({pair: ratio for pair in comparison.ratios if (ratio := result.ratio(*pair)) is not None}),
        "fails": result.failures,
        "goal": _pairs(workload.goal),
        "limit": workload.limit,
        "missed": _pairs(result.missed(comparison.subjects)),
    }


def _pairs(numbers: Mapping[Pair, float]) -> dict[str, float]:
    return {f"{name}/{other}": round(number, 4) for (name, other), number in numbers.items()}
