"""What a daemon leaves to the next one is whole, wherever it was stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from unionfs.fuse import ledger
from unionfs.fuse.ledger import Ledger, State


@pytest.fixture
def kept() -> Iterator[Ledger]:
    made = Ledger()
    yield made
    os.close(made.fd)


def test_batches_come_back(kept: Ledger) -> None:
    kept.append(0, b"first")
    kept.append(1 << 62, b"")
    kept.append(7, b"last" * 1000)
    assert list(kept.batches()) == [(0, b"first"), (1 << 62, b""), (7, b"last" * 1000)]


def test_a_torn_batch_is_none(kept: Ledger) -> None:
    kept.append(1, b"whole")
    size = os.fstat(kept.fd).st_size
    kept.append(2, b"torn")
    whole = os.pread(kept.fd, 1000, 0)
    for end in reversed(range(size, len(whole))):
        os.ftruncate(kept.fd, end)
        assert list(kept.batches()) == [(1, b"whole")]
    kept.append(3, b"next")  # in place of what is torn
    assert list(kept.batches()) == [(1, b"whole"), (3, b"next")]


def test_written_anew_behind_the_same_number(kept: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_LEAST_BYTES", 1000)
    number = kept.fd
    assert not kept.outgrown
    kept.append(1, bytes(1000))
    assert kept.outgrown
    kept.write_anew(bytes(500))
    assert not kept.outgrown
    kept.append(2, bytes(1000))
    assert not kept.outgrown
    kept.append(3, bytes(1000))
    assert kept.outgrown
    assert kept.fd == number
    assert [(unique, len(records)) for unique, records in kept.batches()] == [(0, 500), (2, 1000), (3, 1000)]


def test_another_process_sees_state_and_slot(kept: Ledger) -> None:
    assert kept.noted() is None
    assert kept.dev == ""
    child = os.fork()
    if child == 0:
        kept.state = State.SERVING
        kept.dev = "0:123"
        kept.note(1, b"before")
        kept.note(12345678901234567890, b"name\0")
        os._exit(0)
    os.waitpid(child, 0)
    assert kept.state is State.SERVING
    assert kept.dev == "0:123"
    assert kept.noted() == (12345678901234567890, b"name\0")


def test_more_than_the_slot_holds_is_refused(kept: Ledger) -> None:
    with pytest.raises(ValueError, match="too much"):
        kept.note(1, bytes(1 << 20))
