"""The machine that the comparison runs on: what it is, what it can do, and its caches."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def facts(directory: Path) -> dict[str, object]:
    """Kernel, processor, memory and the file system of `directory`."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": model[1] if model else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": int(memory[1]) // 1024 if memory else 0,
        "file_system": file_system(directory),
        "python": platform.python_version(),
    }


def mounts() -> list[tuple[Path, str, str]]:
    """Mount point, type and source of all mounts of this namespace, the latest last."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        kind, source = line.partition(" - ")[2].split(" ")[:2]
        found.append((Path(_unescape(line.split(" ")[4])), kind, source))
    return found


def _unescape(word: str) -> str:
    return re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), word)


def file_system(directory: Path) -> str:
    """The type of the file system that `directory` lies on."""
    over = [(point, kind) for point, kind, _ in mounts() if directory.resolve().is_relative_to(point)]
    deepest = max(len(point.parts) for point, _ in over)
    return [kind for point, kind in over if len(point.parts) == deepest][-1]


def programs() -> dict[str, str]:
    """The versions of the programs that do the work, as they say it."""
    found = {}
    for name in ("find", "grep", "dd", "ls", "tar", "rm", "git", "fio", "runc"):
        if shutil.which(name):
            done = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
            found[name] = done.stdout.partition("\n")[0]
    return found


def load() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]


def can_drop_caches() -> bool:
    """Whether cold runs are possible: only root may empty the kernel's caches."""
    return os.access(DROP_CACHES, os.W_OK)


def sync(directory: Path) -> None:
    """Write out what the file system of `directory` holds back, so that no later run pays for it."""
    subprocess.run(["sync", "-f", str(directory)], check=True)


def drop_caches() -> None:
    """Empty the page, dentry and inode caches. The caller has synced: dirty pages stay."""
    DROP_CACHES.write_text("3\n")
