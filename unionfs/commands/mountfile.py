"""A whole mount in a file: what `unionfs mount --config FILE.toml` reads.

    lower = ["/srv/app", "/srv/base"]      # top first; or one string
    upper = "/srv/changes"                 # without: read-only
    mountpoint = "/mnt/work"
    name = "work"                          # optional, as all that follows
    work = "/srv/.changes.work"
    data = ["/srv/objects"]                # data-only lowers
    options = ["noatime", "timeout=1"]     # of -o
    bind-mode = "auto"
    volumes-from = ["other:ro"]
    auto-restart = false

    [[volume]]
    source = "/srv/data"                   # a host path, a volume's name, or nothing: an anonymous volume
    target = "/data"
    readonly = true
    nocopy = false

Paths that are not absolute start at the file's directory. A host path that is missing is refused
unless `create = true`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from unionfs.config import escape_lower
from unionfs.errors import UsageError
from unionfs.volumespec import VolumeSpec, from_fields

_TEXTS = ("upper", "mountpoint", "name", "work", "bind-mode")
_LISTS = ("lower", "data", "options", "volumes-from")


@dataclass(frozen=True, slots=True)
class MountFile:
    """What the file says; `positionals` and `options` are as they would stand on the command line."""

    positionals: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    work: str | None = None
    name: str | None = None
    bind_mode: str | None = None
    volumes: tuple[VolumeSpec, ...] = ()
    volumes_from: tuple[str, ...] = ()
    auto_restart: bool = False


def read_mount_file(path: str) -> MountFile:
    """Read a mount from a TOML file.

    Raises UsageError for a file that can't be read or says something that makes no sense.
    """
    import tomllib

    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: {error}") from None
    return _Reader(path, table).mount()


class _Reader:
    def __init__(self, path: str, table: dict[str, Any]) -> None:
        self._where = f"--config {path}"
        self._base = os.path.dirname(os.path.abspath(path))
        self._table = table
        unknown = set(table) - {*_TEXTS, *_LISTS, "auto-restart", "volume"}
        if unknown:
            raise UsageError(f"{self._where}: unknown key {min(unknown)!r}")

    def mount(self) -> MountFile:
        lowers = [self._path(word) for word in self._list("lower")]
        data = [self._path(word) for word in self._list("data")]
        upper, mountpoint = self._text("upper"), self._text("mountpoint")
        if not lowers or mountpoint is None:
            raise UsageError(f"{self._where}: give at least lower and mountpoint")
        layers = ":".join(map(escape_lower, lowers)) + "".join(f"::{escape_lower(word)}" for word in data)
        work = self._text("work")
        return MountFile(
            (layers, *([self._path(upper)] if upper else []), self._path(mountpoint)),
            tuple(self._list("options")),
            self._path(work) if work else None,
            self._text("name"),
            self._text("bind-mode"),
            tuple(self._volumes()),
            tuple(self._list("volumes-from")),
            self._bool("auto-restart"),
        )

    def _volumes(self) -> list[VolumeSpec]:
        tables = self._table.get("volume", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise UsageError(f"{self._where}: write each volume as a table [[volume]]")
        return [self._volume(dict(table), number) for number, table in enumerate(tables, 1)]

    def _volume(self, table: dict[str, Any], number: int) -> VolumeSpec:
        source = table.get("source", "")
        if isinstance(source, str) and (table.get("type") == "bind" or source.startswith((".", "/"))):
            table["source"] = self._path(source)
        return from_fields(table, f"{self._where}: volume {number}")

    def _text(self, name: str) -> str | None:
        value = self._table.get(name)
        if value is not None and (not isinstance(value, str) or not value):
            raise UsageError(f"{self._where}: {name} must be a text")
        return value

    def _bool(self, name: str) -> bool:
        value = self._table.get(name, False)
        if not isinstance(value, bool):
            raise UsageError(f"{self._where}: {name} must be true or false")
        return value

    def _list(self, name: str) -> list[str]:
        value = self._table.get(name, [])
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
            raise UsageError(f"{self._where}: {name} must be a text or a list of texts")
        return words

    def _path(self, path: str) -> str:
        return os.path.join(self._base, path)
