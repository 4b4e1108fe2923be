"""Many processes at work in one mount at the same time: `python -m tests.support.clients WHAT COUNT SECONDS SEED ROOT [PLAIN]`.

Each process is one client with its own random numbers. All begin at once, and work for some seconds; whoever finds what may
not be says so, and the whole ends with that and status 1. What they do:

- `subtrees`: each works in a directory of its own, `home<N>`, in ROOT and in PLAIN alike, by turns with the same call in both,
  which must end alike;
- `storm`: all rename files and directories between the same few directories, `dir<N>`; a file holds its own first name;
- `races`: all create, write, read and remove the same few names; a file holds one record, of one writer;
- `listings`: all list one directory, with more names than the kernel gets attributes with, and make, move and remove names of
  their own there; what nobody touches meanwhile is listed, once;
- `copy-up`: all open the one file `shared` for writing, once, and write a record at their own place.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.support import raw

RECORD = 4096
RACED = 5
"""How many names the clients of `races` share."""
DIRECTORIES = 4
KEPT = 9000
"""How many names of the directory of `listings` always stay; the file of each number holds it."""
OWN = 300
"""How many more each client has there at most."""


def outcome(act: Callable[[], object]) -> object:
    """What a call returns, or its errno."""
    try:
        return act()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")


# -- subtrees --


class Twin:
    """A client that does the same in two directories."""

    def __init__(self, roots: list[Path], number: int, chance: random.Random) -> None:
        self.homes = [root / f"home{number}" for root in roots]
        self.chance = chance

    def turn(self) -> None:
        """One call in both."""
        name, other = (self._name() for _ in range(2))
        data = self.chance.randbytes(self.chance.choice([0, 10, 5000, 70_000]))
        at, mode = self.chance.randrange(20_000), self.chance.choice([0o600, 0o644, 0o755])
        acts: list[Callable[[Path], object]] = [
            lambda home: (home / name).write_bytes(data),
            lambda home: self._patch(home / name, data, at),
            lambda home: (home / name).read_bytes(),
            lambda home: os.truncate(home / name, at),
            lambda home: os.mkdir(home / name),
            lambda home: os.rmdir(home / name),
            lambda home: os.unlink(home / name),
            lambda home: self._rename(home / name, home / other),
            lambda home: os.link(home / name, home / other),
            lambda home: os.symlink(other, home / name),
            lambda home: os.chmod(home / name, mode),
            lambda home: os.setxattr(home / name, "user.x", data[:20]),
            lambda home: sorted(os.listdir(home / name)),
            lambda home: self._seen(home / name),
            lambda home: raw.renameat2(home / name, home / other, raw.RENAME_EXCHANGE),
        ]
        number = self.chance.randrange(len(acts))
        ours, plain = (outcome(lambda home=home: acts[number](home)) for home in self.homes)  # type: ignore[misc]
        assert ours == plain, f"call {number} of {name}, {other}: {ours!r:.100} / {plain!r:.100}"

    def _name(self) -> str:
        parts = [self.chance.choice("abcdef") for _ in range(self.chance.choice([1, 1, 2]))]
        return "/".join(parts)

    @staticmethod
    def _rename(old: Path, new: Path) -> None:
        """Over a directory that is not empty xfs says EEXIST, overlayfs and others ENOTEMPTY: POSIX allows both."""
        try:
            os.rename(old, new)
        except FileExistsError:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY)) from None

    @staticmethod
    def _patch(path: Path, data: bytes, at: int) -> int:
        fd = os.open(path, os.O_RDWR)
        try:
            os.pwrite(fd, data[:3000], at)
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    @staticmethod
    def _seen(path: Path) -> tuple[object, ...]:
        st = os.lstat(path)
        size = st.st_size if not stat.S_ISDIR(st.st_mode) else 0
        return st.st_mode, size, st.st_nlink if stat.S_ISREG(st.st_mode) else 0


# -- the others --


class Stormer:
    """A client that moves things which others move, too."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.root, self.chance = root, chance

    def turn(self) -> None:
        """Move something, or look at something."""
        here, there = (self.root / f"dir{self.chance.randrange(DIRECTORIES)}" for _ in range(2))
        names = os.listdir(here)
        if not names:
            return
        name = self.chance.choice(names)
        new = f"{'d' if name.startswith('d') else 'f'}{self.chance.randrange(10**9)}"
        kind = self.chance.random()
        if kind < 0.5:
            done = outcome(lambda: raw.renameat2(here / name, there / new, raw.RENAME_NOREPLACE))
            assert done in (None, "ENOENT", "EEXIST"), done
        elif kind < 0.7 and (others := [one for one in os.listdir(there) if one[0] == name[0]]):
            other = self.chance.choice(others)
            done = outcome(lambda: raw.renameat2(here / name, there / other, raw.RENAME_EXCHANGE))
            assert done in (None, "ENOENT"), done
        else:
            path = here / name / "token" if name.startswith("d") else here / name
            data = outcome(path.read_bytes)
            assert data in ("ENOENT", "ESTALE") or (isinstance(data, bytes) and data.startswith(b"token ")), data


