"""`unionfs doctor`: can this machine mount unions, and what can a directory's file system do?

Each check is a function that tries the thing itself rather than looking up a version, where trying is
possible. A finding is good, limited (it works, with less; the text says what to do for more) or bad
(mounting can't work before it is put right).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from unionfs.core import sysio
from unionfs.host import preflight
from unionfs.host.mountinfo import mounted_at, read_mounts

# include/uapi/linux/fuse.h: _IOW(229, 1, struct fuse_backing_map)
FUSE_DEV_IOC_BACKING_OPEN = 0x4010E501
# include/uapi/linux/fs.h: _IOW(0x94, 9, int)
FICLONE = 0x40049409
CAP_SYS_ADMIN = 21
DT_UNKNOWN = 0

HANDLES_WORK = "inode numbers and hard links survive copy-up and remounting"
HANDLES_MISSING = "hard links break and inode numbers change on copy-up"


class Verdict(StrEnum):
    """How a check came out."""

    GOOD = "good"
    LIMITED = "limited"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found: `text` is a result, or what to do."""

    subject: str
    verdict: Verdict
    text: str


def good(subject: str, text: str) -> Finding:
    return Finding(subject, Verdict.GOOD, text)


def limited(subject: str, text: str) -> Finding:
    return Finding(subject, Verdict.LIMITED, text)


def bad(subject: str, text: str) -> Finding:
    return Finding(subject, Verdict.BAD, text)


def examine(directory: str) -> list[Finding]:
    """Run all checks; `directory` is where an upper shall lie."""
    checks = (
        _kernel,
        _fuse_device,
        _libfuse,
        _pyfuse3,
        _native,
        _fusermount,
        _allow_other,
        _capabilities,
        _passthrough,
        _user_namespaces,
    )
    return [check() for check in checks] + list(_file_system(directory))


def versions() -> str:
    """Return kernel, libfuse, pyfuse3 and Python versions in one line."""
    return (
        f"kernel {platform.release()}, libfuse {_libfuse_version() or 'missing'}, "
        f"pyfuse3 {_pyfuse3_version() or 'missing'}, Python {platform.python_version()}"
    )


# --- the machine ----------------------------------------------------------------------------------


def _kernel_version() -> tuple[int, int]:
    major, minor = (platform.release().split("-")[0] + ".0").split(".")[:2]
    return int(major), int("".join(filter(str.isdecimal, minor)) or 0)


def _kernel() -> Finding:
    release = platform.release()
    if _kernel_version() < (5, 4):
        return limited("kernel", f"{release} is older than anything this was tried on: use 5.4 or newer")
    return good("kernel", release)


