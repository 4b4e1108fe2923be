"""How a whiteout comes to a name in upper, in each of the forms that a mount may have to use.

- ``char``: a character device 0:0, overlayfs's own; where it can the file system makes it in a rename.
- ``xattr``: an empty file with an attribute, where no devices may be made; its directory says that it has such.
- ``wh``: a file `.wh.NAME` beside the name, for file systems without either.

The first two are made in work and renamed over what is there. The third hides only the layers below, so it may be there
before the name goes.
"""

from __future__ import annotations

import errno
import os
import stat

from unionfs.core import sysio
from unionfs.core.markers import WH_PREFIX, get_xattr
from unionfs.core.workdir import WorkDir


def put(work: WorkDir, upper: int, name: bytes) -> None:
    """Put a whiteout at a name, over whatever non-directory upper has there. Raises OSError.

    Args:
        work: where it is made.
        upper: a descriptor of the directory in upper.
        name: the name.
    """
    if work.whiteout_form == "wh":
        _put_wh_file(upper, name)
        return
    _announce(work, upper)
    temp = work.whiteout()
    try:
        sysio.rename(work.fd, temp, upper, name)
    except BaseException:
        work.discard(temp)
        raise


def put_over_directory(work: WorkDir, upper: int, name: bytes) -> None:
    """Exchange a directory with a whiteout; its remains vanish with the work directory's. Raises OSError.

    In the form ``wh`` the directory must be empty. The arguments are those of `put`.
    """
    if work.whiteout_form == "wh":
        _make_wh_file(upper, name)
        os.rmdir(name, dir_fd=upper)
        return
    _announce(work, upper)
    temp = work.whiteout()
    try:
        sysio.rename(work.fd, temp, upper, name, sysio.RENAME_EXCHANGE)
    except BaseException:
        work.discard(temp)
        raise
    work.discard(temp)


def move_one(work: WorkDir, old_fd: int, old: bytes, new_fd: int, new: bytes) -> None:
    """Rename in upper to a name where a whiteout is, which comes to the old name. Raises OSError.

    The arguments are those of `rename_leaving_one`.
    """
    _announce(work, old_fd)
    sysio.rename(old_fd, old, new_fd, new, sysio.RENAME_EXCHANGE)


def rename_leaving_one(work: WorkDir, old_fd: int, old: bytes, new_fd: int, new: bytes, *, over: bool) -> None:
    """Rename in upper, over whatever is there, and leave a whiteout behind. Raises OSError.

    Args:
        work: where the whiteout is made, if the file system can't make it.
        old_fd: a descriptor of the old name's directory.
        old: the old name.
        new_fd: a descriptor of the new name's directory.
        new: the new name.
        over: whether anything shows at the new name.
    """
    if work.whiteout_form == "char":
        try:
            sysio.rename(old_fd, old, new_fd, new, sysio.RENAME_WHITEOUT)
            return
        except OSError as exc:
            if exc.errno not in (errno.EINVAL, errno.EPERM, errno.ENOSYS):
                raise
    if work.whiteout_form == "wh":
        _make_wh_file(old_fd, old)
        sysio.rename(old_fd, old, new_fd, new)
    elif over:
        _rename_then_put(work, old_fd, old, new_fd, new)
    else:
        put(work, new_fd, new)  # hides nothing
        move_one(work, old_fd, old, new_fd, new)


def _rename_then_put(work: WorkDir, old_fd: int, old: bytes, new_fd: int, new: bytes) -> None:
    """Rename, or exchange with what is there in upper, and then put a whiteout at the old name.

    In between the old name shows what is below, or what was at the new one; nothing is lost.
    """
    _announce(work, old_fd)
    temp = work.whiteout()
    flags = sysio.RENAME_NOREPLACE
    try:
        try:
            sysio.rename(old_fd, old, new_fd, new, flags)
        except FileExistsError:
            flags = sysio.RENAME_EXCHANGE
            sysio.rename(old_fd, old, new_fd, new, flags)
        try:
            sysio.rename(work.fd, temp, old_fd, old, flags)
        except BaseException:
            sysio.rename(new_fd, new, old_fd, old, flags)
            raise
    except BaseException:
        work.discard(temp)
        raise
    if flags == sysio.RENAME_EXCHANGE:
        work.discard(temp)


def _announce(work: WorkDir, upper: int) -> None:
    """A directory that holds whiteouts in the form of attributes says so: opaque=x (overlayfs.rst)."""
    if work.whiteout_form == "xattr":
        path = sysio.fd_path(upper)
        if get_xattr(path, work.fmt.opaque) is None:
            os.setxattr(path, work.fmt.opaque, b"x")


def _put_wh_file(upper: int, name: bytes) -> None:
    """The form without device nodes and attributes: `.wh.NAME` first, then the name itself may go."""
    _make_wh_file(upper, name)
    try:
        os.unlink(name, dir_fd=upper)
    except FileNotFoundError:
        return


def _make_wh_file(dirfd: int, name: bytes) -> None:
    """Make `.wh.NAME`, if it isn't there. Users may have made something else of that name: that is EEXIST."""
    mark = WH_PREFIX + name
    flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(mark, flags, 0o644, dir_fd=dirfd)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise sysio.error(errno.EEXIST, mark) from None
        raise
    st = os.fstat(fd)
    os.close(fd)
    if not stat.S_ISREG(st.st_mode) or st.st_size:
        raise sysio.error(errno.EEXIST, mark)