class Racer:
    """A client that creates and removes what others do, too."""

    def __init__(self, root: Path, number: int, chance: random.Random) -> None:
        self.root, self.number, self.chance = root, number, chance
        self.count = 0

    def turn(self) -> None:
        """Make a file of one's own, or read or remove one."""
        path = self.root / f"raced{self.chance.randrange(RACED)}"
        kind = self.chance.random()
        if kind < 0.4:
            self._make(path)
        elif kind < 0.7:
            data = outcome(path.read_bytes)
            assert data == "ENOENT" or (isinstance(data, bytes) and len(data) in (0, RECORD)), data
            assert len(data) != RECORD or len(set(data)) == 1, "records are mixed"
        else:
            assert outcome(lambda: os.unlink(path)) in (None, "ENOENT")

    def _make(self, path: Path) -> None:
        fd = outcome(lambda: os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR))
        if not isinstance(fd, int):
            assert fd == "EEXIST", fd
            return
        self.count += 1
        record = bytes([self.chance.randrange(1, 256)]) * RECORD
        try:
            assert os.write(fd, record) == RECORD
            assert os.pread(fd, 2 * RECORD, 0) == record, "somebody else's file"
            assert os.fstat(fd).st_nlink in (0, 1)
        finally:
            os.close(fd)


def kept(number: int) -> str:
    """The name of a file that stays in the directory of `listings`."""
    return f"kept-{number}"


class Lister:
    """A client that lists a directory while others change it, too."""

    def __init__(self, root: Path, number: int, chance: random.Random) -> None:
        self.root, self.chance = root, chance
        self.prefix = f"own{number}-"
        self.own = {name for name in os.listdir(root) if name.startswith(self.prefix)}

    def turn(self) -> None:
        """Change something, list all, and look at some."""
        for _ in range(10):
            self._change()
        before, touched = set(self.own), set[str]()
        looks = self.chance.random() < 0.5
        names: list[str] = []
        with os.scandir(self.root) as entries:
            for at, entry in enumerate(entries):
                names.append(entry.name)
                if at % 1000 == 500:
                    touched |= self._change()
                if looks and at % 2:
                    self._look_at(entry)
        assert len(names) == len(set(names)), "a name is listed twice"
        stayed = {name for name in names if name.startswith("kept-")}
        assert stayed == {kept(at) for at in range(KEPT)}, f"{KEPT - len(stayed)} names are missing"
        mine = {name for name in names if name.startswith(self.prefix)}
        assert mine - touched == before - touched, (mine - touched) ^ (before - touched)

    def _look_at(self, entry: os.DirEntry[str]) -> None:
        size = outcome(lambda: entry.stat(follow_symlinks=False).st_size)
        if entry.name.startswith("kept-"):
            assert size == len(entry.name.removeprefix("kept-")), f"{entry.name}: {size}"
        else:
            assert size in (0, "ENOENT"), f"{entry.name}: {size}"

    def _change(self) -> set[str]:
        """Change something; return the names that came or went."""
        kind, name = self.chance.random(), f"{self.prefix}{self.chance.randrange(10**12)}"
        if kind < 0.1:
            os.chmod(self.root / kept(self.chance.randrange(KEPT)), self.chance.choice([0o600, 0o644]))
            return set()
        if not self.own or (kind < 0.4 and len(self.own) < OWN):
            os.close(os.open(self.root / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            self.own.add(name)
            return {name}
        old = self.chance.choice(sorted(self.own))
        self.own.remove(old)
        if kind < 0.7:
            os.unlink(self.root / old)
            return {old}
        os.rename(self.root / old, self.root / name)
        self.own.add(name)
        return {old, name}


def write_record(root: Path, number: int) -> None:
    """What each client of `copy-up` does."""
    fd = os.open(root / "shared", os.O_RDWR)
    try:
        record = b"%8d" % number
        os.pwrite(fd, record, number * RECORD)
        assert os.pread(fd, 8, number * RECORD) == record
    finally:
        os.close(fd)


def work(what: str, roots: list[Path], number: int, seconds: float, seed: int) -> int:
    """Be one client; how many turns it has made."""
    chance = random.Random(f"{seed} {number}")
    if what == "copy-up":
        write_record(roots[0], number)
        return 1
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        "subtrees": lambda: Twin(roots, number, chance).turn,
        "storm": lambda: Stormer(roots[0], chance).turn,
        "races": lambda: Racer(roots[0], number, chance).turn,
        "listings": lambda: Lister(roots[0], number, chance).turn,
    }
    turn = makers[what]()
    end = time.monotonic() + seconds
    turns = 0
    while time.monotonic() < end:
        turn()
        turns += 1
    return turns


def main(what: str, count: str, seconds: str, seed: str, *roots: str) -> int:
    """Start the clients, and wait for them; 0 if none complained."""
    reader, starter = os.pipe()
    results, writer = os.pipe()
    clients = []
    for number in range(int(count)):
        child = os.fork()
        if child:
            clients.append(child)
            continue
        status = 1
        try:
            os.close(starter)
            os.read(reader, 1)  # until all are there
            turns = work(what, [Path(root) for root in roots], number, float(seconds), int(seed))
            os.write(writer, b"%d\n" % turns)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(starter)
    failed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in clients]
    os.close(writer)
    with open(results) as lines:
        print(sum(int(line) for line in lines))
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
