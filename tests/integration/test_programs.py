"""tar, diff, git, pip and sqlite in the mount: everything they make must be as on the bare file system."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest

from tests.integration.conftest import Places, PlacesMaker
from tests.support.filesystems import FS_KINDS, FsKind
from tests.support.snapshot import assert_same, snapshot

GIT_ENVIRONMENT = {
    **os.environ,
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org",
    "GIT_AUTHOR_DATE": "2024-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2024-01-01T00:00:00Z",
}
LARGE = 2500
SMALL = 400


def run(command: str, cwd: Path, *, env: dict[str, str] | None = None) -> str:
    """Run a shell command; its output, or an AssertionError that shows it."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{command}\nexit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def source_tree(target: Path, limit: int = LARGE) -> None:
    """Copy up to `limit` files of the system's own, links and all, into `target`/tree."""
    source = sysconfig.get_path("stdlib")
    (target / "tree").mkdir()
    # A bounded part: whole tar streams cut off at a file would not unpack without an error.
    listing = f"find . -mindepth 1 \\( -type f -o -type l \\) -size -200k | sort | sed -n '1,{limit}p'"
    run(
        f"({listing}) > {target}/list; tar -c -T {target}/list | tar -x -C {target}/tree; rm {target}/list",
        Path(source),
    )


