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

# Bottom to top. `_native` is the C extension, which imports nothing.
ORDER = [
    *(
        "_native",
        "errors",
        "idmap",
        "config",
        "volumespec",
        "sysio",
        "acl",
        "reserve",
        "inodes",
        "markers",
        "slow",
        "layers",
        "dirfds",
    ),
    *("merge", "workdir", "resolve", "tree", "listing", "copyup", "protect", "index", "dirops", "union", "bind"),
    *(
        "native",
        "wire",
        "dispatch",
        "handles",
        "patience",
        "following",
        "watching",
        "direct",
        "bind_direct",
        "ops",
        "bind_ops",
    ),
    *("mountinfo", "control", "preflight", "kernelbind"),
    *("attributes", "dirstack", "copytree", "acltext", "tarformat", "tarwrite", "tarread", "archive"),
    *("volumemodel", "volumedirs", "volumedb", "volumereplace", "volumes", "mountvolumes"),
    *(
        "unmount",
        "notify",
        "daemon",
        "inspection",
        "mountfile",
        "mount8",
        "doctor",
        "podman_cli",
        "clihelp",
        "mount_cli",
        "volume_cli",
        "cli",
        "__main__",
    ),
]

CORE = ORDER[1 : ORDER.index("bind") + 1]

# Which modules may import a library; all others may not.
ALLOWED = {
    "ctypes": {"sysio"},
    "pyfuse3": {"dispatch", "ops", "bind_ops", "daemon", "doctor"},
    "trio": {"dispatch", "patience", "following", "watching", "ops", "bind_ops", "daemon"},
    "sqlite3": {"volumedb"},
    "click": {"clihelp", "cli", "mount_cli", "volume_cli"},
    "rich": {"cli", "volume_cli"},
}

# What `unionfs mount` must not load before it has forked the daemon, if ever: each of them costs milliseconds.
HEAVY = {
    *("pyfuse3", "trio", "rich", "sqlite3", "importlib.metadata", "tempfile", "tomllib", "csv", "subprocess"),
    *("unionfs.volumes", "unionfs.volume_cli", "unionfs.doctor", "unionfs.unmount", "unionfs.archive", "unionfs.union"),
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, parsed, by name."""
    files = [path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    return {path.stem: ast.parse(path.read_text()) for path in files}


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
    parts = [name.split(".") for name in imported(tree)]
    return {part[1] for part in parts if part[0] == "unionfs" and len(part) > 1} & {*ORDER, *modules()}


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
    code = "import sys, unionfs.cli, unionfs.mount_cli, unionfs.daemon, unionfs.preflight; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
