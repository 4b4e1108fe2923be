"""What is fuzzed: a parser, values that it takes, and what must hold for whatever it is given.

A target is a function that is given bytes. It lets pass the errors that the parser says it raises, and fails for all others,
for an answer that makes no sense, and where an encoder doesn't lead back.
"""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.fuzz.mutate import mutated
from tests.support.layers import ACL_MASK, ACL_OTHER, ACL_USER, ACL_USER_OBJ, TRUSTED, acl
from unionfs import config, idmap, volumespec
from unionfs.archives import acltext, archive, tarformat
from unionfs.commands import mount8, mountfile, podman_cli
from unionfs.core import acl as posix_acl
from unionfs.core.markers import (
    Format,
    decode_handle,
    decode_nlink,
    decode_protattr,
    encode_handle,
    encode_nlink,
    encode_protattr,
    parse_redirect,
)
from unionfs.core.union import Union
from unionfs.errors import UnionError, UsageError, VolumeError, one_line
from unionfs.host import control, mountinfo
from unionfs.store.volumemodel import check_name, parse_options


@dataclass(frozen=True)
class Target:
    """`run` is what must not fail; `seeds` are values that are taken; `cost` how many plain parses one run is worth."""

    run: Callable[[bytes], None]
    seeds: Sequence[bytes]
    cost: int = 1
    tokens: Sequence[bytes] = ()

    def value(self, dice: random.Random) -> bytes:
        """Return something to run it with."""
        return mutated(dice, self.seeds, self.tokens)


TARGETS: dict[str, Target] = {}


def target(
    *seeds: bytes | str, cost: int = 1, tokens: Sequence[bytes] = ()
) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Make a function a target of its name."""

    def add(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        encoded = [os.fsencode(seed) if isinstance(seed, str) else seed for seed in seeds]
        TARGETS[run.__name__] = Target(run, encoded, cost, tokens)
        return run

    return add


def text_of(value: bytes) -> str:
    """Bytes as an argument of a program comes: without NUL, which ends it."""
    return os.fsdecode(value.replace(b"\0", b""))


def assert_clear(error: UnionError) -> None:
    """An error's message makes one line of a bounded length, once control characters are shown as escapes."""
    line = one_line(str(error))
    assert line
    assert "\n" not in line


# --- marks of layers ------------------------------------------------------------------------------

UUID = bytes(range(16))


@target(b"name", b"/a/b", b"/", b"..", b"/a/../b", b"a/b")
def redirect(value: bytes) -> None:
    try:
        taken = parse_redirect(value)
    except OSError as error:
        assert error.errno in (errno.EINVAL, errno.EACCES)
        return
    parts = taken.removeprefix(b"/").split(b"/")
    assert taken == value
    assert b"\0" not in taken
    assert not {b"", b".", b".."} & set(parts)
    assert taken.startswith(b"/") or len(parts) == 1


@target(
    encode_handle(1, b"12345678", UUID),
    encode_handle(129, b"", UUID, is_upper=True),
    bytes((0, 0xFB, 255, 0, 1)) + UUID + bytes(234),
)
def origin(value: bytes) -> None:
    found = decode_handle(value)
    if found is not None:
        assert len(found.uuid) == 16
        assert len(found.handle) <= 255
        assert decode_handle(encode_handle(*found)) == found


@target(b"U+1", b"L-2", b"U+0", b"L+2147483640")
def nlink(value: bytes) -> None:
    total = decode_nlink(value, 5, 3)
    assert total is None or 0 < total < 1 << 31
    if total is not None:
        assert decode_nlink(encode_nlink("U", total - 5), 5, 3) == total


@target(b"a", b"i", b"ai", b"")
def protattr(value: bytes) -> None:
    flags = decode_protattr(value)
    assert decode_protattr(encode_protattr(flags)) == flags


@target(
    b"trusted.overlay.opaque",
    b"trusted.overlay.overlay.origin",
    b"user.x",
    b"trusted.overlay.",
    b"trusted.overlay.overlay.",
)
def attribute_names(value: bytes) -> None:
    name = os.fsdecode(value)
    for fmt in (Format(userxattr=False), Format(userxattr=True)):
        stored = fmt.to_disk(name)
        assert not fmt.is_private(stored)
        assert fmt.to_user(stored) == name