def digest_of_tar(directory: Path) -> str:
    """The digest of a tar archive of all that is below, in a fixed order."""
    process = subprocess.Popen(
        ["tar", "--sort=name", "--xattrs", "--acls", "-c", "."], cwd=directory, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout:
        found = hashlib.file_digest(process.stdout, "sha256").hexdigest()  # type: ignore[arg-type]
    assert process.wait() == 0
    return found


@pytest.mark.parametrize("upper_on", FS_KINDS)
@pytest.mark.fault_seconds(240)
def test_tar_and_diff_of_a_large_tree(places: PlacesMaker, upper_on: FsKind) -> None:
    place = places(upper_on, source_tree)
    lower = place.stack.lower / "tree"
    assert digest_of_tar(place.union / "tree") == digest_of_tar(lower)
    run("mkdir copy && tar -c -C tree . | tar -x -C copy", place.union)
    run("diff -r --no-dereference tree copy", place.union)
    run(f"diff -r --no-dereference copy {lower}", place.union)
    for _, where in place.both():
        run(
            """
            cd tree
            find . -type f -name '*.py' | sort | sed -n '1,300p' | xargs -d '\\n' chmod 600
            find . -type f | sort | sed -n '1~7p' | xargs -d '\\n' rm -f
            find . -type f | sort | sed -n '1~11p' | while IFS= read -r name; do echo more >> "$name"; done
            find . -mindepth 1 -maxdepth 1 -type d | sort | sed -n '2~3p' | while IFS= read -r name; do mv "$name" "$name.moved"; done
            find . -mindepth 1 -maxdepth 1 -type d | sort | sed -n '3~4p' | xargs -d '\\n' rm -rf
            """,
            where,
        )
    want = snapshot(place.bare / "tree", times=False)
    assert_same(want, snapshot(place.union / "tree", times=False))
    place.stack.remount()
    assert_same(want, snapshot(place.union / "tree", times=False))
    run("rm -rf tree copy", place.union)
    assert os.listdir(place.union) == []


def git_work(where: Path) -> str:
    """init, commit, clone, branch, merge, gc, fsck; what identifies the result."""
    return run(
        """
        git init -q -b main repo
        cp -a tree repo/tree
        cd repo
        git add -A
        git commit -qm first
        git mv tree moved
        rm -rf moved/[a-c]*
        git add -A
        git commit -qm second
        git checkout -qb side HEAD~1
        echo side > side.txt
        git add side.txt
        git commit -qm third
        git merge -qm merged main
        git gc -q --prune=now
        git fsck --strict
        git status --porcelain
        cd ..
        git clone -q repo clone
        git clone -q --no-hardlinks file://$PWD/repo far
        git -C clone fsck
        git -C far rev-parse HEAD^{tree}
        git -C clone rev-parse HEAD^{tree}
        git -C repo log --format=%T
        git -C repo worktree add -q ../second HEAD~1
        git -C second status --porcelain
        """,
        where,
        env=GIT_ENVIRONMENT,
    )


@pytest.mark.parametrize("upper_on", FS_KINDS)
@pytest.mark.fault_seconds(240)
def test_git_from_init_to_gc(places: PlacesMaker, upper_on: FsKind) -> None:
    place = places(upper_on, lambda target: source_tree(target, SMALL))
    results = {name: git_work(where) for name, where in place.both()}
    assert results["union"] == results["bare"]


def test_git_in_a_repository_of_the_lower(places: PlacesMaker) -> None:
    """Work on top of a repository that lies below: packs, index and refs are copied up as needed."""

    def fill(target: Path) -> None:
        source_tree(target, SMALL)
        run("git init -q -b main . && git add -A && git commit -qm below && git gc -q", target, env=GIT_ENVIRONMENT)

    place = places("ext4", fill)
    results = {
        name: run(
            """
            git status --porcelain
            find tree -name '*.py' | sort | sed -n '1,100p' | while IFS= read -r name; do echo '# more' >> "$name"; done
            git commit -qam changed
            git mv tree elsewhere
            git commit -qm moved
            git stash list
            git checkout -q HEAD~2
            git checkout -q main
            git repack -adq
            git gc -q --prune=now
            git fsck
            git status --porcelain
            git rev-parse HEAD^{tree}
            """,
            where,
            env=GIT_ENVIRONMENT,
        )
        for name, where in place.both()
    }
    assert results["union"] == results["bare"]
    place.stack.remount()
    assert run("git status --porcelain && git fsck", place.union, env=GIT_ENVIRONMENT) == ""


def make_wheel(where: Path, version: str) -> Path:
    """A small wheel made by hand, so that no index is needed."""
    wheel = where / f"ufst_sample-{version}-py3-none-any.whl"
    info = f"ufst_sample-{version}.dist-info"
    files = {
        "ufst_sample/__init__.py": f"version = {version!r}\n",
        f"ufst_sample/only_{version.replace('.', '_')}.py": "x = 1\n",
        "ufst_sample/__main__.py": "from ufst_sample import version\ndef main():\n    print(version)\nmain()\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: ufst-sample\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files |= {f"ufst_sample/data/{number}.txt": "data\n" * number for number in range(200)}
    record = "".join(f"{name},,\n" for name in files) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", record)
    return wheel


@pytest.mark.parametrize("upper_on", ["ext4", "btrfs"])
@pytest.mark.fault_seconds(240)
def test_pip_in_a_virtual_environment(places: PlacesMaker, upper_on: FsKind, ground: Path) -> None:
    place = places(upper_on)
    old, new = make_wheel(ground, "1.0"), make_wheel(ground, "2.0")
    pip = "env/bin/python -m pip --disable-pip-version-check --no-input"
    results = {
        name: run(
            f"""
            {sys.executable} -m venv env
            {pip} install -q --no-index {old}
            env/bin/python -m ufst_sample
            {pip} install -q --no-index {new}
            env/bin/python -m ufst_sample
            {pip} check
            {pip} list --format=freeze
            find env/lib -type f -path '*ufst*' ! -name '*.pyc' | sort | sed 's/python3[0-9.]*//'
            {pip} uninstall -qy ufst-sample
            find env -name '*ufst*'
            find env -type f ! -name '*.pyc' | wc -l
            """,
            where,
        )
        for name, where in place.both()
    }
    assert results["union"] == results["bare"]
    assert results["union"].startswith("1.0\n2.0\n")


WRITER = textwrap.dedent(
    """
    import sqlite3, sys
    with_id = int(sys.argv[2])
    connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
    connection.execute("pragma journal_mode=wal")
    for number in range(int(sys.argv[3])):
        connection.execute("begin immediate")
        connection.execute("insert into t values (?, ?, ?)", (with_id, number, "x" * 300))
        connection.execute("update total set n = n + 1")
        connection.execute("commit")
        print(number, flush=True)
    """
)


def fill_database(directory: Path) -> None:
    """A database that was there before, with its WAL checkpointed."""
    with sqlite3.connect(directory / "base.db") as connection:
        connection.execute("create table t (client, number, text)")
        connection.execute("create table total (n)")
        connection.execute("insert into total values (0)")
        connection.executemany("insert into t values (-1, ?, ?)", [(number, "y" * 200) for number in range(2000)])
        connection.commit()
    connection.close()


def check_database(path: Path) -> tuple[int, int]:
    """Rows and total of a database that must be whole."""
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
        rows = connection.execute("select count(*) from t where client >= 0").fetchone()[0]
        total = connection.execute("select n from total").fetchone()[0]
    finally:
        connection.close()
    return rows, total


@pytest.mark.parametrize("upper_on", FS_KINDS)
def test_sqlite_with_wal_and_several_writers(places: PlacesMaker, upper_on: FsKind) -> None:
    place = places(upper_on, fill_database)
    database = place.union / "base.db"
    # The change of the mode itself doesn't wait for others (sqlite.org/wal.html).
    connection = sqlite3.connect(database)
    assert connection.execute("pragma journal_mode=wal").fetchone() == ("wal",)
    connection.close()
    clients = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(database), str(number), "150"], stdout=subprocess.DEVNULL)
        for number in range(3)
    ]
    for client in clients:
        assert client.wait(120) == 0
    assert check_database(database) == (450, 450)
    place.stack.remount()
    assert check_database(database) == (450, 450)
    connection = sqlite3.connect(database)
    connection.execute("pragma wal_checkpoint(truncate)")
    connection.execute("vacuum")
    connection.close()
    assert check_database(database) == (450, 450)


