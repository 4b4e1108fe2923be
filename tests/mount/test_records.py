"""State files: who may write them, and what root makes of those that other users have written."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw
from tests.support.canary import Canary
from tests.support.cli import refused, unionfs
from tests.support.mounts import Stack
from unionfs.host import control

ALICE = 12031 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""A user whom no test has that may run at the same time."""

ROOM = Path(f"/tmp/.unionfs-{ALICE}")


@pytest.fixture
def room() -> Iterator[Path]:
    """The directory in which ALICE may keep state files."""
    clear()
    ROOM.mkdir(mode=0o700)
    os.chown(ROOM, ALICE, ALICE)
    yield ROOM
    clear()


def clear(path: Path = ROOM) -> None:
    """Remove it, or what stands in its place."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def alices_mount(ground: Path) -> Iterator[Path]:
    """A dead mount of ALICE's, for which root looks at her state files."""
    mnt = ground / "hers"
    mnt.mkdir()
    os.close(raw.mount_fuse(mnt, ALICE))
    try:
        yield mnt
    finally:
        with suppress(OSError):
            raw.umount2(mnt, raw.MNT_DETACH)


def plant(name: str, content: bytes, *, uid: int = ALICE) -> Path:
    """A file of ALICE's in her directory."""
    path = ROOM / name
    path.write_bytes(content)
    os.chown(path, uid, uid)
    os.utime(path, (0, 0))
    return path


def listed() -> list[dict[str, Any]]:
    """What root's `unionfs ls` shows."""
    said = unionfs("ls", "--json")
    assert said.status == 0, said.err
    found: list[dict[str, Any]] = json.loads(said.out)
    return found


def record(**values: object) -> dict[str, object]:
    """A record that makes sense, with these values in it."""
    own = {"pid": os.getpid(), "start": control.process_start(os.getpid()), "pidns": control.pid_namespace()}
    texts = {"mountpoint": "/somewhere", "dev": "0:9999", "name": None, "upper": None, "work": None, "version": "0"}
    rest = {
        "lowers": [],
        "data_lowers": [],
        "options": {},
        "volumes": [],
        "store": None,
        "log": None,
        "mounted_at": 4e9,
    }
    return {**own, **texts, **rest, **values}


def test_a_users_state_directory_is_not_trusted(ground: Path, room: Path) -> None:
    """What is no plain file is neither waited for nor followed; what is no record does no harm, and nothing else is removed."""
    canary = Canary(ground / "canary")
    os.mkfifo(room / "fifo.json")
    (room / "zero.json").symlink_to("/dev/zero")
    (room / "link.json").symlink_to(canary.where / "1.json")
    (room / "dir.json").mkdir()
    plant("deep.json", b"[" * 100_000)
    plant("big.json", b" " * (3 << 20))
    plant("text.json", b'"text"')
    plant("roots.json", json.dumps(record(mountpoint="/roots")).encode(), uid=0)
    odd: dict[str, list[object]] = {
        "pid": [0, -1, 1 << 40, "1", None, [], 1.5],
        "start": ["1", None, -1, 1 << 70],
        "mountpoint": [1, None, []],
        "lowers": ["text", {"a": 1}, [1], None],
        "volumes": [[1], [{}], [{"Destination": 1}], {}],
        "options": [[], None],
        "mounted_at": [1e400, -1e400, "now", float("nan"), 1e300],
        "name": [1],
    }
    for field, values in odd.items():
        for number, value in enumerate(values):
            plant(f"{field}{number}.json", json.dumps(record(**{field: value})).encode())
    with alices_mount(ground) as mnt:
        shown = {entry["mountpoint"]: entry["state"] for entry in listed()}
        assert str(mnt) in shown
        assert "/roots" not in shown
        assert "/somewhere" not in shown
        assert unionfs("ls").status == 0
        refused(unionfs("umount", mnt), 2, f"mounted by user {ALICE}")
    canary.check()


def test_the_directory_itself_may_be_exchanged_at_any_time(ground: Path, room: Path) -> None:
    """ALICE puts a link to a directory with such names in its place, again and again, while root lists and unmounts."""
    canary = Canary(ground / "canary")
    evil = ROOM.with_name(ROOM.name + "-evil")
    clear(evil)
    evil.symlink_to(canary.where)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            raw.renameat2(ROOM, evil, raw.RENAME_EXCHANGE)

    plant("1.json", b"{not json")
    thread = threading.Thread(target=swap)
    with alices_mount(ground):
        thread.start()
        try:
            for _ in range(200):
                for entry in control.entries():
                    if entry.path is not None and entry.path.startswith(str(ROOM)):
                        control.remove(entry.path)
                with suppress(OSError):
                    control._store(str(ROOM / "1.json"), control.Record(**record()))  # type: ignore[arg-type]
        finally:
            stop.set()
            thread.join()
    canary.check()
    for path in (ROOM, evil):
        clear(path)


def test_nobody_can_claim_anothers_mount(ours: Stack, ground: Path, room: Path) -> None:
    """A record of ALICE's that names root's mount, and a process that runs, is no record of that mount."""
    root = ours.mount()
    device = os.stat(root).st_dev
    claim = record(mountpoint=str(root), dev=f"{os.major(device)}:{os.minor(device)}", name="forged", pid=1)
    plant("1.1.json", json.dumps({**claim, "start": control.process_start(1)}).encode())
    with alices_mount(ground):
        (entry,) = [entry for entry in listed() if entry["mountpoint"] == str(root)]
    assert (entry["state"], entry["name"], entry["pid"]) == ("mounted", None, ours.daemon())


@pytest.mark.parametrize("what", ["mode", "owner", "link"])
def test_an_unsafe_state_directory_is_not_used(ground: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may not write there, nor have put a link in its place; else the next place is taken, or none."""
    canary = Canary(ground / "canary")
    runtime = ground / "runtime"
    (runtime / "elsewhere").mkdir(parents=True)
    place = runtime / "unionfs"
    if what == "link":
        place.symlink_to(canary.where)
    else:
        place.mkdir(mode=0o700)
        os.chmod(place, 0o777) if what == "mode" else os.chown(place, ALICE, ALICE)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert control.state_directory() != str(place)
    if what != "owner":  # root may write to what others own, if they can't exchange it
        with pytest.raises(OSError, match=r"others may write|Not a directory"):
            control._store(str(place / "1.json"), control.Record(**record()))  # type: ignore[arg-type]
    canary.check()


def test_state_files_are_their_owners(ours: Stack) -> None:
    ours.mount()
    directory = control.state_directory()
    assert directory is not None
    assert stat.S_IMODE(os.stat(directory).st_mode) & 0o077 == 0
    (path,) = Path(directory).glob(f"{ours.daemon()}.*.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_log_made_anew_is_nobody_elses_to_write_to(ours: Stack) -> None:
    ours.mount("", extra=["--log-level", "info"])
    os.rename(ours.log, ours.log.with_name("rotated"))
    os.kill(ours.daemon(), 10)
    for _ in range(100):
        with suppress(FileNotFoundError):
            if "dump" in ours.log.read_text():
                break
        threading.Event().wait(0.05)
    assert stat.S_IMODE(ours.log.stat().st_mode) == 0o644
