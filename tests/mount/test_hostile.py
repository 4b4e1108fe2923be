"""Layers from strangers: whatever marks, links and names they hold, nothing outside the layers is read, written or shown.

A canary lies beside the layers, on the same file system, and every test that mounts looks at it. What kernel overlayfs mounts
as well is walked in both, and all outcomes, errors included, must be the same but for what is listed here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import FileSystemMaker, StackMaker
from tests.support.canary import Canary, Outcome, assert_hidden, differences, outcomes
from tests.support.layers import TRUSTED, build, opaque, whiteout
from tests.support.mounts import Kind, MountRefused, Stack
from unionfs.core import sysio
from unionfs.core.markers import encode_handle

Plant = Callable[["Site"], None]
KINDS: tuple[Kind, ...] = ("overlay", "union")
SiteMaker = Callable[[Kind], "Site"]


@dataclass
class Site:
    """Two lowers, upper and work, and the canary beside them; the mount point lies elsewhere, so that `..` differs."""

    stack: Stack
    canary: Canary

    @property
    def top(self) -> Path:
        return self.stack.lowers[0]

    @property
    def bottom(self) -> Path:
        return self.stack.lowers[1]

    def mark(self, path: Path, name: str, value: bytes, *, prefix: str = TRUSTED) -> None:
        """Set an overlay attribute; what the file system itself refuses can't come in a layer."""
        with suppress(OSError):
            os.setxattr(path, prefix + name, value, follow_symlinks=False)


@pytest.fixture
def make_site(make_stack: StackMaker, on_file_system: FileSystemMaker) -> Iterator[SiteMaker]:
    """Make a site on xfs, whose attributes hold 64 KiB; its canary is looked at in the end."""
    made: list[Site] = []

    def make(kind: Kind, options: str = "") -> Site:
        stack = make_stack(kind, lowers=2, base=on_file_system("xfs"), options=options)
        stack.mnt = stack.base / "far" / "away" / "mnt"
        stack.mnt.mkdir(parents=True)
        site = Site(stack, Canary(stack.base / "canary"))
        made.append(site)
        return site

    yield make
    for site in made:
        site.stack.umount()
        site.canary.check()


def act_everywhere(root: Path, names: Iterable[str]) -> None:
    """Change whatever can be changed, so that copy-up meets the marks too; errors are as good as success."""
    for number, path in enumerate(root / name for name in sorted(names)):
        with suppress(OSError):
            os.chmod(path, 0o750) if not path.is_symlink() else os.lchown(path, 3, 3)
        with suppress(OSError):
            if path.is_symlink() or path == root:
                continue
            if path.is_dir():
                (path / f"made{number}").write_bytes(b"new")
                os.rename(path, path.with_name(path.name[:100] + "-moved"))
            elif stat.S_ISREG(path.lstat().st_mode):
                with path.open("ab") as file:
                    file.write(b"more")
                os.link(path, path.with_name(path.name[:100] + "-linked"))
                os.unlink(path)


def seen(site: Site, *, act: bool = True) -> dict[str, Outcome] | str:
    """Mount, walk, change, walk again; the first walk's outcomes, or the refusal to mount."""
    try:
        root = site.stack.mount()
    except MountRefused:
        return "refused"
    first = outcomes(root)
    if act:
        act_everywhere(root, first)
        assert_hidden(outcomes(root).values())
    site.stack.umount()
    site.canary.check()
    assert_hidden(first.values())
    return {path: tuple(_anywhere(part, site) for part in outcome) for path, outcome in first.items()}


def _anywhere(part: object, site: Site) -> object:
    """Targets of links, without where the test's directory lies."""
    return part.replace(str(site.stack.base), "BASE") if isinstance(part, str) else part


