"""Archives of volumes: standard tar (pax), plain or compressed, to and from files and pipes.

What is in an archive is the business of the modules below, `tarwrite` and `tarread`. Here is what is around it:
compression, the file that appears whole or not at all, and the counting for a progress bar.

A backup into a file is written to a file without a name, in the same directory, and gets its name when it is complete
and on disk; a failure or a kill leaves what was there before. It is for its owner only (mode 0600), since it holds what
only the owners of the files inside may read.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO, Final, Literal

from unionfs.archives import tarformat, tarread, tarwrite
from unionfs.archives.tarformat import Progress, Root, Totals, Warn
from unionfs.core import sysio
from unionfs.errors import VolumeError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = [
    "Compression",
    "Progress",
    "Root",
    "Totals",
    "backup",
    "backup_file",
    "compression_of",
    "restore",
    "restore_file",
]

Compression = Literal["none", "gzip", "zstd"]

_BY_ENDING: Final[dict[str, Compression]] = {
    ".tar": "none",
    ".tar.gz": "gzip",
    ".tgz": "gzip",
    ".tar.zst": "zstd",
    ".tzst": "zstd",
}
_NOT_WRITTEN: Final = (".xz", ".txz", ".bz2", ".tbz", ".tbz2", ".lz4", ".lz", ".lzma", ".z", ".zip", ".7z", ".br")


def compression_of(path: str | os.PathLike[str]) -> Compression:
    """Return how an archive of this name is to be compressed, by its ending; plain where that says nothing.

    Raises VolumeError for an ending that promises another compression.
    """
    name = os.fspath(path).lower()
    for ending, compression in _BY_ENDING.items():
        if name.endswith(ending):
            return compression
    if name.endswith((".gz", ".zst")):
        return "gzip" if name.endswith(".gz") else "zstd"
    if name.endswith(_NOT_WRITTEN):
        raise VolumeError(f"{os.fspath(path)}: this compression is not written; use .tar, .tar.gz or .tar.zst")
    return "none"


# -- backup --


def backup(
    roots: Sequence[Root],
    out: IO[bytes],
    *,
    compression: Compression = "none",
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Totals:
    """Write an archive of these directories to *out*, which stays open and is flushed.

    *progress* is called with content bytes done and in all, *warn* with one line for what an archive can't hold
    (sockets) or what changed while it was read. Raises VolumeError: a file can't be read, or *out* can't be written.
    """
    total = tarwrite.content_bytes(roots) if progress is not None else 0
    try:
        with _compressor(out, compression) as stream:
            totals = tarwrite.write(roots, stream, total=total, progress=progress, warn=warn)
        out.flush()
    except OSError as exc:
        raise VolumeError(f"the archive can't be written: {exc.strerror or exc}") from exc
    return totals


def backup_file(
    roots: Sequence[Root],
    path: str | os.PathLike[str],
    *,
    compression: Compression | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Totals:
    """Like :func:`backup`, into a file that appears when it is complete; compressed as its name's ending says.

    A path that is no regular file (a device, a fifo) is written to as it is. Raises VolumeError.
    """
    wanted = compression or compression_of(path)
    place = Path(os.path.realpath(path))
    try:
        special = place.exists() and not place.is_file()
        with open(place, "wb") if special else _appearing(place) as out:
            return backup(roots, out, compression=wanted, progress=progress, warn=warn)
    except OSError as exc:
        raise VolumeError(f"{os.fspath(path)}: {exc.strerror}") from exc


@contextlib.contextmanager
def _compressor(out: IO[bytes], compression: Compression) -> Iterator[tarformat.Writable]:
    """What is written to the stream goes compressed to *out*, which is left open; complete at a good end only."""
    if compression == "none":
        yield out
        return
    if compression == "gzip":
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=out) as stream:
            yield stream
    else:
        with zstd.ZstdFile(out, "wb", options={zstd.CompressionParameter.checksum_flag: 1}) as packed:
            yield packed


@contextlib.contextmanager
def _appearing(place: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name, over what had it, at a good end."""
    directory = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    aside = b".%b.%d.partial" % (os.fsencode(place.name)[:200], os.getpid())
    named = False
    try:
        try:
            fd = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
            fd = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
            named = True
        with open(fd, "wb") as out:
            yield out
            out.flush()
            os.fsync(fd)
            if not named:
                sysio.linkat_fd(fd, directory, aside)
                named = True
        os.rename(aside, place.name, src_dir_fd=directory, dst_dir_fd=directory)
        named = False
        os.fsync(directory)
    finally:
        if named:
            with contextlib.suppress(OSError):
                os.unlink(aside, dir_fd=directory)
        os.close(directory)