NAMES = ("f", "d", "d/f", "d/sub", "m", "h1", "h2", "l", "w", ".wh.f", "d/.wh..wh..opq", "#1", "d/sub/f")
MARKS = (
    "opaque",
    "redirect",
    "metacopy",
    "origin",
    "impure",
    "nlink",
    "uuid",
    "protattr",
    "whiteout",
    "upper",
    "overlay.opaque",
)
VALUES = (
    b"",
    b"y",
    b"x",
    b"/d",
    b"/d/sub",
    b"/f",
    b"d",
    b"f",
    b"m",
    b"..",
    b"/..",
    b"U+1",
    b"L-1",
    encode_handle(1, b"12345678", UUID),
    bytes((0, 4, 0, 0)),
)


@cache
def _place() -> Path:
    """A place for directories that the file system takes marks in; in memory where that is to be had."""
    for parent in ("/dev/shm", "/var/tmp", None):
        base = Path(tempfile.mkdtemp(prefix="ufst-fuzz-", dir=parent if parent and os.path.isdir(parent) else None))
        with suppress(OSError):
            os.setxattr(base, TRUSTED + "probe", b"")
            return base
        base.rmdir()
    raise AssertionError("no place for marks")


def clean_up() -> None:
    """Remove what targets have left."""
    if _place.cache_info().currsize:
        shutil.rmtree(_place(), ignore_errors=True)
        _place.cache_clear()


@target(b"layers", bytes(range(64)), os.urandom(64), cost=200)
def whole_layers(value: bytes) -> None:
    """Layers, work and index with marks as the bytes say, opened by the core and walked, read and changed all over."""
    dice = random.Random(value)
    base = _place() / "layers"
    base.mkdir()
    try:
        canary = base / "outside"
        canary.mkdir()
        (canary / "secret").write_bytes(b"canary")
        for layer in ("upper", "l1", "l2"):
            _plant(base / layer, dice)
        _plant(base / "work" / "work", dice)
        _plant(base / "work" / "index", dice)
        opened = config.MountConfig(
            lowers=(str(base / "l1"), str(base / "l2")),
            upper=str(base / "upper"),
            work=str(base / "work"),
            mountpoint=str(base / "mnt"),
            metacopy=dice.random() < 0.8,
            index=dice.random() < 0.8,
        )
        _use(Union.open(opened), dice)
        assert os.listdir(canary) == ["secret"]
        assert (canary / "secret").read_bytes() == b"canary"
    finally:
        for directory, names, _ in os.walk(base):
            for name in names:
                with suppress(OSError):
                    os.chmod(os.path.join(directory, name), 0o700)
        shutil.rmtree(base)


def _plant(root: Path, dice: random.Random) -> None:
    root.mkdir(parents=True)
    for name in NAMES:
        if dice.random() < 0.4:
            continue
        path = root / name
        if path.parent.is_symlink():
            continue
        with suppress(OSError):
            match dice.randrange(8):
                case 0 | 1 | 2:
                    path.write_bytes(dice.choice((b"", b"data", b"more data")))
                case 3 | 4:
                    path.mkdir()
                case 5:
                    path.symlink_to(dice.choice(("f", "..", "../outside", "../outside/secret", str(root.parent))))
                case 6:
                    os.mknod(path, stat.S_IFCHR, 0)
                case _:
                    os.link(root / "f", path)
        for _ in range(dice.randrange(3)):
            with suppress(OSError):
                mark, given = dice.choice(MARKS), mutated(dice, VALUES)[:4000]
                os.setxattr(path, TRUSTED + mark, dice.choice((given, dice.choice(VALUES))), follow_symlinks=False)


def _use(union: Union, dice: random.Random) -> None:
    from unionfs.core.caller import Caller
    from unionfs.core.changes import Changes
    from unionfs.core.dirhandle import DirHandle
    from unionfs.core.inodes import Dir

    who = Caller(0, 0)
    waiting = [union.tree.root]
    visited = 0
    try:
        while waiting and visited < 60:
            directory = waiting.pop()
            visited += 1
            names = [b"new", b"..x"]
            with suppress(OSError):
                names += [entry.name for _, entry in union.read_entries(DirHandle(directory), 0)]
            for name in dict.fromkeys(names):
                with suppress(OSError):
                    found = union.tree.look(directory, name)
                    if found is None:
                        continue
                    node, st = found
                    node.nlookup += 1
                    assert 0 < union.tree.nlink(node, st) < 1 << 32
                    assert 0 <= union.tree.blocks(node, st) < 1 << 60
                    if isinstance(node, Dir) and visited < 40:
                        waiting.append(node)
                    _touch(union, node, dice, Changes)
                    match dice.randrange(6):
                        case 0:
                            union.dirs.rename(directory, name, union.tree.root, b"renamed", 0)
                        case 1:
                            (union.dirs.rmdir if isinstance(node, Dir) else union.dirs.unlink)(directory, name)
                        case 2:
                            union.dirs.mkdir(directory, b"made", 0o755, who)
                        case 3:
                            union.dirs.link(node, directory, b"linked")
                        case _:
                            pass
    finally:
        union.close()


