"""Only the C extension is described here; everything else stands in pyproject.toml.

`unionfs._native` is optional: without a compiler, pkg-config or libfuse's headers the installation goes on
without it, and mounts run on plain pyfuse3.
"""

import shlex
import subprocess
from pathlib import Path

from setuptools import Extension, setup

C_SOURCES = Path("unionfs", "csrc")

# Only libfuse's functions that are defined anew, marked HOOK, are for other libraries to find.
FLAGS = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"]


def pkg_config(flag: str) -> list[str]:
    """Return what pkg-config says of libfuse 3; nothing where it or libfuse's headers are missing."""
    try:
        done = subprocess.run(["pkg-config", flag, "fuse3"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return shlex.split(done.stdout)


def extensions() -> list[Extension]:
    sources = sorted(str(path) for path in C_SOURCES.glob("*.c"))
    if not sources:
        return []
    return [
        Extension(
            "unionfs._native",
            sources,
            depends=[str(path) for path in C_SOURCES.glob("*.h")],
            extra_compile_args=[*FLAGS, *pkg_config("--cflags")],
            extra_link_args=pkg_config("--libs"),
            optional=True,
        )
    ]


setup(ext_modules=extensions())
