"""What is written down of a mount comes back as it was, whatever the next daemon meets first."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from unionfs.fuse import kept
from unionfs.fuse.kept import KeptNodes, Past, Unanswered
from unionfs.fuse.ledger import Ledger


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger()
    yield made
    os.close(made.fd)


def test_numbers_do_not_depend_on_the_order(ledger: Ledger) -> None:
    first = KeptNodes()
    real = [(7, 100), (9, 100), (8, 100), (8, 1 << 60), (9, 1 << 61)]
    shown = [first.map_ino(*one) for one in real[:2]]
    ledger.append(0, first.numbers())
    devices, odd = first.counts()
    shown += [first.map_ino(*one) for one in real[2:]]
    ledger.append(0, first.numbers(devices=devices, odd=odd))
    assert len(set(shown)) == len(real)

    second = KeptNodes()
    past = Past(ledger)
    second.number_as(past.numbered, past.odd)
    assert [second.map_ino(*one) for one in reversed(real)] == shown[::-1]
    assert second.map_ino(5, 1 << 60) not in shown


def test_what_was_counted_for_no_answer(ledger: Ledger) -> None:
    counted = Unanswered(1 << 40)
    counted.lookups, counted.files, counted.directories = {2: 3, 1 << 63: 1, 5: -1}, [7, 8], [1 << 60]
    ledger.append(6, counted.pack())
    again = Past(ledger).unanswered[1 << 40]
    assert (again.unique, again.files, again.directories) == (1 << 40, [7, 8], [1 << 60])
    assert again.lookups == {2: 3, 1 << 63: 1}
    ledger.append(8, kept.gone(b"u", 1 << 40))
    assert 1 << 40 not in Past(ledger).unanswered
