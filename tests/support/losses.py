"""What trials in several modes have come to: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table


def report(title: str, modes: Mapping[str, Mapping[str, int]], wrong: Sequence[str], *, as_json: bool) -> None:
    """Print figures by mode, and what went wrong."""
    if as_json:
        print(json.dumps({"modes": modes, "wrong": wrong}, indent=2))
        return
    table = Table(title=title)
    table.add_column("mode")
    for heading in next(iter(modes.values())):
        table.add_column(heading, justify="right")
    for mode, numbers in modes.items():
        table.add_row(mode, *map(str, numbers.values()))
    console = Console()
    console.print(table)
    console.print(f"lost, half done or left over: {len(wrong)}")
    for text in wrong:
        console.print(f"- {text}", markup=False, highlight=False)
