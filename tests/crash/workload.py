"""What is done in the mount while the daemon is killed: chapters of steps, each step one system call.

A step is known by its place in its chapter. Whoever runs a chapter says of each step that it has begun and that it has
returned, so it is known at any moment which have had their effect and which one may or may not have had it. The same
steps run on a plain directory, whose states are what must be found.

The lower layers: `lower0` on top of `lower1`, and `big` at the bottom, which only the chapter of that name has.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import raw
from tests.support.layers import FIFO, File, HardLink, Symlink, Tree, build

ALICE, STAFF = 12001, 12100
LOWER_TIME = 1_000_000_000
"""When everything in the lower layers was last changed, in seconds."""
BIG_BYTES = 66 << 20


def content(key: str, size: int) -> bytes:
    """Bytes that nothing else has, made from a key."""
    return random.Random(key).randbytes(size)


LOWER1: Tree = {
    "plain": {
        "a": content("a", 3000),
        "b": File(content("b", 200_000), xattrs={"user.kept": b"1"}),
        "c": File(content("c", 5000), mode=0o600, uid=ALICE, gid=STAFF),
        "d": content("d", 10_000),
        "e": b"short",
    },
    "tree": {"one": content("one", 700), "two": b"two", "sub": {"deep": content("deep", 900), "other": b"other"}},
    "empty": {},
    "gone": {"x": b"x", "y": b"y", "in": {"z": b"z"}},
    "links": {"l1": content("l", 4000), "l2": HardLink("links/l1"), "l3": HardLink("links/l1"), "m1": b"m"},
    "more": {"m2": HardLink("links/m1")},
    "odd": {"link": Symlink("../plain/a"), "fifo": FIFO, "suid": File(content("suid", 600), mode=0o4755)},
    "attrs": {"f": File(b"f", xattrs={"user.one": b"1", "user.two": b"2"}), "d": {"inside": b"inside"}},
    "open": {"his": File(b"his", uid=ALICE, gid=ALICE), "other": b"other"},
}
LOWER0: Tree = {"tree": {"three": content("three", 800)}, "plain": {"top": content("top", 6000)}, "gone": {"w": b"w"}}
BIG: Tree = {
    "huge": File(content("huge", BIG_BYTES)),
    "large": File(content("large", 18 << 20), mode=0o640),
    "long": File(content("long", 17 << 20)),
    "middle": File(content("middle", 5 << 20)),
    "cut": File(content("cut", 6 << 20)),
}


def build_lowers(base: Path) -> None:
    """Write the lower layers below a directory."""
    for name, tree in (("lower0", LOWER0), ("lower1", LOWER1), ("big", BIG)):
        root = build(base / name, tree)
        if name == "lower1":
            (root / "open").chmod(0o777)
            os.setxattr(root / "attrs/d", "user.dir", b"d")
        for directory, _, files in os.walk(root, topdown=False):
            for path in (*(os.path.join(directory, file) for file in files), directory):
                os.utime(path, (LOWER_TIME, LOWER_TIME), follow_symlinks=False)


@dataclass
class Hand:
    """Where steps are done, and the files that they have open."""

    root: Path
    fds: dict[str, int] = field(default_factory=dict)

    def open(self, path: str, flags: int) -> None:
        self.fds[path] = os.open(self.root / path, flags, 0o644)

    def close(self, path: str) -> None:
        os.close(self.fds.pop(path))

    def close_all(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()


@dataclass(frozen=True)
class Step:
    """One system call.

    Attributes:
        text: what it is, for reports.
        act: does it.
        opens: the path and flags of the file that it opens.
        closes: the path of the one that it closes.
        writes: the path of the one to which it writes, maybe in several requests.
        follows: the path of a big lower file that it opens for writing: the old file may show until `settles`.
        settles: the path of a file of which all is in upper once the step has returned.
        completes: the path of one of which only metadata is in upper. Its data is copied in place, which changes the time
            until it is put back.
        leaves: the path that it takes away from an object. Where a whiteout comes there in a step of its own, something
            shows there until then, if something was at the new name.
        covers: the new name.
    """

    text: str
    act: Callable[[Hand], object]
    opens: tuple[str, int] | None = None
    closes: str = ""
    writes: str = ""
    follows: str = ""
    settles: str = ""
    completes: str = ""
    leaves: str = ""
    covers: str = ""


class Script:
    """Writes a chapter down."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def do(
        self, text: str, act: Callable[[Hand], object], *, settles: str = "", leaves: str = "", covers: str = ""
    ) -> None:
        self.steps.append(Step(text, act, settles=settles, leaves=leaves, covers=covers))

    # -- open files --

    def open(self, path: str, flags: int, *, follows: bool = False, completes: bool = False) -> None:
        self.steps.append(
            Step(
                f"open {path} {flags:#o}",
                lambda hand: hand.open(path, flags),
                opens=(path, flags),
                follows=path if follows else "",
                completes=path if completes else "",
            )
        )

    def write(self, path: str, data: bytes, at: int | None = None) -> None:
        def act(hand: Hand) -> None:
            done = os.write(hand.fds[path], data) if at is None else os.pwrite(hand.fds[path], data, at)
            assert done == len(data), f"{path}: {done} of {len(data)} bytes written"

        self.steps.append(Step(f"write {len(data)} bytes to {path}", act, writes=path))

    def fsync(self, path: str) -> None:
        self.do(f"fsync {path}", lambda hand: os.fsync(hand.fds[path]), settles=path)

    def fdatasync(self, path: str) -> None:
        self.do(f"fsync {path}, its data", lambda hand: os.fdatasync(hand.fds[path]), settles=path)

    def close(self, path: str) -> None:
        self.steps.append(Step(f"close {path}", lambda hand: hand.close(path), closes=path))

    def put(self, path: str, flags: int, data: bytes, at: int | None = None, *, completes: bool = False) -> None:
        """Open, write, fsync, close."""
        self.open(path, flags, completes=completes)
        self.write(path, data, at)
        self.fsync(path)
        self.close(path)

    def create(self, path: str, size: int) -> None:
        self.put(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, content(path, size))

    def futime(self, path: str, seconds: int) -> None:
        self.do(f"utime of the open {path}", lambda hand: os.utime(hand.fds[path], (seconds, seconds)))

    def fchmod(self, path: str, mode: int) -> None:
        self.do(f"chmod of the open {path}", lambda hand: os.fchmod(hand.fds[path], mode))

    # -- names and attributes --

    def mkdir(self, path: str) -> None:
        self.do(f"mkdir {path}", lambda hand: os.mkdir(hand.root / path))

    def unlink(self, path: str) -> None:
        self.do(f"unlink {path}", lambda hand: os.unlink(hand.root / path))

    def rmdir(self, path: str) -> None:
        self.do(f"rmdir {path}", lambda hand: os.rmdir(hand.root / path))

    def rename(self, old: str, new: str, *, settles: str = "") -> None:
        self.do(
            f"rename {old} {new}",
            lambda hand: os.rename(hand.root / old, hand.root / new),
            settles=settles,
            leaves=old,
            covers=new,
        )

    def exchange(self, old: str, new: str) -> None:
        self.do(
            f"exchange {old} {new}",
            lambda hand: raw.renameat2(hand.root / old, hand.root / new, raw.RENAME_EXCHANGE),
        )

    def link(self, old: str, new: str) -> None:
        self.do(f"link {old} {new}", lambda hand: os.link(hand.root / old, hand.root / new))

    def symlink(self, target: str, path: str) -> None:
        self.do(f"symlink {path}", lambda hand: os.symlink(target, hand.root / path))

    def fifo(self, path: str) -> None:
        self.do(f"mkfifo {path}", lambda hand: os.mknod(hand.root / path, stat.S_IFIFO | 0o640))

    def chmod(self, path: str, mode: int, *, settles: str = "") -> None:
        self.do(f"chmod {path}", lambda hand: os.chmod(hand.root / path, mode), settles=settles)

    def chown(self, path: str, uid: int, gid: int) -> None:
        self.do(f"chown {path}", lambda hand: os.chown(hand.root / path, uid, gid, follow_symlinks=False))

    def utime(self, path: str, seconds: int) -> None:
        self.do(f"utime {path}", lambda hand: os.utime(hand.root / path, (seconds, seconds), follow_symlinks=False))

    def truncate(self, path: str, size: int, *, completes: bool = False) -> None:
        self.steps.append(
            Step(
                f"truncate {path}",
                lambda hand: os.truncate(hand.root / path, size),
                completes=path if completes else "",
            )
        )

    def setxattr(self, path: str, name: str, value: bytes) -> None:
        self.do(f"setxattr {path}", lambda hand: os.setxattr(hand.root / path, name, value))

    def removexattr(self, path: str, name: str) -> None:
        self.do(f"removexattr {path}", lambda hand: os.removexattr(hand.root / path, name))

    def as_alice(self, text: str, act: Callable[[Hand], object]) -> None:
        def acting(hand: Hand) -> None:
            with _alice():
                act(hand)

        self.do(f"{text} as another user", acting)


