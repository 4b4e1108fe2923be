"""Archives of volumes, both ways and against GNU tar and Python's tarfile, whole trees compared."""

from __future__ import annotations

import gzip
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import FileSystemMaker
from tests.support import people
from tests.support.filesystems import FS_KINDS, FsKind, run
from tests.support.snapshot import assert_same, snapshot
from tests.support.trees import access_times, assert_equal, extents, rich_tree
from tests.unit.test_copytree import chain, deep_tree, empty, few_descriptors
from unionfs.archives import acltext, archive, tarwrite
from unionfs.archives.archive import Root, Totals
from unionfs.errors import VolumeError

ALL = ("--xattrs", "--xattrs-include=*", "--acls")
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.zst")


def pack(source: Path, file: Path, **options: object) -> Totals:
    return archive.backup_file([Root("", str(source))], file, **options)  # type: ignore[arg-type]


def unpack(file: Path, target: Path, **options: object) -> Totals:
    target.mkdir(exist_ok=True)
    return archive.restore_file(file, [Root("", str(target))], **options)  # type: ignore[arg-type]


def gnu_pack(source: Path, file: Path, *words: str) -> None:
    run("tar", *words, "-cf", str(file), "-C", str(source), ".")


def gnu_unpack(file: Path, target: Path, *words: str) -> None:
    target.mkdir()
    run("tar", *ALL, *words, "-xpf", str(file), "-C", str(target))


@pytest.fixture
def tree(ground: Path) -> Path:
    return rich_tree(ground / "source", sockets=False)


@pytest.mark.parametrize("ending", ENDINGS)
def test_there_and_back(ground: Path, tree: Path, ending: str) -> None:
    times = access_times(tree)
    made = pack(tree, ground / f"a{ending}")
    back = unpack(ground / f"a{ending}", ground / "back")
    assert made == back
    restored = access_times(ground / "back")
    files = [path for path in times if stat.S_ISREG(os.lstat(os.fsencode(tree) + path).st_mode)]
    assert {path: times[path] for path in files} == {path: restored[path] for path in files}
    assert_equal(tree, ground / "back")
    assert stat.S_IMODE((ground / f"a{ending}").stat().st_mode) == 0o600


def test_endings_mean_what_they_say(ground: Path, tree: Path) -> None:
    for ending, magic in ((".tar", b"./"), (".tgz", b"\x1f\x8b"), (".tar.zst", b"\x28\xb5\x2f\xfd")):
        pack(tree, ground / f"a{ending}")
        assert (ground / f"a{ending}").read_bytes().startswith(magic)
    run("zstd", "-q", "-t", str(ground / "a.tar.zst"))
    run("gzip", "-t", str(ground / "a.tgz"))
    for name in ("a.tar.xz", "a.tar.bz2", "a.zip"):
        with pytest.raises(VolumeError, match="not written"):
            pack(tree, ground / name)
        assert not (ground / name).exists()


@pytest.mark.parametrize("where", FS_KINDS)
def test_between_file_systems(ground: Path, on_file_system: FileSystemMaker, where: FsKind) -> None:
    there = on_file_system(where)
    tree = rich_tree(there / "source", sockets=False)
    pack(tree, ground / "a.tar")
    unpack(ground / "a.tar", ground / "back")
    assert_equal(tree, ground / "back")
    pack(ground / "back", there / "a.tar")
    unpack(there / "a.tar", there / "again")
    assert_equal(ground / "back", there / "again")


# -- GNU tar and tarfile --


