"""Lower layers on slow storage: how the core asks them without anybody else waiting for the answer.

A request is handled in one go by the thread that serves the mount (see `union`). A system call on a lower layer that
lies on a network file system, or on another FUSE one, may take long, or as long as a server is away; all other requests
would wait with it. So whatever the core wants to know of a layer goes through a *door* (`LayerStack.door`):

- `PlainDoor`, where no layer is slow: the system calls themselves, nothing else.
- `SlowDoor`: what isn't known yet of a slow layer is not asked on the spot. :class:`WouldBlock` is raised, carrying the
  *question*: a few system calls that change nothing, on a descriptor of its own. Whoever drives the core gets it
  answered in a thread, and calls the operation again from its beginning. It comes one question further each time, and
  in the end it is done in one go as ever. So nothing of the core ever runs in two threads, or is interrupted.

What the core must see to: an operation asks all that it wants to know before its first change that can't be
repeated. A copy-up, once published, is no such change: when the operation comes back the file is in upper. What is half
built in work is thrown away by the exception. After the operation the driver says that the attempt is *committed*, and
what is still asked for the reply is asked on the spot.

Which descriptors are slow, they know themselves: a `SlowFd` is a number like any other, a `SlowPath` a path, and each
is as good as the plain one for system calls. What is reached through them is slow as well. Two that are copies of each
other share a serial number, by which answers are kept, so a number that is used again brings up nothing old.

Answers last as long as the attempts at one operation, so that they suffice for it. The small ones are remembered beyond
that, the latest `_MOST_FACTS` of them: lower layers don't change while they are mounted. Where the kernel may not
remember names and attributes either (``timeout=0``), because somebody does change them, the layer is asked each time.
"""

from __future__ import annotations

import contextvars
import errno
import functools
import itertools
import os
import stat as stat_module
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol, TypeVar

from unionfs.core import sysio
from unionfs.core.markers import XATTR_ABSENT, get_xattr, list_xattrs

T = TypeVar("T")
Key = tuple[Any, ...]

_MOST_FACTS: Final = 16384
_MOST_BYTES: Final = 4096  # of a fact that is remembered

# Errors that say how things are; others may be gone the next time.
_LASTING: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, *XATTR_ABSENT))
_NO_XATTRS: Final = frozenset((*XATTR_ABSENT, errno.EACCES, errno.EPERM))

_serials = itertools.count(1)


class SlowFd(int):
    """A descriptor of something in a slow layer."""

    serial: int

    def __new__(cls, fd: int, serial: int = 0) -> SlowFd:
        """Mark *fd*; *serial* is that of a descriptor that this one is a copy of."""
        self = super().__new__(cls, fd)
        self.serial = serial or next(_serials)
        return self


class SlowPath(bytes):
    """A path of something in a slow layer: of what is behind a descriptor, or of *name* in there."""

    fd: SlowFd
    name: bytes

    def __new__(cls, fd: SlowFd, name: bytes) -> SlowPath:
        self = super().__new__(cls, _path(fd, name))
        self.fd = fd
        self.name = name
        return self


def _path(fd: int, name: bytes) -> bytes:
    return sysio.entry_path(fd, name) if name else sysio.fd_path(fd)


def close_anyway(fd: int) -> None:
    """Close a descriptor of data that was read: what a server has to say about that (it may be gone) is no error."""
    with suppress(OSError):
        os.close(fd)


# -- answers and questions --


class Answer:
    """What came of a system call: a value, or an error."""

    __slots__ = ("error", "value")

    def __init__(self, value: Any, error: OSError | None = None) -> None:
        self.value = value
        # Without the frames that it went through: they know the question, and with it a descriptor.
        self.error = None if error is None else error.with_traceback(None)

    def give(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror, self.error.filename)
        return self.value

    def lasts(self) -> bool:
        """Tell whether the answer may be remembered."""
        if self.error is not None:
            return self.error.errno in _LASTING
        return not isinstance(self.value, bytes) or len(self.value) <= _MOST_BYTES

    @property
    def shareable(self) -> bool:
        """Tell whether several operations may have it."""
        return True

    def close(self) -> None:
        """Let go of what was not given away."""


