"""Nodes and handles whose changes are noticed, and how they are written down (`restart` says what for)."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from unionfs.core.dirhandle import DirHandle
from unionfs.core.inodes import Dir, InodeTable, Node
from unionfs.fuse.ledger import Ledger

_EXTRA_BIT: Final = 1 << 63

# --- what is noticed ------------------------------------------------------------------------------

_KNOWN: Final = frozenset(("parent", "name", "links", "anchor", "nlookup", "flags", "rino"))

changed: dict[int, Node] = {}  # by id: nodes of which the ledger does not say how they are; one process, one mount


class KeptNode(Node):
    """A node whose changes are noticed."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in _KNOWN:
            changed[self.id] = self


class KeptDir(Dir):
    """The same for a directory."""

    __slots__ = ()

    __setattr__ = KeptNode.__setattr__


def make_node(node_id: int, ino: int, fmt: int, parent: Dir | None, name: bytes) -> Node:
    """Make a node, and have it noticed only then: that is much faster."""
    node = Node(node_id, ino, fmt, parent, name)
    node.__class__ = KeptNode
    changed[node_id] = node
    return node


def make_dir(node_id: int, ino: int, parent: Dir | None, name: bytes) -> Dir:
    """The same for a directory."""
    node = Dir(node_id, ino, parent, name)
    node.__class__ = KeptDir
    changed[node_id] = node
    return node


class KeptNodes(InodeTable):
    """All living nodes; while `forced` is set a new one gets that id."""

    make_node = staticmethod(make_node)
    make_dir = staticmethod(make_dir)

    def __init__(self) -> None:
        super().__init__()
        self.forced = 0

    def _free_id(self, ino: int) -> int:
        return self.forced or super()._free_id(ino)

    def release(self, node: Node, count: int) -> list[Node]:
        dead = super().release(node, count)
        changed.update((one.id, one) for one in dead)
        return dead

    def never_again(self, node_id: int) -> None:
        """Have no new node get an id that the kernel may still use for what is no more."""
        self.retired.add(node_id)

    def numbers(self, *, devices: int = 0, odd: int = 0) -> bytes:
        """Pack the records of how real objects are numbered, but for what was given a number first."""
        parts = [
            record(b"K", _DEVICE.pack(*one)) for one in itertools.islice(self._fsids.items(), devices, None)
        ]  # fmt: skip
        parts += [
            record(b"Q", _ODD.pack(*real, number)) for real, number in itertools.islice(self._odd.items(), odd, None)
        ]
        return b"".join(parts)

    def counts(self) -> tuple[int, int]:
        """Return how many numbers there are of either kind."""
        return len(self._fsids), len(self._odd)

    def number_as(self, devices: dict[int, int], odd: dict[tuple[int, int], int]) -> None:
        """Go on with the numbers that were given."""
        self._fsids.update(devices)
        self._odd.update(odd)

    def count_on_from(self, ids: Iterable[int]) -> None:
        """Have ids of the kind that are no `st_ino` go on after these."""
        self._extra = max((node_id & ~_EXTRA_BIT for node_id in ids if node_id & _EXTRA_BIT), default=self._extra)


