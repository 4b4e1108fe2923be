"""Real work: the same script in a union and beside it; what it says, and what it leaves, must be the same.

Beside it means in the kernel's overlayfs over equal layers; where the kernel has none, in a plain directory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from tests.host.host import REPOSITORY, Host, expect, has_file_system, kernel_version, load_module, need, overlay, shell
from tests.support.filesystems import FS_KINDS, FsKind, file_system
from tests.support.snapshot import assert_same, snapshot

QUIET_GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    **{f"GIT_{who}_{what}": "a@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    **{f"GIT_{who}_DATE": "2024-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")},
}


def first_union(host: Host, room: Path) -> str:
    """Layers, whiteout, copy-up, and what `ls` and `inspect` say; as the README's first minute."""
    base, merged = room / "base", room / "merged"
    base.mkdir()
    (base / "greeting").write_text("hello\n")
    (base / "gone").write_text("")
    with host.union(room, [base], "--name", "first"):
        expect((merged / "greeting").read_text(), "hello\n", "a lower file")
        (merged / "greeting").write_text("hello, world\n")
        (merged / "gone").unlink()
        (merged / "note").write_text("new\n")
        expect(sorted(path.name for path in merged.iterdir()), ["greeting", "note"], "the listing")
        expect(str(merged) in host.unionfs("ls", "--json"), True, "unionfs ls names the mount")
        expect('"mounted"' in host.unionfs("inspect", "first"), True, "unionfs inspect says mounted")
    expect((base / "greeting").read_text(), "hello\n", "the lower file afterwards")
    expect(sorted(path.name for path in (room / "upper").iterdir()), ["gone", "greeting", "note"], "upper")
    expect((room / "upper/gone").is_char_device(), True, "the whiteout is a device")
    host.unionfs("umount", "--rm", "first")
    return "mounted, changed, listed, unmounted"


def doctor(host: Host, room: Path) -> str:
    """`unionfs doctor` finds nothing bad, and what it finds limited is told. The native part was built."""
    lines = host.unionfs("doctor", room).splitlines()
    expect(any(line.endswith("native part: built") for line in lines), True, "the doctor finds the native part")
    return "; ".join(line.removeprefix("limited").strip() for line in lines if line.startswith("limited")) or "all good"


def _same_work(
    host: Host, room: Path, fill: Callable[[Path], object], script: str, *, env: dict[str, str] | None = None
) -> str:
    """Run a script in a union and beside it, over a lower that `fill` made; its output, which is the same."""
    said: dict[str, str] = {}
    trees = {}
    for name in ("union", "beside"):
        place = room / name
        (place / "lower").mkdir(parents=True)
        fill(place / "lower")
        with _mounted(host, place, ours=name == "union") as merged:
            said[name] = shell(script, cwd=merged, env=env)
            trees[name] = snapshot(merged, times=False)
    expect(said["union"], said["beside"], "what the programs said in the union, and beside it")
    assert_same(trees["union"], trees["beside"])
    return said["union"]


def _mounted(host: Host, place: Path, *, ours: bool) -> AbstractContextManager[Path]:
    if ours:
        return host.union(place, [place / "lower"])
    if has_file_system("overlay"):
        return overlay(place, [place / "lower"])
    return nullcontext(place / "lower")


def _source_tree(lower: Path) -> None:
    """This project's own sources, as everybody has them, and links of both kinds."""
    shell(
        f"tar -C '{REPOSITORY}' -c unionfs tests scripts --exclude=__pycache__ --exclude='*.so' | tar -x\n"
        "ln unionfs/__main__.py hard; ln -s unionfs/commands/cli.py soft",
        cwd=lower,
    )


def tar(host: Host, room: Path) -> str:
    """Pack, unpack, change and compare a tree of lower files, with owners, links and times."""
    need("tar", "find")
    script = """
        tar --numeric-owner -cf all.tar tests unionfs scripts hard soft
        mkdir new && tar -xpf all.tar -C new
        for name in tests unionfs scripts; do diff -r $name new/$name; done
        chmod -R g-w new/tests && chown -R 12:34 new/unionfs && mv new/tests new/moved && rm -r new/scripts
        mv tests elsewhere && rm -r unionfs/csrc && mkdir unionfs/csrc && echo again >unionfs/csrc/file
        rm all.tar  # it holds times
        find . -type f | sort | xargs md5sum | md5sum
        find . ! -type d | wc -l"""
    return f"{_same_work(host, room, _source_tree, script).split()[-1]} files"


def git(host: Host, room: Path) -> str:
    """A repository that lies in the lower layer: commit, branch, gc, clone and check it."""
    need("git")

    def repository(lower: Path) -> None:
        _source_tree(lower)
        shell("git init -q -b main . && git add -A && git commit -q -m first", cwd=lower, env=QUIET_GIT)

    script = """
        for name in unionfs/*.py; do echo '#' >>$name; done
        git add -A && git commit -q -m change && git checkout -q -b other HEAD~1 && git rm -q -r tests && git commit -q -m less
        git checkout -q main && git merge -q --no-edit -s ours other && git gc -q
        git clone -q . clone && git -C clone fsck --no-progress && rm -rf clone
        git fsck --no-progress && git status --short && git rev-parse HEAD && git ls-files | wc -l
        rm -rf .git"""  # the index holds inode numbers
    return f"commit {_same_work(host, room, repository, script, env=QUIET_GIT).split()[0][:12]}"


