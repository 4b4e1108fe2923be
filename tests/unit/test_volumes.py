"""The volume store without a mount: volumes, who uses them, first content, replaced content."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.mounts import environment
from tests.support.people import ALICE, REPOSITORY
from unionfs.archives.copytree import copy_tree
from unionfs.errors import BusyError, LayerError, UsageError, VolumeError
from unionfs.host import control
from unionfs.store.volumes import Acquired, Store, check_name, parse_options
from unionfs.volumespec import parse_mount_words, parse_volume


@pytest.fixture
def store(ground: Path) -> Store:
    return Store.open(str(ground / "root"))


def mount(
    store: Store, *volumes: str, name: str | None = None, mountpoint: str = "/mnt", pid: int | None = None
) -> tuple[int, list[Acquired]]:
    """Record a mount whose daemon is this process, or another one."""
    pid = os.getpid() if pid is None else pid
    specs = [parse_mount_words(text) if "=" in text else parse_volume(text) for text in volumes]
    start = control.process_start(pid)
    assert start is not None
    return store.acquire(
        name=name, mountpoint=mountpoint, specs=specs, pid=pid, start=start, pidns=control.pid_namespace()
    )


def mounted_by_a_dead_one(store: Store, *volumes: str, name: str | None = None, mountpoint: str = "/mnt") -> None:
    with subprocess.Popen(["sleep", "60"]) as daemon:
        mount(store, *volumes, name=name, mountpoint=mountpoint, pid=daemon.pid)
        daemon.kill()


def names(store: Store) -> list[str]:
    return [volume.name for volume in store.volumes()]


def entries(store: Store) -> list[str]:
    return sorted(os.listdir(os.path.join(store.root, "volumes")))


# --- names and options ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["web", "0a", "a.b_c-d", "x" * 255])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "a", ".a", "-a", "a/b", "..", "a b", "ä1", "a\n", "x" * 256])
def test_bad_names(name: str, store: Store) -> None:
    with pytest.raises(UsageError, match="volume name"):
        store.create(name)
    with pytest.raises(VolumeError, match="no such volume"):
        store.find(name)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["type=none,device=/srv,o=bind"], {"type": "none", "device": "/srv", "o": "bind"}),
        (["type=none", "device=/srv/", "o=bind,ro"], {"type": "none", "device": "/srv", "o": "bind,ro"}),
        (["device=/a,b,o=rw"], {"device": "/a,b", "o": "rw"}),
    ],
)
def test_options(words: Sequence[str], options: dict[str, str]) -> None:
    assert parse_options(words) == options


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("type=nfs,device=/x", "type=nfs"),
        ("type=none", "device"),
        ("device=rel", "absolute"),
        ("size=1", "size=1"),
        ("bind", "bind"),
        ("o=exec,device=/x", "exec"),
    ],
)
def test_bad_options(word: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        parse_options([word])


# --- volumes --------------------------------------------------------------------------------------


def test_modes_are_dockers(store: Store) -> None:
    volume = store.create("web")
    for path, mode in {
        store.root: 0o711,
        f"{store.root}/unionfs.db": 0o600,
        f"{store.root}/volumes": 0o701,
        f"{store.root}/volumes/web": 0o701,
        volume.mountpoint: 0o755,
    }.items():
        assert stat.S_IMODE(os.stat(path).st_mode) == mode, path


def test_create_is_idempotent(store: Store) -> None:
    made = store.create("web", labels={"a": "1"})
    assert store.create("web") == made == store.create("web", labels={"a": "1"}) == store.find("web")
    with pytest.raises(VolumeError, match="exists with other labels"):
        store.create("web", labels={"a": "2"})
    with pytest.raises(VolumeError, match="exists with other options"):
        store.create("web", options={"device": "/srv"})
    anonymous = store.create()
    assert anonymous.anonymous
    assert len(anonymous.name) == 64
    assert not made.anonymous


def test_content_without_a_row_is_taken_over(store: Store) -> None:
    """The database may be lost; what lies in the directories is the user's."""
    Path(store.create("web").path, "file").write_text("mine")
    os.unlink(f"{store.root}/unionfs.db")
    assert names(store) == []
    store.clean()
    assert Path(store.create("web").path, "file").read_text() == "mine"
    os.mkdir(f"{store.root}/volumes/other")
    for step in (lambda: store.create("other"), lambda: store.rename("web", "other")):
        with pytest.raises(VolumeError, match=r"in the way.*move it elsewhere"):
            step()
    assert names(store) == ["web"]


