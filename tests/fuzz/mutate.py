"""Bytes that are nearly right: seeds, changed in a few places."""

from __future__ import annotations

import random
from collections.abc import Sequence

# What parsers like to stumble over.
TOKENS: Sequence[bytes] = (
    *(
        b"\0",
        b"\xff",
        b"/",
        b"..",
        b".",
        b":",
        b",",
        b"=",
        b"\\",
        b'"',
        b"'",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b"#",
        b"%",
        b"~",
        b"-",
    ),
    *(
        b"-1",
        b"0",
        b"00",
        b"+1",
        b"1e9",
        b"0x10",
        b"4294967295",
        b"4294967296",
        b"9223372036854775808",
        b"9" * 40,
        b"nan",
        b"inf",
    ),
    *(b"\xc3\xa9", b"\xc3", b"\xed\xa0\x80", "²".encode(), "٣".encode(), b"\x1b[2J", b"[" * 50, b"A" * 300),
)
_MOST_CHANGES = 6
_MOST_BYTES = 1 << 17


def mutated(dice: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes] = ()) -> bytes:
    """Return a seed with up to `_MOST_CHANGES` changes; one time in eight as it is, or nothing but noise."""
    what = dice.randrange(16)
    if what == 0:
        return dice.choice(seeds)
    if what == 1:
        return dice.randbytes(dice.randrange(64))
    data = bytearray(dice.choice(seeds))
    for _ in range(dice.randrange(1, _MOST_CHANGES + 1)):
        _change(dice, data, seeds, [*TOKENS, *tokens])
    return bytes(data[:_MOST_BYTES])


def _change(dice: random.Random, data: bytearray, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    at = dice.randrange(len(data) + 1)
    end = min(len(data), at + dice.choice((1, 1, 2, 4, 8, 16, 64, 512)))
    match dice.randrange(9):
        case 0:
            data[at:end] = b""
        case 1:
            data[at:at] = dice.choice(tokens)
        case 2:
            data[at:end] = dice.choice(tokens)
        case 3:
            data[at:at] = data[at:end] * dice.choice((1, 2, 3, 50))
        case 4:
            data[at:end] = dice.randbytes(end - at)
        case 5:
            if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
        case 6:
            other = dice.choice(seeds)
            data[at:] = other[dice.randrange(len(other) + 1) :]
        case 7:
            del data[at:]
        case _:
            if at < len(data):
                data[at] = dice.choice((0, 0x7F, 0x80, 0xFF, 0x30, 0x39))