def _touch(union: Union, node: object, dice: random.Random, changes: type) -> None:
    from unionfs.core.inodes import Node

    assert isinstance(node, Node)
    if stat.S_ISREG(node.fmt):
        fd = union.open_file(node, dice.choice((os.O_RDONLY, os.O_RDWR)))
        os.read(fd, 100)
        union.close_file(fd)
    elif stat.S_ISLNK(node.fmt):
        union.readlink(node)
    for name in union.listxattr(node):
        union.getxattr(node, name)


# --- access-control lists -------------------------------------------------------------------------

ACL = acl((ACL_USER_OBJ, 7), (ACL_USER, 5, 1000), (ACL_MASK, 7), (ACL_OTHER, 0))


@target(ACL, acl((ACL_USER_OBJ, 6)), acl())
def acl_of_directory(value: bytes) -> None:
    bits, access = posix_acl.inherit(value, 0o640)
    assert 0 <= bits <= 0o7777
    assert access is None or len(access) == len(value)
    assert posix_acl.translated(value, lambda uid: uid, lambda gid: gid) == value


@target(
    b"user::rwx\nuser:1000:r-x\ngroup::---\nmask::rwx\nother::---\n",
    b"u::rw,g::r,o::-",
    b"user:root:rw-:0",
    tokens=(b"user:", b"mask", b"rwx"),
)
def acl_as_text(value: bytes) -> None:
    try:
        packed = acltext.from_text(value)
    except ValueError as error:
        assert str(error)
        return
    if packed:
        assert acltext.from_text(acltext.to_text(packed)) == packed


@target(ACL, acl((ACL_USER_OBJ, 6)))
def acl_to_text(value: bytes) -> None:
    with suppress(ValueError):
        acltext.from_text(acltext.to_text(value))


# --- archives -------------------------------------------------------------------------------------


def archives() -> list[bytes]:
    """Archives of all kinds: ours, and tarfile's in its three formats; with sparse files, attributes, links."""
    made: list[bytes] = []
    with tempfile.TemporaryDirectory() as base:
        root = Path(base, "tree")
        (root / "dir").mkdir(parents=True)
        (root / "file").write_bytes(b"content" * 100)
        with open(root / "sparse", "wb") as file:
            file.truncate(1 << 20)
            file.seek(500_000)
            file.write(b"data")
        os.link(root / "file", root / "dir" / "hard")
        (root / "soft").symlink_to("file")
        (root / ("long" * 50)).write_bytes(b"")
        with suppress(OSError):
            os.setxattr(root / "file", "user.a%=b", b"\0value")
        out = io.BytesIO()
        archive.backup([archive.Root("", str(root))], out)
        made.append(out.getvalue())
        for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w", format=form) as tar:
                for name in ("file", "dir", "dir/hard", "soft"):
                    tar.add(root / name, name, recursive=False)
            made.append(out.getvalue())
    return made


ARCHIVES = archives()
_TAR_TOKENS = (
    b"GNU.sparse.major=1\n",
    b"GNU.sparse.map=",
    b"GNU.sparse.numblocks=",
    b"SCHILY.xattr.",
    b"30 mtime=1.5\n",
    b"g",
    b"x",
    b"L",
    b"K",
    b"S",
)


def checksummed(value: bytes) -> bytes:
    """With the checksums of blocks that look like headers put right, damage gets past the first check."""
    data = bytearray(value)
    for start in range(0, len(data) - 511, 512):
        header = data[start : start + 512]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    return bytes(data)


