"""Open directories: where in a listing a reader is, and which listings need not be made again.

Entries come in the order of their *cookies*, which name their places. A cookie is a hash of the name, as in ext4: it
stays the same whatever else happens in the directory, so reading can go on in a newer listing.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from unionfs.core.inodes import Dir
from unionfs.core.listing import Lister
from unionfs.core.merge import Entry

DOTS: Final = 2  # the cookies of `.` and `..` are 1 and 2
_HASH_MASK: Final = (1 << 61) - 1

# Of how many directories, of how many names at most, the last listing is remembered: for readers that come together.
_MOST_LISTINGS: Final = 32
_MOST_LISTED: Final = 4096


class DirHandle:
    """An open directory: its listing as it was when reading began."""

    __slots__ = (
        "again",
        "bare",
        "children",
        "cold",
        "cookies",
        "entries",
        "kept",
        "node",
        "shared",
        "version",
        "wants_all",
    )

    def __init__(self, node: Dir) -> None:
        self.node = node
        self.entries: list[Entry] | None = None
        self.cookies: list[int] = []  # parallel to entries, ascending
        # Whether the same listing was read before, and is kept: the kernel has dropped what it knew, and names too.
        self.again = False
        self.kept = False  # whether the kernel may keep what it reads through this handle
        self.shared = False  # whether others may have it read too, and not be done
        self.version = -1  # of the directory when it was read
        # Of a long listing that is read for its names: how many came last without attributes, and how many of the
        # directory were in use then; whether the reader has been seen to look at them.
        self.bare = self.children = 0
        self.wants_all = False
        self.cold = False  # whether attributes had to be waited for

    def first_after(self, cookie: int) -> int:
        """Return the index of the first entry that comes after a cookie."""
        return bisect.bisect_right(self.cookies, cookie)


class Listings:
    """The listings that readers of one mount use."""

    def __init__(self, lister: Lister) -> None:
        self._lister = lister
        self._lately: OrderedDict[Dir, tuple[int, list[int], list[Entry]]] = OrderedDict()

    def read(self, handle: DirHandle, after: int) -> Iterator[tuple[int, Entry]]:
        """Yield (cookie, entry) of what comes after a cookie. 0 to 2, which the dots have, read the directory anew."""
        if after <= DOTS or handle.entries is None:
            node = handle.node
            handle.version, handle.cookies, handle.entries = self._listing(node)
            handle.again = handle.kept and not handle.shared and node.listed == node.version
            node.listed = node.version
        # By index: to skip what came before would take the longer, the further a reader has come.
        at = range(handle.first_after(after), len(handle.entries))
        return zip(map(handle.cookies.__getitem__, at), map(handle.entries.__getitem__, at), strict=True)

    def _listing(self, node: Dir) -> tuple[int, list[int], list[Entry]]:
        """Return a directory's version, cookies and entries; those that were read lately need not be read again."""
        known = self._lately.get(node)
        if known is not None and known[0] == node.version:
            self._lately.move_to_end(node)
            return known
        listing = (node.version, *_in_order(self._lister.entries(node)))
        if len(listing[1]) <= _MOST_LISTED:
            self._lately[node] = listing
            if len(self._lately) > _MOST_LISTINGS:
                self._lately.popitem(last=False)
        return listing


def _in_order(entries: list[Entry]) -> tuple[list[int], list[Entry]]:
    """Return cookies and the entries that have them, ascending. Equal hashes count on."""
    by_cookie = {DOTS + 1 + (hash(entry.name) & _HASH_MASK): entry for entry in entries}
    if len(by_cookie) == len(entries):
        cookies = sorted(by_cookie)
        return cookies, [by_cookie[cookie] for cookie in cookies]
    hashed = sorted((DOTS + 1 + (hash(entry.name) & _HASH_MASK), entry) for entry in entries)
    cookies = [cookie for cookie, _ in hashed]
    for at in range(1, len(cookies)):
        if cookies[at] <= cookies[at - 1]:
            cookies[at] = cookies[at - 1] + 1
    return cookies, [entry for _, entry in hashed]
