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
from tests.compare.workloads import Goal, Script, Workload, fio, fio_seconds

READ: Goal = {("bind-kernel", "host"): 1.0, ("bind-fuse", "upper"): 1.0}
WRITE: Goal = {**READ, ("bind-fuse", "copy-up"): 0.5}


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

    def command(self, site: Site, options: Sequence[str]) -> list[str]:
        command, mode = super().command(site, options), self.kind.removeprefix("bind-")
        after = command.index("mount") + 1
        return [*command[:after], "--bind-mode", mode, "-v", f"{site.base / 'host'}:/bound", *command[after:]]

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


PLACES: tuple[type[Subject], ...] = (Host, BindKernel, BindFuse, InUpper, CopyUp)


def volume_workloads(sizes: Sizes) -> list[Workload]:
    """What is done in each place."""
    data = f"test -e data || dd if=/dev/zero of=data bs=1M count={sizes.random_mib}"
    size = f"--size={sizes.random_mib}m"
    whole = f"test $(stat -c %s data) -eq {sizes.random_mib << 20}"
    tree = "test -e tree || { mkdir tree && tar -x -f $SOURCE/tree.tar -C tree; }"

    # fio doesn't count the time of its open, but that is when a file may be copied up: the script opens it first.
    opening = "start=$(date +%s%N); : >>data; end=$(date +%s%N); echo $((end - start)); "

    def by_fio(name: str, title: str, pattern: str, goal: Goal, *more: str) -> Script:
        return Script(
            *(name, title, "volumes", ("volume",)),
            goal=goal,
            needs=("fio",),
            prepare=f"{data}\ncat data >/dev/null",
            script=("" if goal is READ else opening) + fio("data", pattern, size, *more),
            parse=fio_seconds if goal is READ else _opening_seconds,
            check=whole,
        )

    return [
        by_fio("volume-read", "volume: sequential read", "read", READ, "--bs=1M", "--loops=4"),
        by_fio("volume-randread", "volume: random read 4k", "randread", READ, f"--io_size={sizes.random_reads * 4}k"),
        by_fio("volume-write", "volume: sequential write", "write", WRITE, "--bs=1M"),
        by_fio(
            "volume-randwrite", "volume: random write 4k", "randwrite", WRITE, f"--io_size={sizes.random_writes * 4}k"
        ),
        Script(
            *("volume-tar", "volume: tar x", "volumes", ("volume", "archive")),
            goal=WRITE,
            prepare=tree,
            script="tar -x --overwrite -f $SOURCE/tree.tar -C tree",
            check=f"test $(find tree -type f | wc -l) -eq {sizes.tree_files}",
        ),
    ]


def _opening_seconds(output: str) -> float:
    """The time of the script's own open, and that of fio."""
    return int(output.split(maxsplit=1)[0]) / 1e9 + fio_seconds(output)