# -- restore --


def restore(
    source: IO[bytes],
    roots: Sequence[Root],
    *,
    total: int | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Totals:
    """Unpack an archive, whose compression is found by its first bytes, into these *empty* directories.

    *progress* is called with bytes read from *source* and *total* (None: not known). Everything is on disk at the
    return. Raises VolumeError for an archive that is damaged, hostile or can't be restored here; then the directories
    hold a part, which is the caller's to remove, as after a KeyboardInterrupt. Nothing outside of them is ever touched.
    """
    raw = _Counted(source, total, progress)
    with _decompressor(raw) as stream:
        try:
            return tarread.unpack(_Checked(stream), roots, warn=warn)
        except OSError as exc:
            raise VolumeError(f"the directory to restore into: {exc.strerror}") from exc


def restore_file(
    path: str | os.PathLike[str],
    roots: Sequence[Root],
    *,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Totals:
    """Like :func:`restore`, from a file. Raises VolumeError, which names it."""
    try:
        with open(path, "rb") as source:
            st = os.fstat(source.fileno())
            total = st.st_size if stat.S_ISREG(st.st_mode) else None
            return restore(source, roots, total=total, progress=progress, warn=warn)
    except OSError as exc:
        raise VolumeError(f"{os.fspath(path)}: {exc.strerror}") from exc
    except VolumeError as exc:
        raise VolumeError(f"{os.fspath(path)}: {exc}") from exc


class _Counted(io.RawIOBase):
    """The archive as it is read, counted; its first bytes can be looked at."""

    def __init__(self, source: IO[bytes], total: int | None, progress: Progress | None) -> None:
        self._source = source
        self._total = total
        self._progress = progress
        self._done = 0
        self._ahead = b""

    def peek(self, count: int) -> bytes:
        """Return the first *count* bytes, fewer at the end, and keep them for reading."""
        while len(self._ahead) < count:
            data = self._source.read(count - len(self._ahead))
            if not data:
                break
            self._ahead += data
        return self._ahead

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if self._ahead:
            data, self._ahead = self._ahead[: len(buffer)], self._ahead[len(buffer) :]
        else:
            data = self._source.read(len(buffer)) or b""
        buffer[: len(data)] = data
        self._done += len(data)
        if self._progress is not None:
            self._progress(self._done, self._total)
        return len(data)


class _Checked:
    """A stream whose own errors are VolumeErrors, so that they are no errors of the file that is being made."""

    def __init__(self, stream: tarformat.Readable) -> None:
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        try:
            return self._stream.read(size)
        except (EOFError, ValueError, zlib.error, lzma.LZMAError, zstd.ZstdError, gzip.BadGzipFile) as exc:
            raise VolumeError(f"the archive is damaged: {exc}") from exc
        except OSError as exc:
            raise VolumeError(f"the archive can't be read: {exc.strerror or exc}") from exc


@contextlib.contextmanager
def _decompressor(raw: _Counted) -> Iterator[tarformat.Readable]:
    try:
        start = raw.peek(6)
    except OSError as exc:
        raise VolumeError(f"the archive can't be read: {exc.strerror or exc}") from exc
    buffered = io.BufferedReader(raw, 1 << 18)
    if start.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=buffered, mode="rb") as unzipped:
            yield unzipped
    elif start.startswith(b"\x28\xb5\x2f\xfd"):
        with zstd.ZstdFile(buffered, "rb") as unpacked:
            yield unpacked
    elif start.startswith(b"BZh"):
        with bz2.BZ2File(buffered, "rb") as unpacked_bz2:
            yield unpacked_bz2
    elif start.startswith(b"\xfd7zXZ\0"):
        with lzma.LZMAFile(buffered, "rb") as unpacked_xz:
            yield unpacked_xz
    else:
        yield buffered
