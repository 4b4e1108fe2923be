"""A gate before every system call that changes a file, for any program and all that it starts.

Linux can ask another process before it executes a system call (seccomp's user notification). The program under the
gate is made to wait at each call that creates, removes, renames or changes something; the warden sees what it is, and
lets it pass, lets it fail with an error, or kills the process, which then has not made that call. Nothing of the
program is changed for that, and its C code and threads are seen like everything else. What it only reads passes without
anybody being asked.

What the kernel does by itself is not seen: data that FUSE passthrough writes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_X86 = os.uname().machine == "x86_64"
_SYS_SECCOMP = 317 if _X86 else 277
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_IOCTL_RECEIVE, _IOCTL_SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_ANSWER = struct.Struct("=QqiI")

_LOAD, _JUMP_EQUAL, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06
_ASK, _ALLOW = 0x7FC00000, 0x7FFF0000
_NUMBER, _ARGUMENTS = 0, 16

_CREATES = os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)
_CHANGING_IOCTLS = {0x40049409: "FICLONE", 0x40086602: "FS_IOC_SETFLAGS", 0x401C5820: "FS_IOC_FSSETXATTR"}
_AT_FDCWD = 0xFFFFFF9C
_NAME_BYTES = 4096


class _Kind(NamedTuple):
    """A system call: its number, -1 where the machine has none, and the arguments that tell what it changes."""

    x86: int
    generic: int
    descriptor: int = -1  # which argument is one: of the object, or of the directory that `path` starts from
    path: int = -1


_KINDS = {
    "openat": _Kind(257, 56, 0, 1),
    "mkdirat": _Kind(258, 34, 0, 1),
    "mknodat": _Kind(259, 33, 0, 1),
    "symlinkat": _Kind(266, 36, 1, 2),
    "linkat": _Kind(265, 37, 2, 3),
    "unlinkat": _Kind(263, 35, 0, 1),
    "renameat": _Kind(264, 38, 2, 3),
    "renameat2": _Kind(316, 276, 2, 3),
    "mkdir": _Kind(83, -1, path=0),
    "rmdir": _Kind(84, -1, path=0),
    "link": _Kind(86, -1, path=1),
    "unlink": _Kind(87, -1, path=0),
    "symlink": _Kind(88, -1, path=1),
    "rename": _Kind(82, -1, path=1),
    "mknod": _Kind(133, -1, path=0),
    "setxattr": _Kind(188, 5, path=0),
    "lsetxattr": _Kind(189, 6, path=0),
    "fsetxattr": _Kind(190, 7, 0),
    "removexattr": _Kind(197, 14, path=0),
    "lremovexattr": _Kind(198, 15, path=0),
    "fremovexattr": _Kind(199, 16, 0),
    "truncate": _Kind(76, 45, path=0),
    "ftruncate": _Kind(77, 46, 0),
    "chmod": _Kind(90, -1, path=0),
    "fchmod": _Kind(91, 52, 0),
    "fchmodat": _Kind(268, 53, 0, 1),
    "fchmodat2": _Kind(452, 452, 0, 1),
    "chown": _Kind(92, -1, path=0),
    "fchown": _Kind(93, 55, 0),
    "lchown": _Kind(94, -1, path=0),
    "fchownat": _Kind(260, 54, 0, 1),
    "utimensat": _Kind(280, 88, 0, 1),
    "fallocate": _Kind(285, 47, 0),
    "copy_file_range": _Kind(326, 285, 2),
    "write": _Kind(1, 64, 0),
    "pwrite64": _Kind(18, 68, 0),
    "pwritev": _Kind(296, 70, 0),
    "pwritev2": _Kind(328, 287, 0),
    "splice": _Kind(275, 76, 2),
    "sendfile": _Kind(40, 71, 0),
    "ioctl": _Kind(16, 29, 0),
}
_NAMES = {kind.x86 if _X86 else kind.generic: name for name, kind in _KINDS.items() if _X86 or kind.generic >= 0}


class Call(NamedTuple):
    """A system call that waits at the gate."""

    id: int
    thread: int
    name: str
    arguments: tuple[int, ...]

    @property
    def process(self) -> int:
        """The process that makes it."""
        lines = Path(f"/proc/{self.thread}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Tgid:"))

    def target(self) -> str:
        """A path that leads this process to what the call changes."""
        kind = _KINDS[self.name]
        descriptor = self.arguments[kind.descriptor] & 0xFFFFFFFF if kind.descriptor >= 0 else _AT_FDCWD
        start = f"/proc/{self.thread}/cwd" if descriptor == _AT_FDCWD else f"/proc/{self.thread}/fd/{descriptor}"
        name = self._text(self.arguments[kind.path]) if kind.path >= 0 else ""
        if name.startswith("/"):
            return name.replace("/proc/self/", f"/proc/{self.thread}/", 1)
        return f"{start}/{name}" if name else start

    def device(self) -> int:
        """The file system on which it changes something; -1 where that can't be told."""
        path = self.target()
        is_object = path.startswith("/proc/") and path.count("/") == 4
        try:
            return os.stat(path if is_object else os.path.dirname(path)).st_dev
        except OSError:
            return -1

    def text(self) -> str:
        """What it is, for a report."""
        path = self.target()
        parts = path.split("/", 5)
        if path.startswith("/proc/") and parts[3] == "fd":
            try:
                path = "/".join([os.readlink("/".join(parts[:5])), *parts[5:]])
            except OSError:
                path = "/".join(parts[5:])
        what = _CHANGING_IOCTLS.get(self.arguments[1] & 0xFFFFFFFF, "") if self.name == "ioctl" else ""
        return f"{what or self.name} {path}"

    def _text(self, address: int) -> str:
        if not address:
            return ""  # futimens(3): the object is the descriptor's
        text = b""
        with open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
            while b"\0" not in text and len(text) < _NAME_BYTES:
                at = address + len(text)
                text += os.pread(memory.fileno(), _NAME_BYTES - at % _NAME_BYTES, at)
        return os.fsdecode(text.partition(b"\0")[0])