@contextmanager
def _alice() -> Iterator[None]:
    os.setegid(ALICE)
    os.seteuid(ALICE)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


# -- the chapters --


def _create() -> Script:
    """New objects in directories of lower and upper, by root and by others, whose objects are built in work."""
    s = Script()
    s.create("plain/new", 5000)
    s.mkdir("fresh")
    s.create("fresh/file", 70_000)
    s.symlink("file", "fresh/link")
    s.fifo("fresh/fifo")
    s.mkdir("tree/newdir")
    s.create("tree/newdir/file", 100)
    s.as_alice("create open/hers", lambda hand: os.mknod(hand.root / "open/hers", stat.S_IFREG | 0o600))
    s.as_alice("mkdir open/herdir", lambda hand: os.mkdir(hand.root / "open/herdir"))
    s.as_alice("symlink open/herlink", lambda hand: os.symlink("hers", hand.root / "open/herlink"))
    s.setxattr("fresh/file", "user.new", b"value")
    s.chmod("fresh", 0o700)
    s.chown("fresh/file", ALICE, STAFF)
    return s


def _overwrite() -> Script:
    """Data of lower files is changed: in the middle, all of it, at the end, by truncation."""
    s = Script()
    s.put("plain/a", os.O_RDWR, content("middle", 500), 1000)
    s.put("plain/b", os.O_WRONLY | os.O_TRUNC, content("anew", 50_000))
    s.open("plain/c", os.O_WRONLY | os.O_APPEND)
    s.write("plain/c", content("first", 300))
    s.write("plain/c", content("second", 300))
    s.fsync("plain/c")
    s.close("plain/c")
    s.truncate("plain/d", 4000)
    s.truncate("plain/top", 9000)
    s.truncate("plain/e", 0)
    s.open("tree/one", os.O_WRONLY)
    s.do("ftruncate tree/one", lambda hand: os.ftruncate(hand.fds["tree/one"], 10))
    s.close("tree/one")
    s.open("plain/b", os.O_WRONLY)
    s.write("plain/b", content("long", 400_000), 49_000)
    s.close("plain/b")
    s.open("tree/three", os.O_RDWR)
    s.write("tree/three", content("within", 200), 300)
    s.fdatasync("tree/three")
    s.close("tree/three")
    # Another file's fsync takes the size along, and not the data.
    s.open("plain/c", os.O_WRONLY | os.O_APPEND)
    s.write("plain/c", content("third", 300))
    s.create("plain/beside", 100)
    s.fsync("plain/c")
    s.close("plain/c")
    return s


