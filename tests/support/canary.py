"""A tree beside the layers that nobody may read or write, and what a mount shows, errors included."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

SECRET = b"canary-5ecre7"
_LONG_AGO = 978_307_200  # 2001-01-01
_READ_BYTES = 4096


class Canary:
    """A directory of things that must stay as they are and must not be seen.

    All its times lie long ago, so that on a file system with relatime each reading, of a directory or a symbolic link too,
    changes an access time. What is added or removed changes the time of a directory. So looking at attributes is enough.
    """

    def __init__(self, where: Path) -> None:
        self.where = where
        deep = where / "deep" / "deeper"
        deep.mkdir(parents=True)
        for name in (
            "secret",
            "deep/secret",
            "deep/deeper/secret",
            "below",
            "x",
            "f",
            ".wh..wh..opq",
            ".wh.f",
            "1.json",
        ):
            (where / name).write_bytes(SECRET)
        os.chmod(where / "secret", 0o600)
        os.setxattr(where / "secret", "user.secret", SECRET)
        (where / "d").mkdir()
        (where / "work").mkdir()
        (where / "volatile").mkdir()
        (where / "link").symlink_to("secret")
        os.mkfifo(where / "fifo")
        self._paths = sorted([*where.rglob("*"), where])
        for path in self._paths:
            os.utime(path, (_LONG_AGO, _LONG_AGO), follow_symlinks=False)
        self._before = self._look()

    def _look(self) -> dict[Path, tuple[object, ...]]:
        return {path: self._entry(path) for path in self._paths}

    @staticmethod
    def _entry(path: Path) -> tuple[object, ...]:
        try:
            st = os.lstat(path)
        except FileNotFoundError:
            return ("gone",)
        names = sorted(os.listxattr(path, follow_symlinks=False))
        xattrs = [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names]
        return (*st[:7], st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns, xattrs)

    def check(self) -> None:
        """Fail where anything was read, changed, added or removed."""
        now = self._look()
        touched = {str(path): (self._before[path], now[path]) for path in now if now[path] != self._before[path]}
        assert not touched, f"touched outside of the layers: {touched}"


Outcome = tuple[object, ...]


def outcomes(root: Path, *, limit: int = 20_000) -> dict[str, Outcome]:
    """What a walk over a mount meets, by path: kind, permissions, and what came of reading it; errors by their names.

    Directories are entered as long as their path is short, so that a mount that shows itself within itself ends it.
    """
    found: dict[str, Outcome] = {}
    waiting = [""]
    while waiting and len(found) < limit:
        path = waiting.pop()
        found[path or "."], names = _outcome(root / path)
        if len(path) < 200:
            waiting += [f"{path}/{name}" if path else name for name in sorted(names, reverse=True)]
    return found


def _outcome(path: Path) -> tuple[Outcome, list[str]]:
    try:
        st = os.lstat(path)
    except OSError as error:
        return ("lstat", _name(error)), []
    kind = stat.filemode(st.st_mode)
    try:
        if stat.S_ISDIR(st.st_mode):
            names = os.listdir(path)
            return (kind, sorted(names)), names
        if stat.S_ISLNK(st.st_mode):
            return (kind, os.readlink(path)), []
        if stat.S_ISREG(st.st_mode):
            return (kind, st.st_size, st.st_nlink, _content(path)), []
    except OSError as error:
        return (kind, _name(error)), []
    return (kind, st.st_rdev), []


def _content(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        return os.read(descriptor, _READ_BYTES)
    finally:
        os.close(descriptor)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "?")


def assert_hidden(seen: Iterable[Outcome]) -> None:
    """Fail where the content of a canary was seen."""
    shown = [outcome for outcome in seen if any(isinstance(part, bytes) and SECRET in part for part in outcome)]
    assert not shown, f"content from outside of the layers is seen: {shown}"


def differences(left: dict[str, Outcome], right: dict[str, Outcome]) -> list[str]:
    """One line for each path at which two walks differ."""
    return [
        f"{path}: {left.get(path)} / {right.get(path)}"
        for path in sorted(left.keys() | right.keys())
        if left.get(path) != right.get(path)
    ]