def test_roots_that_are_refused(ground: Path, store: Store) -> None:
    os.chmod(store.root, 0o777)
    with pytest.raises(VolumeError, match=r"others may write.*chmod"):
        Store.open(store.root)
    os.chmod(store.root, 0o711)
    os.chown(store.root, ALICE, ALICE)
    with pytest.raises(VolumeError, match="belongs to another user"):
        Store.open(store.root)
    (ground / "file").touch()
    with pytest.raises(VolumeError, match="file"):
        Store.open(str(ground / "file"))
    with pytest.raises(VolumeError, match="can't be used"):
        Store.open(str(ground / "file" / "below"))


def test_databases_that_are_refused(store: Store) -> None:
    store.create("web")
    path = f"{store.root}/unionfs.db"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(VolumeError, match="newer unionfs"):
        store.volumes()
    Path(path).write_bytes(b"no database" * 1000)
    with pytest.raises(VolumeError, match=r"database .* can't be used"):
        store.volumes()


def test_remove(store: Store, ground: Path) -> None:
    volume = store.create("web")
    Path(volume.path, "data").write_bytes(bytes(5000))
    Path(volume.path, "kept").write_bytes(bytes(3000))
    os.link(f"{volume.path}/kept", ground / "kept")
    with open(f"{volume.path}/sparse", "wb") as file:
        file.truncate(1 << 40)
    os.symlink(ground, f"{volume.path}/link")
    assert 5000 <= store.remove("web") <= 10_000
    assert (ground / "kept").exists()
    assert entries(store) == []
    with pytest.raises(VolumeError, match="no such volume: web"):
        store.remove("web")


