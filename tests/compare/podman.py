"""Podman: the same images, containers and builds, with one mount program or another below podman's store, or the kernel's overlayfs.

Its subjects are stores: each sample has a new one, with an image in it that holds busybox and a package's files. What is timed is a
podman command from start to end. In it podman mounts a union for each container and each step of a build, and what it commits it
finds by comparing trees, unless the kernel's upper layer tells.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from tests.compare.processes import Failed, end, run, wait_gone
from tests.compare.stage import Site, Sizes
from tests.compare.subjects import END_SECONDS, FuseOverlayfs, Ours, Overlayfs, Subject, Unavailable, ask, clear, find
from tests.compare.workloads import Script, Workload

LAYERS = 10
ROOT = Path(__file__).resolve().parents[2]

# Podman takes at most 50 characters.
RUNROOT = Path(f"/run/unionfs-compare-{os.getpid()}")

# What works without systemd and where limits can't be raised; nothing here needs a network.
FIXED = "--runtime runc --cgroup-manager cgroupfs --events-backend none --storage-driver overlay"
RUN = "./podman run --network none --ulimit nofile=1024:1024 --ulimit nproc=1000:1000"

IMPORT = "./podman import -q $SOURCE/image.tar base"
# An update as a package manager does it: files that a lower layer has are replaced, then its database is written anew.
UPDATE = """
    set -e
    tar -x -f /source/tree.tar -C /usr/lib/package
    for N in $(seq 50); do echo $N >>/usr/lib/database; cp /usr/lib/database /usr/lib/new; mv /usr/lib/new /usr/lib/database; done
"""


class Store(Subject):
    """Podman: a store whose unions are kernel overlayfs."""

    kind = "podman-overlayfs"
    below: ClassVar[type[Subject]] = Overlayfs
    """Who makes the unions."""

    def version(self) -> str:
        if self.rootless:
            raise Unavailable(
                "not in a namespace made here; scripts/podman-check --rootless runs podman as an ordinary user"
            )
        unions = self.below(self.stage, (), rootless=False).version()
        return f"{ask(find('podman'), '--version').strip()}, {unions}"

    def command(self, site: Site, options: Sequence[str]) -> list[str]:
        """Podman itself, with the directories of its store."""
        places = ["--root", str(site.base / "root"), "--runroot", str(RUNROOT), "--tmpdir", str(RUNROOT / "tmp")]
        settings = [f"overlay.mount_program={program}"] if (program := self.program(site)) else []
        settings += [f"overlay.mountopt={','.join(options)}"] if options else []
        return ["podman", *places, *FIXED.split(), *(word for each in settings for word in ("--storage-opt", each))]

    def program(self, site: Site) -> str:
        """The mount_program; empty for none."""
        return ""

    def mount(self, site: Site, more: Sequence[str] = ()) -> None:
        """Make `podman` in the site, which workloads call."""
        _script(
            site.base / "podman", f'#!/bin/sh\nexec {shlex.join(self.command(site, (*self.options, *more)))} "$@"\n'
        )

    def where(self, site: Site) -> Path:
        return site.base

    def unmount(self, site: Site, *, spoilt: Sequence[str] = ()) -> float:
        """Remove the containers, and wait for the daemons of what podman has unmounted.

        A container that goes with its store would keep one of the locks that all of the machine's podman has.
        """
        with suppress(Failed):
            run([str(site.base / "podman"), "rm", "--all", "--force"], cwd=site.base, env=None, seconds=END_SECONDS)
        left = wait_gone(self.daemons(site), END_SECONDS)
        clear(RUNROOT)
        end(left)
        if left:
            raise Failed(f"podman left a daemon that had not ended after {END_SECONDS:.0f} s")
        return 0.0


class FuseOverlayfsStore(Store):
    """Podman: a store whose mount_program is fuse-overlayfs."""

    kind = "podman-fuse-overlayfs"
    below = FuseOverlayfs

    def program(self, site: Site) -> str:
        return find("fuse-overlayfs")


class OurStore(Store):
    """Podman: a store whose mount_program is unionfs-overlay."""

    kind = "podman-unionfs"
    below = Ours

    def program(self, site: Site) -> str:
        return str(site.base / "unionfs-overlay")

    def mount(self, site: Site, more: Sequence[str] = ()) -> None:
        """As pip makes it, for this checkout and the Python that runs the comparison."""
        lines = (
            "import sys",
            f"sys.path.insert(0, {str(ROOT)!r})",
            "from unionfs.__main__ import overlay",
            "overlay()",
        )
        _script(site.base / "unionfs-overlay", "\n".join((f"#!{sys.executable}", *lines, "")))
        super().mount(site, more)


STORES: tuple[type[Subject], ...] = (Store, FuseOverlayfsStore, OurStore)


def podman_workloads(_sizes: Sizes) -> list[Workload]:
    """What is done in each store."""
    in_container = f"-v $SOURCE:/source:ro base sh -c {shlex.quote(UPDATE)}"
    step = "RUN mkdir /new%s && cp /bin/busybox /new%s/program && echo %s >>/usr/lib/database && rm -f /new%s/none"
    context = f"""
        mkdir context && echo FROM base >context/Containerfile
        for N in $(seq {LAYERS}); do printf '{step}\\n' $N $N $N $N >>context/Containerfile; done
    """

    def each(name: str, title: str, prepare: str, script: str, check: str) -> Script:
        return Script(
            *(name, title, "podman", ("archive", "image")),
            needs=("podman", "runc", "busybox"),
            prepare=f"{IMPORT}\n{prepare}",
            script=script,
            check=check,
        )

    return [
        each(
            *("podman-run", "podman run, nothing to do", f"{RUN} --rm base true"),
            *(f"{RUN} --rm base true", 'test -z "$(./podman ps -a -q)"'),
        ),
        each(
            *("podman-build", f"podman build, {LAYERS} layers", context),
            "./podman build -q --isolation chroot --layers -t built context",
            f"test $({RUN} --rm built sh -c 'cat /usr/lib/database /new*/program' | wc -c) -gt 1000000",
        ),
        each(
            *("podman-update", "podman run, a package updated", f"{RUN} --rm base true"),
            *(f"{RUN} --name c {in_container}", "./podman diff c | grep -q '^C /usr/lib/database'"),
        ),
        each(
            *("podman-commit", "podman commit of that", f"{RUN} --name c {in_container}"),
            *("./podman commit -q c changed", f"test $({RUN} --rm changed tail -n 1 /usr/lib/database) = 50"),
        ),
    ]


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
