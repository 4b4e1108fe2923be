"""tar as bytes: headers, extended headers and sparse maps, written (pax) and read (pax, GNU, ustar, v7).

Everything is bytes, for a name need not be text in any encoding. POSIX's pax format is ustar headers of 512 bytes, each
with an extended header before it for what it can't hold, a list of ``LENGTH KEYWORD=VALUE\\n`` records:

======================  ================================================================================================
path, linkpath          names that are long or no ASCII; ``hdrcharset=BINARY`` goes before what is no UTF-8
mtime, atime            seconds with a fraction, here always all nanoseconds
uid, gid, size          numbers that are too large for the header
SCHILY.xattr.NAME       an extended attribute; ``%`` and ``=`` in NAME are written ``%25`` and ``%3D``
SCHILY.acl.access       a POSIX ACL as text, SCHILY.acl.default a directory's default one
GNU.sparse.*            a file with holes, format 1.0: the map of what is there comes before the data, as text
======================  ================================================================================================

Python's own tarfile is the model and the counterpart in the tests, but is not used here: it keeps times as floating
point numbers, believes every announced length (an extended header of gigabytes is read into memory), and reads a sparse
map past the end of a truncated archive forever. Here every length and number is checked before it is believed.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NoReturn, Protocol

from unionfs.archives import acltext
from unionfs.core import acl
from unionfs.errors import VolumeError, one_line

BLOCK: Final = 512
CHUNK: Final = 1 << 20
MAX_EXTENTS: Final = 1 << 22
"""Extents that a sparse map may have: it is held in memory, 16 bytes for each."""

_RECORD: Final = 20 * BLOCK
_MAX_EXTENDED: Final = 16 << 20
_MAX_EXTENDED_IN_A_ROW: Final = 8
_MAX_SECONDS: Final = 1 << 62
_MAX_OFFSET: Final = (1 << 63) - 1
_NO_ID: Final = 0xFFFFFFFF

REGULAR, HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_V7_REGULAR, _CONTIGUOUS, _GNU_SPARSE, _GNU_DIRECTORY, _GNU_LABEL = b"\0", b"7", b"S", b"D", b"V"
_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_GLOBAL, _SOLARIS_PAX = b"L", b"K", b"x", b"g", b"X"
_WITH_DATA: Final = frozenset((REGULAR, _GNU_DIRECTORY))
_FIRST: Final = "the archive's first entry"
_KNOWN: Final = frozenset((REGULAR, HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO))

# name mode uid gid size mtime checksum type linkname magic uname gname major minor prefix
_HEADER: Final = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_MAGIC: Final = b"ustar\00000"
_XATTR: Final = b"SCHILY.xattr."
_XATTR_LIBARCHIVE: Final = b"LIBARCHIVE.xattr."
_TEXTS: Final = frozenset((b"path", b"linkpath", b"uname", b"gname", b"GNU.sparse.name"))
_ACLS: Final = {b"SCHILY.acl.access": acl.ACCESS, b"SCHILY.acl.default": acl.DEFAULT}

Warn = Callable[[str], None]


class Progress(Protocol):
    """Told how far a backup or a restore is."""

    def __call__(self, done: int, total: int | None, /) -> None:
        """*done* of *total* bytes; None: how many there are isn't known."""


@dataclass(frozen=True, slots=True)
class Root:
    """A directory that is one part of an archive.

    `prefix` is its path in the archive; "" for an archive of one directory, whose members are named ``./...`` as
    ``tar -C DIR .`` writes them. `directory` is a path or a descriptor.
    """

    prefix: str
    directory: str | bytes | int

    @property
    def parts(self) -> list[bytes]:
        """The names that the prefix consists of."""
        return [part for part in os.fsencode(self.prefix).split(b"/") if part not in (b"", b".")]


@dataclass(slots=True)
class Totals:
    """What went into an archive or came out of it: entries, content bytes (holes not counted), and warnings given."""

    entries: int = 0
    content: int = 0
    warnings: int = 0


