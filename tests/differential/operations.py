"""Operations, their text form, and hypothesis strategies for sequences of them."""

from __future__ import annotations

import ast
import os
import stat
from dataclasses import dataclass
from typing import Any, NamedTuple

from hypothesis import strategies as st

from . import layers, syscalls
from .model import Ref

#: What came of an operation: ("ok", value) or ("error", errno name).
Outcome = tuple[str, object]

#: What is to know about an inode, by name.
Fields = dict[str, object]

#: Fields by path.
Tree = dict[bytes, Fields]

#: Done by the machine, not by a driver. ``swap`` remounts each side's layers with the other side's implementation.
MACHINE_KINDS = ("check", "remount", "swap", "drop_caches")


class Op(NamedTuple):
    """One operation: its kind, the user who does it and the arguments of the driver's method."""

    kind: str
    user: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Sequence:
    """What one run does.

    ``variant`` of the layers; ``watch``: look at the paths in use after each step; the steps, whose arguments may be wishes
    that the machine grants; ``focus``: the directories that wishes are granted from.
    """

    variant: int
    watch: bool
    ops: tuple[Op, ...]
    focus: tuple[bytes, ...] = ()

    def text(self) -> str:
        """The form that ``parse`` reads, one operation a line."""
        lines = [f"variant {self.variant}", f"watch {int(self.watch)}"]
        return "\n".join(lines + [repr(tuple(op)) for op in self.ops])


def parse(text: str) -> Sequence:
    """Read what ``Sequence.text`` wrote; other lines, as of a test's output around it, are skipped."""
    variant, watch, ops = 0, False, []
    for line in map(str.strip, text.splitlines()):
        line = line.removeprefix("E").strip()
        if line.startswith("variant "):
            variant = int(line.split()[1])
        elif line.startswith("watch "):
            watch = bool(int(line.split()[1]))
        elif line.startswith("('"):
            kind, user, args = ast.literal_eval(line)
            ops.append(Op(kind, user, args))
    return Sequence(variant, watch, tuple(ops))


_USERS = st.sampled_from(["root"] * 6 + ["u1"] * 3 + ["u2"])
_NUMBERS = st.integers(0, 999)
_NEW = [b"n1", b"n2", b"n3"]
_FREE_SLOT = st.integers(0, 3)
_SLOT = st.integers(0, 3).map(lambda number: Ref("slot", number))
_SCAN = st.integers(0, 3).map(lambda number: Ref("scan", number))


def _ref(choice: tuple[str, list[bytes]]) -> st.SearchStrategy[Ref]:
    want, suffixes = choice
    return st.tuples(_NUMBERS, st.sampled_from(suffixes)).map(lambda drawn: Ref(want, *drawn))


def _wish(**weights: int) -> st.SearchStrategy[Any]:
    """A path, of kinds in the proportion of ``weights``; now and then a fixture's path at random or with something appended."""
    wants = [(want, _NEW if want == "new" else [b""]) for want, weight in weights.items() for _ in range(weight)]
    return st.sampled_from([("raw", [b""]), ("any", _ODD), *wants]).flatmap(_ref)


_ODD = [b"", b"", b"/", b"/.", b"/..", b"/n1", b"/n1/n2"]
_FILE, _DIR, _ANY = _wish(file=24, any=4), _wish(dir=24, any=4), _wish(any=28)
_FREE = _wish(new=25, any=3)
_TARGET = _wish(new=12, any=10)
_MAKE = _wish(file=14, new=14)

_UMASKS = st.sampled_from([0o022, 0, 0o077])
_MODES = st.sampled_from([0o644, 0o755, 0o600, 0o666, 0o777, 0, 0o400, 0o1777, 0o2775, 0o4755, 0o6777, 0o2664])
_SEEDS = st.integers(0, 250)
_SIZES = st.sampled_from([0, 1, 10, 100, 4096, 5000, 70000])
_OFFSETS = st.sampled_from([0, 1, 50, 4095, 4096, 65536, 100000])
_IDS = st.sampled_from([-1, 0, 1001, 1002, 2000])
_TIMES = st.sampled_from([1_100_000_000_123456789, 0, 5, -1_000_000_000, 3_000_000_000_000000001, "now", "omit"])
_BOOLS = st.booleans()
_SOME = st.sampled_from([100, 64, 200, 1000])

