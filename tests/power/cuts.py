"""What a disk may hold after a power cut, from the log of what was written to it (`tests.support.disks`).

Certain is only what was written before the last flush that had come to the disk. Of what was written after it, any part
may be there: all, nothing, some writes and not others, in any order, and of one write the first sectors only. A sector is the
4096 bytes that today's disks write as a whole: ext4 relies on it, whose superblock is two of 512.

Of a file whose data is not synced yet any part may be there likewise (`may_hold`). Its size may have come to the disk without
its data: ext4 commits the new size of a file with whatever is synced next if the file's last block is not a new one
(`ext4_da_do_write_end`), and what was appended in that block reads as zeros.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.support.disks import FLUSH, RECORD

Kept = Literal["nothing", "all", "some"]
KEPT: tuple[Kept, ...] = ("nothing", "all", "some")
SECTOR = 4096
GRAIN = 512
"""How much of a file is of one version at least: the smallest block of a file system."""


@dataclass(frozen=True)
class Write:
    """One write: where on the disk, which bytes; a flush has none. *end* is where the log was after it."""

    at: int
    data: bytes
    end: int

    @property
    def is_flush(self) -> bool:
        return self.at == FLUSH


def read_log(log: Path) -> list[Write]:
    """All that was written, in order."""
    writes: list[Write] = []
    text = log.read_bytes()
    here = 0
    while here < len(text):
        at, size = RECORD.unpack_from(text, here)
        here += RECORD.size + size
        writes.append(Write(at, text[here - size : here], here))
    return writes


@dataclass(frozen=True)
class Cut:
    """A power cut: after so many writes, and what is kept of those since the last flush."""

    after: int
    kept: Kept


class Replay:
    """Makes images of what cuts leave. They must be asked for in the order in which they happen.

    Args:
        baseline: the image before the first write; it is changed.
        writes: what was written then.
        chance: decides what is kept where that is left to chance.
    """

    def __init__(self, baseline: Path, writes: Sequence[Write], chance: random.Random) -> None:
        self._durable, self._writes, self._chance = baseline, writes, chance
        self._applied = 0

    def image(self, cut: Cut, target: Path) -> None:
        """Write the image that a cut leaves."""
        flushes = [at for at in range(self._applied, cut.after) if self._writes[at].is_flush]
        if flushes:
            _apply(self._durable, self._writes[self._applied : flushes[-1]])
            self._applied = flushes[-1] + 1
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", self._durable, target], check=True)
        _apply(target, list(self._keep(cut.kept, self._writes[self._applied : cut.after])))

    def _keep(self, kept: Kept, writes: Sequence[Write]) -> Iterator[Write]:
        if kept == "nothing":
            return
        for write in writes:
            chance = self._chance.random() if kept == "some" else 0.0
            if chance < 0.4:
                yield write
            elif chance < 0.6:
                sectors = self._chance.randrange(len(write.data) // SECTOR + 1)
                yield Write(write.at, write.data[: sectors * SECTOR], write.end)


def _apply(image: Path, writes: Sequence[Write]) -> None:
    fd = os.open(image, os.O_WRONLY)
    try:
        for write in writes:
            if not write.is_flush:
                os.pwrite(fd, write.data, write.at)
    finally:
        os.close(fd)


def choose(writes: Sequence[Write], begin: int, count: int | None, chance: random.Random) -> list[Cut]:
    """Cuts after the log was *begin* long: at flushes and between them; *count* of them, or as many as there may be."""
    first = next((at for at, write in enumerate(writes) if write.end > begin), len(writes))
    moments = range(first, len(writes) + 1)
    cuts = [Cut(at, kept) for at in moments for kept in KEPT if kept == "nothing" or not _ends_with_flush(writes, at)]
    if count is not None and count < len(cuts):
        cuts = chance.sample(cuts, count)
    return sorted(cuts, key=lambda cut: cut.after)


def may_hold(found: bytes, versions: Sequence[bytes]) -> bool:
    """Whether a file that had one content after the other, the first of which is synced, may have this one.

    Each piece is that of a version; behind the end of one that was shorter there may be zeros.
    """

    def fits(at: int) -> bool:
        piece = found[at : at + GRAIN]
        return any(data[at : at + len(piece)].ljust(len(piece), b"\0") == piece for data in versions)

    return all(fits(at) for at in range(0, len(found), GRAIN))


def _ends_with_flush(writes: Sequence[Write], at: int) -> bool:
    return at == 0 or writes[at - 1].is_flush


def remove(*paths: Path) -> None:
    """Remove files and trees, if they are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