@pytest.mark.parametrize("ending", ENDINGS)
def test_gnu_tar_reads_it(ground: Path, tree: Path, ending: str) -> None:
    pack(tree, ground / f"a{ending}")
    gnu_unpack(ground / f"a{ending}", ground / "back")
    assert_equal(tree, ground / "back")
    for locale in ("C", "C.UTF-8"):
        listed = subprocess.run(
            ["tar", "-tf", str(ground / f"a{ending}"), "--quoting-style=literal"],
            capture_output=True,
            env={**os.environ, "LC_ALL": locale},
            check=True,
        )
        assert b"./names/\xff\xfe no utf-8 \x80/" in listed.stdout.split(b"\n")


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".xz", ".bz2"])
def test_what_gnu_tar_wrote_is_read(ground: Path, tree: Path, ending: str) -> None:
    gnu_pack(tree, ground / f"a.tar{ending}", "-a", *ALL, "--sparse", "--format=pax")
    unpack(ground / f"a.tar{ending}", ground / "back")
    assert_equal(tree, ground / "back")


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_gnu_tar_sparse_forms(ground: Path, tree: Path, version: str) -> None:
    gnu_pack(tree, ground / "a.tar", *ALL, "--sparse", f"--sparse-version={version}", "--format=pax")
    unpack(ground / "a.tar", ground / "back")
    assert_equal(tree, ground / "back")


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "ustar", "v7"])
def test_older_formats(ground: Path, form: str) -> None:
    source = ground / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_bytes(b"content" * 1000)
    os.link(source / "sub" / "file", source / "sub" / "link")
    (source / "to").symlink_to("/etc/passwd")
    os.chown(source / "sub" / "file", 1234, 4321)
    os.chmod(source / "sub" / "file", 0o4750)
    if form != "v7":
        os.mkfifo(source / "fifo")
        os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        long = source / ("l" * 90) / ("m" * 60)
        long.mkdir(parents=True)
        (long / "leaf").write_bytes(b"leaf")
    if form in ("gnu", "oldgnu"):
        (source / ("x" * 250)).write_bytes(b"a long name")
        (source / "far").symlink_to("y" * 150 + "/" + "y" * 149)
        os.chown(source / "to", 3_000_000_000, 7, follow_symlinks=False)
        (source / "holes").mkdir()
        for name, step in (("few", 512 << 10), ("many", 16 << 10)):
            with open(source / "holes" / name, "wb") as file:
                for at in range(0, 2 << 20, step):
                    os.pwrite(file.fileno(), b"data" * 1024, at)
                file.truncate(3 << 20)
    for path in [*source.rglob("*"), source]:
        os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    gnu_pack(source, ground / "a.tar", "--sparse", f"--format={form}") if "gnu" in form else gnu_pack(
        source, ground / "a.tar", f"--format={form}"
    )
    unpack(ground / "a.tar", ground / "back")
    assert_equal(source, ground / "back")


def test_incremental_gnu_archives(ground: Path) -> None:
    """They hold directories with their listings, and times where ustar has the start of long names."""
    source = ground / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_bytes(b"content")
    run("tar", "-C", str(source), "--format=gnu", "-g", str(ground / "snar"), "-cf", str(ground / "a.tar"), ".")
    unpack(ground / "a.tar", ground / "back")
    assert (ground / "back" / "sub" / "file").read_bytes() == b"content"


def test_tarfile_reads_it(ground: Path, tree: Path) -> None:
    pack(tree, ground / "a.tar")
    with tarfile.open(ground / "a.tar", encoding="utf-8") as tar:
        names = {os.fsencode(member.name) for member in tar}
        assert b"./names/\xff\xfe no utf-8 \x80" in names
        for path in (tree / "holes").glob("*"):
            member = tar.getmember(f"./holes/{path.name}")
            data = tar.extractfile(member)
            assert data is not None
            assert data.read() == path.read_bytes()
        assert tar.getmember("./suid").mode == 0o6755


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_what_tarfile_wrote_is_read(ground: Path, tree: Path, form: int) -> None:
    (tree / "links" / "to-too").unlink()  # it stores a symbolic link with two names twice
    with tarfile.open(ground / "a.tar", "w", format=form, encoding="utf-8") as tar:
        tar.add(tree, ".")
    unpack(ground / "a.tar", ground / "back")
    assert_same(
        snapshot(tree, times=False, xattrs=False),
        snapshot(ground / "back", times=False, xattrs=False),
    )