def _attributes() -> Script:
    """Copies of metadata alone, then the data of some of them; directories, symbolic links and fifos."""
    s = Script()
    s.chmod("plain/a", 0o600)
    s.chown("plain/b", ALICE, STAFF)
    s.utime("plain/c", LOWER_TIME + 77)
    s.setxattr("plain/d", "user.new", b"value")
    s.removexattr("attrs/f", "user.one")
    s.chmod("tree", 0o700)
    s.chown("tree/sub", ALICE, STAFF)
    s.setxattr("attrs/d", "user.more", b"more")
    s.chown("odd/link", ALICE, STAFF)
    s.chmod("odd/fifo", 0o600)
    s.chmod("plain/top", 0o600)
    s.open("plain/top", os.O_RDONLY)
    s.fsync("plain/top")
    s.close("plain/top")
    s.put("plain/b", os.O_WRONLY, content("later", 1000), 100_000, completes=True)
    s.truncate("plain/a", 100, completes=True)
    s.put("plain/c", os.O_WRONLY | os.O_APPEND, b"appended", completes=True)
    s.open("plain/d", os.O_WRONLY | os.O_TRUNC)
    s.close("plain/d")
    s.utime("plain/d", LOWER_TIME + 78)
    return s


def _plain() -> Script:
    """Lower files about which nothing is special: metadata that is copied in one step, and what becomes of such copies."""
    s = Script()
    s.chown("tree/sub/deep", ALICE, STAFF)
    s.chown("odd/suid", ALICE, STAFF)
    s.utime("plain/a", LOWER_TIME + 79)
    s.open("plain/top", os.O_RDONLY)
    s.futime("plain/top", LOWER_TIME + 80)
    s.fsync("plain/top")
    s.close("plain/top")
    s.open("tree/two", os.O_RDONLY)
    s.fchmod("tree/two", 0o600)
    s.fsync("tree/two")
    s.close("tree/two")
    s.rename("plain/e", "plain/moved")
    s.link("tree/one", "tree/also")
    s.chmod("attrs/d/inside", 0)
    s.truncate("plain/d", 20_000)
    s.chown("plain/d", ALICE, STAFF)
    s.truncate("plain/c", 100)
    s.open("plain/a", os.O_WRONLY | os.O_TRUNC)
    s.write("plain/a", content("after", 700))
    s.fdatasync("plain/a")
    s.close("plain/a")
    s.put("plain/top", os.O_WRONLY | os.O_APPEND, content("behind", 700), completes=True)
    s.put("tree/also", os.O_WRONLY, b"linked", 3, completes=True)
    s.chmod("plain/moved", 0o600)
    s.unlink("tree/two")
    return s