def test_remove_a_deep_tree(store: Store) -> None:
    fd = os.open(store.create("web").path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    store.remove("web")
    assert entries(store) == []


def test_a_mount_inside_is_never_entered(store: Store, ground: Path) -> None:
    (ground / "outside").mkdir()
    (ground / "outside" / "file").touch()
    inside = Path(store.create("web").path, "inside")
    inside.mkdir()
    subprocess.run(["mount", "--bind", str(ground / "outside"), str(inside)], check=True)
    try:
        for step in (lambda: store.remove("web"), lambda: store.rename("web", "other")):
            with pytest.raises(BusyError, match=f"unmount {inside}"):
                step()
        assert store.prune(lambda volume: True) == ([], 0, [])
    finally:
        raw.umount2(inside, 0)
    store.remove("web")
    assert (ground / "outside" / "file").exists()


def test_the_device_stays_when_its_volume_goes(store: Store, ground: Path) -> None:
    (ground / "device").mkdir()
    (ground / "device" / "file").touch()
    volume = store.create("web", options={"type": "none", "device": str(ground / "device")})
    assert volume.path == str(ground / "device")
    assert volume.mountpoint == f"{store.root}/volumes/web/_data"
    assert store.remove("web") == 0
    assert (ground / "device" / "file").exists()


def test_rename(store: Store) -> None:
    volume = store.create("web", labels={"a": "1"})
    Path(volume.path, "file").touch()
    store.create("taken")
    mount_id, _ = mount(store, "web:/data", name="shop")
    with pytest.raises(BusyError, match=r"in use by /mnt \(shop\)"):
        store.rename("web", "new")
    store.release(mount_id)
    with pytest.raises(VolumeError, match="taken exists"):
        store.rename("web", "taken")
    with pytest.raises(UsageError, match="too short"):
        store.rename("web", "x")
    store.rename("web", "new")
    assert names(store) == ["new", "taken"]
    assert store.find("new").labels == {"a": "1"}
    assert os.listdir(store.find("new").path) == ["file"]
    assert [spec.source for spec in store.find_mount("shop").specs] == ["new"]
    _, (one,) = mount(store, *["new:/data"], name="shop")
    assert one.volume == store.find("new")


def test_clone(store: Store) -> None:
    Path(store.create("web", labels={"a": "1"}).path, "file").write_text("text")
    clone = store.clone("web", "copy", copy_tree)
    assert clone.labels == {"a": "1"}
    assert Path(clone.path, "file").read_text() == "text"
    with pytest.raises(VolumeError, match="copy exists"):
        store.clone("web", "copy", copy_tree)

    def fail(source: str, target: str) -> None:
        Path(target, "part").touch()
        for step in (lambda: store.remove("web"), lambda: store.rename("web", "x1")):
            with pytest.raises(BusyError, match="web is being copied"):
                step()
        for other in (lambda: store.remove("half"), lambda: mount(store, "half:/data")):
            with pytest.raises(BusyError, match="half is being made"):
                other()
        assert names(store) == ["copy", "web"]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.clone("web", "half", fail)
    assert entries(store) == names(store) == ["copy", "web"]


# --- mounts ---------------------------------------------------------------------------------------


def test_acquire_makes_what_is_missing(store: Store, ground: Path) -> None:
    host = ground / "made" / "deep"
    _, (named, anonymous, bind) = mount(store, "web:/data:ro", "/cache", f"{host}:/host:ro")
    assert named.volume == store.find("web")
    assert named.path == named.volume.path
    assert named.spec == parse_volume("web:/data:ro")
    assert named.fill
    assert anonymous.volume is not None
    assert anonymous.volume.anonymous
    assert anonymous.spec.source == anonymous.volume.name
    assert (bind.volume, bind.path, bind.fill) == (None, str(host), False)
    assert host.is_dir()


def test_host_paths_that_are_refused(store: Store, ground: Path) -> None:
    missing = ground / "missing"
    with pytest.raises(LayerError, match=f"{missing} does not exist"):
        mount(store, "web:/data", f"type=bind,source={missing},target=/x")
    os.symlink("nowhere", ground / "dangling")
    with pytest.raises(LayerError, match="symbolic link to nothing"):
        mount(store, "web:/data", f"{ground}/dangling:/x")
    (ground / "file").touch()
    with pytest.raises(LayerError, match="Not a directory"):
        mount(store, "web:/data", f"{ground}/file/below:/x")
    assert names(store) == []
    assert store.mounts() == []
    _, (bind,) = mount(store, f"{ground}/file:/x")
    assert bind.path == f"{ground}/file"


def test_a_device_must_be_there_when_it_is_mounted(store: Store, ground: Path) -> None:
    store.create("web", options={"device": str(ground / "device")})
    with pytest.raises(VolumeError, match=f"device {ground}/device is no directory here"):
        mount(store, "web:/data")
    (ground / "device").mkdir()
    _, (one,) = mount(store, "web:/data")
    assert (one.path, one.fill) == (f"{ground}/device", True)


def test_a_read_only_volume(store: Store, ground: Path) -> None:
    store.create("web", options=parse_options([f"device={ground},o=ro"]))
    _, (one,) = mount(store, "web:/data")
    assert one.spec.read_only
    assert not one.fill


def test_names_and_mount_points_of_running_mounts_are_taken(store: Store) -> None:
    mount_id, _ = mount(store, name="shop")
    with pytest.raises(BusyError, match=r"name shop is taken by the mount on /mnt"):
        mount(store, name="shop", mountpoint="/other")
    with pytest.raises(BusyError, match="/mnt is mounted already"):
        mount(store, name="else")
    with pytest.raises(UsageError, match="--name a/b"):
        mount(store, name="a/b", mountpoint="/other")
    store.release(mount_id)
    mount(store, name="shop", mountpoint="/other")
    (row,) = store.mounts()
    assert (row.name, row.mountpoint) == ("shop", "/other")
    assert row.running == (os.getpid(), control.process_start(os.getpid()), control.pid_namespace())


@pytest.mark.parametrize("name", [None, "shop"])
def test_a_remembered_mount_gets_its_anonymous_volumes_again(store: Store, name: str | None) -> None:
    mount_id, (first, _) = mount(store, "/cache", "web:/data", name=name)
    store.release(mount_id)
    (row,) = store.mounts()
    assert row.running is None
    assert [spec.source for spec in row.specs] == [first.spec.source, "web"]
    _, (again, other) = mount(store, "/cache", "/other", name=name)
    assert again.volume == first.volume
    assert other.volume != first.volume
    assert len(store.mounts()) == 1


def test_a_nameless_mount_does_not_replace_a_named_one(store: Store) -> None:
    mount_id, (first,) = mount(store, "/cache", name="shop")
    store.release(mount_id)
    mount_id, (second,) = mount(store, "/cache")
    assert second.volume != first.volume
    store.release(mount_id)
    assert [row.name for row in store.mounts()] == ["shop", None]
    assert store.find_mount("/mnt").name is None
    assert store.find_mount("shop").specs[0].source == first.spec.source


def test_nothing_is_remembered_of_a_mount_without_name_and_volumes(store: Store) -> None:
    mount_id, _ = mount(store)
    store.release(mount_id)
    assert store.mounts() == []
    with pytest.raises(VolumeError, match=r"no mount .* is known as /mnt"):
        store.find_mount("/mnt")


def test_in_use(store: Store) -> None:
    mount_id, _ = mount(store, "web:/data", name="shop")
    mount(store, "web:/data", mountpoint="/second")
    with pytest.raises(BusyError, match=r"web is in use by /mnt \(shop\), /second: unmount"):
        store.remove("web")
    with (
        pytest.raises(BusyError, match=r"in use by /mnt \(shop\), /second"),
        store.replacing(["web"], force=True),
    ):
        pytest.fail("replaced a volume in use")
    store.release(mount_id)
    with pytest.raises(BusyError, match="in use by /second: unmount"):
        store.remove("web")


def test_a_dead_mount_is_no_use(store: Store) -> None:
    mounted_by_a_dead_one(store, "web:/data", name="shop")
    assert store.find_mount("shop").running is None
    store.remove("web")
    # The remembered mount keeps its definitions, and makes the volume anew.
    assert [str(spec) for spec in store.find_mount("shop").specs] == ["web:/data"]
    mount(store, "web:/data", name="shop")
    assert names(store) == ["web"]


def test_a_reused_pid_is_no_use(store: Store) -> None:
    store.acquire(
        name="shop",
        mountpoint="/mnt",
        specs=[parse_volume("web:/data")],
        pid=os.getpid(),
        start=1,
        pidns=control.pid_namespace(),
    )
    store.remove("web")


def test_a_mount_in_another_pid_namespace_counts_while_it_is_seen(store: Store) -> None:
    store.acquire(name="shop", mountpoint="/mnt", specs=[parse_volume("web:/data")], pid=1, start=1, pidns=1)
    assert store.find_mount("shop").running is None
    store.remove("web")


def test_prune_spares_what_is_remembered(store: Store) -> None:
    mount_id, _ = mount(store, "/cache", "web:/data", name="shop")
    store.release(mount_id)
    store.create("loose")
    store.create()
    pruned, freed, _ = store.prune(lambda volume: True)
    assert len(pruned) == 2
    assert "loose" in pruned
    assert freed == 0
    assert len(names(store)) == 2
    store.forget("shop", anonymous=False)
    assert len(store.prune(lambda volume: True)[0]) == 2


def test_forget(store: Store) -> None:
    mount_id, (cache, _) = mount(store, "/cache", "web:/data", name="shop")
    with pytest.raises(BusyError, match=r"/mnt \(shop\) is mounted"):
        store.forget("shop", anonymous=True)
    store.release(mount_id)
    mount_id, _ = mount(store, f"{cache.spec.source}:/theirs", "/own", name="other")
    store.release(mount_id)
    store.forget("shop", anonymous=True)
    assert {"web", cache.spec.source} < set(names(store)), "another mount still refers to it"
    store.forget("/mnt", anonymous=True)
    assert names(store) == ["web"]
    with pytest.raises(VolumeError, match="known as shop"):
        store.forget("shop", anonymous=False)


def test_volumes_from(store: Store, ground: Path) -> None:
    mount_id, (cache, *_) = mount(store, "/cache", "web:/data:ro", f"{ground}:/host", name="shop")
    for _ in range(2):
        specs = store.volumes_from("shop")
        assert [str(spec) for spec in specs] == [f"{cache.spec.source}:/cache", "web:/data", f"{ground}:/host"]
        assert [spec.read_only for spec in specs] == [False, True, False]
        assert store.volumes_from("/mnt") == store.volumes_from("/mnt:rw") == specs
        assert all(spec.read_only for spec in store.volumes_from("shop:ro"))
        store.release(mount_id)
    store.remove(cache.spec.source)
    assert [spec.source for spec in store.volumes_from("shop")] == ["", "web", str(ground)]
    with pytest.raises(VolumeError, match="known as nope"):
        store.volumes_from("nope:ro")


# --- first content --------------------------------------------------------------------------------


def test_fill(store: Store) -> None:
    _, (one,) = mount(store, "web:/data")
    assert one.volume is not None
    directory = store.begin_fill(one.volume)
    assert directory is not None
    Path(directory, "file").write_text("first")
    assert os.listdir(one.path) == []
    store.end_fill(one.volume)
    assert os.listdir(one.path) == ["file"]
    assert os.listdir(os.path.dirname(one.path)) == ["_data"]
    assert store.begin_fill(one.volume) is None
    _, (again,) = mount(store, "web:/data", mountpoint="/second")
    assert not again.fill
    os.unlink(f"{one.path}/file")
    _, (empty, nocopy) = mount(store, "web:/data", "web:/other:nocopy", mountpoint="/third")
    assert empty.fill
    assert not nocopy.fill


def test_an_aborted_fill_leaves_the_volume_empty(store: Store) -> None:
    volume = store.create("web")
    directory = store.begin_fill(volume)
    assert directory is not None
    Path(directory, "part").touch()
    store.abort_fill(volume)
    store.abort_fill(volume)
    assert os.listdir(os.path.dirname(volume.path)) == ["_data"]
    assert os.listdir(volume.path) == []
    assert entries(store) == ["web"]
    assert store.begin_fill(volume) is not None
    store.close()
    assert mount(store, "web:/data")[1][0].fill


def test_what_others_wrote_meanwhile_stays(store: Store, ground: Path) -> None:
    (ground / "device").mkdir()
    for volume in (store.create("web"), store.create("dev", options={"device": str(ground / "device")})):
        directory = store.begin_fill(volume)
        assert directory is not None
        Path(directory, "file").touch()
        Path(volume.path, "theirs").touch()
        store.end_fill(volume)
        assert os.listdir(volume.path) == ["theirs"]


def test_two_mounts_fill_one_volume(store: Store) -> None:
    """The second waits, whether it comes before the first fills or while it does."""
    _, (one,) = mount(store, "web:/data", mountpoint="/1")
    assert one.volume is not None
    _, (two,) = mount(store, "web:/data", mountpoint="/2")
    assert two.fill
    directory = store.begin_fill(one.volume)
    assert directory is not None
    inode = os.stat(one.path).st_ino
    other = Store.open(store.root)
    said: list[object] = []
    waiting = [
        threading.Thread(target=lambda: said.append(other.begin_fill(store.find("web")))),
        threading.Thread(target=lambda: said.append(mount(other, "web:/data", mountpoint="/3")[1][0].fill)),
    ]
    for thread in waiting:
        thread.start()
    time.sleep(0.3)
    assert said == []
    Path(directory, "file").touch()
    store.end_fill(one.volume)
    for thread in waiting:
        thread.join()
    assert sorted(map(str, said)) == ["False", "None"]
    assert os.stat(one.path).st_ino == inode, "others have this directory open"


def test_a_volume_twice_in_a_mount_keeps_its_directory(store: Store) -> None:
    """The mount may have opened it for the second target before the fill for the first."""
    _, (one, two) = mount(store, "web:/data", "web:/other")
    assert one.fill
    assert two.fill
    assert one.volume is not None
    inode = os.stat(two.path).st_ino
    directory = store.begin_fill(one.volume)
    assert directory is not None
    Path(directory, "file").touch()
    store.end_fill(one.volume)
    assert os.stat(two.path).st_ino == inode
    assert os.listdir(two.path) == ["file"]


def test_attributes_of_the_first_content(store: Store, ground: Path) -> None:
    (ground / "source").mkdir(mode=0o750)
    os.chown(ground / "source", 12, 34)
    os.chmod(ground / "source", 0o2750)
    os.setxattr(ground / "source", "user.kept", b"yes")
    (ground / "device").mkdir()
    for volume in (store.create("web"), store.create("dev", options={"device": str(ground / "device")})):
        directory = store.begin_fill(volume)
        assert directory is not None
        copy_tree(ground / "source", directory)
        store.end_fill(volume)
        status = os.stat(volume.path)
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12, 34, 0o2750)
        assert os.getxattr(volume.path, "user.kept") == b"yes"