def compare(make_site: SiteMaker, plant: Plant, *, unlike: AbstractSet[str] = frozenset()) -> None:
    """Plant the same in two sites, mount one by each kind, and hold the outcomes against each other.

    unlike: names at which the kernel shows something else, with a reason at the test.
    """
    found: dict[str, dict[str, Outcome] | str] = {}
    for kind in KINDS:
        site = make_site(kind)
        plant(site)
        found[kind] = seen(site)
    kernel, ours = found["overlay"], found["union"]
    if isinstance(kernel, str) or isinstance(ours, str):
        assert kernel == ours
        return
    lines = differences(kernel, ours)
    differing = {line.partition(":")[0].partition("/")[0] for line in lines}
    assert differing == unlike, "\n".join(lines)


# --- redirects ------------------------------------------------------------------------------------

REDIRECTS: dict[str, bytes] = {
    "up": b"..",
    "up-and-over": b"../canary",
    "absolute-up": b"/..",
    "absolute-up-and-over": b"/../canary",
    "from-inside-up": b"/real/../../canary",
    "far-up": b"/../../../../../../etc",
    "slash": b"/",
    "slashes": b"//",
    "empty": b"",
    "relative-path": b"real/deep",
    "double": b"/real//deep",
    "trailing": b"/real/",
    "dot": b".",
    "absolute-dot": b"/.",
    "inner-dot": b"/real/./deep",
    "nul": b"real\0x",
    "nul-only": b"\0",
    "absolute-nul": b"/real\0/deep",
    "long-name": b"n" * 255,
    "longer-name": b"n" * 256,
    "very-long-name": b"n" * 60_000,
    "very-long-path": b"/real" * 12_000,
    "long-path-of-long-names": (b"/" + b"n" * 255) * 200,
    "through-link": b"/link/below",
    "through-link-deeper": b"/link/deep/deeper",
    "to-link": b"/link",
    "to-link-relative": b"link",
    "through-inner-link": b"/real/link/deep",
    "through-up-link": b"/uplink/canary",
    "through-file": b"/file/x",
    "to-file": b"/file",
    "to-fifo": b"/fifo",
    "to-whiteout": b"/gone",
    "to-nothing": b"/nothing/at/all",
    "to-good": b"/real/deep",
    "to-sibling": b"real",
    "newline": b"/real\n/deep",
    "work": b"/../work/work",
}


def plant_targets(layer: Path) -> None:
    build(layer, {"real": {"deep": {"inside": b"good"}, "file": b"good"}, "file": b"good"})
    (layer / "link").symlink_to("../canary")
    (layer / "uplink").symlink_to("..")
    (layer / "real" / "link").symlink_to("../../canary")
    os.mkfifo(layer / "fifo")
    whiteout(layer / "gone")


def plant_redirects(site: Site, layer: Path) -> None:
    for target in {site.bottom, site.top} - {layer}:
        plant_targets(target)
    absolute = {"canary-itself": os.fsencode(site.canary.where), "by-link": b"/link" + os.fsencode(site.canary.where)}
    for name, value in {**REDIRECTS, **absolute}.items():
        for kind in ("dir", "meta"):
            path = layer / f"{kind}-{name}"
            if kind == "dir":
                path.mkdir()
            else:
                path.touch()
                os.truncate(path, 4)
                site.mark(path, "metacopy", b"")
            site.mark(path, "redirect", value)


# The kernel takes a redirect as a C string, so that it ends at a NUL byte; here such a value is malformed.
NUL = {f"{kind}-{name}" for kind in ("dir", "meta") for name in ("nul", "nul-only", "absolute-nul")}

# Directories of upper that share one lower directory, of which the kernel shows the first that is looked up.
SHARED = {"real", "dir-to-good", "dir-to-sibling", "meta-to-file"}


def test_redirects_in_upper(make_site: SiteMaker) -> None:
    compare(make_site, lambda site: plant_redirects(site, site.stack.up), unlike=NUL | SHARED)


def test_redirects_in_a_lower(make_site: SiteMaker) -> None:
    compare(make_site, lambda site: plant_redirects(site, site.top), unlike=NUL)