def _remove() -> Script:
    """Whiteouts, and what is made over them."""
    s = Script()
    s.unlink("plain/a")
    s.create("plain/a", 2000)
    s.unlink("plain/a")
    for path in ("gone/x", "gone/y", "gone/w", "gone/in/z"):
        s.unlink(path)
    s.rmdir("gone/in")
    s.rmdir("gone")
    s.mkdir("gone")
    s.create("gone/x", 600)
    s.unlink("gone/x")
    s.rmdir("gone")
    s.symlink("plain", "gone")
    s.unlink("gone")
    s.create("tree/made", 50)
    s.unlink("tree/made")
    s.rmdir("empty")
    s.mkdir("empty")
    s.create("empty/file", 90)
    s.unlink("odd/link")
    s.unlink("plain/c")
    s.mkdir("plain/c")
    s.rmdir("plain/c")
    s.fifo("plain/c")
    s.unlink("open/his")
    s.as_alice("create open/his", lambda hand: os.mknod(hand.root / "open/his", stat.S_IFREG | 0o600))
    s.unlink("open/other")
    s.as_alice("mkdir open/other", lambda hand: os.mkdir(hand.root / "open/other"))
    return s


def _rename() -> Script:
    """Renames of files and directories to new names, over files, directories and whiteouts."""
    s = Script()
    s.rename("plain/a", "plain/moved")
    s.rename("plain/b", "tree/b")
    s.rename("plain/c", "plain/d")
    s.create("plain/n", 400)
    s.rename("plain/n", "plain/e")
    s.rename("tree/b", "plain/b")
    s.rename("tree", "trunk")
    s.rename("trunk/sub", "branch")
    s.rename("branch", "trunk/sub")
    s.mkdir("d1")
    s.create("d1/f", 300)
    s.rename("d1", "empty")
    for path in ("gone/x", "gone/y", "gone/w", "gone/in/z"):
        s.unlink(path)
    s.rmdir("gone/in")
    s.rename("attrs", "gone")
    s.mkdir("d2")
    s.create("d2/f", 300)
    s.rename("d2", "attrs")
    s.rename("trunk/sub", "attrs/sub")
    s.rename("odd/link", "plain/link")
    s.rename("plain/moved", "plain/a")
    return s


