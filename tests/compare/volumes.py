"""Volumes: the same work on a directory of the host, on that directory bound into a union, and in the union itself.

Its subjects are places, its workloads run there. A place holds the same at first: a file `data`, and the files of an archive in
`tree`; on the lower layer, where each change is a copy-up, they lie there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.compare.processes import Failed, last_line, run
from tests.compare.stage import Site, Sizes
from tests.compare.subjects import Ours, Subject
from tests.compare.workloads import PROBE, Goal, Script, Workload, fio, fio_seconds, last_number

NEW: Goal = {("bind-kernel", "host"): 1.0, ("bind-fuse", "upper"): 1.0, ("bind-cached", "upper"): 1.0}
CHANGE: Goal = {**NEW, ("bind-fuse", "copy-up"): 0.5, ("bind-cached", "copy-up"): 0.5}


class Host(Subject):
    """Volumes: a directory of the host itself."""

    kind = "host"
    is_mount = False
    has_daemon = False

    def version(self) -> str:
        return "a directory of the host"

    def command(self, site: Site, options: Sequence[str]) -> list[str]:
        return []

    def mount(self, site: Site, more: Sequence[str] = ()) -> None:
        self.where(site).mkdir()

    def unmount(self, site: Site, *, spoilt: Sequence[str] = ()) -> float:
        return 0.0

    def where(self, site: Site) -> Path:
        return site.base / "host"


class InUpper(Ours):
    """Volumes: a new directory in the union's upper layer."""

    kind = "upper"

    def mount(self, site: Site, more: Sequence[str] = ()) -> None:
        super().mount(site, more)
        self.where(site).mkdir()

    def where(self, site: Site) -> Path:
        return site.merged / "new"


class CopyUp(Ours):
    """Volumes: a directory of the union's lower layer."""

    kind = "copy-up"

    def where(self, site: Site) -> Path:
        return site.merged / "volume"


class BindKernel(Ours):
    """Volumes: a host directory bound into the union by the kernel."""

    kind = "bind-kernel"
    mode = "kernel"
    consistency = "consistent"

    def command(self, site: Site, options: Sequence[str]) -> list[str]:
        command = super().command(site, options)
        after = command.index("mount") + 1
        bind = ("--bind-mode", self.mode, "-v", f"{site.base / 'host'}:/bound:{self.consistency}")
        return [*command[:after], *bind, *command[after:]]

    def mount(self, site: Site, more: Sequence[str] = ()) -> None:
        (site.base / "host").mkdir()
        super().mount(site, more)

    def unmount(self, site: Site, *, spoilt: Sequence[str] = ()) -> float:
        try:
            taken, _ = run(self.unionfs("umount", "--rm", str(site.merged)), cwd=site.base, env=None, seconds=60)
        except Failed as failed:
            raise Failed(f"umount: {last_line(str(failed))}") from None
        return taken

    def where(self, site: Site) -> Path:
        return site.merged / "bound"


class BindFuse(BindKernel):
    """Volumes: a host directory in the union, served by the daemon."""

    kind = "bind-fuse"
    mode = "fuse"


class BindCached(BindFuse):
    """Volumes: the same, and the kernel may keep names and attributes for a second."""

    kind = "bind-cached"
    consistency = "cached"


PLACES: tuple[type[Subject], ...] = (Host, BindKernel, BindFuse, BindCached, InUpper, CopyUp)


def volume_workloads(sizes: Sizes) -> list[Workload]:
    """What is done in each place."""
    data = f"test -e data || dd if=/dev/zero of=data bs=1M count={sizes.random_mib}"
    size = f"--size={sizes.random_mib}m"
    whole = f"test $(stat -c %s data) -eq {sizes.random_mib << 20}"
    tree = "test -e tree || { mkdir tree && tar -x -f $SOURCE/tree.tar -C tree; }"
    files = f"test $(find tree -type f | wc -l) -eq {sizes.tree_files}"

    # fio doesn't count the time of its open, but that is when a file may be copied up: the script opens it first.
    opening = "start=$(date +%s%N); : >>data; end=$(date +%s%N); echo $((end - start)); "

    def by_fio(name: str, title: str, pattern: str, goal: Goal, *more: str) -> Script:
        return Script(
            *(name, title, "volumes", ("volume",)),
            goal=goal,
            needs=("fio",),
            prepare=f"{data}\ncat data >/dev/null",
            script=("" if goal is NEW else opening) + fio("data", pattern, size, *more),
            parse=fio_seconds if goal is NEW else _opening_seconds,
            check=whole,
        )

    return [
        by_fio("volume-read", "volume: sequential read", "read", NEW, "--bs=1M", "--loops=4"),
        by_fio("volume-randread", "volume: random read 4k", "randread", NEW, f"--io_size={sizes.random_reads * 4}k"),
        by_fio("volume-write", "volume: sequential write", "write", CHANGE, "--bs=1M"),
        by_fio(
            "volume-randwrite", "volume: random write 4k", "randwrite", CHANGE, f"--io_size={sizes.random_writes * 4}k"
        ),
        Script(
            *("volume-tar", "volume: tar x", "volumes", ("archive",)),
            goal=NEW,
            not_on=(CopyUp.kind,),
            prepare="mkdir tree",
            script="tar -x -f $SOURCE/tree.tar -C tree",
            check=files,
        ),
        Script(
            *("volume-tar-over", "volume: tar x over the same files", "volumes", ("volume", "archive")),
            goal=CHANGE,
            prepare=tree,
            script="tar -x --overwrite -f $SOURCE/tree.tar -C tree",
            check=files,
        ),
        Script(
            *("volume-append", "volume: append to each file", "volumes", ("volume", "archive")),
            goal=CHANGE,
            prepare=tree,
            script=f"$PYTHON -I {PROBE} append tree",
            parse=last_number,
            check=files,
        ),
    ]


def _opening_seconds(output: str) -> float:
    """The time of the script's own open, and that of fio."""
    return int(output.split(maxsplit=1)[0]) / 1e9 + fio_seconds(output)