@dataclass(slots=True)
class Member:
    """One entry of an archive.

    `size` is the number of data bytes that follow its header; `extents` tells where in a file of `real_size` bytes they
    belong, None where the file has no holes. In writing, `size` doesn't count the sparse map itself.
    """

    name: bytes
    kind: bytes
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    uname: bytes = b""
    gname: bytes = b""
    size: int = 0
    mtime_ns: int | None = None
    atime_ns: int | None = None
    link: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)
    extents: array[int] | None = None
    real_size: int = 0


class Readable(Protocol):
    """What an archive is read from."""

    def read(self, size: int, /) -> bytes:
        """Return up to *size* bytes, b"" at the end."""


class Writable(Protocol):
    """What an archive is written to."""

    def write(self, data: bytes, /) -> object:
        """Write all of *data*. Raises OSError."""


def padding(size: int) -> int:
    """Return how many bytes are missing to the next block."""
    return -size % BLOCK


# -- writing --


def encode(member: Member) -> bytes:
    """Return a member's headers and, for a file with holes, its map: all that goes before the data."""
    records: dict[bytes, bytes] = {}
    name, size, prelude = member.name, member.size, b""
    if member.extents is not None:
        prelude = _sparse_map(member)
        size += len(prelude)
        records[b"GNU.sparse.major"] = b"1"
        records[b"GNU.sparse.minor"] = b"0"
        records[b"GNU.sparse.name"] = name
        records[b"GNU.sparse.realsize"] = b"%d" % member.real_size
        head, _, tail = name.rpartition(b"/")
        name = (head or b".") + b"/GNUSparseFile.0/" + tail
    for keyword, ns in ((b"mtime", member.mtime_ns), (b"atime", member.atime_ns)):
        if ns is not None:
            records[keyword] = _decimal_time(ns)
    for attribute, value in member.xattrs.items():
        keyword, value = _xattr_record(attribute, value)
        records[keyword] = value
    header = _header(member, name, size, records)
    extended = _extended_header(name, records) if records else b""
    return extended + header + prelude


def end_mark(written: int) -> bytes:
    """Return what ends an archive of *written* bytes: two empty blocks, filled up to a tape record as tar does."""
    return bytes(2 * BLOCK + -(written + 2 * BLOCK) % _RECORD)


def _header(member: Member, name: bytes, size: int, records: dict[bytes, bytes]) -> bytes:
    """Return the ustar header; what does not fit is put into *records*."""

    def text(value: bytes, width: int, keyword: bytes) -> bytes:
        if len(value) > width or not value.isascii():
            records[keyword] = value
        return value[:width]

    def number(value: int, digits: int, keyword: bytes) -> bytes:
        if not 0 <= value < 8**digits:
            records[keyword] = b"%d" % value
            value = 0
        return b"%0*o\0" % (digits, value)

    seconds = (member.mtime_ns or 0) // 1_000_000_000
    fields = [
        text(name, 100, b"path"),
        b"%07o\0" % member.mode,
        number(member.uid, 7, b"uid"),
        number(member.gid, 7, b"gid"),
        number(size, 11, b"size"),
        b"%011o\0" % (seconds if 0 <= seconds < 8**11 else 0),
        b" " * 8,
        member.kind,
        text(member.link, 100, b"linkpath"),
        _MAGIC,
        text(member.uname, 31, b"uname"),
        text(member.gname, 31, b"gname"),
        b"%07o\0" % member.major,
        b"%07o\0" % member.minor,
        b"",
    ]
    fields[6] = b"%06o\0 " % sum(_HEADER.pack(*fields))
    return _HEADER.pack(*fields)


