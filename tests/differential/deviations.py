"""Known differences between this union and kernel overlayfs, each with its reason. Nothing else is let pass."""

from __future__ import annotations

import re
from typing import NamedTuple


class Deviation(NamedTuple):
    """A difference that is meant: a pattern that lines of a comparison match, and why it is so."""

    pattern: str
    reason: str


KNOWN: tuple[Deviation, ...] = ()


def filtered(lines: list[str]) -> list[str]:
    """``lines`` without those that tell of a known deviation."""
    return [line for line in lines if not any(re.search(known.pattern, line) for known in KNOWN)]