# --- replaced content -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", [False, True])
def test_replacing(store: Store, ground: Path, device: bool) -> None:
    (ground / "device").mkdir()
    volume = store.create("web", options={"device": str(ground / "device")} if device else {})
    Path(volume.path, "old").mkdir()
    Path(volume.path, "both").write_text("old")
    with pytest.raises(VolumeError, match=r"web is not empty: use --force"), store.replacing(["web"], force=False):
        pytest.fail("replaced what is there")

    def broken() -> None:
        with store.replacing(["web", "fresh"], force=True) as (directory, other):
            Path(directory, "part").touch()
            Path(other, "part").touch()
            with pytest.raises(BusyError, match="being copied, filled or restored"):
                mount(store, "web:/data")
            raise VolumeError("the archive is damaged")

    with pytest.raises(VolumeError, match="damaged"):
        broken()
    assert sorted(os.listdir(volume.path)) == ["both", "old"]
    assert names(store) == entries(store) == ["web"]
    os.chmod(volume.path, 0o750)
    with store.replacing(["web", "fresh"], force=True) as (directory, other):
        Path(directory, "both").write_text("new")
        Path(other, "file").touch()
        assert Path(volume.path, "both").read_text() == "old"
    assert os.listdir(volume.path) == ["both"]
    assert Path(volume.path, "both").read_text() == "new"
    assert stat.S_IMODE(os.stat(volume.path).st_mode) == 0o750
    assert os.listdir(store.find("fresh").path) == ["file"]
    assert entries(store) == ["fresh", "web"]