@pytest.mark.parametrize("place", ["/etc", "/usr/share/doc"])
def test_a_real_tree(ground: Path, place: str) -> None:
    """What a real machine holds, a few thousand files of it, both ways through both programs."""
    empty(ground / "source")
    taken = 0
    for path in sorted(Path(place).iterdir()):
        if taken < 2000 and not path.is_socket():
            run("cp", "-a", str(path), str(ground / "source"))
            taken += 1 + sum(1 for _ in path.rglob("*"))
    pack(ground / "source", ground / "ours.tar.zst")
    gnu_unpack(ground / "ours.tar.zst", ground / "by-gnu")
    assert_equal(ground / "source", ground / "by-gnu")
    gnu_pack(ground / "source", ground / "gnu.tar", *ALL, "--sparse", "--format=pax")
    unpack(ground / "gnu.tar", ground / "by-us")
    assert_equal(ground / "source", ground / "by-us")


def test_attributes_of_other_systems(ground: Path) -> None:
    """What bsdtar writes on another system: attributes that Linux has no place for are left out, with a warning."""
    info = tarfile.TarInfo("file")
    info.pax_headers = {"LIBARCHIVE.xattr.com.apple.quarantine": "eA==", "LIBARCHIVE.xattr.user.a%25": "Kg"}
    (ground / "a.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    said: list[str] = []
    assert unpack(ground / "a.tar", ground / "back", warn=said.append).warnings == 1
    assert said == ["archive entry file: extended attribute com.apple.quarantine left out"]
    assert os.getxattr(ground / "back" / "file", "user.a%") == b"*"


def test_names_in_lists_of_others(ground: Path) -> None:
    """GNU tar writes names into access-control lists, star also numbers."""
    by_name = b"user::rw-,user:daemon:rw-:77,group::r--,group:daemon:r-x,mask::rwx,other::---"
    value = acltext.from_text(by_name)
    assert acltext.to_text(value).splitlines() == [
        b"user::rw-",
        b"user:77:rw-",
        b"group::r--",
        b"group:1:r-x",
        b"mask::rwx",
        b"other::---",
    ]
    with pytest.raises(ValueError, match="user 'nobody-known', unknown on this machine"):
        acltext.from_text(b"user::rw-\nuser:nobody-known:r--\n")
    for bad in (b"user", b"user::rwz", b"mask:1:rwx", b"what::rwx", b"user:1:r:2:3"):
        with pytest.raises(ValueError, match="no entry"):
            acltext.from_text(bad)
    assert acltext.from_text(b"\n# a comment\n") == b""


# -- several volumes, pipes, progress --


def test_several_volumes_in_one_archive(ground: Path, tree: Path) -> None:
    other = ground / "other"
    (other / "sub").mkdir(parents=True)
    (other / "sub" / "file").write_bytes(b"other")
    (tree / "names" / "inner").mkdir()
    (tree / "names" / "inner" / "hidden").write_bytes(b"another volume lies over it")
    inner = ground / "inner"
    inner.mkdir()
    (inner / "seen").write_bytes(b"seen")
    roots = [Root("/srv/db", str(tree)), Root("other", str(other)), Root("srv/db/names/inner", str(inner))]
    archive.backup_file(roots, ground / "a.tar.gz")
    listed = run("tar", "-tzf", str(ground / "a.tar.gz")).splitlines()
    assert "other/sub/file" in listed
    assert "srv/db/names/inner/seen" in listed
    assert "srv/db/names/inner/hidden" not in listed
    places = [empty(ground / f"back{number}") for number in range(3)]
    archive.restore_file(
        ground / "a.tar.gz", [Root(root.prefix, str(place)) for root, place in zip(roots, places, strict=True)]
    )
    (tree / "names" / "inner" / "hidden").unlink()
    (tree / "names" / "inner").rmdir()
    assert_same(snapshot(tree), snapshot(places[0]))
    assert_equal(other, places[1])
    assert_equal(inner, places[2])
    with pytest.raises(VolumeError, match="none of the volumes"):
        archive.restore_file(ground / "a.tar.gz", [Root("other", str(empty(ground / "part")))])
    with pytest.raises(VolumeError, match="nothing for more"):
        archive.restore_file(
            ground / "a.tar.gz",
            [Root(root.prefix, str(empty(ground / f"more{n}"))) for n, root in enumerate([*roots, Root("more", "")])],
        )


def test_directories_above_the_volumes_are_no_matter(ground: Path) -> None:
    """As the classic recipe writes it: tar -C / -cf FILE srv/db."""
    (ground / "top" / "srv" / "db").mkdir(parents=True)
    (ground / "top" / "srv" / "db" / "file").write_bytes(b"content")
    run("tar", "-C", str(ground / "top"), "-cf", str(ground / "a.tar"), "srv")
    archive.restore_file(ground / "a.tar", [Root("srv/db", str(empty(ground / "back")))])
    assert [path.name for path in (ground / "back").iterdir()] == ["file"]


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_pipes(ground: Path, tree: Path, compression: archive.Compression) -> None:
    reading, writing = os.pipe()
    target = empty(ground / "back")
    errors: list[BaseException] = []

    def restore() -> None:
        try:
            with open(reading, "rb") as source:
                archive.restore(source, [Root("", str(target))])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=restore)
    thread.start()
    with open(writing, "wb") as out:
        archive.backup([Root("", str(tree))], out, compression=compression)
    thread.join()
    assert not errors
    assert_equal(tree, target)


