"""`unionfs volume ...` as a person uses it: what it prints, what it refuses, and what it does with real mounts."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.test_volumes import Place
from tests.support.cli import Said, program, refused, unionfs
from tests.support.mounts import daemons, environment
from tests.support.people import ALICE, opened_interpreter
from unionfs.store.volumes import Store

USAGE, LAYERS, BUSY, VOLUMES = 2, 3, 4, 7


class Volumes:
    """A store and the commands on it."""

    def __init__(self, base: Path) -> None:
        self.base, self.root = base, base / "store"

    def __call__(self, *words: str | Path) -> Said:
        return unionfs("--root", self.root, "volume", *words)

    def good(self, *words: str | Path) -> str:
        """Run a command that must work and complain of nothing; return what it prints."""
        said = self(*words)
        assert (said.status, said.err) == (0, ""), said
        return said.out

    def data(self, name: str) -> Path:
        return self.root / "volumes" / name / "_data"

    def names(self) -> list[str]:
        return self.good("ls", "-q").split()


@pytest.fixture
def volume(ground: Path) -> Volumes:
    return Volumes(ground)


@pytest.fixture
def place(ground: Path) -> Iterator[Place]:
    made = Place(ground, "auto")
    yield made
    made.clear()


# --- create, ls, inspect --------------------------------------------------------------------------


def test_create_prints_the_name(volume: Volumes) -> None:
    assert volume.good("create", "web") == "web\n"
    assert volume.good("create", "web") == "web\n"
    assert re.fullmatch(r"[0-9a-f]{64}\n", volume.good("create"))
    assert volume.data("web").is_dir()


def test_inspect_is_dockers(volume: Volumes) -> None:
    device = volume.base / "device"
    volume.good("create", "--label", "app=shop", "--label", "bare", "--driver", "local", "web")
    volume.good("create", "--opt", "type=none", "-o", f"device={device}", "-o", "o=bind", "dev")
    said = volume.good("inspect", "web", "dev")
    web, dev = json.loads(said)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", web["CreatedAt"])
    assert web == {
        "CreatedAt": web["CreatedAt"],
        "Driver": "local",
        "Labels": {"app": "shop", "bare": ""},
        "Mountpoint": str(volume.data("web")),
        "Name": "web",
        "Options": {},
        "Scope": "local",
    }
    assert list(web) == ["CreatedAt", "Driver", "Labels", "Mountpoint", "Name", "Options", "Scope"]
    assert dev["Options"] == {"type": "none", "device": str(device), "o": "bind"}
    assert dev["Mountpoint"] == str(volume.data("dev"))
    assert said.startswith('[\n    {\n        "CreatedAt"')
    lines = volume.good("inspect", "--format", "json", "web", "dev").splitlines()
    assert [json.loads(line) for line in lines] == [web, dev]
    assert json.loads(volume.good("ls", "--json")) == [dev, web]


def test_inspect_prints_what_was_found(volume: Volumes) -> None:
    volume.good("create", "web")
    said = volume("inspect", "nope", "web", "none")
    assert said.status == VOLUMES
    assert [found["Name"] for found in json.loads(said.out)] == ["web"]
    assert said.err == "unionfs: no such volume: nope\nunionfs: no such volume: none\n"
    assert volume("inspect", "nope") == Said(VOLUMES, "[]\n", "unionfs: no such volume: nope\n")


def test_ls(volume: Volumes) -> None:
    assert volume.good("ls") == "DRIVER    VOLUME NAME\n"
    assert volume.good("ls", "--json") == "[]\n"
    for name in ("web", "db"):
        volume.good("create", name, "--label", f"app={name}")
    assert volume.good("ls") == "DRIVER    VOLUME NAME\nlocal     db\nlocal     web\n"
    assert volume.good("ls", "-q") == volume.good("list", "-q") == "db\nweb\n"
    first, _ = map(json.loads, volume.good("ls", "--format", "json").splitlines())
    assert first == {
        "Availability": "N/A",
        "Driver": "local",
        "Group": "N/A",
        "Labels": "app=db",
        "Links": "N/A",
        "Mountpoint": str(volume.data("db")),
        "Name": "db",
        "Scope": "local",
        "Size": "N/A",
        "Status": "N/A",
    }


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ([], "cache web web-old"),
        (["name=web"], "web web-old"),
        (["name=^web$"], "web"),
        (["name=^web$", "name=ache"], "cache web"),
        (["name=["], ""),
        (["label=tier"], "web web-old"),
        (["label=tier=1"], "web"),
        (["label=tier", "label=old"], "web-old"),
        (["driver=local"], "cache web web-old"),
        (["driver=nfs"], ""),
        (["dangling=true"], "cache web web-old"),
        (["dangling=0"], ""),
        (["dangling=1", "dangling=0"], "cache web web-old"),
    ],
)
def test_ls_filters(volume: Volumes, filters: list[str], found: str) -> None:
    store = Store.open(str(volume.root))
    store.create("web", labels={"tier": "1"})
    store.create("web-old", labels={"tier": "2", "old": ""})
    store.create("cache")
    words = [word for text in filters for word in ("--filter", text)]
    assert volume.good("ls", "-q", *words).split() == found.split()


# --- rm, prune, rename, clone ---------------------------------------------------------------------


def test_rm(volume: Volumes) -> None:
    for name in ("one", "two", "three"):
        volume.good("create", name)
    assert volume.good("rm", "one") == "one\n"
    said = volume("rm", "nope", "two", "none")
    assert said == Said(VOLUMES, "two\n", "unionfs: no such volume: nope\nunionfs: no such volume: none\n")
    assert volume.good("rm", "-f", "nope", "three") == "nope\nthree\n"
    assert volume.names() == []


def test_prune(volume: Volumes) -> None:
    anonymous = volume.good("create").strip()
    (volume.data(anonymous) / "file").write_bytes(bytes(12_345))
    volume.good("create", "web", "--label", "keep")
    volume.good("create", "old")
    assert volume.good("prune", "-f") == f"Deleted Volumes:\n{anonymous}\n\nTotal reclaimed space: 12.35kB\n"
    assert volume.good("prune", "--force") == "Total reclaimed space: 0B\n"
    assert volume.names() == ["old", "web"]
    assert "Deleted" not in volume.good("prune", "-f", "-a", "--filter", "label=nope")
    assert "\nold\n" in volume.good("prune", "-f", "--filter", "all=true", "--filter", "label!=keep")
    assert volume.names() == ["web"]
    assert "\nweb\n" in volume.good("prune", "--all", "--force")


def on_a_terminal(words: list[str], typed: str) -> tuple[int, str]:
    """Run a program on a terminal of its own; return its status and all that appeared there."""
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, env=environment() | {"TERM": "xterm"}
        )
        os.close(slave)
        os.write(master, typed.encode())
        seen = b""
        while True:
            try:
                seen += os.read(master, 65536)
            except OSError:  # EIO: the other side has gone
                break
        return process.wait(), seen.decode()
    finally:
        os.close(master)


def test_prune_asks(volume: Volumes) -> None:
    volume.good("create")
    command = [sys.executable, "-m", "unionfs", "--root", str(volume.root), "volume", "prune"]
    status, seen = on_a_terminal(command, "n\n")
    assert status == 0
    assert "WARNING! This will remove anonymous local volumes not used by at least one mount." in seen
    assert "Are you sure you want to continue? [y/N]" in seen
    assert len(volume.names()) == 1
    status, seen = on_a_terminal(command, "y\n")
    assert status == 0
    assert "Total reclaimed space: 0B" in seen
    assert volume.names() == []
    refused(volume("prune"), USAGE, "no terminal", "--force")


def test_rename_and_clone(volume: Volumes) -> None:
    volume.good("create", "web", "--label", "app=shop")
    (volume.data("web") / "file").write_text("text")
    os.chown(volume.data("web"), 12, 34)
    assert volume.good("rename", "web", "new") == ""
    assert volume.good("clone", "new", "copy") == "copy\n"
    (volume.data("new") / "file").write_text("changed")
    assert (volume.data("copy") / "file").read_text() == "text"
    assert volume.data("copy").stat().st_uid == 12
    assert json.loads(volume.good("inspect", "copy"))[0]["Labels"] == {"app": "shop"}
    assert volume.names() == ["copy", "new"]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "parts"),
    [
        ("create x", USAGE, "'x' is too short"),
        ("create a/b", USAGE, "'a/b'"),
        ("create .hidden", USAGE, "begin with a letter or digit"),
        ("create new --driver nfs", USAGE, "--driver nfs|only local"),
        ("create new -o type=nfs,device=/x", USAGE, "type=nfs|device=DIR"),
        ("create new -o type=none", USAGE, "device=DIR is missing"),
        ("create new -o device=x", USAGE, "device=x|absolute"),
        ("create new -o size=1g", USAGE, "size=1g"),
        ("create new --label =x", USAGE, "KEY=VALUE"),
        ("create web --label other=1", VOLUMES, "web exists with other labels"),
        ("ls --filter x=y", USAGE, "x=y|dangling"),
        ("ls --filter dangling=maybe", USAGE, "dangling=maybe|true or false"),
        ("ls --format {{.Name}}", USAGE, "{{.Name}}|json"),
        ("inspect nope --format {{.Name}}", USAGE, "{{.Name}}|jq"),
        ("rm nope", VOLUMES, "no such volume: nope"),
        ("rm ../x", VOLUMES, "no such volume: ../x"),
        ("prune -f --filter dangling=1", USAGE, "dangling=1|label!="),
        ("rename nope new", VOLUMES, "no such volume: nope"),
        ("rename web a", USAGE, "'a' is too short"),
        ("rename web taken", VOLUMES, "taken exists"),
        ("clone nope new", VOLUMES, "no such volume: nope"),
        ("clone web taken", VOLUMES, "taken exists|another name"),
        ("clone gone new", VOLUMES, "gone|/nowhere/at/all"),
        ("backup web", USAGE, "NAME of a volume"),
        ("backup nope FILE", VOLUMES, "no such volume: nope"),
        ("backup web /nowhere/file.tar", VOLUMES, "/nowhere/file.tar|No such file"),
        ("backup web file.zip", VOLUMES, "file.zip|.tar.gz"),
        ("backup --volumes-from nope FILE", VOLUMES, "nope|--name"),
        ("backup --volumes-from nope web FILE", USAGE, "only a FILE"),
        ("restore web /nowhere/file.tar", VOLUMES, "/nowhere/file.tar|No such file"),
        ("restore full FILE", VOLUMES, "full is not empty|--force"),
        ("restore web FILE", VOLUMES, "FILE|no tar archive"),
        ("restore new FILE", VOLUMES, "no tar archive"),
        ("restore gone FILE", VOLUMES, "gone|/nowhere/at/all"),
        ("restore .new FILE", USAGE, "'.new'"),
    ],
)
def test_errors_are_one_clear_line(volume: Volumes, words: str, status: int, parts: str) -> None:
    file = volume.base / "file"
    file.write_text("no archive " * 1000)
    store = Store.open(str(volume.root))
    for name in ("web", "taken", "full"):
        store.create(name)
    store.create("gone", options={"device": "/nowhere/at/all"})
    (volume.data("full") / "file").touch()
    said = volume(*[str(file) if word == "FILE" else word for word in words.split()])
    refused(said, status, *[str(file) if part == "FILE" else part for part in parts.split("|")])
    assert [found.name for found in store.volumes()] == ["full", "gone", "taken", "web"]
    assert sorted(os.listdir(volume.root / "volumes")) == ["full", "gone", "taken", "web"]


def test_stores_that_can_t_be_used(volume: Volumes) -> None:
    volume.good("create", "web")
    os.chmod(volume.root, 0o777)
    refused(volume("ls"), VOLUMES, "others may write", "chmod")
    os.chmod(volume.root, 0o711)
    (volume.root / "unionfs.db").write_text("rubbish " * 1000)
    refused(volume("ls"), VOLUMES, "unionfs.db", "not a database")
    refused(unionfs("--root", "/proc/nowhere", "volume", "ls"), VOLUMES, "/proc/nowhere")


def test_an_ordinary_user_has_a_store_of_their_own(ground: Path) -> None:
    home = ground / "home"
    home.mkdir()
    os.chown(home, ALICE, ALICE)
    script = f"""
    set -e
    unionfs() {{ "{sys.executable}" -m unionfs "$@"; }}
    export HOME='{home}'
    unionfs volume create web
    unset XDG_DATA_HOME
    echo text > "$HOME/.local/share/unionfs/volumes/web/_data/file"
    mkdir "$HOME/.local/share/unionfs/volumes/web/_data/closed"
    touch "$HOME/.local/share/unionfs/volumes/web/_data/closed/file"
    chmod 500 "$HOME/.local/share/unionfs/volumes/web/_data/closed"
    unionfs volume backup web - > "$HOME/web.tar"
    unionfs volume clone web copy
    unionfs volume restore other - < "$HOME/web.tar"
    unionfs volume rm web copy other
    XDG_DATA_HOME="$HOME/data" unionfs volume create there
    test -d "$HOME/data/unionfs/volumes/there/_data"
    """
    user = [
        "setpriv",
        f"--reuid={ALICE}",
        f"--regid={ALICE}",
        "--clear-groups",
        "--inh-caps=-all",
        "bash",
        "-c",
        script,
    ]
    outer = f'set -e\n{opened_interpreter()}\nexec "$@"'
    said = program(["unshare", "--mount", "--propagation", "private", "bash", "-c", outer, "sh", *user])
    assert said == Said(0, "web\ncopy\nweb\ncopy\nother\nthere\n", "")
    assert os.listdir(home / ".local/share/unionfs/volumes") == []


# --- backup and restore ---------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.zst"])
def test_backup_and_restore(volume: Volumes, ending: str) -> None:
    volume.good("create", "web")
    data = volume.data("web")
    (data / "file").write_text("text")
    os.link(data / "file", data / "link")
    os.chmod(data, 0o2750)
    os.utime(data, ns=(10**9 + 1, 10**9 + 2))
    archive = volume.base / f"web{ending}"
    assert volume.good("backup", "web", archive) == ""
    (data / "file").write_text("changed")
    (data / "added").touch()
    refused(volume("restore", "web", archive), VOLUMES, "not empty", "--force")
    assert volume.good("restore", "--force", "web", archive) == ""
    assert volume.good("restore", "other", archive) == ""
    for name in ("web", "other"):
        data = volume.data(name)
        assert sorted(os.listdir(data)) == ["file", "link"]
        assert (data / "file").read_text() == "text"
        assert (data / "file").stat().st_nlink == 2
        assert data.stat().st_mode & 0o7777 == 0o2750
        assert data.stat().st_mtime_ns == 10**9 + 2
    assert sorted(os.listdir(volume.root / "volumes")) == ["other", "web"]


def test_a_failed_restore_leaves_the_old_content(volume: Volumes) -> None:
    device = volume.base / "device"
    device.mkdir()
    volume.good("create", "web")
    volume.good("create", "dev", "-o", f"device={device}")
    archive = volume.base / "web.tar"
    (volume.data("web") / "big").write_bytes(os.urandom(1 << 20))
    volume.good("backup", "web", archive)
    archive.write_bytes(archive.read_bytes()[: 1 << 19])
    (device / "old").write_text("old")
    inode = volume.data("web").stat().st_ino
    for name in ("web", "dev", "new"):
        refused(volume("restore", "-f", name, archive), VOLUMES, str(archive))
    assert os.listdir(volume.data("web")) == ["big"]
    assert volume.data("web").stat().st_ino == inode
    assert os.listdir(device) == ["old"]
    assert sorted(os.listdir(volume.root / "volumes")) == volume.names() == ["dev", "web"]


def test_through_a_pipe_and_to_a_device(volume: Volumes) -> None:
    device = volume.base / "device"
    device.mkdir()
    volume.good("create", "web")
    volume.good("create", "dev", "-o", f"device={device}")
    (volume.data("web") / "file").write_text("text")
    (device / "old").touch()
    command = f"'{sys.executable}' -m unionfs --root '{volume.root}' volume"
    script = f"set -o pipefail; {command} backup web - | {command} restore --force dev -"
    assert program(["bash", "-c", script]) == Said(0, "", "")
    assert os.listdir(device) == ["file"]
    assert (device / "file").read_text() == "text"


def test_progress_is_for_people(volume: Volumes) -> None:
    volume.good("create", "web")
    (volume.data("web") / "file").write_bytes(bytes(3 << 20))
    command = [sys.executable, "-m", "unionfs", "--root", str(volume.root), "volume"]
    for words in (["backup", "web", f"{volume.base}/web.tar"], ["restore", "new", f"{volume.base}/web.tar"]):
        status, seen = on_a_terminal([*command, *words], "")
        assert status == 0, seen
        assert words[0] in seen
        assert "MB" in seen
    status, seen = on_a_terminal([*command, "clone", "web", "copy"], "")
    assert status == 0
    assert "cloning" in seen
    status, seen = on_a_terminal([*command, "backup", "web", "-"], "")
    assert status == USAGE
    assert "not for the terminal" in seen


# --- with mounts ----------------------------------------------------------------------------------


def test_a_volume_in_use(place: Place) -> None:
    place.mounted("--name", "shop", "-v", "web:/data")
    (place.mnt / "data" / "file").write_text("text")
    for words in (["rm", "web"], ["rm", "-f", "web"], ["rename", "web", "other"]):
        refused(place.run("volume", *words), BUSY, "web is in use by", str(place.mnt), "shop")
    archive = place.base / "web.tar"
    assert place.run("volume", "backup", "web", archive).status == 0
    with tarfile.open(archive) as tar:
        assert tar.getnames() == [".", "./file"]
    refused(place.run("volume", "restore", "--force", "web", archive), BUSY, "in use by", str(place.mnt))
    assert place.run("volume", "prune", "--all", "--force").out == "Total reclaimed space: 0B\n"
    assert place.run("volume", "ls", "-q", "--filter", "dangling=false").out == "web\n"
    assert place.run("volume", "clone", "web", "copy").status == 0
    assert place.umount() == Said(0, "", "")
    assert place.run("volume", "prune", "--all", "--force").out.startswith("Deleted Volumes:\ncopy\n")
    assert place.run("volume", "rm", "web") == Said(0, "web\n", "")


def test_all_volumes_of_a_mount(place: Place) -> None:
    """Docker's recipe: everything of one mount in an archive, and back into another one elsewhere."""
    words = ["--name", "shop", "-v", "web:/srv/data", "-v", "/var/cache", "-v", f"{place.host}:/host"]
    place.mounted(*words)
    (place.mnt / "srv/data/file").write_text("data")
    (place.mnt / "var/cache/file").write_text("cache")
    archive = place.base / "shop.tar.gz"
    said = place.run("volume", "backup", "--volumes-from", "shop", archive)
    assert said == Said(0, "", f"unionfs: {place.host} at /host is no volume: left out\n")
    with tarfile.open(archive) as tar:
        assert {"srv/data/file", "var/cache/file"} <= set(tar.getnames())
        assert not any(name.startswith("host") for name in tar.getnames())
    refused_ = place.run("volume", "restore", "--force", "--volumes-from", place.mnt, archive)
    assert refused_.status == BUSY
    assert str(place.mnt) in refused_.err
    assert place.umount() == Said(0, "", "")

    elsewhere = place.another()
    elsewhere.store = place.base / "elsewhere"
    assert elsewhere.mount(*words[:-2]) == Said(0, "", "")
    (elsewhere.mnt / "srv/data/other").touch()
    assert elsewhere.umount() == Said(0, "", "")
    refused(elsewhere.run("volume", "restore", "--volumes-from", "shop", archive), VOLUMES, "not empty")
    assert elsewhere.run("volume", "restore", "-f", "--volumes-from", "shop", archive) == Said(0, "", "")
    assert elsewhere.mount(*words[:-2]) == Said(0, "", "")
    assert os.listdir(elsewhere.mnt / "srv/data") == ["file"]
    assert (elsewhere.mnt / "srv/data/file").read_text() == "data"
    assert (elsewhere.mnt / "var/cache/file").read_text() == "cache"
    assert elsewhere.umount() == Said(0, "", "")


