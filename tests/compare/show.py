"""Progress: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 15.0


class Show:
    """Shows how many samples of all have been taken. Used with `with`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(
            BarColumn(), MofNCompleteColumn(), *times, TextColumn("{task.description}"), console=console
        )
        self._task = self._progress.add_task("making the layers", total=None)
        self._total = self._done = 0
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, why: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def total(self, samples: int) -> None:
        """How many samples there will be."""
        self._total = samples
        self._progress.update(self._task, total=samples)

    def advance(self, text: str) -> None:
        """One more sample, `text`, has been taken."""
        self._done += 1
        self._progress.update(self._task, advance=1, description=text)
        if not self._console.is_terminal and time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            self.say(f"{self._done}/{self._total}  {text}")

    def say(self, text: str) -> None:
        """Print a line beside the bar."""
        self._progress.console.print(text)
