"""The work that is timed. Each workload is a shell script, run with the merged directory as its current one.

What a script makes lies under `new`. A workload with a cold and a warm *phase* runs the same script twice in one mount: first
after the kernel's caches were emptied, then again. `goal` is what this project wants to reach.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.compare import machine
from tests.compare.processes import Failed, run
from tests.compare.stage import Sizes, python

if TYPE_CHECKING:
    from tests.compare.stage import Site, Stage
    from tests.compare.subjects import Subject

COLD, WARM = "cold", "warm"
Pair = tuple[str, str]
"""The kinds of a subject and of another that it is held against."""
Goal = Mapping[Pair, float]

_OVERLAYFS, _FUSE_OVERLAYFS = ("unionfs", "overlayfs"), ("unionfs", "fuse-overlayfs")
NOT_SLOWER: Goal = {_FUSE_OVERLAYFS: 1.0, ("unionfs", "unionfs-fuse"): 1.0}
READ: Goal = {**NOT_SLOWER, _OVERLAYFS: 1.1}
WRITE: Goal = {**NOT_SLOWER, _OVERLAYFS: 1.15}
SMALL: Goal = {**NOT_SLOWER, _OVERLAYFS: 2.0, _FUSE_OVERLAYFS: 0.7}
COPY_UP: Goal = {**NOT_SLOWER, _OVERLAYFS: 0.5}
REQUEST: Goal = {_FUSE_OVERLAYFS: 1.3}
MOUNT_SECONDS = 0.4
BYTES_PER_INODE = 350e6 / 600_000
PROBE = Path(__file__).with_name("probe.py")
IMPORTING = Path(__file__).with_name("importing.py")
GIT = "git -c user.name=compare -c user.email=compare@localhost -c commit.gpgsign=false"


@dataclass(frozen=True)
class Sample:
    """One run of a workload on one subject, as a workload's `sample` sees it."""

    subject: Subject
    site: Site
    stage: Stage
    cold: bool
    """Whether caches can be emptied."""

    def shell(self, script: str) -> tuple[float, str]:
        """Run a shell script in the merged directory; wall-clock seconds and output. Raises Failed."""
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "LC_ALL": "C",
            "HOME": str(self.stage.base / "home"),
            "GIT_CONFIG_NOSYSTEM": "1",
            "SOURCE": str(self.stage.source),
            "PYTHON": python(),
        }
        return run(["sh", "-ec", script], cwd=self.subject.where(self.site), env=environment)


