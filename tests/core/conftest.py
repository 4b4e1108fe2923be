"""A union over fresh directories, opened but not mounted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from unionfs.config import MountConfig
from unionfs.core.union import Union

Opener = Callable[..., Union]


@pytest.fixture
def open_union(tmp_path: Path) -> Iterator[Opener]:
    """Open a union over ``l1``, ``l2`` and ``upper``; again after closing is a remount. Descriptors must not leak."""
    for name in ("l1", "l2", "upper", "work"):
        (tmp_path / name).mkdir()
    before = set(os.listdir("/proc/self/fd"))
    opened: list[Union] = []

    def open_(**options: Any) -> Union:
        for union in opened:
            union.close()
        config = MountConfig(
            lowers=(str(tmp_path / "l1"), str(tmp_path / "l2")),
            mountpoint=str(tmp_path / "mnt"),
            **{"upper": str(tmp_path / "upper"), "work": str(tmp_path / "work"), **options},
        )
        opened.append(Union.open(config))
        return opened[-1]

    yield open_
    for union in opened:
        union.close()
    assert set(os.listdir("/proc/self/fd")) == before, "descriptors leaked"