class Gate:
    """The warden's side of the gate."""

    def __init__(self, listener: int) -> None:
        self.fd = listener
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)

    def close(self) -> None:
        """Open the gate for good: calls that wait, and later ones, fail with ENOSYS."""
        os.close(self.fd)

    def next(self) -> Call | None:
        """Return the call that waits, None if there is none (any more)."""
        if not any(events & select.POLLIN for _, events in self._poll.poll(0)):
            return None
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self.fd, _IOCTL_RECEIVE, buffer)
        except OSError as error:
            if error.errno != errno.ENOENT:  # killed meanwhile
                raise
            return None
        number, thread, _, call, _, _, *arguments = _NOTIFICATION.unpack(buffer)
        return Call(number, thread, _NAMES[call], tuple(arguments))

    def let_pass(self, call: Call) -> None:
        """Let the kernel execute it."""
        self._answer(call, 0, _CONTINUE)

    def let_fail(self, call: Call, code: int) -> None:
        """Let it fail without having done anything."""
        self._answer(call, -code, 0)

    def _answer(self, call: Call, error: int, flags: int) -> None:
        try:
            fcntl.ioctl(self.fd, _IOCTL_SEND, _ANSWER.pack(call.id, 0, error, flags))
        except OSError as gone:
            if gone.errno != errno.ENOENT:
                raise


class Warden:
    """Counts the calls that change something on one file system, and strikes at one of them.

    Args:
        gate: where they wait; None: there is no gate, it only waits.
        device: the file system.
        at: the number of the call to strike at, from 1 on; 0: none.
        fault: the error that this call gets; 0: its process is killed.
    """

    def __init__(self, gate: Gate | None, device: int, at: int = 0, fault: int = 0) -> None:
        self._gate = gate
        self._device = device
        self._at = at
        self._fault = fault
        self.calls: list[str] = []
        self.struck = False

    def attend(self, *others: int, seconds: float) -> set[int]:
        """Let calls pass until one of some other descriptors is readable, or time is over; return those that are."""
        poll = select.poll()
        for fd in others:
            poll.register(fd, select.POLLIN)
        if self._gate is not None:
            poll.register(self._gate.fd, select.POLLIN)
        end = time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            events = dict(poll.poll(left * 1000))
            if self._gate is not None and events.pop(self._gate.fd, 0) & ~select.POLLIN:
                poll.unregister(self._gate.fd)  # nobody is left behind it
            elif self._gate is not None and (call := self._gate.next()) is not None:
                self._judge(self._gate, call)
            if events or not left:
                return set(events)

    def _judge(self, gate: Gate, call: Call) -> None:
        try:
            counts = call.device() == self._device
            text = call.text() if counts else ""
        except OSError:
            return  # it is gone
        if counts:
            self.calls.append(text)
        if not counts or len(self.calls) != self._at:
            gate.let_pass(call)
            return
        self.struck = True
        if self._fault:
            gate.let_fail(call, self._fault)
        else:
            os.kill(call.process, signal.SIGKILL)


def works() -> bool:
    """Whether this kernel lets programs be put under the gate by this user."""
    try:
        process, gate = start(["true"], stderr=subprocess.DEVNULL, environment={"PATH": os.environ["PATH"]})
    except (OSError, subprocess.SubprocessError):
        return False
    warden = Warden(gate, -2)
    exited = os.pidfd_open(process.pid)
    warden.attend(exited, seconds=5)
    os.close(exited)
    gate.close()
    return process.wait() == 0


def start(command: Sequence[str], *, stderr: int, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], Gate]:
    """Start a program under the gate. Raises SubprocessError where that can't be done."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment,
            preexec_fn=lambda: _install(theirs),  # noqa: PLW1509  # there are no threads here
        )
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    return process, Gate(descriptors[0])


def _install(theirs: socket.socket) -> None:
    """Put this process under the gate and send the warden's side of it through a socket."""
    code = b"".join(_filter())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    listener = libc.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, program)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    socket.send_fds(theirs, [b"g"], [listener])
    os.close(listener)


def _filter() -> list[bytes]:
    """The filter: for each call that is asked about, one jump and what follows it."""
    code = [_load(_NUMBER)]
    for number, name in _NAMES.items():
        body = {"openat": _if_it_creates, "ioctl": _if_it_changes}.get(name, list)() or [_instruction(_RETURN, _ASK)]
        code += [_instruction(_JUMP_EQUAL, number, 0, len(body)), *body]
    return [*code, _instruction(_RETURN, _ALLOW)]


def _if_it_creates() -> list[bytes]:
    ask = [_instruction(_JUMP_BITS, _CREATES, 0, 1), _instruction(_RETURN, _ASK)]
    return [_load(_ARGUMENTS + 8 * 2), *ask, _instruction(_RETURN, _ALLOW)]


def _if_it_changes() -> list[bytes]:
    asks = [
        instruction
        for command in _CHANGING_IOCTLS
        for instruction in (_instruction(_JUMP_EQUAL, command, 0, 1), _instruction(_RETURN, _ASK))
    ]
    return [_load(_ARGUMENTS + 8), *asks, _instruction(_RETURN, _ALLOW)]


def _load(offset: int) -> bytes:
    return _instruction(_LOAD, offset)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