def immutable(path: Path, wanted: bool) -> None:
    subprocess.run(["chattr", "+i" if wanted else "-i", str(path)], check=True)


def test_what_can_t_be_moved_brings_all_back(store: Store, ground: Path) -> None:
    device = ground / "device"
    device.mkdir()
    for name in ("a", "b", "c"):
        (device / name).touch()
    store.create("web", options={"device": str(device)})
    immutable(device / "b", True)
    try:
        with (
            pytest.raises(VolumeError, match="Operation not permitted"),
            store.replacing(["web"], force=True) as (directory,),
        ):
            Path(directory, "new").touch()
        assert sorted(os.listdir(device)) == ["a", "b", "c"]
    finally:
        immutable(device / "b", False)
    with store.replacing(["web"], force=True) as (directory,):
        Path(directory, "new").touch()
    assert os.listdir(device) == ["new"]


def test_what_can_t_be_removed_is_told_once(store: Store) -> None:
    Path(store.create("web").path, "file").touch()
    store.create("other")
    immutable(Path(store.find("web").path, "file"), True)
    try:
        with pytest.raises(VolumeError, match=r"left in .*trash.* could not be removed: file: Operation not permitted"):
            store.remove("web")
        assert names(store) == ["other"]
        store.clone("other", "copy", copy_tree)
        assert len(entries(store)) == 3
    finally:
        (file,) = Path(store.root, "volumes").rglob("file")
        immutable(file, False)
    store.clean()
    assert entries(store) == ["copy", "other"]


