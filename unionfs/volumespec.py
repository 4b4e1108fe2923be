"""What a mount's volumes are asked to be: `VolumeSpec`, and how one is written.

Both notations are Docker's own. `-v [SRC:]DST[:OPTS]` is short and forgiving: a host path that is missing is made.
`--mount type=bind,source=SRC,target=DST,readonly` is explicit and refuses it. An absolute SRC is a host path, any other
word the name of a volume, and without SRC the volume is anonymous. DST is a path in the union.

This module looks at nothing but its arguments; whether a source exists is for whoever mounts it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unionfs.config import split_escaped
from unionfs.errors import UsageError

Kind = Literal["bind", "volume"]
BindMode = Literal["auto", "kernel", "fuse"]

VOLUME_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
PROPAGATIONS = ("private", "rprivate", "slave", "rslave", "shared", "rshared")

_WITHOUT_EFFECT = frozenset({"z", "Z"})
"""What Docker takes and what has no meaning here: SELinux labels."""

CONSISTENCIES = {"consistent": False, "default": False, "cached": True, "delegated": True}
"""Docker's words for how soon each side sees the other's changes, and which of them allow a delay."""


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """One volume of a mount.

    `source` is an absolute host path (kind bind), the name of a volume, or "" for an anonymous one. `target` is an
    absolute path in the union, normalized, never "/". `create` makes a host directory that is missing. `nocopy`
    keeps an empty volume from being filled with what the union has at the target. `cached` lets names and attributes
    that the host changes be seen up to a second late, where the daemon serves the volume.
    """

    kind: Kind
    source: str
    target: str
    read_only: bool = False
    nocopy: bool = False
    create: bool = False
    recursive: bool = True
    propagation: str = "rprivate"
    cached: bool = False

    def __str__(self) -> str:
        return f"{self.source}:{self.target}" if self.source else self.target


@dataclass(frozen=True, slots=True)
class MountVolumes:
    """All that a mount has to do with volumes: its own name, its volumes, how they are bound, and where the store is.

    `root` is the store's directory, None for the user's default.
    """

    name: str | None = None
    specs: tuple[VolumeSpec, ...] = ()
    bind_mode: BindMode = "auto"
    root: str | None = None


def parse_name(name: str) -> str:
    """Return the name of a mount if it is one: the same characters as for volumes.

    Raises UsageError.
    """
    if not VOLUME_NAME.fullmatch(name):
        raise UsageError(f"--name {name}: use two or more letters, digits, '_', '.', '-'")
    return name


def parse_volume(text: str) -> VolumeSpec:
    """Read the argument of `-v`: `[SRC:]DST[:OPTS]`; a colon in a name is written `\\:`.

    Raises UsageError.
    """
    parts = split_escaped(text, ":")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UsageError(f"-v {text}: write SOURCE:TARGET[:OPTIONS], or TARGET alone for an anonymous volume")
    if len(parts) == 1:
        return VolumeSpec("volume", "", _target(parts[0], text))
    source, target = parts[0], _target(parts[1], text)
    kind, source = _source(source, text)
    spec: dict[str, Any] = {"create": kind == "bind"}
    for option in parts[2].split(",") if len(parts) == 3 else ():
        _apply_short(spec, option, text)
    if spec.get("nocopy") and kind == "bind":
        raise UsageError(f"-v {text}: nocopy is for volumes, {source} is a host path")
    return VolumeSpec(kind, source, target, **spec)


def merge_volumes(first: Iterable[VolumeSpec], second: Iterable[VolumeSpec]) -> tuple[VolumeSpec, ...]:
    """Return `first` and what of `second` has another target: what a mount says itself wins over --volumes-from."""
    merged = list(first)
    targets = {spec.target for spec in merged}
    merged += [spec for spec in second if spec.target not in targets]
    return tuple(merged)


def _apply_short(spec: dict[str, Any], option: str, text: str) -> None:
    if option in ("ro", "rw"):
        spec["read_only"] = option == "ro"
    elif option == "nocopy":
        spec["nocopy"] = True
    elif option in PROPAGATIONS:
        spec["propagation"] = option
    elif option in CONSISTENCIES:
        spec["cached"] = CONSISTENCIES[option]
    elif option not in _WITHOUT_EFFECT:
        raise UsageError(
            f"-v {text}: unknown option {option!r}: use ro, rw, nocopy, cached, consistent or one of "
            f"{', '.join(PROPAGATIONS)}"
        )


def parse_mount_words(text: str) -> VolumeSpec:
    """Read the argument of `--mount`: `type=bind|volume,source=SRC,target=DST[,readonly]...`.

    Raises UsageError.
    """
    import csv

    fields: dict[str, str] = {}
    try:
        words = next(csv.reader([text]), [])
    except csv.Error as error:
        raise UsageError(f"--mount {text}: {error}") from None
    for word in words:
        name, equals, value = word.partition("=")
        name = _LONG_NAMES.get(name.strip().lower(), "")
        if not name:
            raise UsageError(f"--mount {text}: unknown key {word!r}: use {', '.join(sorted(_LONG_NAMES))}")
        fields[name] = value if equals else "true"
    return from_fields(fields, f"--mount {text}")


_LONG_NAMES = {
    "type": "type",
    "source": "source",
    "src": "source",
    "target": "target",
    "destination": "target",
    "dst": "target",
    "readonly": "readonly",
    "ro": "readonly",
    "volume-nocopy": "nocopy",
    "bind-propagation": "propagation",
    "bind-nonrecursive": "nonrecursive",
    "consistency": "consistency",
}


def from_fields(fields: Mapping[str, object], where: str, *, create: bool = False) -> VolumeSpec:
    """Build a volume from named fields: type, source, target, readonly, nocopy, propagation, nonrecursive, consistency.

    `where` begins the message of a UsageError; `create` is for a bind whose source may be missing.
    """
    unknown = set(fields) - {*_LONG_NAMES.values(), "create"}
    if unknown:
        raise UsageError(f"{where}: unknown key {min(unknown)!r}")
    source, target = fields.get("source", ""), fields.get("target")
    if not isinstance(source, str) or not isinstance(target, str) or not target:
        raise UsageError(f"{where}: give source= and target= as paths (without source: an anonymous volume)")
    kind = fields.get("type", "bind" if "type" not in fields and _is_path(source) else "volume")
    if kind == "tmpfs":
        raise UsageError(f"{where}: type=tmpfs is not supported: mount a tmpfs and bind that")
    if kind not in ("bind", "volume"):
        raise UsageError(f"{where}: type={kind}: use bind or volume")
    if kind == "bind":
        if not os.path.isabs(source):
            raise UsageError(f"{where}: a bind needs source= with an absolute path")
        source = _clean(source)
    elif source and not VOLUME_NAME.fullmatch(source):
        raise UsageError(
            f"{where}: {source!r} is no volume name: use letters, digits, '_', '.', '-' (a host path is type=bind)"
        )
    propagation = fields.get("propagation", "rprivate")
    if propagation not in PROPAGATIONS:
        raise UsageError(f"{where}: bind-propagation={propagation}: use one of {', '.join(PROPAGATIONS)}")
    consistency = fields.get("consistency", "default")
    if consistency not in CONSISTENCIES:
        raise UsageError(f"{where}: consistency={consistency}: use one of {', '.join(CONSISTENCIES)}")
    nocopy = _truth(fields, "nocopy", where)
    if nocopy and kind == "bind":
        raise UsageError(f"{where}: nocopy is for volumes, {source} is a host path")
    return VolumeSpec(
        kind,
        source,
        _target(target, where),
        read_only=_truth(fields, "readonly", where),
        nocopy=nocopy,
        create=create or _truth(fields, "create", where),
        recursive=not _truth(fields, "nonrecursive", where),
        propagation=str(propagation),
        cached=CONSISTENCIES[str(consistency)],
    )


def _truth(fields: Mapping[str, object], name: str, where: str) -> bool:
    value = fields.get(name, False)
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "1"):
        return True
    if str(value).lower() in ("false", "0"):
        return False
    raise UsageError(f"{where}: {name}={value}: use true or false")


def _clean(path: str) -> str:
    """Return an absolute path in its shortest form; normpath alone keeps two slashes at the start."""
    return os.path.normpath("/" + path.lstrip("/"))


def _is_path(source: str) -> bool:
    return source.startswith(("/", "./", "../")) or source in (".", "..")


def _source(source: str, text: str) -> tuple[Kind, str]:
    if _is_path(source):
        return "bind", _clean(os.path.abspath(source))
    if not VOLUME_NAME.fullmatch(source):
        raise UsageError(
            f"-v {text}: {source!r} is no absolute path and no volume name (letters, digits, '_', '.', '-')"
        )
    return "volume", source


def _target(target: str, text: str) -> str:
    if not os.path.isabs(target):
        raise UsageError(f"{text}: the target {target!r} must be an absolute path in the union")
    target = _clean(target)
    if target == "/":
        raise UsageError(f"{text}: the target can't be the root of the union")
    return target


def check_targets(specs: Iterable[VolumeSpec]) -> None:
    """Raise UsageError where two volumes have the same target."""
    seen: set[str] = set()
    for spec in specs:
        if spec.target in seen:
            raise UsageError(f"two volumes have the target {spec.target}: leave one out")
        seen.add(spec.target)
