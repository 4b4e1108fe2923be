"""One of the two mounts that are compared, with its layers and the file systems under them.

A side owns a directory: ``l1/layer`` (top) to ``l3/layer`` are the lower layers, ``top/upper`` and ``top/work`` the writable
ones, ``merged`` the mount point. Which implementation serves it is decided at each mount, so that two sides can change places.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

LOWERS = ("l1", "l2", "l3")
OPTIONS = "redirect_dir=on,metacopy=on,index=on,xino=on"
_PROJECT = str(Path(__file__).resolve().parents[2])


class MountTrouble(Exception):
    """A mount or an unmount failed; the message is the tool's own."""


def _run(*argv: str, timeout: float = 60) -> None:
    """Run a command; MountTrouble with its output when it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, cwd=_PROJECT)
    if done.returncode:
        raise MountTrouble(f"{' '.join(argv)}: status {done.returncode}: {done.stderr or done.stdout}")


def _run_when_free(*argv: str) -> None:
    """Run a mount command; a mount namespace that somebody made meanwhile may hold the last mount for a while."""
    for attempt in range(240):
        try:
            _run(*argv)
            return
        except MountTrouble as trouble:
            if attempt == 239 or not any(word in str(trouble) for word in ("busy", "already mounted", "status 4")):
                raise
            time.sleep(1)


class Backing:
    """The file systems that hold one side's layers: tmpfs, or loop images of a disk file system.

    Arguments: ``root`` an empty directory; ``kind`` tmpfs, ext4, xfs or btrfs; ``split`` gives every lower layer its own
    file system, otherwise one holds everything.
    """

    def __init__(self, root: Path, kind: str, split: bool) -> None:
        self.root, self.kind = root, kind
        self.places = [root / "top", *(root / name for name in LOWERS)] if split else [root]
        self.images = root.with_name(root.name + ".images")

    def mount(self) -> None:
        """Make and mount what the layers live on; noatime, so that reading leaves no trace in either."""
        self.root.mkdir(parents=True, exist_ok=True)
        for number, place in enumerate(self.places):
            place.mkdir(exist_ok=True)
            if self.kind == "tmpfs":
                _run("mount", "-t", "tmpfs", "-o", "noatime,size=2g,mode=755", "tmpfs", str(place))
            else:
                self._mount_image(place, number)

    def _mount_image(self, place: Path, number: int) -> None:
        self.images.mkdir(exist_ok=True)
        image = self.images / f"{number}.img"
        with image.open("wb") as file:
            file.truncate(1 << 30)
        _run(f"mkfs.{self.kind}", *(["-q"] if self.kind != "btrfs" else ["-q", "-m", "single"]), str(image))
        _run("mount", "-o", "loop,noatime", str(image), str(place))

    def unmount(self) -> None:
        """Unmount everything, lazily, and remove the images."""
        for place in reversed(self.places):
            subprocess.run(["umount", "-l", str(place)], capture_output=True)
        shutil.rmtree(self.images, ignore_errors=True)


class Side:
    """A union mount over one set of layers."""

    def __init__(self, root: Path, name: str, options: str = "") -> None:
        self.root, self.name, self.options = root, name, options
        self.merged, self.upper, self.work = root / "merged", root / "top/upper", root / "top/work"
        self.log = root.with_name(f"{name}.log")
        self.serving: str | None = None
        self._log_read = 0

    def prepare(self) -> None:
        """Make the directories of the layers and the mount point."""
        for path in (*map(self.lower, LOWERS), self.upper, self.work, self.merged):
            path.mkdir(parents=True, exist_ok=True)

    def wipe(self) -> None:
        """Empty upper and work, while nothing is mounted."""
        for path in (self.upper, self.work):
            shutil.rmtree(path)
            path.mkdir()

    def lower(self, name: str) -> Path:
        """Directory of the lower layer ``name``."""
        return self.root / name / "layer"

    def mount(self, implementation: str) -> None:
        """Mount with ``implementation``: kernel, ours or fuse-overlayfs.

        MountTrouble: it refused.
        """
        lowers = ":".join(str(self.lower(name)) for name in LOWERS)
        layers = f"lowerdir={lowers},upperdir={self.upper},workdir={self.work}"
        if implementation == "kernel":
            _run_when_free("mount", "-t", "overlay", "-o", f"noatime,{layers},{OPTIONS}", "overlay", str(self.merged))
        elif implementation == "ours":
            more = os.environ.get("UNIONFS_FUZZ_OPTIONS", "")
            options = ",".join(filter(None, ("noatime", OPTIONS, self.options, more)))
            extra = ("--work", str(self.work), "--log-file", str(self.log))
            command = (sys.executable, "-m", "unionfs", "mount", "-o", options, *extra)
            _run_when_free(*command, lowers, str(self.upper), str(self.merged))
        else:
            _run("/usr/bin/fuse-overlayfs", "-o", f"noatime,allow_other,{layers}", str(self.merged))
        self.serving = implementation

    def unmount(self) -> None:
        """Unmount and wait until upper and work are free again."""
        if self.serving is None:
            return
        if self.serving == "ours":
            _run(sys.executable, "-m", "unionfs", "umount", str(self.merged))
        else:
            _run("umount", str(self.merged))
            if self.serving == "fuse-overlayfs":
                time.sleep(0.2)
        self.serving = None

    def abort(self) -> None:
        """Give up a mount that hangs or is dead: requests under way fail, the mount point is free."""
        subprocess.run(["umount", "-f", "-l", str(self.merged)], capture_output=True)
        self.serving = None

    def complaints(self) -> str:
        """Lines of the daemon's log since the last call that tell of an error."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(self._log_read)
            text = file.read().decode(errors="replace")
            self._log_read = file.tell()
        bad = ("ERROR", "CRITICAL", "WARNING", "Traceback")
        return text if any(word in text for word in bad) else ""

    def path_of(self, layer: str, name: str) -> bytes:
        """Path of subtree ``name`` in "merged", "upper" or a lower layer."""
        base = {"merged": self.merged, "upper": self.upper}.get(layer) or self.lower(layer)
        return os.fsencode(base / name)

    def wipe_when_free(self) -> None:
        """``wipe`` after ``abort``, once a daemon that still ends has let go of the layers."""
        time.sleep(1)
        self.wipe()
