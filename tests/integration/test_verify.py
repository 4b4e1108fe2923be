"""`make verify` in short: fio's checksums through every kind of handle, in every mode; and that it sees a wrong byte."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.cli import program
from tests.verify.__main__ import MODES, Wrong, _fio, _job


def test_a_round_in_every_mode(ground: Path) -> None:
    said = program(
        [sys.executable, "-m", "tests.verify", "--minutes", "0", "--scale", "0.25", "--json", "--dir", str(ground)],
        cwd=Path(__file__).parents[2],
    )
    assert said.status == 0, said.err + said.out
    result = json.loads(said.out)
    assert result["wrong"] is None
    assert list(result["modes"]) == list(MODES)
    for tally in result["modes"].values():
        assert tally["rounds"] == 1
        assert tally["copied_up"] == 7
        assert tally["verified"] > 100 << 20
        assert tally["compared"] > 20 << 20


def test_a_wrong_byte_is_seen(ground: Path) -> None:
    size, how = 1 << 20, ("psync", 0, "4k")
    _fio(ground, [_job("file", size, how, "--rw=write", "--do_verify=0")])
    assert _fio(ground, [_job("file", size, how, "--rw=read")]) == size
    with (ground / "file").open("r+b") as file:
        file.seek(500_001)
        byte = file.read(1)
        file.seek(500_001)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(Wrong, match="verify"):
        _fio(ground, [_job("file", size, how, "--rw=read")])
