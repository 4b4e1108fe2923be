"""What can be seen of the core without a kernel between: states, copy-up jobs, error paths."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from unionfs.core.caller import Caller
from unionfs.core.changes import Changes
from unionfs.core.copyup import OFFLOAD_BYTES, DataCopy, DataCopyPending
from unionfs.core.dirhandle import DirHandle
from unionfs.core.inodes import INDEXED, META, UPPER, Dir, Node
from unionfs.core.union import Union
from unionfs.errors import BusyError, LayerError

ROOT = Caller(0, 0)
Opener = Callable[..., Union]


def find(union: Union, path: str) -> Node:
    node: Node = union.tree.root
    for name in path.encode().split(b"/"):
        assert isinstance(node, Dir)
        node = union.tree.need(node, name)
    node.nlookup += 1
    return node


def find_dir(union: Union, path: str) -> Dir:
    node = find(union, path)
    assert isinstance(node, Dir)
    return node


def listing(union: Union, node: Node) -> list[bytes]:
    assert isinstance(node, Dir)
    return sorted(entry.name for _, entry in union.read_entries(DirHandle(node), 0))


def test_layers_merge_and_whiteouts_hide(tmp_path: Path, open_union: Opener) -> None:
    (tmp_path / "l1/d").mkdir()
    (tmp_path / "l2/d").mkdir()
    (tmp_path / "l1/d/top").write_text("1")
    (tmp_path / "l2/d/top").write_text("2")
    (tmp_path / "l2/d/low").write_text("2")
    union = open_union()
    assert listing(union, find(union, "d")) == [b"low", b"top"]
    union.dirs.unlink(find_dir(union, "d"), b"low")
    assert listing(union, find(union, "d")) == [b"top"]
    assert union.tree.child(find_dir(union, "d"), b"low") is None
    entry = os.stat(tmp_path / "upper/d/low")
    assert stat.S_ISCHR(entry.st_mode)
    assert entry.st_rdev == 0


def test_a_metadata_change_copies_no_data(tmp_path: Path, open_union: Opener) -> None:
    (tmp_path / "l2/f").write_bytes(b"x" * 10000)
    union = open_union()
    node = find(union, "f")
    union.setattr(node, Changes(mode=0o600))
    assert node.flags & META
    with open(tmp_path / "upper/f", "rb") as upper, pytest.raises(OSError, match="No such device or address"):
        os.lseek(upper.fileno(), 0, os.SEEK_DATA)
    assert union.tree.blocks(node, union.tree.stat(node)) == os.stat(tmp_path / "l2/f").st_blocks
    fd = union.open_file(node, os.O_RDWR)
    assert os.pread(fd, 20000, 0) == b"x" * 10000
    assert not node.flags & META
    union.close_file(fd)


def test_without_memory_a_metadata_change_copies_nothing_up(tmp_path: Path, open_union: Opener) -> None:
    (tmp_path / "l2/d").mkdir()
    (tmp_path / "l2/d/f").write_bytes(b"x")
    union = open_union()
    node = find(union, "d/f")
    union.inodes.reserve.spend()
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), before[1]))
    try:
        with pytest.raises(OSError, match="memory"):
            union.setattr(node, Changes(mode=0o600))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert os.listdir(tmp_path / "upper") == []
    union.setattr(node, Changes(mode=0o600))
    assert (tmp_path / "upper/d/f").stat().st_mode & 0o777 == 0o600


def test_reading_descriptors_see_what_is_written_after_copy_up(tmp_path: Path, open_union: Opener) -> None:
    (tmp_path / "l2/f").write_bytes(b"old")
    union = open_union()
    node = find(union, "f")
    reader = union.open_file(node, os.O_RDONLY)
    writer = union.open_file(node, os.O_WRONLY)
    os.pwrite(writer, b"new", 0)
    assert os.pread(reader, 10, 0) == b"new"
    assert (tmp_path / "l2/f").read_bytes() == b"old"
    union.close_file(reader)
    union.close_file(writer)


def test_a_long_copy_is_handed_out_before_anything_changed(tmp_path: Path, open_union: Opener) -> None:
    size = OFFLOAD_BYTES + 1
    (tmp_path / "l2/f").write_bytes(b"z" * size)
    union = open_union(metacopy=False)
    union.up.offload = True
    node = find(union, "f")
    with pytest.raises(DataCopyPending) as caught:
        union.open_file(node, os.O_WRONLY)
    with pytest.raises(DataCopyPending) as again:
        union.setattr(node, Changes(mode=0o600))
    job = caught.value.job
    assert again.value.job is job, "whoever comes meanwhile waits for the same copy"
    assert not node.flags & UPPER
    assert not (tmp_path / "upper/f").exists()
    run(node, job)
    fd = union.open_file(node, os.O_WRONLY)
    assert (tmp_path / "upper/f").stat().st_size == size
    union.close_file(fd)


def run(node: Node, job: DataCopy) -> None:
    job.run()
    node.job = None
    job.finish()


def test_an_abandoned_copy_leaves_nothing(tmp_path: Path, open_union: Opener) -> None:
    (tmp_path / "l2/f").write_bytes(b"z" * (OFFLOAD_BYTES + 1))
    union = open_union(metacopy=False)
    union.up.offload = True
    node = find(union, "f")
    with pytest.raises(DataCopyPending) as caught:
        union.open_file(node, os.O_WRONLY)
    node.job = None
    caught.value.job.abandon()
    assert os.listdir(tmp_path / "work/work") == []
    assert not node.flags & UPPER


def test_names_of_a_lower_hard_link_stay_one_file(tmp_path: Path, open_union: Opener) -> None:
    (tmp_path / "l2/a").write_text("1")
    os.link(tmp_path / "l2/a", tmp_path / "l2/b")
    union = open_union()
    a, b = find(union, "a"), find(union, "b")
    assert a is b
    ino = a.ino
    union.close_file(union.open_file(a, os.O_WRONLY))
    assert a.flags & INDEXED
    union = open_union()
    a, b = find(union, "b"), find(union, "a")
    assert a is b
    assert a.ino == ino
    assert union.tree.nlink(a, union.tree.stat(a)) == 2


def test_without_the_index_copy_up_separates_them(tmp_path: Path, open_union: Opener) -> None:
    (tmp_path / "l2/a").write_text("1")
    os.link(tmp_path / "l2/a", tmp_path / "l2/b")
    union = open_union(index=False)
    a, b = find(union, "a"), find(union, "b")
    assert a is not b
    assert a.ino == b.ino
    union.close_file(union.open_file(a, os.O_WRONLY))
    assert a.ino != b.ino
    assert not b.flags & UPPER


def test_a_moved_lower_directory_keeps_its_content(tmp_path: Path, open_union: Opener) -> None:
    (tmp_path / "l2/d/sub").mkdir(parents=True)
    (tmp_path / "l2/d/sub/f").write_text("1")
    union = open_union()
    root = union.tree.root
    union.dirs.mkdir(root, b"new", 0o755, ROOT)
    union.dirs.rename(root, b"d", find_dir(union, "new"), b"e", 0)
    assert os.getxattr(tmp_path / "upper/new/e", "trusted.overlay.redirect") == b"/d"
    for _ in range(2):
        assert listing(union, find(union, "new/e/sub")) == [b"f"]
        assert union.tree.child(union.tree.root, b"d") is None
        union = open_union()


def test_a_new_directory_hides_what_its_next_name_hid(tmp_path: Path, open_union: Opener) -> None:
    """With options that leave new directories unmarked, a rename over a whiteout has to mark it."""
    (tmp_path / "l2/d/x").mkdir(parents=True)
    (tmp_path / "l2/d/x/old").write_text("old")
    options = {"redirect_dir": "off", "metacopy": False, "index": False, "xino": "off"}
    union = open_union(**options)
    parent = find_dir(union, "d")
    union.dirs.unlink(find_dir(union, "d/x"), b"old")
    union.dirs.rmdir(parent, b"x")
    union.dirs.mkdir(parent, b"new", 0o755, ROOT)
    union.dirs.rename(parent, b"new", parent, b"x", 0)
    union = open_union(**options)
    assert listing(union, find(union, "d/x")) == []


def test_forgotten_nodes_free_their_descriptors(tmp_path: Path, open_union: Opener) -> None:
    for number in range(300):
        (tmp_path / f"l2/d{number}").mkdir()
    union = open_union()
    for number in range(300):
        find(union, f"d{number}")
        listing(union, find(union, f"d{number}"))
    for node in list(union.inodes.nodes.values()):
        if node is not union.tree.root:
            union.tree.forget(node, node.nlookup)
    assert list(union.inodes.nodes.values()) == [union.tree.root]


def test_two_unions_may_not_share_an_upper(tmp_path: Path, open_union: Opener) -> None:
    union = open_union()
    with pytest.raises(BusyError, match="in use"):
        Union.open(union.config)


def test_a_dirty_volatile_work_directory_is_refused(open_union: Opener) -> None:
    open_union(volatile=True)
    with pytest.raises(LayerError, match="incompat"):
        open_union()


def test_a_read_only_union_changes_nothing(tmp_path: Path, open_union: Opener) -> None:
    (tmp_path / "l2/f").write_text("1")
    union = open_union(upper=None, work=None, read_only=True)
    with pytest.raises(OSError, match="Read-only"):
        union.setattr(find(union, "f"), Changes(mode=0))
    with pytest.raises(OSError, match="Read-only"):
        union.dirs.mkdir(union.tree.root, b"d", 0o755, ROOT)