class DirHandles(dict[int, DirHandle]):
    """Open directories by handle; what comes and goes is noticed."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: set[int] = set()

    def __setitem__(self, key: int, value: DirHandle) -> None:
        self.changed.add(key)
        super().__setitem__(key, value)

    def __delitem__(self, key: int) -> None:
        self.changed.add(key)
        super().__delitem__(key)

    def pop(self, key: int, *default: Any) -> Any:
        self.changed.add(key)
        return super().pop(key, *default)


# --- records --------------------------------------------------------------------------------------

_NODE: Final = struct.Struct("=QQIIIQQiiQII")
_NAME: Final = struct.Struct("=QH")
_PIN: Final = struct.Struct("=ii")
_FILE: Final = struct.Struct("=iQiB")
_DIRECTORY: Final = struct.Struct("=QQB")
_NUMBER: Final = struct.Struct("=Q")
_DEVICE: Final = struct.Struct("=qI")
_ODD: Final = struct.Struct("=QQQ")
_UNANSWERED: Final = struct.Struct("=QIII")
_LOOKUPS: Final = struct.Struct("=QQ")
_COUNT: Final = struct.Struct("=I")


class NodeRecord(NamedTuple):
    """A node that the kernel knows."""

    id: int
    ino: int
    fmt: int
    flags: int
    layer: int
    rino: int
    nlookup: int
    anchor: int
    data_anchor: int
    parent: int
    names: list[tuple[int, bytes]]  # id of the directory, name
    pins: list[tuple[int, int]]  # layer and descriptor of a directory that has no name


class FileRecord(NamedTuple):
    """An open file."""

    fd: int
    node: int
    backing_id: int
    maps: bool


class DirectoryRecord(NamedTuple):
    """An open directory."""

    handle: int
    node: int
    kept: bool


def record(kind: bytes, text: bytes) -> bytes:
    """Pack a record of a kind, one letter; `Past` knows them."""
    return kind + _COUNT.pack(len(text)) + text


def _records(text: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(text):
        length = _COUNT.unpack_from(text, at + 1)[0]
        yield text[at : at + 1], text[at + 5 : at + 5 + length]
        at += 5 + length


def _names_of(node: Node) -> list[tuple[int, bytes]]:
    return [
        (parent.id, name)
        for parent, name in ((node.parent, node.name), *(node.links or ()))
        if parent is not None and parent.children.get(name) is node
    ]


def gone(kind: bytes, number: int) -> bytes:
    """Pack a record that takes another one back: its kind is the small letter."""
    return record(kind, _NUMBER.pack(number))


def pack_file(file: FileRecord) -> bytes:
    """Pack the record of an open file."""
    return record(b"F", _FILE.pack(*file))


def pack_directory(directory: DirectoryRecord) -> bytes:
    """Pack the record of an open directory."""
    return record(b"D", _DIRECTORY.pack(*directory))


def pack_owed(number: int, noted: bytes) -> bytes:
    """Pack the record of a request that was carried out, but not answered."""
    return record(b"O", _NUMBER.pack(number) + noted)


def pack_mount(device: int, layers: Iterable[int], *, passthrough: bool) -> bytes:
    """Pack the record of what each daemon needs: the device, `LayerStack.held`, and whether files may be passed."""
    numbers = [device, passthrough, *layers]
    return record(b"L", struct.pack(f"={len(numbers)}i", *numbers))


def pack_node(node: Node, data_anchor: int) -> bytes:
    """Pack the record of a node; *data_anchor* is a descriptor of its data, if it needs one."""
    names = _names_of(node)
    pins = list(zip(node.stack, node.fds or (), strict=False)) if isinstance(node, Dir) and not names else []
    parent = 0 if node.parent is None else node.parent.id
    head = _NODE.pack(
        *(node.id, node.ino, node.fmt, node.flags, node.layer, node.rino, max(node.nlookup, 0)),
        *(node.anchor, data_anchor, parent, len(names), len(pins)),
    )
    tail = b"".join(_NAME.pack(parent_id, len(name)) + name for parent_id, name in names)
    return record(b"N", head + tail + b"".join(_PIN.pack(*pin) for pin in pins))


def _unpack_node(text: bytes) -> NodeRecord:
    fields = _NODE.unpack_from(text)
    names, pins = fields[-2:]
    at = _NODE.size
    found = []
    for _ in range(names):
        parent, length = _NAME.unpack_from(text, at)
        at += _NAME.size + length
        found.append((parent, text[at - length : at]))
    return NodeRecord._make((*fields[:-2], found, [_PIN.unpack_from(text, at + i * _PIN.size) for i in range(pins)]))


class Unanswered:
    """What a request was counted for whose answer may not have come; it is taken back if the request comes again."""

    def __init__(self, unique: int) -> None:
        self.unique = unique
        self.lookups: dict[int, int] = {}
        self.files: list[int] = []
        self.directories: list[int] = []

    def pack(self) -> bytes:
        """Pack the record."""
        lookups = [(node_id, count) for node_id, count in self.lookups.items() if count > 0]
        text = _UNANSWERED.pack(self.unique, len(self.files), len(self.directories), len(lookups))
        text += struct.pack(f"={len(self.files)}i{len(self.directories)}Q", *self.files, *self.directories)
        return record(b"U", text + b"".join(_LOOKUPS.pack(*one) for one in lookups))

    @classmethod
    def unpack(cls, text: bytes) -> Unanswered:
        """Return what was packed."""
        unique, files, directories, lookups = _UNANSWERED.unpack_from(text)
        made, at = cls(unique), _UNANSWERED.size
        numbers = struct.unpack_from(f"={files}i{directories}Q", text, at)
        made.files, made.directories = list(numbers[:files]), list(numbers[files:])
        at += 4 * files + 8 * directories
        made.lookups = dict(_LOOKUPS.unpack_from(text, at + i * _LOOKUPS.size) for i in range(lookups))
        return made


class Past:
    """What the ledger says."""

    def __init__(self, ledger: Ledger) -> None:
        self.nodes: dict[int, NodeRecord] = {}
        self.files: dict[int, FileRecord] = {}
        self.directories: dict[int, DirectoryRecord] = {}
        self.owed: dict[int, bytes] = {}  # by number: requests that were carried out, and what had been noted
        self.unanswered: dict[int, Unanswered] = {}
        self.numbered: dict[int, int] = {}  # file systems, by device
        self.odd: dict[tuple[int, int], int] = {}  # objects that have a number of their own, by device and number
        self.init = b""
        self.device = -1
        self.layers: list[int] = []
        self.passthrough = False
        last = Unanswered(0)
        for unique, records in ledger.batches():
            last = Unanswered(unique)
            for kind, text in _records(records):
                self._take(last, kind, text)
        if last.unique:
            self.unanswered[last.unique] = last

    def _take(self, last: Unanswered, kind: bytes, text: bytes) -> None:
        if kind == b"N":
            node = _unpack_node(text)
            before = self.nodes.get(node.id)
            last.lookups[node.id] = node.nlookup - (0 if before is None else before.nlookup)
            self.nodes[node.id] = node
        elif kind == b"n":
            self.nodes.pop(_NUMBER.unpack(text)[0], None)
        elif kind == b"F":
            file = FileRecord(*_FILE.unpack(text))
            if file.fd not in self.files:
                last.files.append(file.fd)
            self.files[file.fd] = file
        elif kind == b"f":
            self.files.pop(_NUMBER.unpack(text)[0], None)
        elif kind == b"D":
            directory = DirectoryRecord(*_DIRECTORY.unpack(text))
            last.directories.append(directory.handle)
            self.directories[directory.handle] = directory
        elif kind == b"d":
            self.directories.pop(_NUMBER.unpack(text)[0], None)
        elif kind == b"O":
            self.owed[_NUMBER.unpack_from(text)[0]] = text[_NUMBER.size :]
        elif kind == b"o":
            self.owed.pop(_NUMBER.unpack(text)[0], None)
        elif kind == b"U":
            unanswered = Unanswered.unpack(text)
            self.unanswered[unanswered.unique] = unanswered
        elif kind == b"u":
            self._take_back(self.unanswered.pop(_NUMBER.unpack(text)[0], None))
        elif kind == b"K":
            device, number = _DEVICE.unpack(text)
            self.numbered[device] = number
        elif kind == b"Q":
            device, real, number = _ODD.unpack(text)
            self.odd[device, real] = number
        elif kind == b"I":
            self.init = text
        elif kind == b"L":
            self.device, passthrough, *self.layers = struct.unpack(f"={len(text) // 4}i", text)
            self.passthrough = bool(passthrough)

    def _take_back(self, counted: Unanswered | None) -> None:
        """A request came again: what follows in the batch is counted anew, maybe by the same numbers."""
        if counted is None:
            return
        for fd in counted.files:
            self.files.pop(fd, None)
        for handle in counted.directories:
            self.directories.pop(handle, None)
        for node_id, lookups in counted.lookups.items():
            node = self.nodes.get(node_id)
            if node is not None and lookups > 0:
                self.nodes[node_id] = node._replace(nlookup=node.nlookup - lookups)

    def keep_files(self, there: set[int]) -> None:
        """Forget files that were closed when the daemon died; their numbers will be others'."""
        self.files = {fd: file for fd, file in self.files.items() if fd in there}
        for number, node in self.nodes.items():
            pins = node.pins if all(fd in there for _, fd in node.pins) else []
            anchor, data_anchor = (fd if fd in there else -1 for fd in (node.anchor, node.data_anchor))
            self.nodes[number] = node._replace(anchor=anchor, data_anchor=data_anchor, pins=pins)

    def forget(self) -> None:
        """Let go of what was taken over."""
        self.nodes = {}
        self.files = {}
        self.directories = {}

    def descriptors(self) -> set[int]:
        """Return all descriptors that mean something."""
        found = {self.device, *self.layers, *self.files}
        for node in self.nodes.values():
            found |= {node.anchor, node.data_anchor, *(fd for _, fd in node.pins)}
        return found
