"""Known differences between this union and kernel overlayfs, each with its reason. Nothing else is let pass.

Two of them concern what lies in upper and are taken out of what is compared (``comparable``); one is in how a comparison is
read (``tolerable``); the driver leaves out what makes the others.
"""

from __future__ import annotations

import re

from .snapshot import Tree

KNOWN = {
    "names of an indexed hard link": "a request names an inode, not the name it was reached by: of the lower names of a "
    "hard link another one may lie in upper than overlayfs would choose; the index holds the file in any case",
    "holes": "overlayfs fills the holes after the first data of a file; here all are kept",
    "security.capability after a write through a shared mapping": "pages are written back by the daemon, and the host "
    "drops the capability then; overlayfs keeps it",
    "rmdir with whiteouts in the form of attributes": "overlayfs takes them for entries and refuses",
}


def comparable(tree: Tree, indexed: dict[int, str], names: dict[str, set[bytes]], subtree: bytes) -> Tree:
    """``tree`` without what depends on which name of an indexed hard link lies in upper.

    Arguments: ``indexed`` as of ``snapshot.index``; ``names`` the lower names of each lower file; ``subtree`` the path
    of the tree in the mount, with which absolute redirects begin.
    """
    origins = set(indexed.values())
    result: Tree = {}
    for path, fields in tree.items():
        origin = fields.get("same file as", path.decode(errors="replace"))
        if origin not in origins:
            result[path] = fields
        elif path not in names[str(origin)]:
            result[path] = _of_any_name(fields, names, subtree)
    return result


def _of_any_name(fields: dict[str, object], names: dict[str, set[bytes]], subtree: bytes) -> dict[str, object]:
    """``fields`` of an indexed file with its links counted as the union does, and a redirect to the file, not a name."""
    xattrs, nlink = fields.get("xattrs"), fields.get("nlink")
    if not isinstance(xattrs, dict) or not isinstance(nlink, int):
        return fields
    xattrs = dict(xattrs)
    if match := re.fullmatch(rb"U([+-]\d+)", xattrs.pop("trusted.overlay.nlink", b"")):
        nlink += int(match[1])
    redirect = xattrs.get("trusted.overlay.redirect", b"").removeprefix(subtree)
    found = [origin for origin, paths in names.items() if redirect in paths and not origin.startswith("upper:")]
    if found:
        xattrs["trusted.overlay.redirect"] = found
    return {**fields, "xattrs": xattrs, "nlink": nlink}


def tolerable(key: str, expected: object, got: object) -> bool:
    """Whether a field may differ: fewer blocks, or data in fewer places."""
    if key == "blocks" and isinstance(expected, int) and isinstance(got, int):
        return got <= expected
    if key == "extents" and isinstance(expected, list) and isinstance(got, list):
        return _length(got) <= _length(expected)
    return False


def _length(extents: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in extents)
