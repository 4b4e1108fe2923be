"""POSIX access-control lists as text, as archives hold them.

One entry a line (or between commas), ``user:NAME:rwx``, as ``acl_to_text(3)`` writes it; star adds the number as a
fourth field. Written are numbers only: they are what a file system stores, and names mean something else elsewhere.
"""

from __future__ import annotations

import grp
import pwd
import struct
from typing import Final

_HEAD: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")
_VERSION: Final = 2
_NO_ID: Final = 0xFFFFFFFF
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_WORDS: Final = {_USER_OBJ: "user", _USER: "user", _GROUP_OBJ: "group", _GROUP: "group", _MASK: "mask", _OTHER: "other"}
_TAGS: Final = {
    **dict.fromkeys(("user", "u"), (_USER_OBJ, _USER)),
    **dict.fromkeys(("group", "g"), (_GROUP_OBJ, _GROUP)),
    **dict.fromkeys(("mask", "m"), (_MASK, 0)),
    **dict.fromkeys(("other", "o"), (_OTHER, 0)),
}


def to_text(value: bytes) -> bytes:
    """Return the text of a ``system.posix_acl_*`` value. Raises ValueError for a malformed one."""
    if len(value) < _HEAD.size or (len(value) - _HEAD.size) % _ENTRY.size or _HEAD.unpack_from(value)[0] != _VERSION:
        raise ValueError("a malformed access-control list")
    lines: list[str] = []
    for tag, perm, ident in _ENTRY.iter_unpack(value[_HEAD.size :]):
        if tag not in _WORDS:
            raise ValueError("a malformed access-control list")
        bits = "".join(letter if perm & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
        lines.append(f"{_WORDS[tag]}:{ident if tag in (_USER, _GROUP) else ''}:{bits}\n")
    return "".join(lines).encode()


def from_text(text: bytes) -> bytes:
    """Return the ``system.posix_acl_*`` value of a text, b"" for one without entries.

    Raises ValueError: what is wrong with it, or which user or group this machine doesn't know.
    """
    entries: list[tuple[int, int, int]] = []
    for line in text.decode(errors="surrogateescape").replace(",", "\n").split("\n"):
        entry = line.partition("#")[0].strip()
        if entry:
            entries.append(_parse(entry))
    if not entries:
        return b""
    return _HEAD.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in sorted(entries, key=_place))


def _place(entry: tuple[int, int, int]) -> tuple[int, int]:
    """The kernel wants the kinds in order; libacl keeps the numbers in order too."""
    return entry[0], entry[2]


def _parse(entry: str) -> tuple[int, int, int]:
    fields = [part.strip() for part in entry.split(":")]
    if fields[0] in ("mask", "m", "other", "o") and len(fields) == 2:
        fields.insert(1, "")
    if not 3 <= len(fields) <= 4 or fields[0] not in _TAGS or not set(fields[2]) <= set("rwx-"):
        raise ValueError(f"{entry!r} is no entry of an access-control list")
    plain, named = _TAGS[fields[0]]
    perm = sum(bit for letter, bit in (("r", 4), ("w", 2), ("x", 1)) if letter in fields[2])
    if not fields[1]:
        return plain, perm, _NO_ID
    if not named:
        raise ValueError(f"{entry!r} is no entry of an access-control list")
    ident = _number(fields[3]) if len(fields) == 4 else None
    if ident is None:
        ident = _number(fields[1])
    if ident is None:
        ident = _by_name(fields[1], user=named == _USER)
    return named, perm, ident


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    return int(text) if int(text) < _NO_ID else None


def _by_name(name: str, *, user: bool) -> int:
    try:
        return pwd.getpwnam(name).pw_uid if user else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError, UnicodeError):
        kind = "user" if user else "group"
        raise ValueError(
            f"its access-control list names the {kind} {name!r}, unknown on this machine: make that {kind} first"
        ) from None
