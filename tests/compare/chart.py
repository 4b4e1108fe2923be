"""The chart: for each workload the time of every subject as a multiple of overlayfs's, on a logarithmic scale, as an SVG.

It is written by hand: the drawing is small, needs no library, and follows the light or dark scheme of its reader.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from tests.compare.bench import Result
from tests.compare.report import Comparison, value

COLOURS = ("#d1495b", "#8d96a3", "#3d7ea6", "#edae49", "#66a182", "#9a5fb4", "#7a5c3e")
"""The first is that of the subject in question; the others follow in the order of the columns."""
LEFT, PLOT, RIGHT = 250, 620, 90
ROW, HEAD, FOOT = 22, 64, 34
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.small { font-size: 11px; fill: #57606a }
.grid { stroke: #d0d7de; stroke-width: 1 }
.one { stroke: #57606a; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .grid { stroke: #3d444d } .one { stroke: #9198a1 }
}
"""


def chart(comparison: Comparison) -> str:
    """An SVG with a row for each workload and a mark for each subject; left is faster."""
    ours, reference = comparison.ratios[0] if comparison.ratios else (comparison.subjects[-1], comparison.subjects[0])
    rows = [result for result in comparison.results if result.median(reference)]
    shown = [ours, *(name for name in comparison.subjects if name not in {reference, ours})]
    ratios = [ratio for row in rows for name in shown if (ratio := row.ratio(name, reference))]
    scale = _Scale(min([0.5, *ratios]), max([2.0, *ratios]))
    height = HEAD + ROW * len(rows) + FOOT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + PLOT + RIGHT} {height}" role="img">',
        f"<title>Time as a multiple of {escape(reference)}, {escape(comparison.title)}</title><style>{STYLE}</style>",
        f'<text x="12" y="22" font-weight="bold">Time as a multiple of {escape(reference)}: left is faster</text>',
        *_legend(shown, reference),
        *_grid(scale, height),
    ]
    for number, row in enumerate(rows):
        lines += _row(row, HEAD + ROW * number + ROW / 2, shown, reference, scale)
    return "\n".join([*lines, "</svg>"]) + "\n"


class _Scale:
    """Positions of ratios on the logarithmic axis."""

    def __init__(self, smallest: float, largest: float) -> None:
        self._low = math.log(smallest * 0.9)
        self._width = math.log(largest * 1.1) - self._low
        self.steps = [step for step in _steps() if smallest * 0.9 <= step <= largest * 1.1]

    def __call__(self, ratio: float) -> float:
        return LEFT + PLOT * (math.log(ratio) - self._low) / self._width


def _steps() -> Iterable[float]:
    return (digit * 10.0**power for power in range(-4, 5) for digit in (1, 2, 5))


def _legend(shown: Sequence[str], reference: str) -> Iterable[str]:
    x = 12.0
    for name, colour in zip(shown, COLOURS * len(shown), strict=False):
        yield f'<circle cx="{x + 5}" cy="42" r="5" fill="{colour}"/><text x="{x + 15}" y="46">{escape(name)}</text>'
        x += 32 + 7 * len(name)
    yield f'<text x="{LEFT + PLOT + 8}" y="46" class="small">{escape(reference)}</text>'


def _grid(scale: _Scale, height: int) -> Iterable[str]:
    for step in scale.steps:
        x, kind = f"{scale(step):.1f}", "one" if step == 1 else "grid"
        yield f'<line x1="{x}" y1="{HEAD - 6}" x2="{x}" y2="{height - FOOT + 4}" class="{kind}"/>'
        yield f'<text x="{x}" y="{height - 12}" text-anchor="middle" class="small">{step:g} ×</text>'


def _row(row: Result, y: float, shown: Sequence[str], reference: str, scale: _Scale) -> Iterable[str]:
    yield f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(row.title)}</text>'
    median = row.median(reference)
    assert median is not None
    yield f'<text x="{LEFT + PLOT + 8}" y="{y + 4:.1f}" class="small">{value(median, row.workload.unit)}</text>'
    # The subject in question is drawn last, over the others.
    for name, colour in reversed([*zip(shown, COLOURS * len(shown), strict=False)]):
        ratio = row.ratio(name, reference)
        if ratio is not None:
            said = escape(f"{row.title}: {name} {ratio:.2f} × {reference}")
            yield f'<circle cx="{scale(ratio):.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{said}</title></circle>'
