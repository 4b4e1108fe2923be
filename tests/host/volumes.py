"""Volumes: host directories and named volumes in a union, served by the kernel and by the daemon."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path

from tests.host.host import Host, expect, shell

MODES = ("kernel", "fuse")


def binds(host: Host, room: Path) -> str:
    """A host directory and a read-only file, in both modes: each side sees at once what the other does."""
    for mode in MODES:
        place = room / mode
        _lower(place)
        (place / "data").mkdir()
        (place / "config").write_text("one\n")
        words = ["-v", f"{place / 'data'}:/app/data", "-v", f"{place / 'config'}:/config:ro", "--bind-mode", mode]
        with host.union(place, [place / "lower"], *words) as merged:
            (merged / "app/data/new").write_text("from inside")
            expect((place / "data/new").read_text(), "from inside", f"{mode}: what the host sees")
            (place / "data/new").write_text("from the host")
            expect((merged / "app/data/new").read_text(), "from the host", f"{mode}: what the union sees")
            expect(_refusal(merged / "config"), errno.EROFS, f"{mode}: writing to a read-only file")
            shell("cd app/data && mkdir -p a/b && echo x >a/b/c && mv a z && ln z/b/c hard && rm -r z", cwd=merged)
            modes = [mount["BindMode"] for mount in _inspect(host, merged)["Mounts"]]
            expect(modes, [mode, mode], "who serves them")
        expect(
            sorted(path.name for path in (place / "data").iterdir()),
            ["hard", "new"],
            f"{mode}: the directory afterwards",
        )
        expect((place / "upper/app/data/new").exists(), False, f"{mode}: upper holds the volume's data")
    return "in both modes"


def named(host: Host, room: Path) -> str:
    """A named volume is filled from the union, shared with a second one, backed up and restored."""
    _lower(room)
    with host.union(room, [room / "lower"], "--name", "web", "-v", "integration:/app") as merged:
        expect((merged / "app/program").read_text(), "from the image", "a new volume is filled")
        (merged / "app/state").write_text("kept")
        _lower(room / "second")
        with host.union(room / "second", [room / "second/lower"], "--volumes-from", "web:ro") as other:
            expect((other / "app/state").read_text(), "kept", "--volumes-from")
            expect(_refusal(other / "app/state"), errno.EROFS, "writing to a volume that is shared read-only")
    archive = room / "backup.tar.gz"
    host.unionfs("volume", "backup", "integration", archive)
    host.unionfs("volume", "restore", "again", archive)
    expect("state" in shell("tar tzf backup.tar.gz", cwd=room), True, "tar finds the file in the backup")
    restored = Path(json.loads(host.unionfs("volume", "inspect", "again"))[0]["Mountpoint"])
    expect((restored / "state").read_text(), "kept", "the restored volume")
    host.unionfs("umount", "--rm", "-v", "web")
    host.unionfs("volume", "rm", "integration", "again")
    expect(json.loads(host.unionfs("volume", "ls", "--json")), [], "volumes left")
    return "filled, shared, backed up, restored, removed"


def _lower(place: Path) -> None:
    (place / "lower/app").mkdir(parents=True)
    (place / "lower/app/program").write_text("from the image")


def _refusal(path: Path) -> int | None:
    """The errno with which a file can't be written to; None if it can."""
    try:
        with path.open("a") as file:
            file.write("x")
    except OSError as error:
        return error.errno
    return None


def _inspect(host: Host, merged: Path) -> dict[str, Sequence[dict[str, object]]]:
    found: dict[str, Sequence[dict[str, object]]] = json.loads(host.unionfs("inspect", merged))[0]
    return found
