"""Merging listings."""

from __future__ import annotations

from unionfs.core.merge import DT_CHR, DT_DIR, DT_REG, merge

NONE: frozenset[bytes] = frozenset()


def names(*layers: tuple[list[bytes], set[bytes]]) -> list[tuple[bytes, int]]:
    merged = merge(
        (index, [(name, 7, DT_REG) for name in listed], frozenset(whiteouts))
        for index, (listed, whiteouts) in enumerate(layers)
    )
    return [(entry.name, entry.layer) for entry in merged]


def test_the_topmost_name_is_shown_once() -> None:
    assert names(([b"a", b"b"], set()), ([b"b", b"c"], set())) == [(b"a", 0), (b"b", 0), (b"c", 1)]


def test_a_name_that_was_read_twice_is_shown_once() -> None:
    assert names(([b"a", b"b", b"a"], set()), ([b"b", b"c"], set())) == [(b"a", 0), (b"b", 0), (b"c", 1)]
    assert names(([b"a", b"a"], set())) == [(b"a", 0)]


def test_a_whiteout_hides_what_is_below_only() -> None:
    assert names(([b"a"], {b"a"}), ([b"a", b"b"], set())) == [(b"b", 1)]
    assert names(([b"a"], set()), ([b"a"], {b"a"}), ([b"a"], set())) == [(b"a", 0)]


def test_a_file_whiteout_spares_its_own_layer() -> None:
    assert names(([b".wh.a", b"a"], {b".wh.a"}), ([b"a"], set())) == [(b"a", 0)]
    assert names(([b".wh.a"], {b".wh.a"}), ([b"a", b"b"], set())) == [(b"b", 1)]


def test_types_are_those_of_the_layer_that_shows() -> None:
    merged = merge([(0, [(b"x", 1, DT_CHR)], NONE), (1, [(b"x", 2, DT_DIR), (b"y", 3, DT_DIR)], NONE)])
    assert [(entry.kind, entry.ino) for entry in merged] == [(DT_CHR, 1), (DT_DIR, 3)]
