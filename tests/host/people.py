"""Without root: an ordinary user through fusermount3, and root of a user namespace, beside overlayfs in one.

The user is `nobody`, whom every system knows and nobody has to make.
"""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
from pathlib import Path

from tests.host.host import Host, LeftOut, expect, need, run, shell
from tests.host.oracle import beside_overlayfs

NOBODY = "nobody"
NAMESPACE = ("unshare", "-Ur", "--mount", "--propagation", "private")


def by_fusermount(host: Host, room: Path) -> str:
    """An ordinary user mounts, works and unmounts; root has no way in."""
    user = _become(host)
    own = _own(room)
    script = f"""
        mkdir lower upper merged
        echo lower >lower/file; echo gone >lower/gone
        {host.program("unionfs")} mount --log-file log lower upper merged
        echo more >>merged/file; rm merged/gone; mv merged/file merged/moved; ls merged; cat merged/moved
        {host.program("unionfs")} umount merged
        ls merged; cat lower/file"""
    said = run([*user, "sh", "-euc", script], cwd=own)
    expect(said, "moved\nlower\nmore\nlower\n", "what an ordinary user sees")
    if host.quick or subprocess.run([*user, *NAMESPACE, "true"], capture_output=True, check=False).returncode:
        return f"as {NOBODY}"
    # The oracle is overlayfs as the same user can have it, in a namespace.
    held = beside_overlayfs(host, own, {"overlay": [*user, *NAMESPACE], "union": user})
    return f"as {NOBODY}, {held}"


def in_a_namespace(host: Host, room: Path) -> str:
    """Root of a user namespace: what overlayfs with userxattr can do there, ours does."""
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        raise LeftOut("no user namespaces here")
    return beside_overlayfs(host, room, {"overlay": NAMESPACE, "union": NAMESPACE})


def _own(room: Path) -> Path:
    """A directory that is nobody's own."""
    own = room / "own"
    own.mkdir()
    account = pwd.getpwnam(NOBODY)
    os.chown(own, account.pw_uid, account.pw_gid)
    return own


def _become(host: Host) -> list[str]:
    """The command that runs another one as nobody. Raises LeftOut where that can't run our Python, or has no fusermount3."""
    need("setpriv", "fusermount3")
    account = pwd.getpwnam(NOBODY)
    user = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    user += ["env", "-u", "XDG_RUNTIME_DIR", f"HOME={host.base}"]
    if subprocess.run([*user, host.program("python"), "-c", ""], capture_output=True, check=False).returncode:
        raise LeftOut(f"{host.python} can't be run by others: it lies in a closed directory")
    if not os.stat("/dev/fuse").st_mode & stat.S_IWOTH:
        # udev opens it to all; where there is no udev it is opened for the user's processes alone.
        shell("[ -e fuse ] || { mknod fuse c 10 229 && chmod 666 fuse; }", cwd=host.base)
        enter = f"mount --bind '{host.base}/fuse' /dev/fuse && exec \"$@\""
        user = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", enter, "sh", *user]
    return user