def test_the_daemon_is_killed_while_it_fills(place: Place) -> None:
    """What it had done is thrown away, and the next mount starts anew."""
    content = place.lower / "data"
    content.mkdir()
    for number in range(1500):
        (content / f"file{number}").write_text(f"text {number}")
    kills = 0
    for wait in (0.0, 0.02, 0.05, 0.1, 0.2):
        command = [sys.executable, "-m", "unionfs", "--root", str(place.store), "mount", "-v", "web:/data"]
        layers = [str(place.lower), str(place.upper), str(place.mnt)]
        mounting = subprocess.Popen([*command, *layers], env=environment(), stderr=subprocess.PIPE)
        staged = place.data("web").with_name("_fill")
        deadline = time.monotonic() + 20
        while not staged.exists() and mounting.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        hangs = time.monotonic() >= deadline
        time.sleep(wait)
        for pid in daemons(place.base):
            os.kill(pid, signal.SIGKILL)
        mounting.communicate()
        kills += mounting.returncode != 0
        place.clear()
        assert not hangs, "the mount neither fills nor ends"
        assert len(os.listdir(place.data("web"))) in (0, 1500)
        if os.listdir(place.data("web")):
            assert place.run("volume", "rm", "web").out == "web\n"
    assert kills, "no mount was ever interrupted"
    assert place.mount("-v", "web:/data") == Said(0, "", "")
    assert len(os.listdir(place.mnt / "data")) == 1500
    assert place.umount() == Said(0, "", "")
    assert place.run("volume", "prune", "-f").status == 0
    assert os.listdir(place.store / "volumes") == ["web"]


def test_mounts_without_volumes(place: Place) -> None:
    place.mounted("--name", "plain", "-v", f"{place.host}:/host")
    said = place.run("volume", "backup", "--volumes-from", "plain", place.base / "x.tar")
    assert said.status == VOLUMES
    assert said.err.splitlines()[-1] == f"unionfs: {place.mnt} (plain) has no volumes"
    assert place.umount() == Said(0, "", "")
