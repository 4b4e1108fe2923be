"""Wheel and sdist: both are built, each is installed into an environment of its own, and works there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.host.host import REPOSITORY, Host, LeftOut, Wrong, expect, run
from tests.support.mounts import mounted_below

LEFT_OF_SOURCE = (
    ".git",
    ".venv*",
    "build",
    "dist",
    "demo",
    "*.so",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)
_CHECK_NATIVE = "import unionfs._native, unionfs; print(unionfs.__file__)"


def build(host: Host, room: Path) -> str:
    """`python -m build` makes both, of a copy of the checkout; the wheel becomes the one that is installed."""
    if host.wheel is not None:
        raise LeftOut(f"{host.wheel.name} was given")
    _need_compiler(host)
    tools = _environment(host, room / "tools")
    _install(host, tools, "build", "setuptools>=69", "wheel")
    source, out = room / "source", host.base / "dist"
    shutil.copytree(REPOSITORY, source, ignore=shutil.ignore_patterns(*LEFT_OF_SOURCE))
    # Without --sdist or --wheel the wheel is built from the sdist: what is missing there is missed. The environment is a new one.
    run([tools / "bin/python", "-m", "build", "--no-isolation", "--outdir", out, source], cwd=room)
    (host.wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return f"{host.wheel.name} ({host.wheel.stat().st_size >> 10} KiB), {sdist.name} ({sdist.stat().st_size >> 10} KiB)"


def _need_compiler(host: Host) -> None:
    """Raise Wrong where the native part can't be built: it would be left out silently, and everything be slow."""
    missing = [name for name in ("gcc", "pkg-config") if not shutil.which(name)]
    if not missing and subprocess.run(["pkg-config", "fuse3"], check=False).returncode:
        missing.append("the headers of libfuse 3 (libfuse3-dev, fuse3-devel)")
    probe = "import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path('include') + '/Python.h'))"
    if subprocess.run([host.python, "-c", probe], check=False).returncode:
        missing.append("Python's headers (python3-dev, python3-devel)")
    if missing:
        raise Wrong(f"to build the native part and pyfuse3, please install {', '.join(missing)}")


def install(host: Host, room: Path) -> str:
    """The wheel in the environment that all other checks use."""
    if host.wheel is None:
        raise Wrong("there is no wheel: give one with --wheel, or let it be built")
    if host.wheelhouse is None:
        _need_compiler(host)  # pyfuse3 has no wheels
    _environment(host, host.venv)
    _install(host, host.venv, host.wheel)
    said = host.unionfs("--version").strip()
    host.facts["version"] = said
    smoke(host.venv, room)
    return said


def sdist(host: Host, room: Path) -> str:
    """The sdist, compiled on this host, in an environment of its own."""
    found = list((host.base / "dist").glob("*.tar.gz"))
    if not found:
        raise LeftOut("no sdist was built")
    venv = _environment(host, room / "venv")
    if host.wheelhouse:
        _install(host, venv, "setuptools", "wheel", "--no-build-isolation")
    _install(host, venv, found[0], *(["--no-build-isolation"] if host.wheelhouse else []))
    smoke(venv, room)
    return f"{found[0].name} compiled and works"


def _environment(host: Host, path: Path) -> Path:
    run([host.python, "-m", "venv", path], env={"PYTHONPATH": ""})
    return path


def _install(host: Host, venv: Path, *what: str | Path) -> None:
    words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if host.emulated:
        words += ["--no-compile"]  # most of it is never imported, and compiling it takes a minute there
    if host.wheelhouse is not None:
        words += ["--no-index", "--find-links", str(host.wheelhouse)]
    run([venv / "bin/python", *words, *what], env={"PYTHONPATH": ""})


def smoke(venv: Path, room: Path) -> None:
    """Mount, read, change, unmount with what is installed in `venv`; its native part is there."""
    unionfs, where = venv / "bin/unionfs", room / "smoke"
    for name in ("lower", "upper", "merged"):
        (where / name).mkdir(parents=True)
    (where / "lower/file").write_text("from lower\n")
    place = run([venv / "bin/python", "-c", _CHECK_NATIVE], cwd=where, env={"PYTHONPATH": ""})
    expect(place.startswith(str(venv)), True, f"unionfs is imported from {place.strip()}, not from {venv}")
    for name in ("unionfs", "pyunionfs", "unionfs-overlay", "mount.unionfs", "mount.fuse.unionfs"):
        expect(os.access(venv / "bin" / name, os.X_OK), True, f"the program {name} is installed")
    expect((venv / "share/unionfs/unionfs@.service").exists(), True, "the service template is installed")
    version = run([unionfs, "--version"])
    pattern = (
        rf"unionfs \S+ \(kernel {re.escape(os.uname().release)}, libfuse 3[\d.]*, pyfuse3 [\d.]+, Python 3[\d.]+\)"
    )
    expect(bool(re.match(pattern, version)), True, f"--version says {version!r}")
    run([unionfs, "mount", where / "lower", where / "upper", where / "merged"])
    expect((where / "merged/file").read_text(), "from lower\n", "a lower file")
    with (where / "merged/file").open("a") as file:
        file.write("more\n")
    (where / "merged/new").write_text("new\n")
    expect((where / "merged/file").read_text(), "from lower\nmore\n", "a changed file")
    run([unionfs, "umount", where / "merged"])
    expect(mounted_below(where), [], "mounts after the unmount")
    expect((where / "lower/file").read_text(), "from lower\n", "the lower layer")
    expect(sorted(path.name for path in (where / "upper").iterdir()), ["file", "new"], "the upper layer")