def _exchange() -> Script:
    """Renames with RENAME_EXCHANGE."""
    s = Script()
    s.exchange("plain/a", "plain/top")
    s.exchange("plain/b", "tree/one")
    s.exchange("tree", "odd")
    s.exchange("plain/c", "gone")
    s.mkdir("plain/dir")
    s.create("plain/dir/f", 200)
    s.exchange("plain/dir", "odd/sub")
    s.exchange("plain/top", "plain/a")
    return s


def _links() -> Script:
    """Hard links of lower files, which the index keeps together; and of others."""
    s = Script()
    s.chmod("links/l1", 0o600)
    s.link("links/l1", "links/l4")
    s.put("links/l2", os.O_WRONLY | os.O_APPEND, content("appended", 100), completes=True)
    s.unlink("links/l3")
    s.rename("links/l2", "plain/l2")
    s.unlink("links/l1")
    s.create("links/n", 80)
    s.rename("links/n", "links/l4")
    s.rename("plain/l2", "links/l1")
    s.link("plain/a", "plain/a2")
    s.put("plain/a2", os.O_WRONLY, b"changed", 5, completes=True)
    s.unlink("plain/a")
    s.unlink("links/m1")
    s.link("more/m2", "links/m1")
    s.unlink("links/m1")
    s.create("links/m1", 40)
    s.unlink("more/m2")
    s.link("links/m1", "more/m2")
    s.unlink("links/l1")
    return s


def _big() -> Script:
    """Big lower files, whose data follows when they are opened for writing."""
    s = Script()
    s.open("huge", os.O_WRONLY | os.O_APPEND, follows=True)
    s.write("huge", content("end", 3000))
    s.fsync("huge")
    s.close("huge")
    s.chmod("large", 0o600)
    s.open("large", os.O_WRONLY | os.O_APPEND, follows=True, completes=True)
    s.write("large", content("end", 100))
    s.close("large")
    s.chmod("large", 0o644, settles="large")
    s.open("long", os.O_RDWR, follows=True)
    s.write("long", content("middle", 5000), 9 << 20)
    s.close("long")
    s.rename("long", "longer", settles="long")
    # Too small for that, and too big to be copied while others wait.
    s.open("middle", os.O_WRONLY | os.O_APPEND)
    s.write("middle", content("end", 3000))
    s.fsync("middle")
    s.close("middle")
    s.truncate("cut", 5 << 20)
    return s


CHAPTERS: dict[str, list[Step]] = {
    "create": _create().steps,
    "overwrite": _overwrite().steps,
    "attributes": _attributes().steps,
    "plain": _plain().steps,
    "remove": _remove().steps,
    "rename": _rename().steps,
    "exchange": _exchange().steps,
    "links": _links().steps,
    "big": _big().steps,
}


# -- doing them --


def reopen(steps: list[Step], first: int, hand: Hand) -> None:
    """Open what is open before the step number `first`, without what opening did then."""
    still: dict[str, int] = {}
    for step in steps[:first]:
        if step.opens is not None:
            still[step.opens[0]] = step.opens[1] & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC)
        still.pop(step.closes, None)
    for path, flags in still.items():
        hand.open(path, flags)


def work(steps: list[Step], hand: Hand, journal: int, order: int) -> None:
    """Do all steps, and say so: `b N` before, `f N` after, `e N ERRNO` where it fails.

    After a failure a byte from *order* says whether to try the step again (`t`); anything else ends the work.
    """
    for number, step in enumerate(steps):
        while True:
            os.write(journal, b"b %d\n" % number)
            try:
                step.act(hand)
                break
            except OSError as error:
                os.write(journal, b"e %d %d\n" % (number, error.errno or 0))
            if os.read(order, 1) != b"t":
                return
        os.write(journal, b"f %d\n" % number)
