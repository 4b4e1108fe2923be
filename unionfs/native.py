"""The native layer, seen from Python.

`unionfs._native` is a C extension whose definitions of some libfuse functions are found before libfuse's own, if it
is loaded first. It asks the kernel for capabilities that pyfuse3 does not know, and serves what concerns only the
data of open files on their host descriptors (a handle number *is* a descriptor). Without it everything works, more
slowly: `active` is False then.

What the layer does by itself once `active` is True:

- READ, WRITE, LSEEK, FALLOCATE, COPY_FILE_RANGE, the reading ioctls (inode flags, project) and FLUSH never reach
  Python.
- The kernel does not apply the umask (`FUSE_DONT_MASK`): the operations must, unless a default ACL overrides it.
- Symlink targets are cached, data caches are dropped only on `pyfuse3.invalidate_inode`.
- An entry's `generation`, when not 0, is the `st_ino` to show; `st_ino` is then only the node id.

Who clears suid and sgid (the kernel's file_remove_privs, left to the server by FUSE_HANDLE_KILLPRIV_V2):

===============================  =====================================================================================
WRITE, OPEN or CREATE + O_TRUNC  this layer, on the descriptor, where the kernel says so; fallocate and
                                 copy_file_range: for every user but root
SETATTR size                     `ops.setattr`: if `kill_suidgid(ctx.uid)`, clear `suidgid_lost(mode, in_group)` and
                                 return the new mode. Ask before the first `await`
SETATTR uid or gid               nobody: chown(2) on the layer's file clears them, as it does for root
security.capability              nobody: the layer's file system removes it on write, truncate and chown
===============================  =====================================================================================

Without the layer libfuse asks for version 1 of that protocol: the kernel clears nothing and says nothing, so the
operations have to clear both bits on each write, truncation and O_TRUNC as well (`kill_suidgid(uid)` is then True for
every user but root; a write has no uid and must assume another user).
"""

from __future__ import annotations

import os
import stat
import sys
from types import ModuleType

_module: ModuleType | None = None


def load() -> bool:
    """Load the C extension so that pyfuse3 will find its functions first.

    Call this before pyfuse3 is imported; a later first call changes nothing and returns False.

    Returns:
        Whether the extension is loaded and visible to libraries loaded from now on. That the mounted session goes
        through it is what `active` tells, after `pyfuse3.init`.
    """
    global _module
    if _module is None and "pyfuse3" not in sys.modules:
        _module = _import_global()
    return _module is not None


def _import_global() -> ModuleType | None:
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_GLOBAL)
    try:
        from unionfs import _native
    except ImportError:  # not built, or libfuse is missing
        return None
    finally:
        sys.setdlopenflags(flags)
    return _native if _native.in_scope() else None


def active() -> bool:
    """Whether the session that pyfuse3 mounted goes through the native layer."""
    return _module is not None and bool(_module.active())


def counters() -> dict[str, int]:
    """Requests answered without entering Python, by kind; empty if the layer is not active."""
    return dict(_module.counters()) if _module is not None and active() else {}


def kill_suidgid(uid: int) -> bool:
    """Whether the request being handled must clear suid and sgid of the file that it changes.

    Valid in a handler up to its first `await`.

    Args:
        uid: the caller's, for when the kernel does not tell.
    """
    if _module is not None and active() and _module.killpriv_v2():
        return bool(_module.kill_suidgid())
    return uid != 0


def suidgid_lost(mode: int, in_group: bool) -> int:
    """The bits of `mode` that a change of data clears; mirrors setattr_should_drop_suidgid() without CAP_FSETID.

    Args:
        mode: st_mode of a regular file.
        in_group: whether the file's group is among the caller's (supplementary ones included).
    """
    lost = mode & stat.S_ISUID
    if mode & stat.S_IXGRP or not in_group:
        lost |= mode & stat.S_ISGID
    return lost


def readiness(spin: float, linger: float, slice_seconds: float) -> ModuleType | None:
    """Make receiving non-blocking and return its controls (`may_receive`, `drained`, `new_slice`), for `dispatch`.

    Args:
        spin: seconds to look for the next request before sleeping.
        linger: seconds to sleep until a request comes, before the device counts as drained.
        slice_seconds: seconds for which `may_receive` stays true after `new_slice`.

    Returns:
        None if the layer is not active.
    """
    if _module is None or not active():
        return None
    _module.drive(spin, linger, slice_seconds)
    return _module
