"""What `unionfs inspect` shows of a mount that runs, or of one that is only remembered."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

from unionfs.errors import UsageError, VolumeError
from unionfs.host import control
from unionfs.host.control import Entry

if TYPE_CHECKING:
    from unionfs.store.volumes import MountRow


def inspect_mount(word: str, store: str | None) -> dict[str, Any]:
    """Return all that is known of a mount.

    Args:
        word: its mount point or name.
        store: the volume store's directory, None for the default.

    Raises:
        UsageError: nothing is known of it.
    """
    path = os.path.realpath(os.path.dirname(os.path.abspath(word)))
    path = os.path.join(path, os.path.basename(os.path.abspath(word)))
    entries = [entry for entry in control.entries() if entry.record is not None or entry.mountpoint == path]
    for entry in entries:
        if entry.mountpoint == path or (entry.record is not None and entry.record.name == word):
            return _running(entry)
    row = _remembered(word, path, store)
    if row is None:
        raise UsageError(f"no mount {word}: 'unionfs ls' shows what is mounted")
    return _not_running(row)


def _running(entry: Entry) -> dict[str, Any]:
    record = entry.record
    if record is None:
        return {"Mountpoint": entry.mountpoint, "State": entry.state.value}
    return {
        "Name": record.name,
        "Mountpoint": entry.mountpoint,
        "State": entry.state.value,
        "Pid": record.pid,
        "MountedAt": _moment(record.mounted_at),
        "Lowers": record.lowers,
        "DataLowers": record.data_lowers,
        "Upper": record.upper,
        "Work": record.work,
        "Options": record.options,
        "Mounts": [{key: value for key, value in volume.items() if key != "MountId"} for volume in record.volumes],
        "Store": record.store,
        "LogPath": record.log,
        "Version": record.version,
    }


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _remembered(word: str, path: str, store: str | None) -> MountRow | None:
    from unionfs.store.volumes import Store

    opened = Store.open(store)
    for name in (word, path):
        with contextlib.suppress(VolumeError):
            return opened.find_mount(name)
    return None


def _not_running(row: MountRow) -> dict[str, Any]:
    return {
        "Name": row.name,
        "Mountpoint": row.mountpoint,
        "State": "unmounted",
        "Mounts": [
            {
                "Type": spec.kind,
                **({"Name": spec.source, "Driver": "local"} if spec.kind == "volume" else {"Source": spec.source}),
                "Destination": spec.target,
                "Mode": "ro" if spec.read_only else "",
                "RW": not spec.read_only,
            }
            for spec in row.specs
        ],
    }
