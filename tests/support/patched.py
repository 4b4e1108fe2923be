"""Daemons whose modules are patched as they are imported, by a ``sitecustomize`` that Python finds before all else."""

from __future__ import annotations

from pathlib import Path

from tests.support.people import REPOSITORY

_FINDER = """
import importlib.machinery
import sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            PATCHES[name](module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
"""


def command(directory: Path, patches: str, **variables: Path) -> list[str]:
    """The words before a daemon's command.

    directory: takes the code; patches: code that ends in `PATCHES`, a function for each module's name, which gets the
    module; variables: of the environment, for the code.
    """
    (directory / "sitecustomize.py").write_text(patches + _FINDER)
    return ["env", f"PYTHONPATH={directory}:{REPOSITORY}", *(f"{name}={value}" for name, value in variables.items())]