@dataclass(frozen=True)
class Workload:
    """See the head of the module.

    Attributes:
        parts: what of the lower layers, or of `source`, it needs.
        changes: the parts among them that it changes.
        goal: largest ratio of one subject to another that is wanted.
        limit: largest value of ours that is wanted, in the unit.
        unit: of the result: `s` seconds, `B` bytes.
        full: whether it takes so long that only --full or its name selects it.
        not_on: kinds of subject on which it makes no sense.
    """

    name: str
    title: str
    group: str
    parts: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    phases: tuple[str, ...] = ("",)
    goal: Goal = field(default_factory=dict)
    limit: float | None = None
    unit: str = "s"
    full: bool = False
    needs: tuple[str, ...] = ()
    """Programs that must be installed."""
    not_on: tuple[str, ...] = ()

    def applies(self, subject: Subject) -> bool:
        """Whether it makes sense for `subject`."""
        return subject.kind not in self.not_on

    def missing(self) -> str:
        """The reason why it can't be run on this machine; empty if it can."""
        missing = [program for program in self.needs if not shutil.which(program)]
        return f"{' and '.join(missing)} not installed" if missing else ""

    def sample(self, sample: Sample) -> dict[str, float]:
        """Mount, run, unmount; results by phase. Raises Failed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Script(Workload):
    """Work that a shell script does.

    Attributes:
        script: what is timed.
        prepare: what is done before; a sync follows it.
        check: what must succeed afterwards, so that nobody wins by failing quietly.
        uncached: whether the subject is mounted with its kernel caches off.
        parse: takes the seconds out of the script's output, where they are not its wall-clock time.
    """

    script: str = ""
    prepare: str = ""
    check: str = ""
    uncached: bool = False
    parse: Callable[[str], float] | None = None

    def sample(self, sample: Sample) -> dict[str, float]:
        subject, site = sample.subject, sample.site
        found: dict[str, float] = {}
        try:
            subject.mount(site, subject.uncached if self.uncached else ())
            if self.prepare:
                sample.shell(self.prepare)
            for phase in self.phases:
                machine.sync(site.base)
                if phase == COLD:
                    if not sample.cold:
                        sample.shell(self.script)
                        continue
                    machine.drop_caches()
                taken, output = sample.shell(self.script)
                found[phase] = self.parse(output) if self.parse else taken
            if self.check:
                sample.shell(self.check)
        finally:
            subject.unmount(site, spoilt=self.changes)
        return found


@dataclass(frozen=True)
class MountTime(Workload):
    """The time of the mount command, or of the unmount until the daemon has ended; its program is cached, as all others' are."""

    def applies(self, subject: Subject) -> bool:
        return subject.is_mount

    def sample(self, sample: Sample) -> dict[str, float]:
        try:
            sample.subject.mount(sample.site)
        finally:
            sample.subject.unmount(sample.site)
        start = time.perf_counter()
        try:
            sample.subject.mount(sample.site)
            mounted = time.perf_counter() - start
            sample.shell("test -e .")
        finally:
            unmounted = sample.subject.unmount(sample.site)
        return {"": mounted if self.name == "mount" else unmounted}


@dataclass(frozen=True)
class Memory(Workload):
    """The memory of the daemon (PSS, its share of what it shares) after a walk over many files; the kernel's is not in it."""

    def applies(self, subject: Subject) -> bool:
        return subject.has_daemon

    def sample(self, sample: Sample) -> dict[str, float]:
        try:
            sample.subject.mount(sample.site)
            sample.shell(f"test $(find walk -type f -printf '%s\\n' | wc -l) -eq {sample.stage.sizes.walk_inodes}")
            daemons = sample.subject.daemons(sample.site)
            if not daemons:
                raise Failed("its daemon was not found")
            return {"": sum(_pss(pid) for pid in daemons)}
        finally:
            sample.subject.unmount(sample.site)