def test_reading_keeps_a_volume(store: Store) -> None:
    store.create("web")
    with store.reading(["web"]) as (volume,), store.reading(["web"]):
        assert volume.name == "web"
        with pytest.raises(BusyError, match="being copied"):
            store.remove("web")
        mount(store, "web:/data")


# --- several commands at once ---------------------------------------------------------------------

CREATE = """
import sys
from unionfs.store.volumes import Store
store = Store.open(sys.argv[1])
for number in range(20):
    print(store.create(f"v{number}").id)
"""
REMOVE = """
import sys
from unionfs.errors import VolumeError
from unionfs.store.volumes import Store
store = Store.open(sys.argv[1])
for number in range(20):
    try:
        store.remove(f"v{number}")
        print(number)
    except VolumeError:
        pass
"""


def at_once(script: str, store: Store) -> list[list[int]]:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, store.root],
            cwd=REPOSITORY,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 4
    return [[int(line) for line in output.split()] for output in outputs]


def test_commands_at_once(store: Store) -> None:
    made = at_once(CREATE, store)
    assert all(numbers == made[0] for numbers in made), "each got the same volumes"
    assert len(names(store)) == len(entries(store)) == 20
    removed = at_once(REMOVE, store)
    assert sorted(number for numbers in removed for number in numbers) == list(range(20)), "each was removed once"
    assert names(store) == entries(store) == []
