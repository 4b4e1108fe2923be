"""A daemon that is killed at a certain step of a request: put into a daemon from outside.

`command` starts a program in which Python runs, at its start, what stands in `_SITE`. A step is a system call that changes
something, or a word in the ledger, once it is done. The flag file has the number of the step, counted from when it is
written, at which the process kills itself. More numbers after that are for the next daemons, counted from the death of
the one before; with the last one the file is removed. Where there is a file of that name with `.fail` behind it, SIGUSR1
raises what nobody catches.
"""

from __future__ import annotations

from pathlib import Path

from tests.support import patched

_SITE = """
import functools, os, signal
FLAG = os.environ["UFST_STEP"]

def step():
    if os.getpgrp() != os.getpid():
        return  # the supervisor
    try:
        with open(FLAG) as flag:
            left, *others = flag.read().split()
    except FileNotFoundError:
        return
    if left != "1":
        write(str(int(left) - 1), *others)
        return
    if others:
        write(*others)
    else:
        unlink(FLAG)
    os.kill(os.getpid(), signal.SIGKILL)

def write(*words):
    with open(FLAG + ".new", "w") as flag:
        flag.write(" ".join(words))
    os.replace(FLAG + ".new", FLAG)

unlink = os.unlink

def stepping(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        step()
        return result
    return call

for name in ("mkdir", "unlink", "rmdir", "link", "symlink", "mknod", "setxattr", "removexattr", "chmod", "chown", "ftruncate"):
    setattr(os, name, stepping(getattr(os, name)))

def opening(path, flags, *args, _open=os.open, **kwargs):
    fd = _open(path, flags, *args, **kwargs)
    if flags & os.O_CREAT:
        step()
    return fd

os.open = opening

def patch_sysio(module):
    for name in ("rename", "linkat_fd"):
        setattr(module, name, stepping(getattr(module, name)))

def patch_ledger(module):
    for name in ("append", "note"):
        setattr(module.Ledger, name, stepping(getattr(module.Ledger, name)))

def patch_session(module):
    dump = module.dump
    def failing(operations):
        if os.path.exists(FLAG + ".fail"):
            unlink(FLAG + ".fail")
            raise RuntimeError("not to be caught")
        dump(operations)
    module.dump = failing

PATCHES = {"unionfs.core.sysio": patch_sysio, "unionfs.fuse.ledger": patch_ledger, "unionfs.service.session": patch_session}
"""


def command(directory: Path) -> list[str]:
    """The words before a daemon's command; *directory* takes the code, and the file `step`."""
    return patched.command(directory, _SITE, UFST_STEP=directory / "step")


def arm(flag: Path, *steps: int) -> None:
    """Have the daemon killed at a step from now on, and the next ones at theirs."""
    draft = flag.with_suffix(".draft")
    draft.write_text(" ".join(map(str, steps)))
    draft.rename(flag)