class Opened(Answer):
    """A descriptor. One of a mere place (``O_PATH``) can be given again and again, another once."""

    __slots__ = ("_again", "_aside", "serial")

    def __init__(self, fd: int, *, again: bool, aside: Callable[[int], None]) -> None:
        super().__init__(fd)
        self._again = again
        self._aside = aside
        self.serial = next(_serials)

    @property
    def shareable(self) -> bool:
        return False

    @property
    def once(self) -> bool:
        """Tell whether it can be given once only."""
        return not self._again

    def give(self) -> SlowFd:
        if self._again:
            return SlowFd(os.dup(self.value), self.serial)
        fd, self.value = self.value, -1
        return SlowFd(fd, self.serial)

    def lasts(self) -> bool:
        return False

    def close(self) -> None:
        if self.value >= 0:
            (os.close if self._again else self._aside)(self.value)
            self.value = -1


Answers = dict[Key, Answer]


def _tried(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Answer:
    try:
        return Answer(call(*args, **kwargs))
    except OSError as exc:
        return Answer(None, exc)


class Question:
    """System calls on a slow layer, to be made in a thread."""

    def __init__(self, key: Key, fd: int, find: Callable[[int], Answers], *, keep: bool) -> None:
        self.key = key
        self.keep = keep
        self._find = find
        self._fd = -1
        self._fd = os.dup(fd)  # the loop may close the other meanwhile

    def find(self) -> Answers:
        """Ask; in any thread."""
        return self._find(self._fd)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class WouldBlock(Exception):
    """An operation can't go on before a slow layer has answered a question. It is no error: see the module's head."""

    def __init__(self, question: Question) -> None:
        super().__init__()
        self.question = question


class Attempt:
    """The attempts at one operation, and what was found out for it."""

    def __init__(self) -> None:
        self.answers: Answers = {}
        self.committed = False  # it can't be begun again any more

    def take(self, answers: Answers) -> None:
        """Add answers."""
        for key, answer in answers.items():
            old = self.answers.get(key)
            if old is not None:
                old.close()
            self.answers[key] = answer

    def close(self) -> None:
        """The operation is done, or has failed."""
        for answer in self.answers.values():
            answer.close()
        self.answers = {}


_attempt: contextvars.ContextVar[Attempt | None] = contextvars.ContextVar("attempt", default=None)


@contextmanager
def attempting() -> Iterator[Attempt]:
    """In the block (of one task) the core finds what was found out for the operation."""
    attempt = Attempt()
    token = _attempt.set(attempt)
    try:
        yield attempt
    finally:
        _attempt.reset(token)
        attempt.close()


def committed() -> None:
    """The operation of this task has changed something: from now on what it asks is asked on the spot."""
    attempt = _attempt.get()
    if attempt is not None:
        attempt.committed = True


# -- doors --


class Door(Protocol):
    """How the core asks layers. What is named after a function of `os`, `sysio` or `markers` does the same."""

    is_slow: bool
    waits: bool
    """Whether questions are left to be answered by a driver, which sets it."""
    aside: Callable[[int], None]
    """What descriptors of data are closed with, once a driver has set it."""
    stat_opened: bool
    """Whether `fstat` will be asked of them."""

    def learn(self, question: Question, answers: Answers) -> None:
        """Remember what may be remembered of the answers to a question."""

    def stat(self, path: bytes, *, dir_fd: int, follow_symlinks: bool) -> os.stat_result: ...
    def look(self, path: bytes, *, dir_fd: int, follow_symlinks: bool) -> os.stat_result:
        """As `stat`, for one who will ask for the attributes next."""

    def fstat(self, fd: int, /) -> os.stat_result: ...
    def open(self, path: bytes, flags: int, *, dir_fd: int | None = None) -> int: ...
    def open_beneath(self, root_fd: int, path: bytes, flags: int) -> int: ...
    def readlink(self, path: bytes, *, dir_fd: int) -> bytes: ...
    def getxattr(self, path: bytes, attribute: str, *, follow_symlinks: bool) -> bytes: ...
    def listxattr(self, path: bytes, *, follow_symlinks: bool) -> list[str]: ...
    def get_xattr(self, path: bytes, name: str, *, follow: bool | None = None) -> bytes | None: ...
    def list_xattrs(self, path: bytes, *, follow: bool | None = None) -> list[str]: ...
    def fd_path(self, fd: int) -> bytes: ...
    def entry_path(self, dirfd: int, name: bytes) -> bytes: ...
    def dup(self, fd: int, /) -> int: ...
    def close_file(self, fd: int, /) -> None:
        """Close a descriptor of data, which may have to tell a server so."""

    def ask(self, fd: int, what: Key, call: Callable[[int], T], *, keep: bool = True) -> T:
        """Return what *call* returns for a descriptor; *what* tells this from other questions about it.

        The call may run in a thread: it must neither change nor use what changes. *keep*: its result is small.
        """

    def ask_path(self, path: bytes, what: Key, call: Callable[[bytes], T]) -> T:
        """The same for a path."""

    def foresee(self, path: bytes, what: Callable[[str], bool]) -> None:
        """All extended attributes of *path* that *what* says will be asked for."""


class PlainDoor:
    """No layer is slow."""

    is_slow = False

    def __init__(self) -> None:
        self.waits = False
        self.aside: Callable[[int], None] = os.close
        self.stat_opened = False

    def learn(self, question: Question, answers: Answers) -> None:
        """There are no questions."""

    stat = staticmethod(os.stat)
    look = staticmethod(os.stat)
    fstat = staticmethod(os.fstat)
    open = staticmethod(os.open)
    open_beneath = staticmethod(sysio.open_beneath)
    readlink = staticmethod(os.readlink)
    getxattr = staticmethod(os.getxattr)
    listxattr = staticmethod(os.listxattr)
    get_xattr = staticmethod(get_xattr)
    list_xattrs = staticmethod(list_xattrs)
    fd_path = staticmethod(sysio.fd_path)
    entry_path = staticmethod(sysio.entry_path)
    dup = staticmethod(os.dup)
    close_file = staticmethod(os.close)

    @staticmethod
    def ask(fd: int, what: Key, call: Callable[[int], T], *, keep: bool = True) -> T:
        """See `Door`."""
        return call(fd)

    @staticmethod
    def ask_path(path: bytes, what: Key, call: Callable[[bytes], T]) -> T:
        """See `Door`."""
        return call(path)

    @staticmethod
    def foresee(path: bytes, what: Callable[[str], bool]) -> None:
        """See `Door`."""


class SlowDoor:
    """Some layer is slow; see the module's head. Questions about what isn't are asked on the spot."""

    is_slow = True

    def __init__(self, *, remember: bool) -> None:
        """Start knowing nothing.

        Args:
            remember: whether answers may outlast the operation that asked.
        """
        self.waits = False
        self.aside: Callable[[int], None] = close_anyway
        self.stat_opened = False
        self._remember = remember
        self._facts: OrderedDict[Key, Answer] = OrderedDict()

    def learn(self, question: Question, answers: Answers) -> None:
        """Remember what may be remembered of the answers to a question."""
        if not self._remember or not question.keep:
            return
        for key, answer in answers.items():
            if answer.lasts():
                self._facts[key] = answer
        while len(self._facts) > _MOST_FACTS:
            self._facts.popitem(last=False)

    def _known(self, key: Key) -> Answer | None:
        attempt = _attempt.get()
        if attempt is not None:
            answer = attempt.answers.get(key)
            if answer is not None:
                if isinstance(answer, Opened) and answer.once:
                    del attempt.answers[key]
                return answer
        answer = self._facts.get(key)
        if answer is not None:
            self._facts.move_to_end(key)
        return answer

    def _ask(self, fd: SlowFd, key: Key, find: Callable[[int], Answers], *, keep: bool = True) -> Any:
        key = (fd.serial, *key)
        answer = self._known(key)
        if answer is not None:
            return answer.give()
        attempt = _attempt.get()
        if self.waits and (attempt is None or not attempt.committed):
            raise WouldBlock(Question(key, fd, find, keep=keep))
        answer = find(fd)[key]
        try:
            return answer.give()
        finally:
            answer.close()

    # -- entries --

    def stat(self, path: bytes, *, dir_fd: int, follow_symlinks: bool) -> os.stat_result:
        """See `Door`; slow entries are not followed."""
        if not isinstance(dir_fd, SlowFd):
            return os.stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        key = (dir_fd.serial, "stat", path)
        st: os.stat_result = self._ask(
            dir_fd, key[1:], lambda fd: {key: _tried(os.stat, path, dir_fd=fd, follow_symlinks=False)}
        )
        return st

    def look(self, path: bytes, *, dir_fd: int, follow_symlinks: bool) -> os.stat_result:
        """See `Door`; asked together with the names of the extended attributes, and the values of overlayfs's own."""
        if not isinstance(dir_fd, SlowFd):
            return os.stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        st: os.stat_result = self._ask(dir_fd, ("stat", path), functools.partial(_look, dir_fd.serial, path))
        return st

    def fstat(self, fd: int, /) -> os.stat_result:
        """See `Door`."""
        if not isinstance(fd, SlowFd):
            return os.fstat(fd)
        key = (fd.serial, "fstat")
        st: os.stat_result = self._ask(fd, key[1:], lambda real: {key: _tried(os.fstat, real)})
        return st

    def readlink(self, path: bytes, *, dir_fd: int) -> bytes:
        """See `Door`."""
        if not isinstance(dir_fd, SlowFd):
            return os.readlink(path, dir_fd=dir_fd)
        return self.ask(dir_fd, ("readlink", path), lambda fd: os.readlink(path, dir_fd=fd))

    # -- descriptors --

    def open(self, path: bytes, flags: int, *, dir_fd: int | None = None) -> int:
        """See `Door`."""
        if isinstance(path, SlowPath):
            name = path.name
            return self._open(path.fd, name, flags, lambda fd: os.open(_path(fd, name), flags))
        if not isinstance(dir_fd, SlowFd):
            return os.open(path, flags, dir_fd=dir_fd)
        return self._open(dir_fd, path, flags, lambda fd: os.open(path, flags, dir_fd=fd))

    def open_beneath(self, root_fd: int, path: bytes, flags: int) -> int:
        """See `Door`."""
        if not isinstance(root_fd, SlowFd):
            return sysio.open_beneath(root_fd, path, flags)
        return self._open(root_fd, path, flags, lambda fd: sysio.open_beneath(fd, path, flags))

    def _open(self, at: SlowFd, path: bytes, flags: int, opener: Callable[[int], int]) -> int:
        key = (at.serial, "open", path, flags)
        place = bool(flags & os.O_PATH)

        def find(fd: int) -> Answers:
            try:
                opened = Opened(opener(fd), again=place, aside=self.aside)
            except OSError as exc:
                return {key: Answer(None, exc)}
            answers: Answers = {key: opened}
            if self.stat_opened and not place:
                answers[opened.serial, "fstat"] = _tried(os.fstat, opened.value)
            return answers

        fd: int = self._ask(at, key[1:], find)
        return fd

    def dup(self, fd: int, /) -> int:
        """See `Door`."""
        return SlowFd(os.dup(fd), fd.serial) if isinstance(fd, SlowFd) else os.dup(fd)

    def close_file(self, fd: int, /) -> None:
        """See `Door`."""
        (self.aside if isinstance(fd, SlowFd) else os.close)(fd)

    # -- paths --

    @staticmethod
    def fd_path(fd: int) -> bytes:
        """See `Door`."""
        return SlowPath(fd, b"") if isinstance(fd, SlowFd) else sysio.fd_path(fd)

    @staticmethod
    def entry_path(dirfd: int, name: bytes) -> bytes:
        """See `Door`."""
        return SlowPath(dirfd, name) if isinstance(dirfd, SlowFd) else sysio.entry_path(dirfd, name)

    def getxattr(self, path: bytes, attribute: str, *, follow_symlinks: bool) -> bytes:
        """See `Door`."""
        if not isinstance(path, SlowPath):
            return os.getxattr(path, attribute, follow_symlinks=follow_symlinks)
        key = (path.fd.serial, "getxattr", path.name, attribute)
        name = path.name
        value: bytes = self._ask(path.fd, key[1:], lambda fd: {key: _tried(_getxattr, fd, name, attribute)})
        return value

    def listxattr(self, path: bytes, *, follow_symlinks: bool) -> list[str]:
        """See `Door`."""
        if not isinstance(path, SlowPath):
            return os.listxattr(path, follow_symlinks=follow_symlinks)
        key = (path.fd.serial, "listxattr", path.name)
        name = path.name
        names: list[str] = self._ask(path.fd, key[1:], lambda fd: {key: _tried(_listxattr, fd, name)})
        return names

    def get_xattr(self, path: bytes, name: str, *, follow: bool | None = None) -> bytes | None:
        """See `Door`."""
        if not isinstance(path, SlowPath):
            return get_xattr(path, name, follow=follow)
        try:
            return self.getxattr(path, name, follow_symlinks=False)
        except OSError as exc:
            if exc.errno in _NO_XATTRS:
                return None
            raise

    def list_xattrs(self, path: bytes, *, follow: bool | None = None) -> list[str]:
        """See `Door`."""
        if not isinstance(path, SlowPath):
            return list_xattrs(path, follow=follow)
        try:
            return self.listxattr(path, follow_symlinks=False)
        except OSError as exc:
            if exc.errno in _NO_XATTRS:
                return []
            raise

    # -- anything --

    def ask(self, fd: int, what: Key, call: Callable[[int], T], *, keep: bool = True) -> T:
        """See `Door`."""
        if not isinstance(fd, SlowFd):
            return call(fd)
        key = (fd.serial, *what)
        answer: T = self._ask(fd, what, lambda real: {key: _tried(call, real)}, keep=keep)
        return answer

    def ask_path(self, path: bytes, what: Key, call: Callable[[bytes], T]) -> T:
        """See `Door`."""
        if not isinstance(path, SlowPath):
            return call(path)
        name = path.name
        return self.ask(path.fd, (*what, name), lambda fd: call(_path(fd, name)))

    def foresee(self, path: bytes, what: Callable[[str], bool]) -> None:
        """See `Door`."""
        if isinstance(path, SlowPath):
            self._ask(path.fd, ("foresee", path.name), functools.partial(_foresee, path.fd.serial, path.name, what))


# What runs in threads.


def _getxattr(fd: int, name: bytes, attribute: str) -> bytes:
    return os.getxattr(_path(fd, name), attribute, follow_symlinks=not name)


def _listxattr(fd: int, name: bytes) -> list[str]:
    return os.listxattr(_path(fd, name), follow_symlinks=not name)


def _look(serial: int, name: bytes, fd: int) -> Answers:
    st = _tried(os.stat, name, dir_fd=fd, follow_symlinks=False)
    answers: Answers = {(serial, "stat", name): st}
    if st.error is None and (stat_module.S_ISREG(st.value.st_mode) or stat_module.S_ISDIR(st.value.st_mode)):
        answers |= _attributes(serial, name, fd, lambda attribute: ".overlay." in attribute)
    return answers


def _foresee(serial: int, name: bytes, what: Callable[[str], bool], fd: int) -> Answers:
    return {(serial, "foresee", name): Answer(None), **_attributes(serial, name, fd, what)}


def _attributes(serial: int, name: bytes, fd: int, what: Callable[[str], bool]) -> Answers:
    """Read the names of all extended attributes, and the values of those that *what* says."""
    names = _tried(_listxattr, fd, name)
    answers: Answers = {(serial, "listxattr", name): names}
    for attribute in names.value or ():
        if what(attribute):
            answers[serial, "getxattr", name, attribute] = _tried(_getxattr, fd, name, attribute)
    return answers