def compile_program(host: Host, room: Path) -> str:
    """`make` builds a program of many files in parallel, and again after a change."""
    need("make", "gcc")
    count = 12 if host.quick else 40

    def sources(lower: Path) -> None:
        for number in range(count):
            (lower / f"f{number}.c").write_text(f'#include "all.h"\nint f{number}(void) {{ return {number} + ONE; }}\n')
        (lower / "all.h").write_text("#define ONE 1\n" + "".join(f"int f{n}(void);\n" for n in range(count)))
        calls = " + ".join(f"f{number}()" for number in range(count))
        (lower / "main.c").write_text(
            f'#include <stdio.h>\n#include "all.h"\nint main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
        )
        (lower / "Makefile").write_text(
            "OBJECTS = $(patsubst %.c,%.o,$(wildcard *.c))\nprogram: $(OBJECTS)\n\tgcc -o $@ $^\n"
            "%.o: %.c all.h\n\tgcc -c -o $@ $<\nclean:\n\trm -f $(OBJECTS)\n"
        )

    script = """
        make -s -j 2 program && ./program
        sed -i 's/ONE 1/ONE 2/' all.h && make -s -j 2 program && ./program
        make -q program && make -s clean && ls | wc -l"""
    said = _same_work(host, room, sources, script).split()
    total = count * (count - 1) // 2
    expect(said, [str(total + count), str(total + 2 * count), str(count + 4)], "what the built programs say")
    return f"{count + 1} files, twice"


def sqlite(host: Host, room: Path) -> str:
    """A database in the lower layer: rollback and WAL journal, many commits, integrity."""
    need("sqlite3")
    rows = 50 if host.quick else 300
    fill = "create table t(a integer primary key, b text); insert into t values (1, 'lower');"
    each = f"seq {rows} | sed 's/.*/insert into t(b) values (hex(zeroblob(100)));/' | sqlite3 db"

    def database(lower: Path) -> None:
        shell(f'sqlite3 db "{fill}"', cwd=lower)

    script = f"""
        {each}
        sqlite3 db 'pragma journal_mode=wal' && {each}
        sqlite3 db 'pragma wal_checkpoint(truncate); pragma journal_mode=delete; vacuum; pragma integrity_check'
        sqlite3 db 'select count(*), sum(length(b)) from t'"""
    said = _same_work(host, room, database, script).split()
    expect(said[-1], f"{2 * rows + 1}|{2 * rows * 200 + 5}", "what is in the database")
    return f"{2 * rows} commits"


def large_file(host: Host, room: Path) -> str:
    """A big lower file: written in the middle while others read and map it, then read again by everyone."""
    size = 8 if host.quick else 64
    program = host.checks / "tests/host/bigfile.py"

    def big(lower: Path) -> None:
        with (lower / "big").open("wb") as file:
            for number in range(size):
                file.write(bytes([number % 251]) * (1 << 20))

    _same_work(host, room, big, f"'{host.python}' -I -B '{program}' big")
    return f"{size} MiB"


def on_file_systems(host: Host, room: Path) -> str:
    """Layers on each file system that this host can make: overlayfs must see the tree that the union showed."""
    reasons = {kind: _cannot_make(kind) for kind in FS_KINDS}
    for kind in FS_KINDS:
        if not reasons[kind]:
            with file_system(kind, room) as place:
                # The UUID of a tmpfs, which is part of what ties hard links together, is not told before Linux 6.9.
                _change_all(host, place, links=kind != "tmpfs" or kernel_version() >= (6, 9))
    done = [kind for kind, reason in reasons.items() if not reason]
    return ", ".join([*done, *(f"not {kind} ({reason})" for kind, reason in reasons.items() if reason)])


def _cannot_make(kind: FsKind) -> str:
    """Why this host can't make a file system of a kind in a file; empty if it can."""
    if not has_file_system(kind):
        return "not in this kernel"
    if kind == "tmpfs":
        return ""
    load_module("loop")
    if not Path("/dev/loop-control").exists():
        return "no loop devices"
    return "" if shutil.which(f"mkfs.{kind}") else f"mkfs.{kind} is not installed"


def _change_all(host: Host, place: Path, *, links: bool) -> None:
    (place / "lower").mkdir()
    _source_tree(place / "lower")
    with host.union(place, [place / "lower"]) as merged:
        shell("chmod -R o-r tests; rm -r scripts; mv unionfs other; echo x >>other/cli.py; rm hard", cwd=merged)
        found = snapshot(merged, links=links)
    if has_file_system("overlay"):
        with overlay(place, [place / "lower"]) as merged:
            assert_same(found, snapshot(merged, links=links))