def test_sqlite_writer_killed_in_the_middle(places: PlacesMaker) -> None:
    """What was committed is there, the rest is rolled back."""
    place = places("ext4", fill_database)
    database = place.union / "base.db"
    client = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(database), "0", "100000"], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    for _ in range(200):
        last = int(client.stdout.readline())
    client.send_signal(signal.SIGKILL)
    client.wait()
    last = max([last, *(int(line) for line in client.stdout.read().split())])
    client.stdout.close()
    rows, total = check_database(database)
    assert rows == total
    assert rows >= last + 1


def test_programs_that_replace_their_files(places: PlacesMaker) -> None:
    """sed -i, patch-like rename dances, ln -sf, cp --reflink=auto, rsync-like temporary files, install."""

    def fill(target: Path) -> None:
        (target / "conf").mkdir()
        for number in range(50):
            (target / "conf" / f"{number}.conf").write_text(f"value={number}\nother=1\n")
        os.symlink("0.conf", target / "conf" / "current")

    place = places("ext4", fill)
    for _, where in place.both():
        run(
            """
            cd conf
            sed -i 's/other=1/other=2/' *.conf
            ln -sf 7.conf current
            ln -sfn 8.conf newest
            cp --reflink=auto 3.conf copy.conf
            cp -a . ../second
            install -m 600 4.conf installed
            mv -n 5.conf 6.conf
            touch -d '2001-02-03 04:05:06' 9.conf
            cp -u 9.conf 10.conf
            truncate -s 100 11.conf
            dd if=/dev/zero of=12.conf bs=1 count=4 seek=2 conv=notrunc status=none
            tee -a 13.conf < 14.conf > /dev/null
            sort -o 15.conf 15.conf
            split -n 3 16.conf part-
            find . -name '2*.conf' -delete
            mkfifo pipe
            rmdir --ignore-fail-on-non-empty ../second
            """,
            where,
        )
    assert_same(snapshot(place.bare, times=False), snapshot(place.union, times=False))
    shutil.rmtree(place.union / "conf")
    assert os.listdir(place.union) == ["second"]


def test_places_are_what_they_say(places: PlacesMaker) -> None:
    """The bare directory is on upper's file system, the union is not."""
    place: Places = places("tmpfs")
    assert place.bare.stat().st_dev == place.stack.up.stat().st_dev
    assert place.union.stat().st_dev != place.bare.stat().st_dev