def plant_cycles(site: Site) -> None:
    """Redirects that lead to one another, to themselves, into themselves, and a chain through each step of the way."""
    for layer in (site.bottom, site.top, site.stack.up):
        for name in ("a", "b", "self", "into", "chain"):
            build(layer, {name: {"sub": {"sub": {layer.name: layer.name.encode()}}}})
        site.mark(layer / "a", "redirect", b"/b")
        site.mark(layer / "b", "redirect", b"/a")
        site.mark(layer / "self", "redirect", b"self")
        site.mark(layer / "into", "redirect", b"/into/sub")
        site.mark(layer / "into" / "sub", "redirect", b"/into")
        site.mark(layer / "chain" / "sub" / "sub", "redirect", b"/chain/sub")
        site.mark(layer / "chain" / "sub", "redirect", b"/chain")
        for one, other in (("f", "g"), ("g", "f")):
            (layer / one).write_bytes(b"data")
            site.mark(layer / one, "redirect", b"/" + other.encode())
            site.mark(layer / one, "metacopy", b"")


def test_cycles_of_redirects(make_site: SiteMaker) -> None:
    # In the kernel a directory that two others of upper lead to is shown once; see above.
    compare(make_site, plant_cycles, unlike={"into", "chain"})


def test_redirects_that_grow_end(make_site: SiteMaker) -> None:
    """Each step of a long way has a redirect of 60,000 bytes, relative, so that they add up; it ends in little time and room."""
    site = make_site("union")
    steps = 40
    (site.top / "start").mkdir()
    site.mark(site.top / "start", "redirect", b"/d" * steps + b"/end")
    here = site.bottom
    for number in range(steps):
        here /= "d"
        here.mkdir()
        site.mark(here, "redirect", b"%d" % number * 20_000)
    (here / "end").mkdir()
    root = site.stack.mount()
    with pytest.raises(OSError, match="too long"):
        os.lstat(root / "start")
    assert os.listdir(root / "d")


# --- other marks ----------------------------------------------------------------------------------

HUGE = b"y" * 60_000
DIGEST = bytes((0, 36, 0, 1)) + bytes(32)
METACOPIES = {
    "zero": b"\0",
    "short": b"abc",
    "head": bytes((0, 4, 0, 0)),
    "version": bytes((1, 4, 0, 0)),
    "length": bytes((0, 99, 0, 0)),
    "flags": bytes((0, 4, 255, 0)),
    "digest": DIGEST,
    "digest-cut": DIGEST[:-1],
    "algorithm": bytes((0, 36, 0, 99)) + bytes(32),
    "text": b"y",
    "huge": HUGE,
}


@pytest.mark.parametrize("where", ["upper", "lower"])
def test_metacopy_marks_of_other_kinds(make_site: SiteMaker, where: str) -> None:
    def plant(site: Site) -> None:
        layer = site.stack.up if where == "upper" else site.top
        for name, value in METACOPIES.items():
            (site.bottom / name).write_bytes(b"data")
            (layer / name).write_bytes(bytes(4))
            site.mark(layer / name, "metacopy", value)

    compare(make_site, plant)


def plant_odd_marks(site: Site) -> None:
    """Marks that belong to directories on files and the other way round, of wrong sizes, and at the roots."""
    values = {"y": b"y", "x": b"x", "empty": b"", "yy": b"yy", "nul": b"\0", "huge": HUGE, "path": b"/../canary"}
    for layer in (site.stack.up, site.top):
        for mark in (
            "opaque",
            "whiteout",
            "impure",
            "metacopy",
            "origin",
            "nlink",
            "upper",
            "uuid",
            "protattr",
            "redirect",
        ):
            for name, value in values.items():
                if mark == "metacopy" and name in ("y", "x", "yy", "nul"):
                    continue  # see above
                stem = f"{layer.name}-{mark}-{name}"
                build(site.bottom, {f"{stem}-d": {"below": b"below"}, f"{stem}-f": b"below"})
                build(layer, {f"{stem}-d": {"above": b"above"}, f"{stem}-f": b"above", f"{stem}-e": b""})
                (layer / f"{stem}-l").symlink_to("../canary/secret")
                os.mkfifo(layer / f"{stem}-p")
                for kind in "dfelp":
                    site.mark(layer / f"{stem}-{kind}", mark, value)
        for mark in ("redirect", "metacopy", "whiteout", "opaque"):
            site.mark(layer, mark, b"y")
        whiteout(layer / f"{layer.name}-w")
        site.mark(layer / f"{layer.name}-w", "redirect", b"/../canary")
    site.mark(site.bottom, "opaque", b"y")
    site.mark(site.bottom, "redirect", b"/../canary")


