"""The workload of the kill test, and what may be found after the daemon has been killed in the midst of it.

    python -m tests.integration.crashing DIRECTORY JOURNAL SEED

Works in DIRECTORY until the mount dies. JOURNAL, a file outside the mount, gets a line before each operation (what
each name will hold) and a line after it. So at any moment a name holds its last finished content, or, of the one
operation that was under way, the next one.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from pathlib import Path

FILES = 40
RECORD = 100
REPLACED_BYTES = 50_000
LOWER_BYTES = 3 << 20

State = dict[str, str]
"""Name → digest of what it holds; a name that is absent has none."""


def content(key: str, size: int) -> bytes:
    """The bytes of a version of a file, made from its name."""
    return random.Random(key).randbytes(size)


def digest(data: bytes) -> str:
    """The digest of a content."""
    return hashlib.sha256(data).hexdigest()


def lower_tree() -> dict[str, bytes]:
    """The lower layer: big files, small ones, and directories of some files."""
    files = {f"big{number}": content(f"big{number}", LOWER_BYTES) for number in range(6)}
    files |= {f"small{number}": content(f"small{number}", 2000) for number in range(FILES)}
    return files | {
        f"dir{number}/f{file}": content(f"{number} {file}", 500) for number in range(6) for file in range(5)
    }


class Workload:
    """Random operations on a tree, each announced in the journal."""

    def __init__(self, root: Path, journal: Path, seed: int) -> None:
        self.root = root
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.random = random.Random(seed)
        self.data = lower_tree()
        self.number = 0

    def run(self) -> None:
        """Work until the mount fails."""
        while True:
            self.number += 1
            self.random.choice([self.create, self.replace, self.append, self.delete, self.move, self.move_directory])()

    def say(self, line: str) -> None:
        """Write one line of the journal."""
        os.write(self.journal, (line + "\n").encode())

    def begin(self, changes: dict[str, bytes | None]) -> None:
        """Announce the contents that names will have (None: absent)."""
        words = [f"{name}={'' if data is None else digest(data)}" for name, data in changes.items()]
        self.say(" ".join(["begin", *words]))

    def end(self, changes: dict[str, bytes | None]) -> None:
        """Note that the operation has returned."""
        self.say("end")
        for name, data in changes.items():
            self.data.pop(name, None)
            if data is not None:
                self.data[name] = data

    def write(self, path: Path, data: bytes, flags: int) -> None:
        """Write and fsync."""
        descriptor = os.open(path, os.O_WRONLY | flags, 0o644)
        os.write(descriptor, data)
        os.fsync(descriptor)
        os.close(descriptor)

    def create(self) -> None:
        """A new file, complete under its name by way of a rename."""
        self._put(f"new{self.number}")

    def replace(self) -> None:
        """Another file in the place of one that exists."""
        self._put(self.random.choice(list(self.data)))

    def _put(self, name: str) -> None:
        data = content(f"{name} {self.number}", REPLACED_BYTES)
        self.write(self.root / "scratch", data, os.O_CREAT | os.O_TRUNC)
        changes: dict[str, bytes | None] = {name: data}
        self.begin(changes)
        os.rename(self.root / "scratch", self.root / name)
        self.end(changes)

    def append(self) -> None:
        """A record after what is there, often in a big lower file, and a mode change before."""
        name = self.random.choice([name for name in self.data if name.startswith("big")] or list(self.data))
        data = self.data[name] + content(f"record {self.number}", RECORD)
        os.chmod(self.root / name, self.random.choice([0o600, 0o644, 0o755]))
        changes: dict[str, bytes | None] = {name: data}
        self.begin(changes)
        self.write(self.root / name, data[-RECORD:], os.O_APPEND)
        self.end(changes)

    def delete(self) -> None:
        """Remove a file, but keep enough to work with."""
        names = [name for name in self.data if not name.startswith("big")]
        if len(names) < FILES:
            self.create()
            return
        name = self.random.choice(names)
        changes: dict[str, bytes | None] = {name: None}
        self.begin(changes)
        os.unlink(self.root / name)
        self.end(changes)

    def move(self) -> None:
        """Rename a file to a new name."""
        old = self.random.choice(list(self.data))
        stem = "big" if old.startswith("big") else "moved"
        new = f"{stem}{self.number}"
        changes = {old: None, new: self.data[old]}
        self.begin(changes)
        os.rename(self.root / old, self.root / new)
        self.end(changes)

    def move_directory(self) -> None:
        """Rename a directory with all that it holds."""
        names = [name for name in self.data if "/" in name]
        if not names:
            self.create()
            return
        old = self.random.choice(names).partition("/")[0]
        new = f"tree{self.number}"
        inside = {name: data for name, data in self.data.items() if name.startswith(f"{old}/")}
        changes: dict[str, bytes | None] = dict.fromkeys(inside)
        changes |= {f"{new}/{name.partition('/')[2]}": data for name, data in inside.items()}
        self.begin(changes)
        os.rename(self.root / old, self.root / new)
        self.end(changes)


def allowed(journal: Path) -> list[State]:
    """What the tree may be by the journal: one state, or two where an operation was under way."""
    state = {name: digest(data) for name, data in lower_tree().items()}
    pending: State = {}
    for line in journal.read_text().splitlines():
        word, *changes = line.split(" ")
        if word == "begin":
            pending = dict(change.split("=", 1) for change in changes)
        else:
            state, pending = apply(state, pending), {}
    return [state, apply(state, pending)]


def apply(state: State, changes: State) -> State:
    """The state after changes; an empty digest removes the name."""
    return {name: found for name, found in (state | changes).items() if found}


def found(root: Path) -> State:
    """The files of a tree, but for the workload's own temporary one."""
    files = [path for path in root.rglob("*") if not path.is_dir() and path != root / "scratch"]
    return {str(path.relative_to(root)): digest(path.read_bytes()) for path in files}


def main(arguments: list[str]) -> int:
    """Work until the mount dies, which is how this is meant to end."""
    directory, journal, seed = arguments
    try:
        Workload(Path(directory), Path(journal), int(seed)).run()
    except OSError as error:
        print(error, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
