"""The house has an order: a module imports only modules below it, and some libraries belong in some rooms only."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import unionfs

PACKAGE = Path(unionfs.__file__).parent

# Bottom to top, the packages and the modules in each; "" is the top level. `_native` is the C extension, which imports nothing.
ROOMS = (
    ("", ("_native", "errors", "idmap", "config", "volumespec")),
    (
        "core",
        (
            "sysio",
            "caller",
            "changes",
            "acl",
            "reserve",
            "inodes",
            "markers",
            "slow",
            "layers",
            "dirfds",
            "merge",
            "workdir",
            "whiteouts",
            "resolve",
        ),
    ),
    (
        "core",
        (
            "tree",
            "listing",
            "dirhandle",
            "metadata",
            "copyup",
            "protect",
            "index",
            "dirops",
            "union",
            "bindnodes",
            "bind",
        ),
    ),
    (
        "fuse",
        (
            "native",
            "wire",
            "dispatch",
            "handles",
            "ledger",
            "kept",
            "once",
            "takeover",
            "restart",
            "patience",
            "following",
            "watching",
        ),
    ),
    ("fuse", ("direct", "bind_direct", "ops", "bind_ops")),
    ("host", ("mountinfo", "control", "preflight", "kernelbind")),
    ("archives", ("attributes", "dirstack", "copytree", "acltext", "tarformat", "tarwrite", "tarread", "archive")),
    ("store", ("volumemodel", "volumedirs", "volumedb", "volumereplace", "volumes", "mountvolumes")),
    ("service", ("unmount", "notify", "supervise", "logs", "process", "session", "daemon", "starting", "inspection")),
    ("commands", ("mountfile", "mount8", "doctor", "podman_cli", "clihelp", "mount_cli", "volume_cli", "cli")),
    ("", ("__main__",)),
)
ORDER = [f"{room}.{name}".lstrip(".") for room, names in ROOMS for name in names]

CORE = ORDER[1 : ORDER.index("core.bind") + 1]

# Which modules may import a library; all others may not.
ALLOWED = {
    "ctypes": {"core.sysio"},
    "pyfuse3": {
        *("fuse.dispatch", "fuse.ops", "fuse.bind_ops", "service.process", "service.session", "service.daemon"),
        "commands.doctor",
    },
    "trio": {
        *("fuse.dispatch", "fuse.patience", "fuse.following", "fuse.watching", "fuse.ops", "fuse.bind_ops"),
        *("service.session", "service.daemon"),
    },
    "sqlite3": {"store.volumedb"},
    "click": {"commands.clihelp", "commands.cli", "commands.mount_cli", "commands.volume_cli"},
    "rich": {"commands.cli", "commands.volume_cli"},
}

# What `unionfs mount` must not load before it has forked the daemon, if ever: each of them costs milliseconds.
HEAVY = {
    *("pyfuse3", "trio", "rich", "sqlite3", "importlib.metadata", "tempfile", "tomllib", "csv", "subprocess"),
    *(
        "unionfs.store.volumes",
        "unionfs.commands.volume_cli",
        "unionfs.commands.doctor",
        "unionfs.service.unmount",
        "unionfs.archives.archive",
        "unionfs.core.union",
    ),
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, parsed, by its dotted name below the package."""
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    return {".".join(path.with_suffix("").parts): ast.parse((PACKAGE / path).read_text()) for path in files}


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.Module) -> set[str]:
    """The modules of this package that a module imports."""
    return {name.removeprefix("unionfs.") for name in imported(tree)} & {*ORDER, *modules()}


def test_every_module_has_its_place() -> None:
    assert set(modules()) | {"_native"} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", ORDER[1:])
def test_imports_go_downward(name: str) -> None:
    above = own_imports(modules()[name]) - set(ORDER[: ORDER.index(name)])
    assert not above, f"{name} imports {sorted(above)}, which stand above it"


@pytest.mark.parametrize("library", ALLOWED)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    users = {name for name, tree in modules().items() if library in {full.split(".")[0] for full in imported(tree)}}
    assert users <= ALLOWED[library]


@pytest.mark.parametrize("name", CORE)
def test_the_core_is_synchronous(name: str) -> None:
    awaits = [node for node in ast.walk(modules()[name]) if isinstance(node, ast.AsyncFunctionDef | ast.Await)]
    assert not awaits


def test_mount_starts_with_little() -> None:
    code = "import sys, unionfs.commands.cli, unionfs.commands.mount_cli, unionfs.service.starting, unionfs.host.preflight; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