@target(*ARCHIVES, cost=5, tokens=_TAR_TOKENS)
def tar(value: bytes) -> None:
    for data in (value, checksummed(value)):
        reader = tarformat.Reader(io.BytesIO(data))
        members = 0
        with suppress(VolumeError):
            for member in reader:
                members += 1
                assert members <= len(data) // 512 + 1
                assert member.name is not None
                length = 0
                while piece := reader.read():
                    length += len(piece)
                assert length <= len(data)


@target(*ARCHIVES, cost=50, tokens=_TAR_TOKENS)
def restore(value: bytes) -> None:
    place = _place() / "restored"
    place.mkdir()
    try:
        archive.restore(io.BytesIO(checksummed(value)), [archive.Root("", str(place))])
    except VolumeError as error:
        assert_clear(error)
    finally:
        shutil.rmtree(place, onerror=lambda *_: None)
        if place.exists():
            import subprocess

            subprocess.run(["chattr", "-R", "-ia", str(place)], check=False, capture_output=True)
            shutil.rmtree(place)
        assert not any(_place().iterdir())


@target(
    *(__import__("gzip").compress(data) for data in ARCHIVES[:2]),
    *(archive.zstd.compress(data) for data in ARCHIVES[:2]),
    cost=20,
)
def compressed(value: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".tar") as file, tempfile.TemporaryDirectory(dir=_place()) as place:
        file.write(value)
        file.flush()
        try:
            archive.restore_file(file.name, [archive.Root("", place)])
        except VolumeError as error:
            assert_clear(error)


# --- what users write -----------------------------------------------------------------------------

TOML = b"""lower = ["/srv/app", "base"]
upper = "changes"
mountpoint = "/mnt/work"
name = "work"
data = ["/srv/objects"]
options = ["noatime", "timeout=1"]
bind-mode = "auto"
volumes-from = ["other:ro"]

[[volume]]
source = "/srv/data"
target = "/data"
readonly = true
"""