def test_marks_in_odd_places(make_site: SiteMaker) -> None:
    # A file that only its attribute makes a whiteout, in a directory that doesn't say that it has such, is listed by the
    # kernel, but can't be looked up; here it isn't listed either.
    values = ("y", "x", "empty", "yy", "nul", "huge", "path")
    listed = {f"{layer}-whiteout-{value}-e" for layer in ("upper", "lower0") for value in values}
    nul = {"upper-redirect-nul-d", "lower0-redirect-nul-d"}
    compare(make_site, plant_odd_marks, unlike={".", *listed, *nul})


def plant_origins(site: Site) -> None:
    """Origins that name the canary, what has them itself, each other, and nothing."""
    build(site.bottom, {"file": b"lower", "dir": {}, "link": {"one": b"one", "two": b"two"}})
    bottom = os.open(site.bottom, os.O_PATH)
    uuid = sysio.file_system_uuid(bottom)
    os.close(bottom)
    (site.stack.up / "itself").write_bytes(b"upper")

    def handle(path: Path) -> bytes:
        parent = os.open(path.parent, os.O_PATH)
        try:
            return encode_handle(*sysio.file_handle(parent, os.fsencode(path.name)), uuid)
        finally:
            os.close(parent)

    good = handle(site.bottom / "file")
    values = {
        "good": good,
        "canary": handle(site.canary.where / "secret"),
        "canary-dir": handle(site.canary.where),
        "canary-link": handle(site.canary.where / "link"),
        "itself": handle(site.stack.up / "itself"),
        "work": handle(site.stack.work),
        "dir": handle(site.bottom / "dir"),
        "empty": b"",
        "cut": good[:-1],
        "long": good + b"x",
        "length": good[:2] + bytes((255,)) + good[3:] + bytes(255 - len(good)),
        "huge": good + HUGE,
        "no-uuid": good[:5] + bytes(16) + good[21:],
        "other-kind": good[:4] + b"\xff" + good[5:],
        "magic": b"\0\0" + good[2:],
        "garbage": bytes(range(200)),
    }
    for name, value in values.items():
        build(site.stack.up, {f"{name}-f": b"upper", f"{name}-d": {"in": b"upper"}})
        (site.stack.up / f"{name}-l").symlink_to("../canary/secret")
        build(site.bottom, {f"{name}-d": {"below": b"lower"}})
        for kind in "fdl":
            site.mark(site.stack.up / f"{name}-{kind}", "origin", value)
    site.mark(site.stack.up, "impure", b"y")
    site.mark(site.stack.up / "itself", "origin", values["itself"])


def test_origins(make_site: SiteMaker) -> None:
    # Several files of upper that claim one origin: the kernel takes them for one inode, and shows the first, even at the
    # name of the lower file; for the others lookups fail, and listings leave them out.
    several = {"file", "itself-f", "length-f", "long-f", "huge-f"}
    compare(make_site, plant_origins, unlike={".", *several})


# --- links and names ------------------------------------------------------------------------------


