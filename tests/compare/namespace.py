"""The mount namespace that a comparison runs in, a copy of its own.

A mount lives until it is gone from every mount namespace. If somebody made a namespace from the one that we mount in (a container,
`unshare`), it would keep our mounts, their daemons and their upper layers in use after we unmounted them. So we mount in a
namespace that nobody copies, and keep nobody else's mounts in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.compare.machine import mounts

INSIDE = "UNIONFS_COMPARE_INSIDE"
"""Set for the process that runs in the new namespace."""


def inside() -> bool:
    """Whether this process is the one in a namespace of its own."""
    return INSIDE in os.environ


def enter(words: Sequence[str], *, rootless: bool) -> None:
    """Become the process that runs the comparison with the command line `words` in a new namespace.

    Returns only where no mount namespace can be made, and the comparison can go on in this one.

    Args:
        rootless: in a user namespace too.
    """
    # Slave: what others unmount goes here too, and nothing of ours goes there.
    unshare = ["unshare", *(["--user", "--map-root-user"] if rootless else []), "--mount", "--propagation", "slave"]
    if not rootless and subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        return
    os.environ[INSIDE] = "1"
    os.execvp(unshare[0], [*unshare, sys.executable, "-m", "tests.compare", *words])


def let_go(needed: Sequence[Path]) -> None:
    """Detach this namespace's copies of other unions and of images, but those that `needed` paths lie on.

    Where mounts propagate they vanish when their owner unmounts them; elsewhere they would be kept until we end.
    """
    for point, kind, source in reversed(mounts()):
        foreign = kind == "overlay" or kind.startswith("fuse") or source.startswith("/dev/loop")
        if foreign and not any(path.is_relative_to(point) for path in needed):
            subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False)
