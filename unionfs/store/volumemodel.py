"""What a volume and a mount that uses volumes are, and which names and options a volume can have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from unionfs.errors import UsageError
from unionfs.volumespec import VOLUME_NAME, VolumeSpec

DRIVER: Final = "local"


@dataclass(frozen=True, slots=True)
class Volume:
    """One volume. `mountpoint` is its directory in the store; `path` is where the content is."""

    id: int
    name: str
    labels: dict[str, str]
    options: dict[str, str]
    anonymous: bool
    created_at: str
    mountpoint: str

    @property
    def device(self) -> str | None:
        """The user's own directory that holds the content, if there is one."""
        return self.options.get("device")

    @property
    def path(self) -> str:
        return self.device or self.mountpoint

    @property
    def read_only(self) -> bool:
        """Whether its options (`o=ro`) make every mount of it read-only."""
        return "ro" in self.options.get("o", "").split(",")

    def as_docker(self) -> dict[str, Any]:
        """Return the object that `docker volume inspect` prints."""
        return {
            "CreatedAt": self.created_at,
            "Driver": DRIVER,
            "Labels": self.labels,
            "Mountpoint": self.mountpoint,
            "Name": self.name,
            "Options": self.options,
            "Scope": "local",
        }


@dataclass(frozen=True, slots=True)
class MountRow:
    """A mount, running or remembered; `running` is (pid, start, pidns) of a daemon that lives.

    The anonymous volumes of `specs` have got their names, unless they were removed.
    """

    id: int
    name: str | None
    mountpoint: str
    running: tuple[int, int, int] | None
    created_at: str
    specs: list[VolumeSpec]

    def __str__(self) -> str:
        return f"{self.mountpoint} ({self.name})" if self.name else self.mountpoint


@dataclass(frozen=True, slots=True)
class Acquired:
    """A volume of a mount: `path` is the host's directory or file, `volume` None for a bind of a host path.

    With `fill` the volume is empty and is to get what the union has at the target: see `Store.begin_fill`.
    """

    spec: VolumeSpec
    volume: Volume | None
    path: str
    fill: bool


# --- what a volume can be -------------------------------------------------------------------------


def check_name(name: str) -> str:
    """Return `name` if it can be a volume's.

    Raises UsageError.
    """
    if len(name) < 2:
        raise UsageError(f"volume name {name!r} is too short: use at least two letters or digits")
    if not VOLUME_NAME.fullmatch(name) or len(name) > 255:
        raise UsageError(
            f"volume name {name!r} can't be used: begin with a letter or digit; then letters, digits, '_', '.', '-'"
        )
    return name


def parse_options(words: Sequence[str]) -> dict[str, str]:
    """Read `-o` of `volume create`: `type=none`, `o=bind`, `device=DIR`, each alone or several with commas.

    What follows a comma and begins with none of these keys belongs to the value before it.

    Raises UsageError.
    """
    options: dict[str, str] = {}
    for word in words:
        key = ""
        for part in word.split(","):
            name, equals, value = part.partition("=")
            if equals and name in ("type", "o", "device"):
                key = name
                options[key] = value
            elif key in ("o", "device"):
                options[key] += "," + part
            else:
                raise UsageError(f"-o {word}: {part!r} is unknown: use type=none, o=bind and device=DIR")
    return _checked(options)


def _checked(options: dict[str, str]) -> dict[str, str]:
    if (kind := options.get("type", "none")) not in ("none", "bind"):
        raise UsageError(f"-o type={kind} is not supported: mount it yourself and give -o type=none,device=DIR")
    for word in options.get("o", "bind").split(","):
        if word not in ("bind", "rbind", "rw", "ro"):
            raise UsageError(f"-o o={word}: use bind, rbind, rw or ro")
    device = options.get("device")
    if options and device is None:
        raise UsageError("-o: device=DIR is missing: it names the directory that holds the content")
    if device is not None:
        if not os.path.isabs(device):
            raise UsageError(f"-o device={device}: must be an absolute path")
        options["device"] = os.path.normpath(device)
    return options
