"""The table of POSIX behaviours on a plain directory, on kernel overlayfs, on ours and in a bind path, from three places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.posix import BEHAVIOURS, Behaviour
from tests.mount.posix.table import plant, touch_all
from tests.support.filesystems import remove_tree
from tests.support.layers import build
from tests.support.mounts import Kind, Stack

HOUSES = [
    "plain-lower",
    "overlay-lower",
    "overlay-upper",
    "overlay-touched",
    "union-lower",
    "union-upper",
    "union-touched",
    "union-waiting",
    "bind-lower",
    "bind-upper",
]
AS_LOWER = {"union-waiting": "union-lower"}
"""Houses that are built, and behave, as another one."""


@pytest.fixture(scope="module", params=HOUSES)
def house(request: pytest.FixtureRequest, session_ground: Path, _stacks: list[Stack]) -> Iterator[tuple[str, Stack]]:
    """One mount for the whole table: its label, and the stack."""
    name: str = request.param
    kind: Kind = name.split("-", maxsplit=1)[0]  # type: ignore[assignment]
    # Every lower taken for a slow one: each operation is begun again until all of its questions are answered.
    stack = Stack.make(kind, session_ground / f"posix-{name}", options="slow_lower=on" if name in AS_LOWER else "")
    if not name.endswith("upper"):
        plant(stack.below, list(BEHAVIOURS.values()))
    stack.mount()
    _stacks.append(stack)
    yield name, stack
    stack.umount()
    remove_tree(stack.base)


@pytest.mark.parametrize("line", BEHAVIOURS.values(), ids=lambda line: line.name)
def test_behaviour(house: tuple[str, Stack], line: Behaviour) -> None:
    name, stack = house
    if AS_LOWER.get(name, name) in line.unlike:
        return
    directory = stack.inside / line.name
    if name.endswith("upper"):
        build(directory, line.seed)
    elif name.endswith("touched"):
        touch_all(directory)
    line.check(directory)
