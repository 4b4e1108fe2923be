"""Known differences between this union and kernel overlayfs, each with its reason. Nothing else is let pass.

Some are in how fields are compared (``tolerable``), the machine and the driver leave out what makes the others.
"""

from __future__ import annotations

import os

from .operations import Fields, Op, Tree

KNOWN = {
    "holes": "overlayfs fills the holes after the first data of a file; here all are kept",
    "impure stays": "overlayfs takes the mark from a directory when a listing finds nothing from below any more",
    "link count of an open lower file without a name": "overlayfs tells that of the lower file; it should be 0",
    "names of a hard link, through a descriptor": "a request names the inode; the name last looked up goes into upper",
    "changes to an open lower object without a name": "overlayfs fails them, leaves things in work, or brings the name back; "
    "here they work on a file",
    "marks of what failed": "overlayfs marks directories and what it will move before it tries to; here nothing stays",
    "suid set while the file is open for writing": "a write by root clears it, as one by others does",
    "O_TMPFILE": "the FUSE library has no such request (kind tmpfile is left out)",
    "time of a metacopy file opened for writing": "overlayfs sets it to now when the data is copied up; here it stays",
    "security.capability after a write through a shared mapping": "pages are written back by the daemon, and the host "
    "drops the capability then; overlayfs keeps it",
    "rmdir with whiteouts in the form of attributes": "overlayfs takes them for entries and refuses",
}

_IMPURE = "trusted.overlay.impure"
_MARKS = {_IMPURE, "trusted.overlay.redirect", "trusted.overlay.opaque"}
#: Kinds that FUSE cannot serve here.
LEFT_OUT = frozenset({"tmpfile"})

#: Kinds that write data. Root's writes to a file with suid or sgid that was open before it got them are left out: the
#: kernel clears the bits on a file that is passed through, whoever writes.
WRITING = {"write", "pwrite", "writefile", "mmap_write"}

#: Kinds that change something through a descriptor: before them the name that it was opened by is looked up.
BY_DESCRIPTOR = {"publish", "fchmod", "fchown", "futimens", "fsetxattr", "ftruncate", "reopen"}


def opens_only(op: Op, value: object) -> bool:
    """Whether a successful ``op`` with result ``value`` may have opened a file for writing and written nothing."""
    match op.kind, op.args:
        case "open" | "reopen", (_, _, int(flags), *_):
            return not flags & os.O_TRUNC
        case "writefile", (_, int(flags), *_):
            return not flags & os.O_TRUNC and value == 0
        case "truncate", _:
            return True
        case "mmap_write", _:
            return value == 0 or isinstance(value, str)
    return False


def without_marks(tree: Tree) -> Tree:
    """``tree`` of an upper layer without what an operation that failed may have left."""
    return {
        path: {**fields, "xattrs": {name: value for name, value in xattrs.items() if name not in _MARKS}}
        if isinstance(xattrs := fields.get("xattrs"), dict)
        else fields
        for path, fields in tree.items()
    }


def tolerable(key: str, expected: object, got: object) -> bool:
    """Whether a field may differ in this direction."""
    match key, expected, got:
        case "blocks", int(), int():
            return got <= expected
        case "extents", list(), list():
            return _length(got) <= _length(expected)
        case "xattrs", dict(), dict():
            return {**expected, _IMPURE: b"y"} == got
    return False


def nameless(op: Op, got: Fields) -> bool:
    """Whether an open file has lost its last name, so that its number of links may differ."""
    return op.kind == "fstat" and got.get("nlink") == 0


def _length(extents: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in extents)
