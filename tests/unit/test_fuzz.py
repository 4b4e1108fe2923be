"""Every fuzz target for a moment; `make fuzz` runs them for minutes."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import command_line
from tests.fuzz.targets import TARGETS, clean_up


@pytest.fixture(autouse=True, scope="module")
def _cleaned() -> object:
    yield
    clean_up()


@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str) -> None:
    target = TARGETS[name]

    @settings(
        max_examples=max(10, 200 // target.cost),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(dice=st.randoms(use_true_random=False))
    def run(dice: random.Random) -> None:
        target.run(target.value(dice))

    for seed in target.seeds:
        target.run(seed)
    run()


def test_command_lines() -> None:
    """In a sandbox, as an ordinary user: a documented exit status, one line, no traceback."""
    runs, wrong = command_line.fuzz(3, 1)
    assert wrong == []
    assert runs > 3