def _extended_header(name: bytes, records: dict[bytes, bytes]) -> bytes:
    body = b"".join(_record(keyword, value) for keyword, value in records.items())
    if not all(_is_utf8(value) for keyword, value in records.items() if keyword in _TEXTS):
        body = _record(b"hdrcharset", b"BINARY") + body
    head, _, tail = name.rstrip(b"/").rpartition(b"/")
    label = ((head or b".") + b"/PaxHeaders/" + tail).decode("ascii", "replace").replace("�", "?").encode()[:100]
    header = _header(Member(label, _PAX), label, len(body), {})
    return header + body + bytes(padding(len(body)))


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _record(keyword: bytes, value: bytes) -> bytes:
    """Return a record; its length counts its own digits."""
    rest = len(keyword) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, keyword, value)


def _decimal_time(ns: int) -> bytes:
    sign = b"-" if ns < 0 else b""
    seconds, fraction = divmod(abs(ns), 1_000_000_000)
    return b"%b%d.%09d" % (sign, seconds, fraction) if fraction else b"%b%d" % (sign, seconds)


def _xattr_record(name: str, value: bytes) -> tuple[bytes, bytes]:
    for keyword, attribute in _ACLS.items():
        if name == attribute:
            return keyword, acltext.to_text(value)
    raw = name.encode(errors="surrogateescape")
    return _XATTR + raw.replace(b"%", b"%25").replace(b"=", b"%3D"), value


