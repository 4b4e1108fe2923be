"""What no module may use: a shell, guessable temporary names, and what turns data into code. Found by reading the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "unionfs"
MODULES = sorted(PACKAGE.rglob("*.py"))

_NEVER = {
    **dict.fromkeys(("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), "uses a shell"),
    **dict.fromkeys(("os.tempnam", "os.tmpnam", "tempfile.mktemp"), "makes a guessable name"),
    **dict.fromkeys(
        ("eval", "exec", "compile", "marshal.loads", "pickle.load", "pickle.loads"), "turns data into code"
    ),
}
_STARTERS = {f"subprocess.{name}" for name in ("run", "call", "check_call", "check_output", "Popen")}


def findings(source: str) -> Iterator[str]:
    """One line for each forbidden call in a module's source."""
    tree = ast.parse(source)
    lists = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in _NEVER:
            yield f"line {node.lineno}: {name} {_NEVER[name]}"
        if any(word.arg == "shell" for word in node.keywords):
            yield f"line {node.lineno}: {name} with shell="
        if name in _STARTERS and not (
            node.args and (isinstance(node.args[0], ast.List) or ast.unparse(node.args[0]) in lists)
        ):
            yield f"line {node.lineno}: {name} is not given a list of words"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module(path: Path) -> None:
    assert list(findings(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import os; os.system('true')",
        "import os; os.popen('true')",
        "import subprocess; subprocess.run(['true'], shell=True)",
        "import subprocess; subprocess.run('true')",
        "import subprocess; words = 'true'; subprocess.Popen(words)",
        "import tempfile; tempfile.mktemp()",
        "eval('1')",
    ],
)
def test_such_a_line_would_be_found(line: str) -> None:
    assert list(findings(line))
