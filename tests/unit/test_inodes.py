"""Node ids, numbers of several file systems, and when nodes die."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from unionfs.core.inodes import UPPER, Dir, InodeTable


def table(tmp_path: Path) -> tuple[InodeTable, Dir]:
    nodes = InodeTable()
    nodes.know_device(os.stat(tmp_path).st_dev)
    return nodes, nodes.add_root(os.stat(tmp_path))


def test_numbers_of_two_file_systems_never_meet(tmp_path: Path) -> None:
    nodes, _ = table(tmp_path)
    mine = os.stat(tmp_path).st_dev
    inos = (2, 3, 2**32, 2**55 - 1, 2**56, 2**63)
    mapped = [nodes.map_ino(device, ino) for device in (mine, 4242, 4243) for ino in inos]
    assert len(set(mapped)) == len(mapped)
    assert mapped == [nodes.map_ino(device, ino) for device in (mine, 4242, 4243) for ino in inos]
    assert nodes.map_ino(mine, 77) == 77, "upper's numbers are plain"
    assert all(0 < number < 2**64 for number in mapped)


def test_a_node_has_the_number_for_an_id_unless_it_is_taken(tmp_path: Path) -> None:
    nodes, root = table(tmp_path)
    one = nodes.add(50, stat.S_IFREG, root, b"one")
    two = nodes.add(50, stat.S_IFREG, root, b"two")
    third = nodes.add(1, stat.S_IFREG, root, b"third")
    assert one.id == one.ino == two.ino == 50
    assert len({one.id, two.id, third.id, root.id}) == 4


def test_a_directory_lives_as_long_as_something_below_it(tmp_path: Path) -> None:
    nodes, root = table(tmp_path)
    directory = nodes.add(60, stat.S_IFDIR, root, b"d")
    assert isinstance(directory, Dir)
    file = nodes.add(61, stat.S_IFREG, directory, b"f")
    directory.nlookup = file.nlookup = 1
    assert nodes.release(directory, 1) == []
    assert nodes.nodes[60] is directory
    assert nodes.release(file, 1) == [file, directory]
    assert list(nodes.nodes) == [1]
    assert root.children == {}


def test_a_second_name_keeps_a_node_findable(tmp_path: Path) -> None:
    nodes, root = table(tmp_path)
    file = nodes.add(70, stat.S_IFREG, root, b"a")
    file.flags, file.rino, file.nlookup = UPPER, 70, 2
    nodes.add_name(file, root, b"b")
    assert nodes.find_upper(70) is file
    assert nodes.drop_name(file, root, b"a")
    assert (file.parent, file.name, file.links) == (root, b"b", None)
    assert not nodes.drop_name(file, root, b"b")
    assert nodes.release(file, 2) == [file]
    assert nodes.find_upper(70) is None
