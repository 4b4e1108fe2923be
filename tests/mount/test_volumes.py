"""Volumes of a mount by the command line: what both modes must do alike, and what only the kernel's binds can.

Every test of the first part runs with `--bind-mode kernel` and `--bind-mode fuse`.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import select
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw
from tests.support.cli import Said, environment, listed, refused, unionfs
from tests.support.mounts import daemons, mounted_below, wait_gone


class Place:
    """Layers, a host directory, a store, and the commands on them."""

    def __init__(self, base: Path, mode: str) -> None:
        self.base, self.mode = base, mode
        self.lower, self.upper, self.mnt = base / "lower", base / "upper", base / "mnt"
        self.host, self.store = base / "host", base / "store"
        for directory in (self.lower, self.upper, self.mnt, self.host):
            directory.mkdir()
        (self.lower / "file").write_text("from lower\n")
        (self.host / "inside").write_text("from the host\n")

    def run(self, *words: str | Path) -> Said:
        """`unionfs --root STORE WORDS...`."""
        return unionfs("--root", self.store, *words)

    def mount(self, *words: str | Path, mnt: Path | None = None) -> Said:
        """`unionfs mount --bind-mode MODE WORDS... LOWER UPPER MOUNTPOINT`."""
        return self.run("mount", "--bind-mode", self.mode, *words, self.lower, self.upper, mnt or self.mnt)

    def mounted(self, *words: str | Path) -> Path:
        """Mount, which must work in silence."""
        assert self.mount(*words) == Said(0, "", "")
        return self.mnt

    def umount(self, *words: str | Path) -> Said:
        return self.run("umount", *words, self.mnt)

    def inspect(self, word: str | Path | None = None) -> dict[str, Any]:
        said = self.run("inspect", word or self.mnt)
        assert said.status == 0, said
        (found,) = json.loads(said.out)
        assert isinstance(found, dict)
        return found

    def data(self, volume: str) -> Path:
        return self.store / "volumes" / volume / "_data"

    def another(self) -> Place:
        """Layers of a second mount with the same store."""
        (self.base / "another").mkdir()
        made = Place(self.base / "another", self.mode)
        made.store = self.store
        return made

    def clear(self) -> None:
        """Detach whatever a failed test left."""
        for pid in daemons(self.base):
            os.kill(pid, signal.SIGKILL)
        for path in reversed(mounted_below(self.base)):
            raw.umount2(path, raw.MNT_DETACH)


@pytest.fixture(params=["kernel", "fuse"])
def place(ground: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    made = Place(ground, request.param)
    yield made
    made.clear()


@pytest.fixture
def kernel(ground: Path) -> Iterator[Place]:
    made = Place(ground, "kernel")
    yield made
    made.clear()


def fails(code: int, action: Callable[[], object]) -> None:
    """Assert that an action fails with an errno."""
    with pytest.raises(OSError) as failed:  # noqa: PT011
        action()
    assert failed.value.errno == code, failed.value


# --- binding --------------------------------------------------------------------------------------


def test_a_host_directory_appears(place: Place) -> None:
    mnt = place.mounted("-v", f"{place.host}:/data")
    assert (mnt / "data/inside").read_text() == "from the host\n"
    (mnt / "data/new").write_text("mine")
    assert (place.host / "new").read_text() == "mine"
    assert (place.upper / "data").is_dir()
    assert list((place.upper / "data").iterdir()) == []
    assert sorted(os.listdir(mnt)) == ["data", "file"]
    assert place.umount() == Said(0, "", "")
    assert mounted_below(place.base) == []
    assert (place.host / "new").read_text() == "mine"


def test_both_sides_see_changes_at_once(place: Place) -> None:
    inside = place.mounted("-v", f"{place.host}:/data") / "data"
    for round_ in range(3):
        (place.host / "inside").write_text(f"host {round_}" * (round_ + 1))
        assert (inside / "inside").read_text() == f"host {round_}" * (round_ + 1)
        (inside / "inside").write_text(f"union {round_}")
        assert (place.host / "inside").read_text() == f"union {round_}"
        (place.host / f"h{round_}").mkdir()
        assert sorted(os.listdir(inside)) == sorted(os.listdir(place.host))
        (place.host / f"h{round_}").rmdir()
        assert not (inside / f"h{round_}").exists()
        (place.host / "other").write_text(f"replaced {round_}")
        (place.host / "other").rename(place.host / "inside")
        assert (inside / "inside").read_text() == f"replaced {round_}"
        (place.host / "inside").chmod(0o600 + round_)
        assert stat.S_IMODE((inside / "inside").stat().st_mode) == 0o600 + round_
    assert place.umount().status == 0


def test_a_missing_source_is_made_by_v_and_refused_by_mount(place: Place) -> None:
    missing = place.base / "a/b"
    refused(place.mount("--mount", f"type=bind,source={missing},target=/data"), 3, str(missing), "does not exist")
    assert not missing.exists()
    assert mounted_below(place.base) == []
    mnt = place.mounted("-v", f"{missing}:/data")
    (mnt / "data/x").touch()
    assert (missing / "x").exists()
    assert place.umount().status == 0


def test_a_single_file(place: Place) -> None:
    target = place.mounted("-v", f"{place.host}/inside:/etc/conf") / "etc/conf"
    assert target.read_text() == "from the host\n"
    assert (place.upper / "etc/conf").read_bytes() == b""
    target.write_text("changed")
    assert (place.host / "inside").read_text() == "changed"
    other = target.parent / "other"
    other.write_text("x")
    fails(errno.EBUSY, lambda: other.rename(target))
    fails(errno.EBUSY, target.unlink)
    assert place.umount().status == 0


def test_over_content_of_a_lower(place: Place) -> None:
    (place.lower / "data").mkdir()
    (place.lower / "data/hidden").write_text("hidden")
    mnt = place.mounted("-v", f"{place.host}:/data")
    assert os.listdir(mnt / "data") == ["inside"]
    assert not (place.upper / "data").exists()
    assert place.umount().status == 0
    assert place.mount() == Said(0, "", "")
    assert os.listdir(mnt / "data") == ["hidden"]
    assert place.umount().status == 0


def test_nested(place: Place) -> None:
    inner = place.base / "inner"
    inner.mkdir()
    (inner / "deep").write_text("deep")
    # Given the wrong way round: outer targets are bound first all the same.
    mnt = place.mounted("-v", f"{inner}:/data/in/ner", "-v", f"{place.host}:/data")
    assert (mnt / "data/in/ner/deep").read_text() == "deep"
    assert (mnt / "data/inside").read_text() == "from the host\n"
    assert (place.host / "in/ner").is_dir()
    (mnt / "data/in/ner/new").write_text("n")
    assert (inner / "new").read_text() == "n"
    assert [found["Destination"] for found in place.inspect()["Mounts"]] == ["/data", "/data/in/ner"]
    assert place.umount() == Said(0, "", "")
    assert mounted_below(place.base) == []


def test_under_a_read_only_union(place: Place) -> None:
    (place.lower / "data").mkdir()
    words = ["mount", "--bind-mode", place.mode, "-v"]
    assert place.run(*words, f"{place.host}:/data", place.lower, place.mnt) == Said(0, "", "")
    (place.mnt / "data/new").write_text("written")
    assert (place.host / "new").read_text() == "written"
    fails(errno.EROFS, (place.mnt / "new").touch)
    assert place.umount().status == 0
    refused(place.run(*words, f"{place.host}:/missing", place.lower, place.mnt), 3, "/missing", "read-only union")
    assert mounted_below(place.base) == []


def test_symlinks_in_a_layer_lead_nowhere_else(place: Place) -> None:
    outside = place.base / "outside"
    outside.mkdir()
    (place.lower / "abs").symlink_to(outside)
    (place.lower / "up").symlink_to("../../../../../../..")
    mnt = place.mounted("-v", f"{place.host}:/abs/data", "-v", f"{place.host}:/up/data")
    assert list(outside.iterdir()) == []
    assert (Path(f"{mnt}{outside}") / "data/inside").read_text() == "from the host\n"
    assert (mnt / "data/inside").read_text() == "from the host\n"
    assert place.umount().status == 0


def test_directory_and_file_don_t_fit(place: Place) -> None:
    refused(place.mount("-v", f"{place.host}:/file"), 3, "/file", "directory onto a file")
    (place.lower / "d").mkdir()
    refused(place.mount("-v", f"{place.host}/inside:/d"), 3, "/d", "file onto a directory")
    assert mounted_below(place.base) == []
    assert not daemons(place.base)


def test_a_source_inside_upper_is_refused(place: Place) -> None:
    (place.upper / "x").mkdir()
    refused(place.mount("-v", f"{place.upper}/x:/data"), 3, "lies inside upper")


def test_the_bind_point_stays(place: Place) -> None:
    mnt = place.mounted("-v", f"{place.host}:/a/data")
    (mnt / "x").mkdir()
    (mnt / "f").touch()
    fails(errno.EBUSY, lambda: (mnt / "a/data").rename(mnt / "y"))
    fails(errno.EBUSY, lambda: (mnt / "x").rename(mnt / "a/data"))
    fails(errno.EBUSY, (mnt / "a/data").rmdir)
    fails(errno.EXDEV, lambda: (mnt / "f").rename(mnt / "a/data/f"))
    fails(errno.EXDEV, lambda: (mnt / "a/data/inside").rename(mnt / "i"))
    fails(errno.EXDEV, lambda: (mnt / "a/data/inlink").hardlink_to(mnt / "f"))
    fails(errno.EXDEV, lambda: (mnt / "inlink").hardlink_to(mnt / "a/data/inside"))
    assert sorted(os.listdir(mnt / "a/data")) == ["inside"]
    # A bind lies on a directory entry, not on a path: its parents may move.
    (mnt / "a").rename(mnt / "b")
    assert (mnt / "b/data/inside").read_text() == "from the host\n"
    assert place.umount().status == 0


CHANGES: dict[str, Callable[[Path], object]] = {
    "create": lambda d: (d / "new").touch(),
    "mkdir": lambda d: (d / "new").mkdir(),
    "symlink": lambda d: (d / "new").symlink_to("x"),
    "mknod": lambda d: os.mkfifo(d / "new"),
    "link": lambda d: (d / "new").hardlink_to(d / "inside"),
    "open for writing": lambda d: os.close(os.open(d / "inside", os.O_WRONLY)),
    "open read-write": lambda d: os.close(os.open(d / "inside", os.O_RDWR)),
    "open with truncation": lambda d: os.close(os.open(d / "inside", os.O_RDONLY | os.O_TRUNC)),
    "truncate": lambda d: os.truncate(d / "inside", 3),
    "unlink": lambda d: (d / "inside").unlink(),
    "rmdir": lambda d: (d / "sub").rmdir(),
    "rename": lambda d: (d / "inside").rename(d / "new"),
    "chmod": lambda d: (d / "inside").chmod(0o600),
    "chmod of the root": lambda d: d.chmod(0o700),
    "chown": lambda d: os.chown(d / "inside", 1, 1),
    "utimens": lambda d: os.utime(d / "inside", (1, 1)),
    "setxattr": lambda d: os.setxattr(d / "inside", "user.x", b"1"),
    "removexattr": lambda d: os.removexattr(d / "inside", "user.there"),
    "chmod of a descriptor": lambda d: _through(d / "inside", lambda fd: os.fchmod(fd, 0o600)),
    "times of a descriptor": lambda d: _through(d / "inside", lambda fd: os.utime(fd, (1, 1))),
    "xattr of a descriptor": lambda d: _through(d / "inside", lambda fd: os.setxattr(fd, "user.x", b"1")),
}


def _through(path: Path, action: Callable[[int], object]) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        action(fd)
    finally:
        os.close(fd)


def test_read_only(place: Place) -> None:
    (place.host / "sub").mkdir()
    os.setxattr(place.host / "inside", "user.there", b"1")

    def state() -> list[object]:
        return [
            (path.name, path.lstat().st_mode, path.lstat().st_mtime_ns, path.lstat().st_ctime_ns, os.listxattr(path))
            for path in (place.host, *sorted(place.host.iterdir()))
        ]

    before = state()
    inside = place.mounted("-v", f"{place.host}:/data:ro") / "data"
    for action in CHANGES.values():
        fails(errno.EROFS, lambda action=action: action(inside))  # type: ignore[misc]
    fd = os.open(inside / "inside", os.O_RDONLY)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 4, mmap.MAP_SHARED, mmap.PROT_WRITE | mmap.PROT_READ)
    assert os.read(fd, 100) == b"from the host\n"
    os.close(fd)
    assert not os.access(inside / "inside", os.W_OK) or place.mode == "fuse"
    assert state() == before
    assert place.umount().status == 0


def test_two_mounts_share_a_volume(place: Place) -> None:
    """Two writers in two mounts and one on the host, appending to one file and each making files of its own."""
    second = place.another()
    place.mounted("-v", "shared:/data")
    second.mounted("-v", "shared:/data")
    places = [place.mnt / "data", second.mnt / "data", place.data("shared")]

    def work(number: int) -> None:
        for count in range(200):
            fd = os.open(places[number] / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(fd, b"%d %06d\n" % (number, count))
            os.close(fd)
            (places[number] / f"f{number}-{count}").write_text(str(count))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for where in places:
        lines = (where / "log").read_bytes().splitlines()
        assert sorted(lines) == sorted(b"%d %06d" % (n, c) for n in range(3) for c in range(200))
        assert len(os.listdir(where)) == 601
        assert (where / "f1-7").read_text() == "7"
    assert place.umount().status == second.umount().status == 0


def test_sqlite_in_wal_mode(place: Place) -> None:
    """A database with a shared-memory file: shared mappings must be coherent between processes of the mount."""
    inside = place.mounted("-v", f"{place.host}:/data") / "data"
    with closing(sqlite3.connect(inside / "db")) as first:  # sqlite does not wait for others who change the mode, too
        first.execute("pragma journal_mode=wal")
        first.execute("create table t (x)")
    program = (
        "import sqlite3, sys; d = sqlite3.connect(sys.argv[1], timeout=30);"
        "[(d.execute('insert into t values (?)', (n,)), d.commit()) for n in range(50)]"
    )
    children = [subprocess.Popen([sys.executable, "-c", program, str(inside / "db")]) for _ in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    count = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('select count(*) from t').fetchone()[0])"
    done = subprocess.run([sys.executable, "-c", count, str(place.host / "db")], capture_output=True, text=True)
    assert done.stdout == "150\n", done
    assert place.umount().status == 0


# --- named and anonymous volumes --------------------------------------------------------------------


def test_a_named_volume_outlives_the_mount(place: Place) -> None:
    mnt = place.mounted("-v", "cache:/var/cache")
    (mnt / "var/cache/kept").write_text("kept")
    refused(place.run("volume", "rm", "cache"), 4, "cache", str(mnt))
    assert place.umount().status == 0
    assert (place.data("cache") / "kept").read_text() == "kept"
    mnt = place.mounted("-v", "cache:/elsewhere")
    assert (mnt / "elsewhere/kept").read_text() == "kept"
    assert place.umount("--rm").status == 0
    assert place.run("volume", "rm", "cache") == Said(0, "cache\n", "")
    assert not place.data("cache").exists()


def seed(data: Path) -> None:
    """Content with all that a fill must keep."""
    data.mkdir(parents=True)
    os.chown(data, 1234, 5678)
    data.chmod(0o2750)
    (data / "f").write_bytes(b"x" * 10_000)
    os.chown(data / "f", 1, 2)
    os.setxattr(data / "f", "user.note", b"kept")
    (data / "f").chmod(0o4755)
    (data / "g").hardlink_to(data / "f")
    (data / "s").symlink_to("f")
    os.mkfifo(data / "p")
    with open(data / "holes", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"in the middle")
    (data / "d").mkdir()
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, perm, who)
        for tag, perm, who in [
            (1, 7, 2**32 - 1),
            (2, 5, 1000),
            (4, 5, 2**32 - 1),
            (16, 7, 2**32 - 1),
            (32, 0, 2**32 - 1),
        ]
    )
    os.setxattr(data / "d", "system.posix_acl_access", acl)
    os.setxattr(data / "d", "system.posix_acl_default", acl)
    for path in ("f", "p", "holes", "d", "."):
        os.utime(data / path, ns=(10**18, 10**18 + 7))


def picture(data: Path) -> dict[str, object]:
    """What `seed` made, as far as it must be equal."""
    found: dict[str, object] = {}
    for path in (data, *sorted(data.iterdir())):
        status = path.lstat()
        found[path.name if path != data else "."] = (
            status.st_mode,
            (status.st_uid, status.st_gid),
            status.st_mtime_ns if not path.is_symlink() else 0,
            status.st_nlink,
            status.st_blocks < 100 if path.name == "holes" else 0,
            {
                name: os.getxattr(path, name, follow_symlinks=False)
                for name in os.listxattr(path, follow_symlinks=False)
            },
            path.read_bytes() if path.is_file() else b"",
        )
    return found


def test_an_empty_volume_is_filled(place: Place) -> None:
    seed(place.lower / "data")
    expected = picture(place.lower / "data")
    place.mounted("-v", "vol:/data", "-v", "plain:/data2:nocopy")
    assert picture(place.mnt / "data") == expected
    assert picture(place.data("vol")) == expected
    assert os.listdir(place.mnt / "data2") == []
    (place.mnt / "data/f").unlink()
    assert place.umount().status == 0
    place.mounted("-v", "vol:/data")
    assert not (place.mnt / "data/f").exists()  # not filled again
    assert place.umount().status == 0
    assert picture(place.lower / "data") == expected
    assert list(place.upper.iterdir()) == [place.upper / "data2"]


def test_nocopy_and_a_full_volume_hide_the_content(place: Place) -> None:
    seed(place.lower / "data")
    assert place.run("volume", "create", "full").status == 0
    (place.data("full") / "mine").touch()
    place.mounted("-v", "full:/data", "-v", "none:/d2:nocopy")
    assert os.listdir(place.mnt / "data") == ["mine"]
    assert place.umount().status == 0
    place.mounted("-v", "none:/data:nocopy")
    assert os.listdir(place.mnt / "data") == []
    assert place.umount().status == 0


def test_anonymous_volumes_live_with_their_mount(place: Place) -> None:
    place.mounted("-v", "/data", "--name", "web")
    (place.mnt / "data/x").write_text("x")
    (shown,) = place.inspect("web")["Mounts"]
    volume = str(shown["Name"])
    assert len(volume) == 64
    assert place.umount().status == 0
    assert place.run("volume", "prune", "-f").out.startswith("Total reclaimed")  # the mount is remembered
    place.mounted("-v", "/data", "--name", "web")
    assert (place.mnt / "data/x").read_text() == "x"  # and finds its volume again
    assert place.run("umount", "--rm", "-v", "web").status == 0
    assert not place.data(volume).exists()
    place.mounted("-v", "/data")
    (shown,) = place.inspect()["Mounts"]
    assert place.umount("--rm").status == 0
    assert place.data(str(shown["Name"])).exists()
    assert str(shown["Name"]) in place.run("volume", "prune", "-f").out
    assert not place.data(str(shown["Name"])).exists()


def test_volumes_from(place: Place) -> None:
    place.mounted("-v", f"{place.host}:/data", "-v", "vol:/v:ro", "--name", "first")
    other = place.another()
    other.mounted("--volumes-from", "first:ro", "-v", f"{other.host}:/v")
    assert (other.mnt / "data/inside").read_text() == "from the host\n"
    fails(errno.EROFS, (other.mnt / "data/x").touch)
    (other.mnt / "v/mine").touch()  # its own definition wins
    assert (other.host / "mine").exists()
    assert other.umount().status == place.umount().status == 0
    other.mounted("--volumes-from", str(place.mnt))  # not running any more
    (other.mnt / "data/x").touch()
    fails(errno.EROFS, (other.mnt / "v/x").touch)
    assert other.umount().status == 0
    assert place.run("umount", "--rm", "first").status == 0
    refused(other.mount("--volumes-from", "first"), 7, "first")


def test_a_whole_mount_in_a_file(place: Place) -> None:
    (place.base / "m.toml").write_text(
        f'lower = "lower"\nupper = "upper"\nmountpoint = "mnt"\nname = "filed"\nbind-mode = "{place.mode}"\n'
        '[[volume]]\nsource = "./host"\ntarget = "/data"\nreadonly = true\n'
        '[[volume]]\nsource = "vol"\ntarget = "/vol"\n'
    )
    assert place.run("mount", "--config", place.base / "m.toml", "-v", f"{place.host}:/more") == Said(0, "", "")
    assert (place.mnt / "data/inside").exists()
    fails(errno.EROFS, (place.mnt / "data/x").touch)
    (place.mnt / "more/y").touch()
    shown = place.inspect("filed")
    assert [(v["Destination"], v["RW"], v["BindMode"]) for v in shown["Mounts"]] == [
        ("/data", False, place.mode),
        ("/vol", True, place.mode),
        ("/more", True, place.mode),
    ]
    assert place.run("umount", "filed") == Said(0, "", "")
    assert place.inspect("filed")["State"] == "unmounted"


def test_a_name_is_given_once(place: Place) -> None:
    place.mounted("--name", "one")
    other = place.another()
    refused(other.mount("--name", "one"), 4, "one", str(place.mnt))
    assert place.umount().status == 0
    assert other.mount("--name", "one").status == 0
    assert other.umount("--rm").status == 0


def test_names_and_volumes_are_shown(place: Place) -> None:
    place.mounted("--name", "shown", "-v", f"{place.host}:/data:ro")
    (entry,) = listed(place.mnt)
    assert entry["name"] == "shown"
    (volume,) = place.inspect("shown")["Mounts"]
    assert volume == {
        "Type": "bind",
        "Source": str(place.host),
        "Destination": "/data",
        "Mode": "ro",
        "RW": False,
        "Propagation": "rprivate" if place.mode == "kernel" else "",
        "BindMode": place.mode,
    }
    assert place.umount().status == 0


def test_the_daemon_is_killed(place: Place) -> None:
    """A dead mount is no use of its volumes, and one umount clears it with all its binds."""
    place.mounted("-v", f"{place.host}:/data", "-v", "vol:/data/vol", "--name", "dead")
    (pid,) = daemons(place.mnt)
    os.kill(pid, signal.SIGKILL)
    assert wait_gone(pid)
    assert place.run("volume", "rm", "vol").status == 0
    said = place.umount()
    assert said.status == 0, said
    assert "cleared the dead mount" in said.err
    assert mounted_below(place.base) == []
    place.mounted("-v", f"{place.host}:/data", "-v", "vol:/data/vol", "--name", "dead")
    assert place.umount("--rm").status == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_undoes_the_binds(place: Place, number: int) -> None:
    mnt = place.mounted("-v", f"{place.host}:/data", "-v", "vol:/data/vol")
    (pid,) = daemons(mnt)
    os.kill(pid, number)
    assert wait_gone(pid)
    assert mounted_below(place.base) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_a_volume_is_filled(place: Place, number: signal.Signals) -> None:
    """Who fills it waits for the daemon, and the daemon for nobody; the next mount fills it anew."""
    full = place.lower / "full"
    full.mkdir()
    for name in range(3000):
        (full / str(name)).write_bytes(b"x" * 100)
    command = [sys.executable, "-m", "unionfs", "--root", place.store, "mount", "--bind-mode", place.mode]
    command += ["-v", f"{place.host}:/first", "-v", "vol:/full", place.lower, place.upper, place.mnt]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as started:
        deadline = time.monotonic() + 20
        while not list(place.store.glob("volumes/vol/**/100")) and not list(place.store.glob("**/100")):
            assert time.monotonic() < deadline, "nothing is filled"
            time.sleep(0.005)
        (*alive,) = daemons(place.mnt).keys() - {started.pid}
        for pid in alive:
            os.kill(pid, number)
        assert all(wait_gone(pid, 5) for pid in alive), "it outlives the signal"
        _, said = started.communicate(timeout=20)
    assert started.returncode
    assert len(said.splitlines()) == 1, said
    assert ("being ended" if number == signal.SIGTERM else "without a word") in said
    assert mounted_below(place.base) == []
    assert not list(place.data("vol").iterdir())
    place.mounted("-v", "vol:/full")
    assert len(list((place.mnt / "full").iterdir())) == 3000
    assert place.umount().status == 0


def test_lazily(place: Place) -> None:
    mnt = place.mounted("-v", f"{place.host}:/data")
    with open(mnt / "data/inside") as file:
        assert place.umount("--lazy").status == 0
        assert file.read() == "from the host\n"
    assert mounted_below(place.base) == []


# --- the kernel's binds -----------------------------------------------------------------------------


def test_busy_volumes_bring_all_back(kernel: Place) -> None:
    mnt = kernel.mounted("-v", f"{kernel.host}:/a", "-v", "vol:/b", "-v", f"{kernel.host}:/c:ro")
    before = mounted_below(kernel.base)
    with open(mnt / "a/inside"):
        refused(kernel.umount(), 4, "busy", f"pid {os.getpid()}")
        assert sorted(mounted_below(kernel.base)) == sorted(before)
        fails(errno.EROFS, (mnt / "c/x").touch)
        (mnt / "b/x").touch()
    with open(mnt / "file"):
        refused(kernel.umount(), 4, "busy", f"pid {os.getpid()}")
        assert sorted(mounted_below(kernel.base)) == sorted(before)
    assert kernel.umount() == Said(0, "", "")
    assert mounted_below(kernel.base) == []


def test_a_strange_mount_inside_keeps_it_busy(kernel: Place) -> None:
    mnt = kernel.mounted("-v", f"{kernel.host}:/a")
    (mnt / "own").mkdir()
    raw.mount("tmpfs", mnt / "own", "tmpfs")
    refused(kernel.umount(), 4, "busy", f"{mnt}/own")
    assert (mnt / "a/inside").exists()
    raw.umount2(mnt / "own", 0)
    assert kernel.umount() == Said(0, "", "")


def test_binds_are_recursive(kernel: Place) -> None:
    (kernel.host / "sub").mkdir()
    raw.mount("tmpfs", kernel.host / "sub", "tmpfs")
    (kernel.host / "sub/f").write_text("in the sub-mount")
    mnt = kernel.mounted(
        "-v", f"{kernel.host}:/a:ro", "--mount", f"type=bind,src={kernel.host},dst=/b,bind-nonrecursive"
    )
    assert (mnt / "a/sub/f").read_text() == "in the sub-mount"
    fails(errno.EROFS, (mnt / "a/sub/new").touch)
    assert os.listdir(mnt / "b/sub") == []
    assert kernel.umount() == Said(0, "", "")
    raw.umount2(kernel.host / "sub", 0)
    assert mounted_below(kernel.base) == []


def test_inotify_sees_changes_on_the_host(kernel: Place) -> None:
    mnt = kernel.mounted("-v", f"{kernel.host}:/data")
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_CLOEXEC)
    assert libc.inotify_add_watch(fd, os.fsencode(mnt / "data"), 0x100) >= 0  # IN_CREATE
    (kernel.host / "made-outside").touch()
    assert select.select([fd], [], [], 10)[0]
    assert b"made-outside" in os.read(fd, 4096)
    os.close(fd)
    assert kernel.umount().status == 0


def test_umount_recursively_by_other_means(kernel: Place) -> None:
    """`umount -R` is enough: the daemon ends, the store knows."""
    mnt = kernel.mounted("-v", "vol:/data", "--name", "plain")
    (pid,) = daemons(mnt)
    subprocess.run(["umount", "-R", mnt], check=True)
    assert wait_gone(pid)
    assert kernel.inspect("plain")["State"] == "unmounted"
    assert kernel.run("volume", "rm", "vol").status == 0


def test_host_speed_means_no_request(kernel: Place) -> None:
    """The daemon does not hear of what happens in a kernel bind: it may even be stopped."""
    mnt = kernel.mounted("-v", f"{kernel.host}:/data")
    fd = os.open(mnt / "data", os.O_RDONLY)
    (pid,) = daemons(mnt)
    os.kill(pid, signal.SIGSTOP)
    try:
        for number in range(100):
            os.close(os.open(f"f{number}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        assert len(os.listdir(fd)) == 101
    finally:
        os.kill(pid, signal.SIGCONT)
        os.close(fd)
    assert kernel.umount().status == 0