_XATTRS: list[tuple[bytes, list[bytes]]] = [
    (b"user.one", [b"", b"new", b"x" * 2000]),
    (b"user.two", [b"2"]),
    (b"trusted.two", [b"t"]),
    (b"security.capability", [layers.CAPABILITY, b"bad"]),
    (b"trusted.overlay.opaque", [b"y", b"n"]),
    (b"trusted.overlay.redirect", [b"/etc"]),
    (b"trusted.overlay.overlay.x", [b"twice"]),
    (b"trusted.overlay.esc", [b"again"]),
    (b"user.overlay.opaque", [b"y"]),
    (b"system.posix_acl_access", [layers.ACL_U2, layers.ACL_PLAIN, layers.ACL_G2000, layers.ACL_BAD, b"short"]),
    (b"system.posix_acl_default", [layers.ACL_G2000, layers.ACL_U2, layers.ACL_PLAIN]),
    (b"unknown.x", [b"v"]),
]
_XATTR_NAMES = st.sampled_from([name for name, _ in _XATTRS])
_XATTR_PAIRS = st.sampled_from([(name, value) for name, values in _XATTRS for value in values])
_TARGETS = st.sampled_from([b"n1", b".", b"a", b"missing/x", b"f1", b"n1/n2", b"x/" * 500])
_OPENS = [
    os.O_RDONLY,
    os.O_WRONLY,
    os.O_RDWR,
    os.O_RDWR | os.O_CREAT,
    os.O_RDWR | os.O_CREAT | os.O_EXCL,
    os.O_WRONLY | os.O_TRUNC,
    os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    os.O_WRONLY | os.O_APPEND,
    os.O_RDWR | os.O_APPEND | os.O_CREAT,
    os.O_RDONLY | os.O_DIRECTORY,
    os.O_RDONLY | os.O_NOFOLLOW,
    os.O_RDONLY | os.O_TRUNC,
    os.O_PATH,
    os.O_PATH | os.O_NOFOLLOW,
]
_WRITE_FLAGS = [0, os.O_TRUNC, os.O_APPEND, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_CREAT | os.O_TRUNC]
_NODES = [
    (stat.S_IFIFO | 0o644, (0, 0)),
    (stat.S_IFSOCK | 0o755, (0, 0)),
    (stat.S_IFCHR | 0o666, (1, 3)),
    (stat.S_IFBLK | 0o600, (7, 98)),
    (stat.S_IFCHR | 0o600, (0, 0)),
    (stat.S_IFREG | 0o4755, (0, 0)),
]
_FALLOCATES = [0, syscalls.FALLOC_KEEP_SIZE, syscalls.FALLOC_PUNCH_HOLE | 1, syscalls.FALLOC_ZERO_RANGE]
_RENAMES = [0, 0, 0, 0, 0, syscalls.RENAME_NOREPLACE]