@target(
    TOML,
    b'lower="a"\nmountpoint="m"\n',
    b"[[volume]]\n[volume]\n",
    cost=5,
    tokens=(b"[[volume]]\n", b"true", b"[]", b"{}", b'""', b"1979-05-27", b"a.b.c=1\n"),
)
def mount_file(value: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(value)
        file.flush()
        try:
            found = mountfile.read_mount_file(file.name)
        except UsageError as error:
            assert_clear(error)
        else:
            assert len(found.positionals) in (2, 3)


@target("/srv/base:/srv/app", "a\\:b:c::data::more", "a", ":", "\\", "a:b::")
def lowers(value: bytes) -> None:
    text = text_of(value)
    with suppress(UsageError):
        above, below = config.parse_lowers(text)
        assert all(above)
        again = ":".join(map(config.escape_lower, above)) + "".join(f"::{config.escape_lower(path)}" for path in below)
        assert config.parse_lowers(again) == (above, below)


OPTIONS = (
    "ro,noatime,timeout=1.5,redirect_dir=on,metacopy=off",
    "lowerdir=/a:/b,upperdir=/u,workdir=/w",
    "lowerdir+=/a,datadir+=/b,xino=auto,uuid=null,index=off",
    "uidmapping=0:1000:10:5:6:7,gidmapping=0:1:2,squash_to_uid=5",
    "fsname=a\\,b,allow_other,userxattr,volatile,static_nlink,noacl",
    "whiteout=wh,native=off,slow_lower=auto,passthrough=on,squash_to_root",
)


@target(*OPTIONS, cost=3, tokens=[word.encode() for word in config.known_options()])
def options(value: bytes) -> None:
    text = text_of(value)
    for positionals in (["/l", "/u", "/m"], ["/m"]):
        for sloppy in (False, True):
            try:
                made = config.parse_mount(positionals, [text], privileged=True, sloppy=sloppy)
                config.as_json(made.timeout)
            except UsageError as error:
                assert_clear(error)
    with suppress(UsageError):
        config.given_settings([text])
    words = config.split_options(text)
    assert sum(map(len, words)) <= len(text)


@target("0:1000:65536", "0:1:2:3:4:5", "4294967295:0:1")
def id_ranges(value: bytes) -> None:
    text = text_of(value)
    with suppress(UsageError):
        ranges = idmap.parse_ranges("uidmapping", text)
        mapping = idmap.IdMap(uids=ranges)
        for one in ranges:
            assert mapping.shown_uid(one.stored) < 1 << 32
            with suppress(OSError):
                assert mapping.stored_uid(one.shown) < 1 << 32
    with suppress(UsageError):
        assert 0 <= idmap.parse_id("squash_to_uid", text) < 1 << 32


@target("/srv/data:/data:ro,cached", "vol:/data:nocopy", "/data", "a\\:b:/c", "/a:/b:rslave,z")
def volume_short(value: bytes) -> None:
    try:
        spec = volumespec.parse_volume(text_of(value))
    except UsageError as error:
        assert_clear(error)
        return
    assert_spec(spec)


@target(
    "type=bind,source=/srv/data,target=/data,readonly",
    'type=volume,src=vol,"dst=/a,b",volume-nocopy',
    "target=/x,bind-propagation=rshared,bind-nonrecursive=true,consistency=cached",
)
def volume_long(value: bytes) -> None:
    try:
        spec = volumespec.parse_mount_words(text_of(value))
    except UsageError as error:
        assert_clear(error)
        return
    assert_spec(spec)


def assert_spec(spec: volumespec.VolumeSpec) -> None:
    """What was taken makes sense."""
    assert spec.target.startswith("/")
    assert os.path.normpath(spec.target) == spec.target != "/"
    assert spec.kind == "volume" or spec.source.startswith("/")
    assert spec.propagation in volumespec.PROPAGATIONS


@target("web", "a.b-c", "type=none,device=/srv", "o=bind")
def volume_names(value: bytes) -> None:
    text = text_of(value)
    for parse in (check_name, volumespec.parse_name):
        with suppress(UsageError):
            assert parse(text) == text
            assert "/" not in text
            assert not text.startswith((".", "-"))
    with suppress(UsageError, VolumeError):
        parse_options([text])


@target("union /mnt -o ro,lowerdir=/a", "-sfnv -N /proc/1/ns/mnt n /mnt", "n /mnt -t fuse.unionfs -o remount,rw")
def mount8_call(value: bytes) -> None:
    words = text_of(value).split(" ")
    try:
        call = mount8.read_call(words)
    except UsageError as error:
        assert_clear(error)
        return
    with suppress(UsageError):
        config.given_settings(call.options, sloppy=call.sloppy)


@target(
    '-o lowerdir=/a:/b,upperdir=/u,workdir=/w,context="a,b" /mnt',
    "-f -d -o noacl,plugins=x,threaded=1 n /mnt",
    "--help",
    "-V",
    '-o "',
)
def podman_call(value: bytes) -> None:
    words = text_of(value).split(" ")
    try:
        pairs, rest = podman_cli._split(words)
        call = podman_cli._call(pairs, rest)
    except UsageError as error:
        assert_clear(error)
        return
    for option in call.options:
        assert option


# --- what the machine and other processes say -----------------------------------------------------

MOUNTINFO = (
    b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n",
    rb"41 24 0:36 /a\040b /c\134d\011 rw shared:9 - fuse.unionfs a\040-\040b rw,user_id=12,group_id=0" + b"\n",
)


@target(b"/plain", b"/with space\tand\\backslash\nand more#", b"\xff\xfe")
def mountinfo_names(value: bytes) -> None:
    """Any name, escaped as the kernel does (mangle), comes out again."""
    name = b"/" + value.replace(b"\0", b"")
    escaped = b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes((byte,)) for byte in name)
    line = b"41 24 0:36 / %b rw shared:9 master:2 - fuse.unionfs %b rw,user_id=7\n" % (escaped, escaped)
    mount = mountinfo._parse_line(line)
    assert os.fsencode(mount.mountpoint) == os.fsencode(mount.source) == name
    assert mount.user_id == 7


RECORD = (
    b'{"pid": 1, "start": 2, "pidns": 3, "mountpoint": "/m", "dev": "0:1", "name": null, "lowers": ["/l"], "data_lowers": [],'
    b' "upper": null, "work": null, "options": {}, "volumes": [{"Destination": "/d"}], "store": null, "log": null,'
    b' "version": "1", "mounted_at": 1.5}'
)


@target(RECORD, b"{}", b"[]", cost=5, tokens=(b"null", b"[]", b"{}", b"1e999", b"NaN", b"-1", b'"pid"', b"true"))
def state_file(value: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = os.path.join(place, "1.json")
        Path(path).write_bytes(value)
        record = control._load(path)
        if record is not None:
            record.alive()
            assert isinstance(record.mountpoint, str)
