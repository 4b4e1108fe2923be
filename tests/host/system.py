"""The system's own ways to mount: mount(8) and fstab, and with --system the host's real fstab and systemd.

Without --system nothing of the host is changed: the helper is seen in /sbin in a mount namespace that ends with the check, by
means of a union over that directory.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.host.host import Host, LeftOut, Wrong, expect, need, run

HELPER = "mount.fuse.unionfs"
FSTAB = Path("/etc/fstab")


def _line(room: Path, *more: str) -> str:
    """A line of fstab, and its layers."""
    for name in ("lower", "upper", "work", "merged"):
        (room / name).mkdir(exist_ok=True)
    (room / "lower/file").write_text("from lower\n")
    options = [f"lowerdir={room / 'lower'}", f"upperdir={room / 'upper'}", f"workdir={room / 'work'}", *more]
    return f"integration {room / 'merged'} fuse.unionfs {','.join(options)} 0 0\n"


def fstab(host: Host, room: Path) -> str:
    """mount(8) by a line of an fstab, remounts and umount(8)."""
    need("unshare", "mount", "umount")
    (room / "fstab").write_text(_line(room, "nofail", "x-systemd.automount", "noexec"))
    (room / "helpers").mkdir()
    (room / "helpers" / HELPER).symlink_to(host.program(HELPER))
    sbin = Path("/sbin").resolve()
    script = f"""
        cd {room}
        {host.program("unionfs")} mount helpers:{sbin} {sbin}
        trap 'umount {sbin}' EXIT
        mount -T fstab -a; mount -T fstab -a
        grep -c '^integration ' /proc/mounts
        cat merged/file; echo more >>merged/file
        mount -o remount,ro merged; echo no 2>&- >>merged/file || echo refused
        mount -o remount,rw merged; echo again >>merged/file
        umount merged; ls merged; cat upper/file"""
    said = run(["unshare", "--mount", "--propagation", "private", "sh", "-euc", script])
    expect(
        said.split(), ["1", "from", "lower", "refused", "from", "lower", "more", "again"], "mount -a, remount, umount"
    )
    return "mount -a, remount ro and rw, umount"


def errors(host: Host, room: Path) -> str:
    """What can't be mounted is refused in one line, with the status that the README gives it."""
    line = _line(room).split()
    layers = line[3]
    for words, status in (
        ([host.program(HELPER), "x", room / "merged", "-o", "lowerdir=/no/such"], 32),
        ([host.program(HELPER), "x", room / "merged", "-o", f"{layers},nonsense=1"], 1),
        ([host.program("unionfs"), "mount", "/no/such", room / "upper", room / "merged"], 3),
        ([host.program("unionfs"), "mount", "-o", "index=on,uuid=maybe", room / "lower", room / "merged"], 2),
        ([host.program("unionfs"), "umount", room / "merged"], 2),
    ):
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
        if done.returncode != status or len(done.stderr.splitlines()) != 1:
            raise Wrong(f"{shlex.join(map(str, words))}: status {done.returncode}, not {status}\n{done.stderr}")
    return "five of them"


# --- the host's own fstab and systemd -------------------------------------------------------------


def _need_systemd(host: Host) -> None:
    if not host.system:
        raise LeftOut("changes the system's configuration for a moment: only with --system")
    if not Path("/run/systemd/system").is_dir():
        raise LeftOut("systemd doesn't run here")


@contextmanager
def _installed(host: Host, *files: tuple[Path, Path | str]) -> Iterator[None]:
    """Put links (given a path) and files (given their text) into the system; take them away after the block."""
    for target, source in files:
        if os.path.lexists(target):
            raise LeftOut(f"{target} is there already")
        if isinstance(source, Path):
            target.symlink_to(source)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source)
    before = FSTAB.read_bytes() if FSTAB.exists() else b""
    try:
        yield
    finally:
        FSTAB.write_bytes(before)
        for target, _ in files:
            target.unlink()
        run(["systemctl", "daemon-reload"])


def real_fstab(host: Host, room: Path) -> str:
    """A line in /etc/fstab becomes a mount unit of systemd, which mounts and unmounts it."""
    _need_systemd(host)
    with _installed(host, (Path("/sbin") / HELPER, Path(host.program(HELPER)))):
        with FSTAB.open("a") as file:
            file.write(_line(room, "noauto", "_netdev"))
        run(["systemctl", "daemon-reload"])
        unit = run(["systemd-escape", "--path", "--suffix=mount", room / "merged"]).strip()
        run(["systemctl", "start", unit])
        expect((room / "merged/file").read_text(), "from lower\n", "a lower file through the unit")
        expect(run(["systemctl", "show", "-P", "SubState", unit]).strip(), "mounted", "the state of the unit")
        (room / "merged/new").write_text("new")
        run(["systemctl", "stop", unit])
        expect(os.listdir(room / "merged"), [], "the mount point after the unit was stopped")
        run(["mount", room / "merged"])
        expect((room / "merged/new").read_text(), "new", "what upper kept")
        run(["umount", room / "merged"])
    return unit.replace("\\x2d", "-")


def service(host: Host, room: Path) -> str:
    """The service template: up when the mount answers, unmounted when it is stopped."""
    _need_systemd(host)
    _line(room)
    config = f'lower = "{room / "lower"}"\nupper = "{room / "upper"}"\nmountpoint = "{room / "merged"}"\nname = "integration"\n'
    config += f'[[volume]]\nsource = "{room / "data"}"\ntarget = "/data"\ncreate = true\n'
    template = Path("/etc/systemd/system/unionfs@.service")
    files = (
        (Path("/usr/local/bin/pyunionfs"), Path(host.program("pyunionfs"))),
        (template, (host.venv / "share/unionfs/unionfs@.service").read_text()),
        (Path("/etc/unionfs/integration.toml"), config),
    )
    with _installed(host, *files):
        run(["systemctl", "daemon-reload"])
        run(["systemctl", "start", "unionfs@integration"])
        # No waiting: that it is up means that it answers.
        expect((room / "merged/file").read_text(), "from lower\n", "a lower file through the service")
        (room / "merged/data/new").write_text("new")
        expect((room / "data/new").read_text(), "new", "the volume's directory")
        run(["systemctl", "stop", "unionfs@integration"])
        expect(os.listdir(room / "merged"), [], "the mount point after the service was stopped")
        expect(run(["systemctl", "show", "-P", "Result", "unionfs@integration"]).strip(), "success", "its result")
        run([host.program("unionfs"), "umount", "--rm", "integration"])
    shutil.rmtree("/etc/unionfs", ignore_errors=True) if not os.listdir("/etc/unionfs") else None
    return "started, used, stopped"