def plant_links(site: Site) -> None:
    """Symbolic links where other layers have directories, hard links of what has marks, and devices as whiteouts that aren't."""
    upper, top, bottom = site.stack.up, site.top, site.bottom
    for layer, other in ((upper, "upper"), (top, "top")):
        (layer / f"{other}-link").symlink_to("../canary")
        (layer / f"{other}-absolute").symlink_to(site.canary.where)
        for below in {top, bottom} - {layer}:
            build(below, {f"{other}-link": {"secret": b"below"}, f"{other}-absolute": {"secret": b"below"}})
        build(layer, {f"{other}-through": {}})
        site.mark(layer / f"{other}-through", "redirect", f"/{other}-link/deep".encode())
    build(top, {"top-dir": {"x": b"top"}})
    (bottom / "top-dir").symlink_to("../canary")
    (upper / "dangling").symlink_to("dangling")
    for layer in (upper, top):
        (layer / "one").write_bytes(b"data")
        site.mark(layer / "one", "metacopy", b"")
        site.mark(layer / "one", "redirect", b"/three")
        os.link(layer / "one", layer / "two")
        whiteout(layer / "w1")
        os.link(layer / "w1", layer / "w2")
        os.mknod(layer / "block-0-0", stat.S_IFBLK | 0o600, 0)
        os.mknod(layer / "char-0-1", stat.S_IFCHR | 0o600, os.makedev(0, 1))
        os.mkfifo(layer / "fifo")
    build(bottom, dict.fromkeys(("one", "two", "three", "w1", "w2", "block-0-0", "char-0-1", "fifo"), b"down"))
    os.link(bottom / "three", bottom / "four")


def test_links_and_devices(make_site: SiteMaker) -> None:
    compare(make_site, plant_links)


def plant_names(site: Site) -> None:
    """Names like those in the work directory, and such as are awkward."""
    names = [
        "#1",
        "#2",
        "#ff",
        "work",
        "index",
        "incompat",
        " ",
        "\n",
        "\x1b[2J",
        "\udcff",
        "-rf",
        "~",
        "n" * 255,
        ".wh",
        "...",
    ]
    for layer in (site.stack.up, site.top, site.bottom):
        build(layer, {name: {"in": layer.name.encode()} for name in names})
        build(layer, {f"{name[:200]}-file": b"content" for name in names})


def test_names_like_ours(make_site: SiteMaker) -> None:
    compare(make_site, plant_names)


def test_marks_of_image_layers(make_site: SiteMaker) -> None:
    """`.wh.` names of all kinds, which overlayfs doesn't know: those that aren't plain empty files mark nothing."""
    site = make_site("union")
    build(
        site.bottom, {name: {"in": b"below"} for name in ("dir", "full", "link", "plain", "opq", "opq-link", "opq-dir")}
    )
    build(
        site.top,
        {".wh.dir": {"in": b""}, ".wh.full": b"content", ".wh.plain": b"", ".wh.": b"", ".wh..": b"", ".wh...": b""},
    )
    (site.top / ".wh.link").symlink_to("../canary/below")
    build(
        site.top,
        {"opq": {".wh..wh..opq": b""}, "opq-link": {}, "opq-dir": {".wh..wh..opq": {}}, ".wh." + "n" * 251: b""},
    )
    (site.top / "opq-link" / ".wh..wh..opq").symlink_to("../../canary/f")
    found = seen(site, act=False)
    assert isinstance(found, dict)
    top = found["."][1]
    assert isinstance(top, list)
    assert "plain" not in top
    assert {"dir", "full", "link", "opq", "opq-link", "opq-dir"} <= set(top)
    assert "opq/in" not in found
    site.stack.mount()
    act_everywhere(site.stack.mnt, found)


# --- work and index -------------------------------------------------------------------------------


