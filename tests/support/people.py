"""Acting as someone else: other users by thread credentials, and user and mount namespaces by unshare(1)."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tests.support import raw

T = TypeVar("T")
ALICE = 12001
BOB = 12002
STAFF = 12100
"""Numbers of users and of a group that no account needs."""
REPOSITORY = Path(__file__).resolve().parents[2]


def as_user(uid: int, act: Callable[[], T], *, gid: int | None = None, groups: tuple[int, ...] = ()) -> T:
    """Run `act` in a thread that has the given identity and no capabilities, with a umask and a working
    directory of its own; its result is returned and its exception raised here.

    A system call made by such a thread is seen by the kernel, and so by a FUSE daemon, as that user's.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            raw.unshare(raw.CLONE_FS)
            raw.become(uid, uid if gid is None else gid, groups)
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _roots_to_open(paths: Sequence[Path]) -> list[Path]:
    """The topmost directories on the way to `paths` that others may not enter."""
    closed: list[Path] = []
    for path in paths:
        for ancestor in reversed(path.resolve().parents):
            if not ancestor.stat().st_mode & 0o001:
                if ancestor not in closed:
                    closed.append(ancestor)
                break
    return closed


def opened_interpreter() -> str:
    """Shell commands that, in a private mount namespace, let any user run this interpreter.

    An interpreter below a closed home (/root/.pyenv, say) can't be run by others. There an empty, open directory
    is mounted over the closed one, with the needed directories bound back into it.
    """
    needed = [Path(sys.prefix), Path(sys.base_prefix), REPOSITORY]
    lines: list[str] = []
    for closed in _roots_to_open(needed):
        inside = [path for path in needed if path.resolve().is_relative_to(closed)]
        for number, path in enumerate(inside):
            lines.append(f"exec {3 + number}<'{path}'")
        lines.append(f"mount -t tmpfs -o mode=755 tmpfs '{closed}'")
        for number, path in enumerate(inside):
            lines.append(f"mkdir -p '{path}' && mount --no-canonicalize --bind /proc/self/fd/{3 + number} '{path}'")
    return "\n".join(lines)


def in_user_namespace(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a program as root of a new user and mount namespace that maps only the caller (`unshare -Ur --mount`)."""
    command = ["unshare", "-Ur", "--mount", "--propagation", "private", "--", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True, check=False)
