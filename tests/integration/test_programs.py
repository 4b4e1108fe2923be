"""Real programs at work in the union and, side by side, in a plain directory on the upper's own file system.

What a program says and leaves must be the same in both; afterwards kernel overlayfs over the layers must show the
tree that the union showed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.filesystems import run
from tests.support.mounts import Stack
from tests.support.snapshot import assert_same, snapshot

Oracle = Callable[..., Path]
TREE_FILES = 2000
TREE_FILE_BYTES = 256 << 10


@pytest.fixture
def plain(ground: Path) -> Path:
    """A plain directory on the file system that upper lies on."""
    path = ground / "plain"
    path.mkdir()
    return path


def finish(stack: Stack, check_by_overlay: Oracle) -> None:
    """Unmount the union; kernel overlayfs over its layers must show the same tree."""
    view = snapshot(stack.mnt)
    stack.umount()
    assert_same(view, snapshot(check_by_overlay(stack)))


def sh(directory: Path, script: str, timeout: float = 60, **variables: str | Path) -> str:
    """Run a shell script in `directory`, `variables` in its environment; all that it says, which names no place.

    Fails where a command of the script does.
    """
    environment = os.environ | {name: str(value) for name, value in variables.items()} | {"LC_ALL": "C", "TZ": "UTC"}
    done = subprocess.run(
        ["sh", "-euc", script],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    said = done.stdout.replace(str(directory), ".")
    assert done.returncode == 0, f"exit {done.returncode}\n{said}"
    return said


# -- tar and diff --


def copy_of_system_files(target: Path) -> None:
    """Fill `target` with some thousand of this machine's own files: every kind of name, symlinks, hard links, modes."""
    found: list[str] = []
    for top in ("/usr/share", "/usr/lib", "/usr/bin"):
        for directory, _, names in os.walk(top):
            paths = (os.path.join(directory, name) for name in names)
            found += [path for path in paths if os.lstat(path).st_size <= TREE_FILE_BYTES]
    chosen = sorted(found)[:: max(1, len(found) // TREE_FILES)]
    listed = "\0".join(chosen).encode(errors="surrogateescape")
    packed = subprocess.run(["tar", "-cf", "-", "--null", "-T", "-"], input=listed, capture_output=True, check=True)
    subprocess.run(["tar", "-xpf", "-", "-C", target], input=packed.stdout, check=True)


@pytest.mark.fault_seconds(200)
def test_tar_and_diff_of_a_large_tree(ours: Stack, plain: Path, check_by_overlay: Oracle) -> None:
    """Out of the mount, into it, changed there and compared: nothing is lost, added or different."""
    tree = ours.lower / "tree"
    tree.mkdir()
    copy_of_system_files(tree)
    for number, path in enumerate(sorted(tree.rglob("*.*"))[:200]):
        if path.is_file() and not path.is_symlink():
            os.link(path, tree / f"link{number}")
    root = ours.mount()
    listing = "tar --sort=name --numeric-owner --full-time -cf - tree | tar --numeric-owner --full-time -tvf -"
    assert sh(root, listing) == sh(ours.lower, listing)
    sh(root, 'tar -cf "$ARCHIVE" --sort=name tree; mkdir in; tar -xpf "$ARCHIVE" -C in', ARCHIVE=plain / "tree.tar")
    sh(plain, "mkdir out; tar -xpf tree.tar -C out")
    for one, other in ((root / "tree", plain / "out/tree"), (root / "in/tree", ours.lower / "tree")):
        assert run("diff", "-r", "--no-dereference", str(one), str(other)) == ""
    assert_same(snapshot(root / "in/tree"), snapshot(plain / "out/tree"))
    script = """
        cp -a tree copy
        find copy -type f -name '*[13579].*' -exec sh -c 'for f; do echo changed >>"$f"; done' sh {} +
        find copy -type f -name '*[02468].*' -delete
        chmod -R go-w copy; find copy -type f | wc -l
        mv tree moved; mv moved/usr/share moved/other
        find moved/other -maxdepth 1 -name 'd*' -exec rm -r {} +
        (diff -rq --no-dereference copy/usr moved/usr || true) | sort | cksum
        find . -path ./in -prune -o -print | sort | cksum
    """
    (plain / "side").mkdir()
    sh(plain, "mv out/tree side/tree")
    assert sh(root, script, timeout=150) == sh(plain / "side", script)
    finish(ours, check_by_overlay)


# -- git --

GIT = {
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_COUNT": "2",
    "GIT_CONFIG_KEY_0": "init.defaultBranch",
    "GIT_CONFIG_VALUE_0": "main",
    "GIT_CONFIG_KEY_1": "gc.autoDetach",
    "GIT_CONFIG_VALUE_1": "false",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org",
    "GIT_AUTHOR_DATE": "2020-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2020-01-01T00:00:00Z",
}
"""Nothing of the user's own configuration, and commits whose names depend on their content alone."""
GIT_CREATE = """
    git init -q repo; cd repo
    for d in $(seq 20); do mkdir -p "dir $d"; for f in $(seq 20); do seq "$d" $((d * f)) >"dir $d/$f.txt"; done; done
    ln -s "dir 1" link; chmod +x "dir 1/1.txt"
    git add -A; git commit -qm first
"""
GIT_WORK = """
    git checkout -q -b side; for f in dir\\ 1/*; do echo side >>"$f"; done; git mv "dir 2" moved
    git rm -qr "dir 3"; git commit -qam second
    git checkout -q main; seq 5000 >new; git add new; git commit -qm third
    git merge -q -m merged side; git stash list; echo more >>new; git stash -q; git stash pop -q; git reset -q --hard
    git gc -q --prune=now; git fsck --strict --full 2>&1; git status --porcelain; git rev-parse HEAD 'HEAD^{tree}'
    git count-objects -v | grep -v size
    git clone -q --no-local . ../clone; cd ../clone; git fsck --full 2>&1; git status --porcelain; git rev-parse HEAD
    git ls-files -s | cksum
"""


def test_git(ours: Stack, plain: Path, check_by_overlay: Oracle) -> None:
    """init, commits, merge, stash, gc, fsck and clone: equal objects, clean checks."""
    root = ours.mount()
    assert sh(root, GIT_CREATE + GIT_WORK, **GIT) == sh(plain, GIT_CREATE + GIT_WORK, **GIT)
    finish(ours, check_by_overlay)


def test_git_repository_from_a_lower_layer(ours: Stack, plain: Path, check_by_overlay: Oracle) -> None:
    """A repository of a lower layer gets its further history in the union; the layer keeps the old one."""
    for place in (ours.lower, plain):
        sh(place, GIT_CREATE, **GIT)
    before = snapshot(ours.lower)
    root = ours.mount()
    work = "cd repo; git status --porcelain" + GIT_WORK
    assert sh(root, work, **GIT) == sh(plain, work, **GIT)
    finish(ours, check_by_overlay)
    assert_same(before, snapshot(ours.lower))


# -- pip --


def wheel(directory: Path) -> Path:
    """Write a wheel of a package of 200 modules with a console script."""
    path = directory / "manyparts-1.0-py3-none-any.whl"
    info = "manyparts-1.0.dist-info"
    files = {f"manyparts/part{number}.py": f"VALUE = {number}\n" for number in range(200)}
    imports = "".join(f"from manyparts import part{number}\n" for number in range(200))
    total = "+".join(f"part{number}.VALUE" for number in range(200))
    files["manyparts/__init__.py"] = ""
    files["manyparts/main.py"] = f"{imports}\n\ndef main() -> None:\n    print({total})\n"
    files[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: manyparts\nVersion: 1.0\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = "[console_scripts]\nmanyparts = manyparts.main:main\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.mark.fault_seconds(200)
def test_pip_installs_into_a_virtual_environment(ours: Stack, plain: Path, check_by_overlay: Oracle) -> None:
    """venv, pip install, run, uninstall, install again: the same words and the same files."""
    script = """
        "$PYTHON" -m venv env
        pip="env/bin/python -m pip --disable-pip-version-check --no-cache-dir"
        $pip install --no-index "$WHEEL"; env/bin/manyparts; $pip check; $pip list --format=freeze
        $pip uninstall -qy manyparts; test ! -e env/bin/manyparts
        $pip install -q --no-index --force-reinstall "$WHEEL"; env/bin/manyparts
        find env | sort
    """
    root = ours.mount()
    words = {"PYTHON": sys.executable, "WHEEL": str(wheel(plain)), "PIP_ROOT_USER_ACTION": "ignore", "PYTHONPATH": ""}
    (plain / "side").mkdir()
    assert sh(root, script, 180, **words) == sh(plain / "side", script, 180, **words)
    finish(ours, check_by_overlay)


# -- sqlite --

SQLITE_CREATE = """
import sqlite3
connection = sqlite3.connect("data.db")
connection.execute("create table t (who text, number integer, body blob, unique (who, number))")
connection.executemany("insert into t values ('old', ?, zeroblob(1000))", [(n,) for n in range(500)])
connection.commit()
connection.close()
"""
SQLITE_WRITER = """
import sqlite3, sys
connection = sqlite3.connect("data.db", timeout=60, isolation_level=None)
assert connection.execute("pragma journal_mode=wal").fetchone() == ("wal",)
for number in range(100):
    connection.execute("begin immediate")
    connection.execute("insert into t values (?, ?, zeroblob(3000))", (sys.argv[1], number))
    connection.execute("delete from t where who = 'old' and number = ?", (number,))
    connection.execute("commit")
    seen = connection.execute("select count(*) from t where who = ?", (sys.argv[1],)).fetchone()
    assert seen == (number + 1,), seen
"""
SQLITE_CHECK = """
import sqlite3
connection = sqlite3.connect("data.db")
print(connection.execute("pragma integrity_check").fetchall(), connection.execute("pragma journal_mode").fetchall())
print(connection.execute("select who, count(*), sum(number), sum(length(body)) from t group by who").fetchall())
connection.execute("pragma wal_checkpoint(truncate)")
connection.execute("vacuum")
print(connection.execute("pragma integrity_check").fetchall(), connection.execute("pragma page_count").fetchall())
"""
SQLITE_WORK = """
    "$PYTHON" -c "$WRITER" one & first=$!
    "$PYTHON" -c "$WRITER" two
    wait $first
    "$PYTHON" -c "$CHECK"
    ls
"""


@pytest.mark.parametrize("place", ["upper", "lower"])
def test_sqlite_with_a_write_ahead_log(ours: Stack, plain: Path, check_by_overlay: Oracle, place: str) -> None:
    """Two processes commit 100 times each to one database, made in the union or in a lower layer."""
    words = {"PYTHON": sys.executable, "CREATE": SQLITE_CREATE, "WRITER": SQLITE_WRITER, "CHECK": SQLITE_CHECK}
    if place == "lower":
        sh(ours.lower, '"$PYTHON" -c "$CREATE"', **words)
    root = ours.mount()
    for directory in (root, plain):
        if not (directory / "data.db").exists():
            sh(directory, '"$PYTHON" -c "$CREATE"', **words)
    in_union = sh(root, SQLITE_WORK, **words)
    assert in_union == sh(plain, SQLITE_WORK, **words)
    assert "('one', 100, 4950, 300000)" in in_union
    finish(ours, check_by_overlay)


# -- CPython's own tests --

Outcomes = dict[str, str]


@cache
def interpreter_with_tests() -> str:
    """A Python that has its own tests: the one that runs these, else another (Debian's has them in
    libpython3-testsuite)."""
    for python in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        if Path(python).exists():
            probe = subprocess.run(
                [python, "-c", "import test.libregrtest, test.test_os"], capture_output=True, check=False
            )
            if probe.returncode == 0:
                return python
    raise AssertionError("no Python here has its test package; install libpython3-testsuite")


def cpython_tests(module: str, directory: Path, report: Path) -> Outcomes:
    """Run one module of CPython's tests in `directory`; test name → "passed", or how it failed or was skipped."""
    (directory / "tmp").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(
        [
            interpreter_with_tests(),
            "-m",
            "test",
            "-j1",
            "--tempdir",
            str(directory),
            "--junit-xml",
            str(report),
            module,
        ],
        cwd=directory,
        env=environment | {"TMPDIR": str(directory / "tmp")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=200,
        check=False,
    )
    outcomes: Outcomes = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        told = [child for child in case if child.tag in {"failure", "error", "skipped"}]
        outcomes[case.attrib["name"]] = ", ".join(f"{child.tag} {child.text}" for child in told) or "passed"
    return outcomes


@pytest.mark.fault_seconds(240)
@pytest.mark.parametrize(
    "module",
    [
        "test_os",
        "test_posix",
        "test_shutil",
        "test_tarfile",
        "test_zipfile",
        "test_mailbox",
        "test_dbm",
        "test_sqlite3",
    ],
)
def test_cpython_tests(ours: Stack, plain: Path, check_by_overlay: Oracle, module: str) -> None:
    """The same tests pass, fail and are skipped as on the plain file system."""
    in_union = cpython_tests(module, ours.mount(), plain / "union.xml")
    on_disk = cpython_tests(module, plain, plain / "plain.xml")
    assert len(on_disk) > 10, on_disk
    assert {
        name: in_union.get(name) for name in in_union.keys() | on_disk.keys() if in_union.get(name) != on_disk.get(name)
    } == {}
    finish(ours, check_by_overlay)