def _pss(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return float(line.split()[1]) * 1024
    raise Failed("no Pss in smaps_rollup")


def last_number(output: str) -> float:
    """What the probe says that it took."""
    return float(output.rsplit(maxsplit=1)[-1])


def fio_seconds(output: str) -> float:
    """The run time that fio reports: that of its slowest job."""
    jobs = json.loads(output[output.index("{") :])["jobs"]
    return float(max(job[way]["runtime"] for job in jobs for way in ("read", "write"))) / 1000


def fio(path: str, pattern: str, *more: str) -> str:
    """A fio command of 4 KiB requests through the page cache, on a file that is there."""
    fixed = "--ioengine=psync --bs=4k --invalidate=0 --randrepeat=1 --allow_file_create=0 --output-format=json"
    return f"fio --name=compare --filename={path} --rw={pattern} {fixed} {' '.join(more)}"


def parallel(script: str, processes: int = 4) -> str:
    """`script` in several processes at once; `$N` is the number of each."""
    return f'pids=\nfor N in $(seq {processes}); do ( {script} ) & pids="$pids $!"; done\nfor pid in $pids; do wait $pid; done'


def workloads(sizes: Sizes) -> list[Workload]:
    """All workloads, in the order in which they are run and shown."""
    return [*_reading(sizes), *_writing(sizes), *_files(sizes), *_copy_up(sizes), *_parallel(sizes), *_daemon(sizes)]


FIND = "find tree -type f -printf '%s %m %p\\n' | tail -n 1"
GREP = "grep -r -F no-such-text-anywhere tree || test $? -eq 1"


def _reading(sizes: Sizes) -> list[Workload]:
    both = (COLD, WARM)
    read_all = f"test $(find tree -type f | wc -l) -eq {sizes.tree_files}"
    importing = f'$PYTHON -I -S -B -W ignore {IMPORTING} "$PWD/pylib"'
    reads = (f"--size={sizes.read_mib}m", f"--io_size={sizes.random_reads * 4}k")
    return [
        Script("find", "find and stat", "reading", ("tree",), (), both, READ, script=FIND, check=read_all),
        Script("grep", "grep -r", "reading", ("tree",), (), both, READ, script=GREP, check=read_all),
        Script("import", "Python imports", "reading", ("pylib",), (), both, READ, script=importing),
        Script(
            "read", "sequential read", "reading", ("read",), (), both, READ, script="dd if=read/data of=/dev/null bs=1M"
        ),
        Script(
            *("randread", "random read 4k", "reading", ("read",), (), (WARM,), READ),
            needs=("fio",),
            prepare="cat read/data >/dev/null",
            script=fio("read/data", "randread", *reads),
            parse=fio_seconds,
        ),
        Script("ls", "ls -f, many names", "reading", ("many",), (), both, READ, script="ls -f many | tail -n 1"),
        Script("ls-l", "ls -l, many names", "reading", ("many",), (), both, READ, script="ls -l many | tail -n 1"),
    ]


def _writing(sizes: Sizes) -> list[Workload]:
    write = f"mkdir new && dd if=/dev/zero of=new/data bs=1M count={sizes.write_mib}"
    written = f"test $(stat -c %s new/data) -eq {sizes.write_mib << 20}"
    rewrite = f"mkdir new && dd if=/dev/zero of=new/data bs=1M count={sizes.random_mib}"
    size = f"--size={sizes.random_mib}m"
    return [
        Script("write", "sequential write", "writing", goal=WRITE, script=write, check=written),
        Script(
            "write-fsync", "sequential write, fsync", "writing", goal=WRITE, script=f"{write} conv=fsync", check=written
        ),
        Script(
            *("randwrite", "random write 4k", "writing"),
            goal=WRITE,
            needs=("fio",),
            prepare=rewrite,
            script=fio("new/data", "randwrite", size, f"--io_size={sizes.random_writes * 4}k"),
            parse=fio_seconds,
        ),
        Script(
            *("randwrite-fsync", "random write 4k, fsync each 64", "writing"),
            goal=WRITE,
            needs=("fio",),
            prepare=rewrite,
            script=fio("new/data", "randwrite", size, f"--io_size={sizes.synced_writes * 4}k", "--fsync=64"),
            parse=fio_seconds,
        ),
        Script(
            *("sqlite", "SQLite commits", "writing"),
            goal=WRITE,
            prepare="mkdir new",
            script=f"$PYTHON -I {PROBE} sqlite new/database {sizes.commits}",
            parse=last_number,
        ),
    ]


def _files(sizes: Sizes) -> list[Workload]:
    warm = "cat $SOURCE/tree.tar >/dev/null"
    untar = "mkdir new && tar -x -f $SOURCE/tree.tar -C new"
    git = f"""
        mkdir new && cd new
        {GIT} clone -q $SOURCE/repository.git work && cd work
        find . -name '*.py' -not -path './.git/*' | sort | awk 'NR % 10 == 0' | while read name; do echo '#' >>$name; done
        {GIT} add -A && {GIT} commit -q -m change && {GIT} status --short
    """
    return [
        Script(
            *("tar", "tar x", "files", ("archive",)),
            goal=SMALL,
            prepare=warm,
            script=untar,
            check=f"test $(find new -type f | wc -l) -eq {sizes.tree_files}",
        ),
        Script(
            *("git", "git clone, commit, status", "files", ("repository",)),
            goal=SMALL,
            needs=("git",),
            prepare="find $SOURCE/repository.git -type f -exec cat {} + >/dev/null",
            script=git,
            check=f'cd new/work && {GIT} fsck --no-progress && test -z "$({GIT} status --short)"',
        ),
        Script(
            *("rm-new", "rm -r of new files", "files", ("archive",)),
            goal=SMALL,
            prepare=untar,
            script="rm -r new",
            check="test ! -e new",
        ),
        Script(
            *("rm-lower", "rm -r of lower files", "files", ("tree",), ("tree",)),
            goal=SMALL,
            prepare=FIND,
            script="rm -r tree",
            check='test ! -e tree && test -z "$(ls -d tr* 2>/dev/null)"',
        ),
    ]


def _copy_up(sizes: Sizes) -> list[Workload]:
    changed = f"test $(find tree -type f %s | wc -l) -eq {sizes.tree_files}"
    return [
        Script(
            *("chmod", "chmod -R of lower files", "copy-up", ("tree",), ("tree",)),
            goal=COPY_UP,
            prepare=FIND,
            script="chmod -R go-rwx tree",
            check=changed % "-perm 600",
        ),
        Script(
            *("chown", "chown -R of lower files", "copy-up", ("tree",), ("tree",)),
            goal=COPY_UP,
            prepare=FIND,
            script="chown -R 1:1 tree",
            check=changed % "-user 1 -group 1",
        ),
        Script(
            *("append", f"one byte appended to {sizes.huge_mib} MiB", "copy-up", ("huge",), ("huge",)),
            goal=COPY_UP,
            prepare="cat huge/data >/dev/null",
            script="printf x >>huge/data",
            check=f"test $(stat -c %s huge/data) -eq {(sizes.huge_mib << 20) + 1} && test $(tail -c 1 huge/data) = x",
        ),
    ]


def _parallel(sizes: Sizes) -> list[Workload]:
    reads = (f"--size={sizes.read_mib}m", f"--io_size={sizes.random_reads * 2}k", "--numjobs=4")
    files = 4 * sizes.tree_files
    return [
        Script(
            "find-4", "find and stat, 4 at once", "parallel", ("tree",), (), (COLD, WARM), READ, script=parallel(FIND)
        ),
        Script("grep-4", "grep -r, 4 at once", "parallel", ("tree",), (), (COLD, WARM), READ, script=parallel(GREP)),
        Script(
            *("randread-4", "random read 4k, 4 at once", "parallel", ("read",), (), (WARM,), READ),
            needs=("fio",),
            prepare="cat read/data >/dev/null",
            script=fio("read/data", "randread", *reads),
            parse=fio_seconds,
        ),
        Script(
            *("tar-4", "tar x, 4 at once", "parallel", ("archive",)),
            goal=SMALL,
            prepare="cat $SOURCE/tree.tar >/dev/null",
            script="mkdir new && cd new && mkdir 1 2 3 4\n" + parallel("tar -x -f $SOURCE/tree.tar -C $N"),
            check=f"test $(find new -type f | wc -l) -eq {files}",
        ),
    ]


def _daemon(sizes: Sizes) -> list[Workload]:
    probe = f"$PYTHON -I {PROBE}"
    return [
        MountTime("mount", "mount", "daemon", limit=MOUNT_SECONDS),
        MountTime("umount", "umount", "daemon"),
        Script(
            *("stat", "one stat, kernel caches off", "daemon", ("one",)),
            goal=REQUEST,
            uncached=True,
            script=f"{probe} stat one {sizes.stats}",
            parse=last_number,
        ),
        Script(
            *("fstat", "one fstat, kernel caches off", "daemon", ("one",)),
            goal=REQUEST,
            uncached=True,
            script=f"{probe} fstat one {sizes.stats}",
            parse=last_number,
        ),
        Memory(
            *("memory", f"daemon memory, {sizes.walk_inodes:,} files", "daemon", ("walk",)),
            limit=sizes.walk_inodes * BYTES_PER_INODE if sizes.walk_inodes >= 100_000 else None,
            unit="B",
            full=True,
        ),
    ]