def _sparse_map(member: Member) -> bytes:
    assert member.extents is not None
    numbers = list(member.extents)
    if not numbers or numbers[-2] + numbers[-1] < member.real_size:
        numbers += [member.real_size, 0]
    text = b"%d\n" % (len(numbers) // 2) + b"".join(b"%d\n" % number for number in numbers)
    return text + bytes(padding(len(text)))


# -- reading --


class Reader:
    """The members of an archive, one after the other, and the data of the one that is at hand."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._left = 0  # data of the member at hand not yet read, and the padding after it
        self._padding = 0
        self._where = _FIRST
        self._global: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[Member]:
        """Go through all members. Raises VolumeError that names the entry; the end of the file is checked too."""
        while True:
            while self.read():
                pass
            self._exact(self._padding)
            self._padding = 0
            member = self._next()
            if member is None:
                return
            yield member

    def read(self) -> bytes:
        """Return the next piece of the data of the member at hand, b"" at its end. Raises VolumeError."""
        if not self._left:
            return b""
        data = self._some(min(self._left, CHUNK))
        if not data:
            self._fail("the archive ends in the middle of it: it is truncated")
        self._left -= len(data)
        return data

    def _fail(self, reason: str) -> NoReturn:
        raise VolumeError(f"{self._where}: {reason}")

    def _some(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except VolumeError as exc:
            raise VolumeError(f"{self._where}: {exc}") from exc

    def _exact(self, size: int) -> bytes:
        """Read *size* bytes; the caller has made sure that this is not too much."""
        data = self._some(size) if size else b""
        while len(data) < size:
            more = self._some(size - len(data))
            if not more:
                self._fail("the archive ends here: it is truncated")
            data += more
        return data

    def _next(self) -> Member | None:
        """Read headers up to the next member; None at the end mark."""
        extended: list[tuple[bytes, bytes]] = []
        long_name = long_link = None
        for _ in range(_MAX_EXTENDED_IN_A_ROW):
            block = self._exact(BLOCK)
            if not block.strip(b"\0"):
                self._to_the_end()
                return None
            kind = block[156:157]
            if kind in (_PAX, _SOLARIS_PAX):
                extended += self._records(block)
            elif kind == _PAX_GLOBAL:
                self._global.update((key, value) for key, value in self._records(block) if key in _KEYWORDS)
            elif kind == _GNU_LONG_NAME:
                long_name = self._extended(block).partition(b"\0")[0]
            elif kind == _GNU_LONG_LINK:
                long_link = self._extended(block).partition(b"\0")[0]
            elif kind == _GNU_LABEL:
                self._check(block)
                extended.clear()
            else:
                return self._member(block, extended, long_name, long_link)
        return self._fail("too many extended headers in a row")

    def _to_the_end(self) -> None:
        """After the end mark only zeros may come; reading them also proves a compressed archive whole."""
        self._where = "the end of the archive"
        while data := self._some(CHUNK):
            if data.strip(b"\0"):
                self._fail("something follows the end mark: the archive is damaged, or two were joined")

    def _check(self, block: bytes) -> None:
        rest = block[:148] + b" " * 8 + block[156:]
        text, right = block[148:156].partition(b"\0")[0].strip(), sum(rest)
        stored = int(text, 8) if text and not text.strip(b"01234567") else -1
        # Some old programs added the bytes up as signed numbers.
        if stored != right and stored != right - 256 * sum(byte > 127 for byte in rest):
            if self._where == _FIRST:
                raise VolumeError("this is no tar archive, or a damaged one")
            self._fail("the header after it is damaged")

    def _number(self, raw: bytes, what: str) -> int:
        """Read a number of a header: octal text, or GNU's base 256."""
        if raw[:1] in (b"\x80", b"\xff"):
            return int.from_bytes(raw[1:], "big") - (256 ** (len(raw) - 1) if raw[0] == 0xFF else 0)
        return self._octal(raw, what)

    def _octal(self, raw: bytes, what: str) -> int:
        text = raw.partition(b"\0")[0].strip()
        if not text:
            return 0
        if text.strip(b"01234567"):
            self._fail(f"the {what} in its header is no number")
        return int(text, 8)

    def _extended(self, block: bytes) -> bytes:
        self._check(block)
        size = self._number(block[124:136], "size")
        if not 0 <= size <= _MAX_EXTENDED:
            self._fail(f"the extended header after it has {size} bytes, at most {_MAX_EXTENDED} are read")
        data = self._exact(size)
        self._exact(padding(size))
        return data

    def _records(self, block: bytes) -> list[tuple[bytes, bytes]]:
        data = self._extended(block)
        found: list[tuple[bytes, bytes]] = []
        at = 0
        while at < len(data) and data[at]:
            space = data.find(b" ", at, at + 12)
            digits = data[at:space]
            if space < 0 or not digits.isdigit():
                self._fail("the extended header after it is malformed")
            end = at + int(digits)
            keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
            if end > len(data) or data[end - 1 : end] != b"\n" or not equals or end <= space:
                self._fail("the extended header after it is malformed")
            found.append((keyword, value))
            at = end
        return found

    def _member(
        self, block: bytes, extended: list[tuple[bytes, bytes]], long_name: bytes | None, long_link: bytes | None
    ) -> Member:
        self._check(block)
        raw = _HEADER.unpack(block)
        texts = [part.partition(b"\0")[0] for part in raw]
        ustar = raw[9][:6] == b"ustar\0"
        name = texts[14] + b"/" + texts[0] if ustar and texts[14] else texts[0]
        member = Member(long_name or name, raw[7], link=long_link or texts[8])
        self._name(member)
        records = {**self._global, **dict(extended)}
        self._apply(member, records, raw)
        self._kind(member, block, records, extended)
        return member

    def _name(self, member: Member) -> None:
        self._where = "archive entry " + one_line(member.name.decode(errors="backslashreplace"))[:1000]

    def _apply(self, member: Member, records: dict[bytes, bytes], raw: tuple[bytes, ...]) -> None:
        """Set what the header and the extended header say, in this order."""
        if name := records.get(b"GNU.sparse.name") or records.get(b"path"):
            member.name = name
            self._name(member)
        member.link = records.get(b"linkpath") or member.link
        member.mode = self._number(raw[1], "mode") & 0o7777
        member.uid = self._identity(records.get(b"uid"), raw[2], "owner")
        member.gid = self._identity(records.get(b"gid"), raw[3], "group")
        member.size = self._chosen(records.get(b"size"), raw[4], "size")
        if not 0 <= member.size <= _MAX_OFFSET:
            self._fail(f"{member.size} is no size")
        member.mtime_ns = self._time(records.get(b"mtime"))
        if member.mtime_ns is None:
            member.mtime_ns = self._seconds(self._number(raw[5], "time")) * 1_000_000_000
        member.atime_ns = self._time(records.get(b"atime"))
        if member.kind in (CHAR, BLOCK_DEVICE):
            member.major = self._number(raw[12], "device number")
            member.minor = self._number(raw[13], "device number")
        self._attributes(member, records)

    def _chosen(self, text: bytes | None, raw: bytes, what: str) -> int:
        return self._decimal(text, what) if text else self._number(raw, what)

    def _identity(self, text: bytes | None, raw: bytes, what: str) -> int:
        number = self._chosen(text, raw, what)
        if not 0 <= number < _NO_ID:
            self._fail(f"its {what} {number} is out of range")
        return number

    def _decimal(self, text: bytes, what: str) -> int:
        if not re.fullmatch(rb"-?[0-9]{1,20}", text):
            self._fail(f"its {what} {_shown(text)} is no number")
        return int(text)

    def _seconds(self, seconds: int) -> int:
        if not -_MAX_SECONDS < seconds < _MAX_SECONDS:
            self._fail("its time is out of range")
        return seconds

    def _time(self, text: bytes | None) -> int | None:
        if not text:
            return None
        match = re.fullmatch(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?", text[:100])
        if match is None:
            self._fail(f"its time {_shown(text)} is no number")
        ns = self._seconds(int(match[2])) * 1_000_000_000 + int(((match[3] or b"") + b"000000000")[:9])
        return -ns if match[1] else ns

    def _attributes(self, member: Member, records: dict[bytes, bytes]) -> None:
        for keyword, value in records.items():
            if keyword.startswith(_XATTR):
                name = keyword[len(_XATTR) :].replace(b"%3D", b"=").replace(b"%25", b"%")
            elif keyword.startswith(_XATTR_LIBARCHIVE):
                name = _unquoted(keyword[len(_XATTR_LIBARCHIVE) :])
                try:
                    value = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
                except binascii.Error:
                    self._fail("the value of an extended attribute is malformed")
            else:
                continue
            if not name or b"\0" in name:
                self._fail("the name of an extended attribute is malformed")
            member.xattrs[name.decode(errors="surrogateescape")] = value
        # A list in binary form is the file system's own, with numbers: it counts more than the text with names.
        for keyword, attribute in _ACLS.items():
            if attribute not in member.xattrs and (text := records.get(keyword)):
                try:
                    value = acltext.from_text(text)
                except ValueError as exc:
                    self._fail(one_line(str(exc)))
                if value:
                    member.xattrs[attribute] = value

    def _kind(
        self, member: Member, block: bytes, records: dict[bytes, bytes], extended: list[tuple[bytes, bytes]]
    ) -> None:
        """Settle what the member is and what data follows."""
        if member.kind in (_V7_REGULAR, _CONTIGUOUS):
            member.kind = REGULAR
        if member.kind == REGULAR and member.name.endswith(b"/"):
            member.kind = _GNU_DIRECTORY
        sparse = member.kind == _GNU_SPARSE
        if sparse:
            member.kind = REGULAR
        if member.kind not in _WITH_DATA:
            member.size = 0
        self._left, self._padding = member.size, padding(member.size)
        member.real_size = member.size
        if member.kind == _GNU_DIRECTORY:
            member.kind = DIRECTORY
        elif sparse:
            self._sparse_old(member, block)
        elif member.kind == REGULAR:
            self._sparse_pax(member, records, extended)
        if member.kind not in _KNOWN:
            self._fail(f"its type {_shown(block[156:157])} is not known")

    # -- sparse files --

    def _sparse_old(self, member: Member, block: bytes) -> None:
        """GNU's old form: four extents in the header, more in blocks after it."""
        member.real_size = self._number(block[483:495], "size")
        pieces, more = block[386:482], block[482]
        extents = array("q")
        while True:
            for at in range(0, len(pieces), 24):
                if pieces[at]:
                    self._extent(extents, *(self._number(pieces[i : i + 12], "size") for i in (at, at + 12)))
            if not more:
                break
            block = self._exact(BLOCK)
            pieces, more = block[:504], block[504]
        self._check_extents(member, extents)

    def _sparse_pax(self, member: Member, records: dict[bytes, bytes], extended: list[tuple[bytes, bytes]]) -> None:
        """The three pax forms: 1.0 with the map before the data, 0.1 with it in one record, 0.0 in many."""
        extents = array("q")
        if records.get(b"GNU.sparse.major") == b"1":
            if records.get(b"GNU.sparse.minor") != b"0":
                self._fail("it is sparse in a form that is not known")
            member.real_size = self._decimal(records.get(b"GNU.sparse.realsize", b""), "size")
            self._sparse_map(member, extents)
        elif b"GNU.sparse.map" in records:
            numbers = records[b"GNU.sparse.map"].split(b",")
            if len(numbers) % 2:
                self._fail("its map of holes is malformed")
            for at in range(0, len(numbers), 2):
                self._extent(extents, *(self._decimal(number, "offset") for number in numbers[at : at + 2]))
            member.real_size = self._decimal(records.get(b"GNU.sparse.size", b""), "size")
        elif b"GNU.sparse.numblocks" in records:
            offset = -1
            for keyword, value in extended:
                if keyword == b"GNU.sparse.offset":
                    offset = self._decimal(value, "offset")
                elif keyword == b"GNU.sparse.numbytes":
                    self._extent(extents, offset, self._decimal(value, "size"))
            member.real_size = self._decimal(records.get(b"GNU.sparse.size", b""), "size")
        else:
            return
        self._check_extents(member, extents)

    def _sparse_map(self, member: Member, extents: array[int]) -> None:
        """Read the map in front of the data: numbers on lines of their own, filled up to a block."""
        buffer = b""

        def number() -> int:
            nonlocal buffer
            while b"\n" not in buffer:
                if len(buffer) > 20 or self._left < BLOCK:
                    self._fail("its map of holes is malformed")
                buffer += self._exact(BLOCK)
                self._left -= BLOCK
            text, _, buffer = buffer.partition(b"\n")
            return self._decimal(text, "offset")

        count = number()
        if not 0 <= count <= MAX_EXTENTS:
            self._fail(f"its map of holes has {count} entries, at most {MAX_EXTENTS} are read")
        for _ in range(count):
            self._extent(extents, number(), number())
        member.size = self._left

    def _extent(self, extents: array[int], offset: int, length: int) -> None:
        after = extents[-2] + extents[-1] if extents else 0
        if not after <= offset <= _MAX_OFFSET or not 0 <= length <= _MAX_OFFSET - offset:
            self._fail("its map of holes contradicts itself")
        if len(extents) >= 2 * MAX_EXTENTS:
            self._fail(f"its map of holes has more than {MAX_EXTENTS} entries")
        extents.extend((offset, length))

    def _check_extents(self, member: Member, extents: array[int]) -> None:
        end = extents[-2] + extents[-1] if extents else 0
        if not end <= member.real_size <= _MAX_OFFSET or sum(extents[1::2]) != member.size:
            self._fail("its map of holes contradicts its size")
        member.extents = extents


_KEYWORDS: Final = frozenset((b"path", b"linkpath", b"uid", b"gid", b"size", b"mtime", b"atime", *_ACLS))


def _shown(text: bytes) -> str:
    return repr(text[:40].decode(errors="backslashreplace"))


def _unquoted(name: bytes) -> bytes:
    """Undo the percent signs in libarchive's attribute names."""
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes([int(match[1], 16)]), name)