def test_a_pipe_that_breaks(tree: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(VolumeError, match="can't be written: Broken pipe"):  # noqa: SIM117
        with open(writing, "wb", buffering=0) as out:
            archive.backup([Root("", str(tree))], out)


def test_a_full_disk(ground: Path, tree: Path) -> None:
    with pytest.raises(VolumeError, match="No space left"):
        archive.backup_file([Root("", str(tree))], "/dev/full")
    small = empty(ground / "small")
    run("mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small))
    try:
        with pytest.raises(VolumeError, match="No space left"):
            pack(tree, small / "a.tar")
        assert list(small.iterdir()) == []
        pack(tree, ground / "a.tar")
        with pytest.raises(VolumeError, match=r"archive entry \./\S+: No space left"):
            unpack(ground / "a.tar", small)
    finally:
        run("umount", str(small))


def test_progress(ground: Path, tree: Path) -> None:
    told: list[tuple[int, int | None]] = []
    totals = pack(tree, ground / "a.tar", progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == totals.content
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    told.clear()
    unpack(ground / "a.tar", ground / "back", progress=lambda done, total: told.append((done, total)))
    size = (ground / "a.tar").stat().st_size
    assert told[-1] == (size, size)
    told.clear()
    with open(ground / "a.tar", "rb") as source:
        archive.restore(
            source,
            [Root("", str(empty(ground / "again")))],
            progress=lambda done, total: told.append((done, total)),
        )
    assert told[-1] == (size, None)


# -- what changes, what can't be archived --


def test_sockets_are_left_out(ground: Path) -> None:
    tree = rich_tree(ground / "source")
    said: list[str] = []
    assert pack(tree, ground / "a.tar", warn=said.append).warnings == 1
    assert said == ["./dev/socket: socket left out, archives hold none"]
    unpack(ground / "a.tar", ground / "back")
    assert not (ground / "back" / "dev" / "socket").exists()


@pytest.mark.parametrize("new_size", [0, 1_500_000, 9_000_000])
def test_a_file_that_changes_size(ground: Path, new_size: int) -> None:
    """The archive stays good: the entry is filled up or cut to what was announced."""
    source = empty(ground / "source")
    size = 4 << 20
    (source / "log").write_bytes(b"x" * size)
    (source / "next").write_bytes(b"next")
    said: list[str] = []
    changed = False

    def change(done: int, total: int | None) -> None:
        nonlocal changed
        if not changed:
            changed = True
            with open(source / "log", "r+b") as file:
                file.truncate(new_size)

    pack(source, ground / "a.tar", progress=change, warn=said.append)
    assert len(said) == 1
    assert said[0].startswith("./log: file " + ("shrank by" if new_size < size else "changed as it was read"))
    unpack(ground / "a.tar", ground / "back")
    gnu_unpack(ground / "a.tar", ground / "gnu")
    assert_equal(ground / "gnu", ground / "back")
    content = (ground / "back" / "log").read_bytes()
    assert len(content) == size
    assert content.rstrip(b"\0") == b"x" * min(size, max(new_size, 1 << 20))
    assert (ground / "back" / "next").read_bytes() == b"next"


def test_a_tree_that_changes(ground: Path) -> None:
    """Directories that become links out, files that vanish: whole, readable, and nothing from outside."""
    outside = empty(ground / "outside")
    (outside / "f1").write_bytes(b"OUTSIDE")
    source = empty(ground / "source")
    for number in range(20):
        (source / f"d{number}").mkdir()
        for file in range(10):
            (source / f"d{number}" / f"f{file}").write_bytes(b"inside")
    stop = threading.Event()

    def disturb() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 1) % 20
            victim = source / f"d{number}"
            os.rename(victim, ground / "hidden")
            victim.symlink_to(outside)
            os.unlink(victim)
            os.rename(ground / "hidden", victim)
            (victim / "f5").unlink()
            (victim / "f5").symlink_to(outside / "f1")
            (victim / "f5").unlink()
            (victim / "f5").write_bytes(b"inside")

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for number in range(4):
            pack(source, ground / "a.tar")
            run("tar", "-tf", str(ground / "a.tar"))
            unpack(ground / "a.tar", ground / f"back{number}")
            assert b"OUTSIDE" not in (ground / "a.tar").read_bytes()
    finally:
        stop.set()
        thread.join()


def test_what_can_not_be_read_ends_the_backup(ground: Path) -> None:
    source = empty(ground / "source")
    (source / "secret").write_bytes(b"secret")
    os.chmod(source / "secret", 0o600)
    place = empty(ground / "place")
    os.chown(place, people.ALICE, people.ALICE)
    with pytest.raises(VolumeError, match=r"\./secret can't be read: Permission denied"):
        people.as_user(people.ALICE, lambda: pack(source, place / "a.tar"))
    assert list(place.iterdir()) == []
    with pytest.raises(VolumeError, match=r"can't be read: No such file"):
        pack(ground / "none", ground / "a.tar")


def test_restoring_without_privilege(ground: Path) -> None:
    source = empty(ground / "source")
    (source / "theirs").write_bytes(b"suid")
    os.chown(source / "theirs", people.BOB, people.BOB)
    os.chmod(source / "theirs", 0o6755)
    os.setxattr(source / "theirs", "user.x", b"kept")
    os.setxattr(source / "theirs", "trusted.x", b"lost")
    (source / "closed" / "inner").mkdir(parents=True)
    (source / "closed" / "inner" / "file").write_bytes(b"x")
    os.chmod(source / "closed" / "inner", 0o000)
    os.chmod(source / "closed", 0o500)
    pack(source, ground / "a.tar")
    os.chmod(ground / "a.tar", 0o644)
    target = empty(ground / "back")
    os.chown(target, people.ALICE, people.ALICE)
    people.as_user(people.ALICE, lambda: unpack(ground / "a.tar", target))
    st = (target / "theirs").stat()
    assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (people.ALICE, people.ALICE, 0o755)
    assert os.listxattr(target / "theirs") == ["user.x"]
    assert stat.S_IMODE((target / "closed" / "inner").stat().st_mode) == 0
    assert (target / "closed" / "inner" / "file").read_bytes() == b"x"


# -- size and depth --


def test_four_gigabytes_of_holes(ground: Path) -> None:
    source = empty(ground / "source")
    with open(source / "disk", "wb") as file:
        for at in (0, 1 << 30, (4 << 30) - 4096):
            os.pwrite(file.fileno(), b"%d" % at, at)
        file.truncate(4 << 30)
    (source / "more").mkdir()
    with open(source / "more" / "huge", "wb") as file:
        file.truncate((1 << 40) + 1)
    for ending in (".tar", ".tar.zst"):
        totals = pack(source, ground / f"a{ending}")
        assert totals.content < 1 << 16
        assert (ground / f"a{ending}").stat().st_size < 1 << 17
        unpack(ground / f"a{ending}", ground / f"back{ending}")
        back = ground / f"back{ending}" / "disk"
        assert back.stat().st_size == 4 << 30
        assert extents(back) == extents(source / "disk")
        assert back.stat().st_blocks <= (source / "disk").stat().st_blocks
        assert (ground / f"back{ending}" / "more" / "huge").stat().st_size == (1 << 40) + 1
        with open(back, "rb") as file:
            assert os.pread(file.fileno(), 10, 1 << 30) == b"1073741824"
    run("tar", "-C", str(empty(ground / "gnu")), "-xf", str(ground / "a.tar"))
    assert extents(ground / "gnu" / "disk") == extents(source / "disk")
    gnu_pack(source, ground / "gnu.tar", "--sparse", "--format=gnu")
    unpack(ground / "gnu.tar", ground / "from-gnu")
    assert extents(ground / "from-gnu" / "disk") == extents(source / "disk")


def test_a_file_of_more_than_eight_gigabytes(ground: Path) -> None:
    """The size does not fit the header's octal digits; written by hand, since it is only read up to its start."""
    size = 9 << 30
    header = tarfile.TarInfo("big")
    header.size = size
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with pytest.raises(VolumeError, match="archive entry big: the archive ends in the middle of it"):
            archive.restore(
                io.BytesIO(header.tobuf(form) + b"x" * 1000), [Root("", str(empty(ground / f"back{form}")))]
            )


def test_depth_is_no_matter(ground: Path) -> None:
    name = b"n" * 200
    deep_tree(ground / "source", 600, name)
    with few_descriptors():
        pack(ground / "source", ground / "a.tar.zst")
        unpack(ground / "a.tar.zst", ground / "back")
    made = chain(ground / "back", name)
    assert len(made) == 601
    assert made[-1][2] == 2
    assert made == chain(ground / "source", name)
    for path in ("source", "back"):
        subprocess.run(["rm", "-rf", str(ground / path)], check=True)


MEMORY = """
import resource, sys
from unionfs.archives import archive
from unionfs.archives.archive import Root
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[3]), int(sys.argv[3])))
try:
    archive.{call}
except archive.VolumeError as exc:
    print(exc)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def in_a_small_process(call: str, *words: str | Path, limit: int = 400 << 20) -> list[str]:
    """Run a call in a process of its own with little memory; what it said, the last line being its size in KiB."""
    return run(sys.executable, "-c", MEMORY.format(call=call), *map(str, words), str(limit)).splitlines()


def test_memory_is_bounded(ground: Path) -> None:
    source = empty(ground / "source")
    with open(source / "big", "wb") as file:
        file.writelines(os.urandom(1 << 20) for _ in range(60))
    for number in range(3000):
        (source / f"file-{number}").write_bytes(b"x")
    for ending in (".tar", ".tar.zst", ".tar.gz"):
        words = (source, ground / f"a{ending}")
        small = in_a_small_process('backup_file([Root("", sys.argv[1])], sys.argv[2])', *words)
        assert int(small[-1]) < 100 << 10
        words = (empty(ground / f"back{ending}"), ground / f"a{ending}")
        small = in_a_small_process('restore_file(sys.argv[2], [Root("", sys.argv[1])])', *words)
        assert int(small[-1]) < 100 << 10
        assert len(small) == 1


# -- killed --

KILLED = """
import os, signal, sys
from unionfs.archives import archive
from unionfs.archives.archive import Root
def progress(done, total):
    if done > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
archive.{call}
"""


@pytest.mark.parametrize("at", [0, 100_000, 3_000_000])
@pytest.mark.parametrize("old", [False, True])
def test_a_killed_backup_leaves_what_was_there(ground: Path, at: int, old: bool) -> None:
    source = empty(ground / "source")
    (source / "big").write_bytes(os.urandom(4 << 20))
    place = empty(ground / "place")
    if old:
        (place / "a.tar").write_bytes(b"old")
    script = KILLED.format(call='backup_file([Root("", sys.argv[1])], sys.argv[2], progress=progress)')
    done = subprocess.run([sys.executable, "-c", script, str(source), str(place / "a.tar"), str(at)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.read_bytes() for path in place.iterdir()] == ([b"old"] if old else [])
    pack(source, place / "a.tar")
    assert unpack(place / "a.tar", ground / "back").entries == 2


def test_a_killed_restore_touches_only_its_directory(ground: Path, tree: Path) -> None:
    pack(tree, ground / "a.tar")
    place = empty(ground / "place")
    (place / "other").write_bytes(b"other")
    target = empty(place / "target")
    script = KILLED.format(call='restore_file(sys.argv[2], [Root("", sys.argv[1])], progress=progress)')
    done = subprocess.run([sys.executable, "-c", script, str(target), str(ground / "a.tar"), "300000"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert {path.name for path in place.iterdir()} == {"other", "target"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_failed_backup_leaves_what_was_there(ground: Path, tree: Path, ending: str) -> None:
    place = empty(ground / "place")
    (place / f"a{ending}").write_bytes(b"old")

    def interrupt(done: int, total: int | None) -> None:
        if done > 150_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(tree, place / f"a{ending}", progress=interrupt)
    assert [path.read_bytes() for path in place.iterdir()] == [b"old"]
    pack(tree, place / f"a{ending}")
    with pytest.raises(KeyboardInterrupt):
        unpack(place / f"a{ending}", ground / "back", progress=lambda done, total: interrupt(1 << 20, total))


def test_a_file_system_without_nameless_files(ground: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., int] = os.open

    def no_tmpfile(path: object, flags: int, *more: object, **named: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", no_tmpfile)
    place = empty(ground / "place")
    pack(tree, place / "a.tar")
    assert [path.name for path in place.iterdir()] == ["a.tar"]
    unpack(place / "a.tar", ground / "back")


def test_a_link_to_the_file_and_a_fifo(ground: Path, tree: Path) -> None:
    """The file that a name stands for is replaced, not the name; what is no file is written to."""
    (ground / "real").mkdir()
    (ground / "a.tar").symlink_to("real/b.tar")
    pack(tree, ground / "a.tar")
    assert (ground / "a.tar").is_symlink()
    unpack(ground / "real" / "b.tar", ground / "back")
    os.mkfifo(ground / "fifo.tar.gz")
    with subprocess.Popen(["cat", str(ground / "fifo.tar.gz")], stdout=subprocess.PIPE) as cat:
        pack(tree, ground / "fifo.tar.gz")
        assert cat.stdout is not None
        assert len(gzip.decompress(cat.stdout.read())) == (ground / "a.tar").stat().st_size


def test_content_is_about_what_is_announced(tree: Path, ground: Path) -> None:
    announced = tarwrite.content_bytes([Root("", str(tree))])
    assert announced >= pack(tree, ground / "a.tar").content