def _fuse_device() -> Finding:
    try:
        fd = os.open(preflight.FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return bad("fuse device", "no /dev/fuse: modprobe fuse, or give the container --device /dev/fuse")
    except PermissionError:
        return bad("fuse device", "/dev/fuse is closed to this user: chmod 666 /dev/fuse")
    except OSError as error:
        return bad("fuse device", f"/dev/fuse can't be opened ({error.strerror}): modprobe fuse")
    os.close(fd)
    return good("fuse device", "/dev/fuse opens")


def _pyfuse3_error() -> str | None:
    """Import pyfuse3 and with it libfuse; return the error's text if that fails."""
    try:
        import pyfuse3  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def _libfuse_version() -> str | None:
    """Return the version of the libfuse that pyfuse3 has loaded, by its file's name."""
    if _pyfuse3_error() is not None:
        return None
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        paths = {line.split(None, 5)[5].strip() for line in file if "/libfuse3.so" in line}
    return next((os.path.realpath(path).rpartition(".so.")[2] for path in paths), None)


def _libfuse() -> Finding:
    version = _libfuse_version()
    if version is None and "libfuse3" in (_pyfuse3_error() or ""):
        return bad("libfuse", "libfuse 3 is missing: apt install fuse3, or what your distribution calls it")
    return good("libfuse", version or "unknown version")


def _pyfuse3_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pyfuse3")
    except PackageNotFoundError:
        return None


def _pyfuse3() -> Finding:
    error = _pyfuse3_error()
    if error is not None:
        return bad("pyfuse3", f"can't be imported ({error}): pip install --force-reinstall pyfuse3")
    return good("pyfuse3", _pyfuse3_version() or "unknown version")


def _native() -> Finding:
    try:
        from unionfs import _native
    except ImportError:
        return limited(
            "native part",
            "not built, file data goes through Python: install gcc, pkg-config, libfuse3-dev, reinstall",
        )
    del _native
    return good("native part", "built")


def _fusermount() -> Finding:
    path = shutil.which("fusermount3")
    if path is None:
        text = "missing, ordinary users can't mount: apt install fuse3"
        return limited("fusermount3", text) if os.geteuid() == 0 else bad("fusermount3", text)
    if not os.stat(path).st_mode & stat.S_ISUID:
        text = f"{path} is not setuid root, ordinary users can't mount: reinstall fuse3"
        return limited("fusermount3", text)
    return good("fusermount3", path)


def _allow_other() -> Finding:
    if preflight.user_allow_other():
        return good("allow_other", "ordinary users may let others see their mounts")
    if os.geteuid() == 0:
        return good("allow_other", "default for root; for ordinary users add user_allow_other to /etc/fuse.conf")
    return limited("allow_other", "others won't see your mounts: root can add user_allow_other to /etc/fuse.conf")


def _has_sys_admin() -> bool:
    """Whether this process has CAP_SYS_ADMIN in the initial user namespace, as far as can be told."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return sysio.in_initial_user_namespace() and bool(effective >> CAP_SYS_ADMIN & 1)


def _capabilities() -> Finding:
    if _has_sys_admin():
        return good("privilege", "CAP_SYS_ADMIN: trusted.overlay.* and 0:0 whiteouts, as kernel overlayfs")
    return limited("privilege", "none: user.overlay.* is used, redirect_dir and metacopy are off; root has them")


def _passthrough() -> Finding:
    """Ask the FUSE device for a backing file; the error tells whether the kernel knows the call."""
    if not _has_sys_admin():
        return limited("passthrough", "needs root; the native part moves file data instead")
    try:
        fd = os.open(preflight.FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return limited("passthrough", "unknown without /dev/fuse")
    try:
        fcntl.ioctl(fd, FUSE_DEV_IOC_BACKING_OPEN, struct.pack("=iIQ", -1, 0, 0))
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
            return limited("passthrough", "not in this kernel: use 6.9 or newer with CONFIG_FUSE_PASSTHROUGH")
    finally:
        os.close(fd)
    return good("passthrough", "in this kernel")


def _user_namespaces() -> Finding:
    if shutil.which("unshare") is None:
        return limited("user namespaces", "unknown: install util-linux")
    done = subprocess.run(
        ["unshare", "-Ur", "--mount", "true"], capture_output=True, text=True, check=False, timeout=10
    )
    if done.returncode == 0:
        return good("user namespaces", "unshare -Ur --mount works")
    return limited(
        "user namespaces",
        f"not for this user ({done.stderr.strip().removeprefix('unshare: ')}): leave the chroot, if this is one; "
        "else see sysctl user.max_user_namespaces and kernel.apparmor_restrict_unprivileged_userns",
    )


# --- a file system --------------------------------------------------------------------------------


def _file_system(directory: str) -> Iterator[Finding]:
    """Try in a temporary directory what an upper needs."""
    path = os.path.realpath(directory)
    yield _what_it_is(path)
    try:
        trial = tempfile.TemporaryDirectory(dir=path, prefix=".unionfs-doctor-")
    except OSError as error:
        yield limited("write", f"{path} can't be written ({error.strerror}): fit for a lower only")
        return
    with trial as place:
        file = os.path.join(place, "file")
        with open(file, "wb") as stream:
            stream.write(b"x" * 4096)
        yield _xattrs(file)
        yield _whiteouts(place)
        yield _tried("O_TMPFILE", lambda: _tmpfile(place), "works", "named temporary files are used instead")
        yield _tried("reflink", lambda: _clone(file), "copies share their data", "copy-up copies data")
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield _tried("file handles", lambda: _file_handles(fd), HANDLES_WORK, HANDLES_MISSING)
            yield _d_type(fd)
        finally:
            os.close(fd)


def _what_it_is(path: str) -> Finding:
    mounts = read_mounts()
    here = path
    while (mount := mounted_at(here, mounts)) is None and here != "/":
        here = os.path.dirname(here)
    kind = mount.fstype if mount else "unknown"
    if kind in ("nfs", "nfs4", "cifs", "smb3", "vfat", "exfat"):
        return limited("file system", f"{path} is on {kind}: fit for a lower, an upper belongs on a local disk")
    return good("file system", f"{path} is on {kind}")


def _tried(subject: str, action: Callable[[], None], works: str, otherwise: str) -> Finding:
    try:
        action()
    except OSError as error:
        return limited(subject, f"{error.strerror}: {otherwise}")
    return good(subject, works)


def _xattrs(file: str) -> Finding:
    """Which namespace can hold overlayfs's marks."""
    import xattr

    works: list[str] = []
    for name in ("trusted", "user"):
        with contextlib.suppress(OSError):
            xattr.setxattr(file, f"{name}.overlay.unionfs-doctor", b"y")
            works.append(f"{name}.*")
    if not works:
        return limited("xattrs", "none: no upper here; use another file system (ext4, xfs, btrfs, tmpfs)")
    if "user.*" not in works:
        return limited("xattrs", "trusted.* only: an ordinary user can't have an upper here")
    return good("xattrs", " and ".join(works))


def _whiteouts(place: str) -> Finding:
    try:
        os.mknod(os.path.join(place, "whiteout"), stat.S_IFCHR, os.makedev(0, 0))
    except OSError as error:
        return limited("whiteouts", f"no 0:0 device ({error.strerror}): whiteouts are xattrs or .wh. files")
    return good("whiteouts", "0:0 devices, as kernel overlayfs")


def _tmpfile(place: str) -> None:
    os.close(os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))


def _clone(file: str) -> None:
    with open(file, "rb") as source, open(file + ".clone", "wb") as target:
        fcntl.ioctl(target.fileno(), FICLONE, source.fileno())


def _file_handles(place: int) -> None:
    sysio.file_handle(place, b"file")


def _d_type(place: int) -> Finding:
    if any(kind == DT_UNKNOWN for _, _, kind in sysio.getdents(place)):
        return limited("d_type", "listings tell no types: each listing costs a stat for every name")
    return good("d_type", "listings tell types")
