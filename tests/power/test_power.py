"""That a cut leaves what it should. The cuts themselves are `make powercut`: each run of it tries others."""

from __future__ import annotations

import random
from pathlib import Path

from tests.power.__main__ import Recording
from tests.power.cuts import GRAIN, SECTOR, Cut, Replay, Write, choose, may_hold, read_log
from tests.support.disks import FLUSH, RECORD


def test_what_a_cut_leaves(tmp_path: Path) -> None:
    log, baseline, image = tmp_path / "log", tmp_path / "baseline", tmp_path / "image"
    one, two = SECTOR, 2 * SECTOR
    entries = [(0, b"a" * two), (FLUSH, b""), (two, b"b" * two), (0, b"c" * one), (FLUSH, b""), (2 * two, b"d" * two)]
    log.write_bytes(b"".join(RECORD.pack(at, len(data)) + data for at, data in entries))
    writes = read_log(log)
    assert [(write.at, write.data) for write in writes] == entries
    assert writes[-1].end == log.stat().st_size

    def left(*cuts: Cut) -> list[bytes]:
        baseline.write_bytes(bytes(6 * SECTOR))
        replay = Replay(baseline, writes, random.Random(3))
        found = []
        for cut in cuts:
            replay.image(cut, image)
            found.append(bytes(image.read_bytes()[at] for at in range(0, 6 * SECTOR, SECTOR)))
        return found

    nothing = bytes(6)
    assert left(Cut(0, "all"), Cut(1, "nothing"), Cut(1, "all")) == [nothing, nothing, b"aa\0\0\0\0"]
    assert left(Cut(4, "nothing"), Cut(4, "all"), Cut(5, "nothing")) == [b"aa\0\0\0\0", b"cabb\0\0", b"cabb\0\0"]
    assert left(Cut(6, "nothing"), Cut(6, "all")) == [b"cabb\0\0", b"cabbdd"]
    some = {left(*[Cut(4, "some")] * number)[-1] for number in range(1, 60)}
    assert {b"aa\0\0\0\0", b"cabb\0\0", b"ca\0\0\0\0", b"aabb\0\0", b"aab\0\0\0"} <= some


def test_cuts_are_at_flushes_and_between(tmp_path: Path) -> None:
    writes = [Write(0, b"x", 10), Write(FLUSH, b"", 20), Write(0, b"y", 30), Write(0, b"z", 40), Write(FLUSH, b"", 50)]
    every = choose(writes, 20, None, random.Random(1))
    assert {cut.after for cut in every} == {2, 3, 4, 5}
    assert [cut.kept for cut in every if cut.after == 5] == ["nothing"]
    assert len([cut for cut in every if cut.after == 4]) == 3
    assert len(choose(writes, 20, 3, random.Random(1))) == 3


def test_what_a_file_that_is_not_synced_may_hold() -> None:
    size = 3 * GRAIN
    old, new = b"o" * (size + 100), b"o" * GRAIN + b"n" * (size - GRAIN + 300)
    mixed = old[: 2 * GRAIN] + new[2 * GRAIN :]
    for found in (old, new, mixed, new[:size], old + bytes(200), new[:size] + old[size:] + bytes(200)):
        assert may_hold(found, [old, new])
    torn = new[: GRAIN + 10] + old[GRAIN + 10 :]
    for found in (torn, old + b"x" * 200, old + bytes(199) + b"x", bytes(GRAIN) + old[GRAIN:], new + b"n"):
        assert not may_hold(found, [old, new])
    assert may_hold(bytes(size), [b"", new])


def test_which_steps_a_cut_lies_between() -> None:
    # The third step, an fsync, finds all synced.
    recording = Recording(begun=[10, 30, 60, 60], confirmed=[(50, 1, ""), (60, 2, ""), (60, 3, "file")])
    assert [recording.between(position) for position in (10, 30, 40, 50, 60, 70)] == [
        *((0, 0), (0, 1), (0, 2), (1, 2), (3, 3), (3, 4))
    ]
