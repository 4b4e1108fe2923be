"""File systems to put layers on: one made in an image file by mkfs and mounted by loop, or a tmpfs."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args

from tests.support import raw

FsKind = Literal["ext4", "xfs", "btrfs", "tmpfs"]
FS_KINDS: tuple[FsKind, ...] = get_args(FsKind)

_MKFS: dict[str, list[str]] = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-O", "^has_journal"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


@contextmanager
def file_system(kind: FsKind, where: Path, *, size: str = "1G", name: str = "") -> Iterator[Path]:
    """A fresh file system of `kind` and `size` mounted below `where`; unmounted and removed at the end.

    Images are sparse: they take the room that is written to them.
    """
    target = where / f"fs-{kind}{name}"
    target.mkdir()
    image = where / f"fs-{kind}{name}.img"
    if kind == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(target))
    else:
        run("truncate", "-s", size, str(image))
        run(*_MKFS[kind], str(image))
        run("mount", "-o", "loop", str(image), str(target))
    try:
        os.chmod(target, 0o755)
        yield target
    finally:
        run("umount", str(target))
        target.rmdir()
        image.unlink(missing_ok=True)


def run(*command: str, timeout: float = 120) -> str:
    """Run a tool; its output, or an AssertionError that shows what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def have_own_mounts() -> None:
    """Give this process a mount namespace that is only its own: no other may keep alive what is unmounted here."""
    raw.unshare(raw.CLONE_NEWNS)
    run("mount", "--make-rprivate", "/")


def takes_layers(directory: Path) -> bool:
    """Whether overlay layers can lie in `directory`: on a disk, with trusted xattrs, not itself an overlay."""
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", str(directory)], capture_output=True, text=True, check=False
    ).stdout.strip()
    if kind in {"tmpfs", "ramfs", "overlayfs", "fuseblk", "fuse", ""}:
        return False
    with suppress(OSError), tempfile.TemporaryDirectory(dir=directory) as probe:
        os.setxattr(probe, "trusted.overlay.probe", b"")
        return True
    return False


@contextmanager
def disk_ground() -> Iterator[Path]:
    """A directory on a real disk file system for one test session; an ext4 image stands in where none is found.

    UNIONFS_TEST_DIR names another parent directory than /var/tmp or /tmp.
    """
    wanted = [os.environ.get("UNIONFS_TEST_DIR", ""), "/var/tmp", "/tmp", os.getcwd()]
    for parent in (Path(name) for name in wanted if name):
        if takes_layers(parent):
            base = Path(tempfile.mkdtemp(prefix="ufst-", dir=parent))
            base.chmod(0o755)
            try:
                yield base
            finally:
                base.rmdir()
            return
    base = Path(tempfile.mkdtemp(prefix="ufst-"))
    base.chmod(0o755)
    with file_system("ext4", base, size="16G") as disk:
        yield disk
    base.rmdir()


def remove_tree(path: Path) -> None:
    """Remove a tree of any depth, whiteouts included; rm(1) knows how."""
    run("rm", "-rf", "--one-file-system", "--", str(path))