def test_the_work_directory_may_hold_anything(make_site: SiteMaker) -> None:
    """It is emptied without following a link, however deep it is; whiteouts and marks in it mean nothing."""
    site = make_site("union")
    work = site.stack.work / "work"
    build(work, {"#1": {"in": {"deeper": b""}}, "file": b"", "marked": {"x": b""}})
    (work / "link").symlink_to("../../canary")
    (work / "incompat").symlink_to("../../canary")
    (work / "#2").symlink_to(site.canary.where / "d")
    whiteout(work / "gone")
    opaque(work / "marked")
    site.mark(work / "marked", "redirect", b"/../canary")
    here = os.open(work, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deep", dir_fd=here)
        below = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.symlink("../../canary", "link", dir_fd=below)
        os.close(here)
        here = below
    os.close(here)
    build(site.bottom, {"f": b"lower"})
    root = site.stack.mount()
    assert os.listdir(work) == []
    (root / "f").write_bytes(b"changed")
    (root / "new").mkdir()


@pytest.mark.expected_log("can't prepare the layers: Not a directory")
@pytest.mark.parametrize("name", ["work", "index"])
@pytest.mark.parametrize("what", ["link", "file", "fifo"])
def test_work_and_index_must_be_directories(make_site: SiteMaker, name: str, what: str) -> None:
    site = make_site("union")
    place = site.stack.work / name
    match what:
        case "link":
            place.symlink_to("../canary")
        case "file":
            place.write_bytes(b"")
        case "fifo":
            os.mkfifo(place)
    with pytest.raises(MountRefused) as refused:
        site.stack.mount()
    assert refused.value.code == 3


def test_an_index_that_lies(make_site: SiteMaker) -> None:
    """Index entries that are links, directories, whiteouts, have other origins or link counts of their own."""

    def prepare(site: Site) -> list[Path]:
        names = [f"f{number}" for number in range(8)]
        for name in names:
            build(site.bottom, {name: b"lower"})
            os.link(site.bottom / name, site.bottom / f"{name}-other")
        root = site.stack.mount()
        for name in names:
            os.chmod(root / name, 0o600)
        site.stack.umount()
        entries = [path for path in (site.stack.work / "index").iterdir() if path.is_file()]
        by_inode = {path.stat().st_ino: path for path in entries}
        return [by_inode[(site.stack.up / name).stat().st_ino] for name in names]

    def plant(site: Site) -> None:
        entries = prepare(site)
        entries[0].unlink()
        entries[0].symlink_to("../../canary/secret")
        entries[1].unlink()
        entries[1].mkdir()
        site.mark(entries[2], "nlink", b"U+99999999999")
        site.mark(entries[3], "nlink", b"U+" + b"9" * 4000)
        site.mark(entries[4], "nlink", b"L-100")
        site.mark(entries[5], "nlink", b"U+2147483646")
        site.mark(entries[6], "origin", os.getxattr(entries[7], TRUSTED + "origin"))
        index = entries[0].parent
        (index / "#1").mkdir()
        (index / ("00fb" * 20)).symlink_to("../../canary")
        (index / "not hex").write_bytes(b"")

    site = make_site("union")
    site.stack.expected_log.append("index")
    plant(site)
    found = seen(site)
    assert isinstance(found, dict)
    for number in range(2, 8):
        assert found[f"f{number}"][3] == b"lower"
        assert 0 < found[f"f{number}"][2] < 1 << 31  # type: ignore[operator]


@pytest.mark.expected_log("can't be filled")
def test_a_malformed_redirect_where_a_volume_shall_be_filled(make_site: SiteMaker) -> None:
    site = make_site("union")
    (site.top / "data").mkdir()
    site.mark(site.top / "data", "redirect", b"../canary")
    with pytest.raises(MountRefused, match="volume vol can't be filled from /data") as refused:
        site.stack.mount(extra=["-v", "vol:/data"])
    assert refused.value.code == 3


@pytest.mark.parametrize("what", ["link", "absolute", "fifo", "file", "directory", "device"])
def test_what_a_user_puts_where_a_wh_file_shall_be(make_site: SiteMaker, what: str) -> None:
    """With whiteout=wh a removal makes an empty file `.wh.NAME`; what has that name already is neither followed nor opened."""
    site = make_site("union")
    build(site.bottom, {"f": b"lower", "d": {}, "g": b"lower"})
    root = site.stack.mount("whiteout=wh")
    for name in ("f", "d", "g"):
        mark = root / f".wh.{name}"
        match what:
            case "link":
                mark.symlink_to(f"../canary/made-{name}")
            case "absolute":
                mark.symlink_to(site.canary.where / f"made-{name}")
            case "fifo":
                os.mkfifo(mark)
            case "file":
                mark.write_bytes(b"mine")
            case "directory":
                mark.mkdir()
            case "device":
                os.mknod(mark, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for change in (
        lambda: os.unlink(root / "f"),
        lambda: os.rmdir(root / "d"),
        lambda: os.rename(root / "g", root / "h"),
    ):
        with pytest.raises(FileExistsError):
            change()
    assert {"f", "d", "g"} <= set(os.listdir(root))
    (root / "f").write_bytes(b"still works")