#: For each kind its weight and its arguments.
_KINDS: dict[str, tuple[int, tuple[st.SearchStrategy[Any], ...]]] = {
    "check": (1, ()),
    "open": (24, (_FREE_SLOT, _wish(file=18, new=4, dir=4), st.sampled_from(_OPENS), _MODES, _UMASKS)),
    "close": (1, (_SLOT,)),
    "read": (2, (_SLOT, _SIZES)),
    "pread": (3, (_SLOT, _SIZES, _OFFSETS)),
    "write": (5, (_SLOT, _SEEDS, _SIZES)),
    "pwrite": (4, (_SLOT, _SEEDS, _SIZES, _OFFSETS)),
    "lseek": (1, (_SLOT, _OFFSETS, st.sampled_from([os.SEEK_SET, os.SEEK_END]))),
    "holes": (1, (_SLOT, _OFFSETS, st.sampled_from([os.SEEK_DATA, os.SEEK_HOLE]))),
    "fstat": (4, (_SLOT,)),
    "ftruncate": (2, (_SLOT, _OFFSETS)),
    "fchmod": (2, (_SLOT, _MODES)),
    "fchown": (1, (_SLOT, _IDS, _IDS)),
    "futimens": (1, (_SLOT, _TIMES, _TIMES)),
    "fsetxattr": (1, (_SLOT, _XATTR_PAIRS)),
    "fgetxattr": (1, (_SLOT, _XATTR_NAMES)),
    "flistxattr": (1, (_SLOT,)),
    "fsync": (1, (_SLOT,)),
    "fallocate": (1, (_SLOT, st.sampled_from(_FALLOCATES), _OFFSETS, _SIZES)),
    "copy_range": (2, (_SLOT, _SLOT, _SIZES, _OFFSETS, _OFFSETS)),
    "lock": (1, (_SLOT, st.sampled_from(["read", "write", "unlock"]))),
    "flock": (1, (_SLOT, st.sampled_from(["read", "write", "unlock"]))),
    "reopen": (2, (_SLOT, _FREE_SLOT, st.sampled_from([os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC]))),
    "publish": (2, (_SLOT, _FREE)),
    "create_at": (1, (_SLOT, st.sampled_from(_NEW))),
    "mkdir_at": (1, (_SLOT, st.sampled_from(_NEW))),
    "tmpfile": (1, (_FREE_SLOT, _DIR, _MODES)),
    "mkdir": (7, (_FREE, _MODES, _UMASKS)),
    "mknod": (2, (_FREE, st.sampled_from(_NODES), _UMASKS)),
    "symlink": (2, (_TARGETS, _FREE)),
    "link": (6, (_FILE, _FREE, _BOOLS)),
    "unlink": (8, (_FILE,)),
    "rmdir": (4, (_DIR,)),
    "rmtree": (3, (_DIR,)),
    "rename": (10, (_ANY, _TARGET, st.sampled_from(_RENAMES))),
    "exchange": (3, (_ANY, _ANY)),
    "readlink": (1, (_FILE,)),
    "readdir": (2, (_DIR,)),
    "stat": (1, (_ANY, _BOOLS)),
    "chmod": (5, (_ANY, _MODES)),
    "chown": (5, (_ANY, _IDS, _IDS, _BOOLS)),
    "utimens": (4, (_ANY, _TIMES, _TIMES, _BOOLS)),
    "access": (2, (_ANY, st.integers(0, 7), st.sampled_from([0, syscalls.AT_EACCESS]))),
    "truncate": (3, (_FILE, _OFFSETS)),
    "statfs": (1, (_ANY,)),
    "setxattr": (5, (_ANY, _XATTR_PAIRS, st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]), _BOOLS)),
    "getxattr": (2, (_ANY, _XATTR_NAMES, _BOOLS)),
    "listxattr": (1, (_ANY, _BOOLS)),
    "removexattr": (2, (_ANY, _XATTR_NAMES, _BOOLS)),
    "readfile": (2, (_FILE,)),
    "writefile": (8, (_MAKE, st.sampled_from(_WRITE_FLAGS), _MODES, _UMASKS, _SEEDS, _SIZES)),
    "mmap_read": (1, (_FILE,)),
    "mmap_write": (1, (_FILE, _SEEDS, _SIZES)),
    "scan_open": (2, (_FREE_SLOT, _DIR)),
    "scan_some": (2, (_SCAN, _SOME)),
    "scan_back": (1, (_SCAN, st.sampled_from([0.1, 0.5, 0.9]))),
    "scan_end": (2, (_SCAN,)),
}


#: Kinds whose arguments of type bytes are paths.
PATH_KINDS = frozenset(
    [
        "open",
        "publish",
        "tmpfile",
        "mkdir",
        "mknod",
        "link",
        "unlink",
        "rmdir",
        "rmtree",
        "rename",
        "exchange",
        "readlink",
        "readdir",
        "stat",
        "chmod",
        "chown",
        "utimens",
        "access",
        "truncate",
        "statfs",
        "readfile",
        "writefile",
        "mmap_read",
        "mmap_write",
        "scan_open",
    ]
)


def paths(op: Op) -> set[bytes]:
    """Paths that an operation names, with their parents."""
    found = {arg for arg in op.args if isinstance(arg, bytes)} if op.kind in PATH_KINDS else set()
    return found | {os.path.dirname(path) or b"." for path in found}


def _flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments that were drawn as pairs become two."""
    return tuple(part for arg in args for part in (arg if type(arg) is tuple else (arg,)))


def _op(kind: str) -> st.SearchStrategy[Op]:
    return st.builds(lambda user, args: Op(kind, user, _flat(args)), _USERS, st.tuples(*_KINDS[kind][1]))


@st.composite
def sequences(
    draw: st.DrawFn, remounts: bool = True, without: frozenset[str] = frozenset(), length: int = 50
) -> Sequence:
    """Sequences of up to ``length`` operations, around a few directories so that they meet each other.

    Arguments: ``remounts`` allows remounts and swaps in the middle; ``without`` names kinds to leave out.
    """
    focus = draw(st.lists(st.sampled_from(layers.directories()), min_size=1, max_size=3, unique=True))
    kinds = [kind for kind, (weight, _) in _KINDS.items() if kind not in without for _ in range(weight)]
    by_kind = {kind: _op(kind) for kind in kinds}
    ops = draw(st.lists(st.sampled_from(kinds).flatmap(by_kind.__getitem__), min_size=12, max_size=length))
    if remounts:
        for kind in draw(st.lists(st.sampled_from(["remount", "swap", "drop_caches"]), max_size=1)):
            ops.insert(draw(st.integers(0, len(ops))), Op(kind, "root", ()))
    return Sequence(draw(st.integers(0, layers.VARIANTS - 1)), draw(st.booleans()), tuple(ops), tuple(focus))
