"""Command lines that are nearly right, as processes: each ends with a documented status, and what went wrong is one line.

They are run by an ordinary user without any privilege, in a mount namespace in which all but one directory and what programs need
is read-only, for a damaged command line may name anything.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.mutate import mutated
from tests.support.mounts import environment
from tests.support.people import ALICE, REPOSITORY, opened_interpreter
from unionfs.errors import EXIT_CODES

PROGRAMS = {
    "unionfs": ["-m", "unionfs"],
    "unionfs-overlay": ["-c", "from unionfs.__main__ import overlay; overlay()"],
    "mount.unionfs": ["-c", "from unionfs.__main__ import mount_helper; mount_helper()"],
}
STATUSES = {
    "unionfs": set(EXIT_CODES) - {1},
    "unionfs-overlay": set(EXIT_CODES) - {1},
    "mount.unionfs": {0, 1, 2, 32},
}
LINES = {
    "unionfs": [
        "mount lower upper mnt",
        "mount -o ro,timeout=1 lower:lower2 mnt --name web",
        "mount -v vol:/data --mount type=bind,source=lower,target=/x,readonly lower upper mnt",
        "mount --config work.toml -f --log-level debug --log-file log",
        "mount --volumes-from web:ro --bind-mode fuse lower upper mnt --work work",
        "umount --lazy mnt web",
        "umount --rm -v web",
        "inspect web mnt",
        "ls --json",
        "doctor --json .",
        "volume create vol --label a=b -o type=none,device=lower",
        "volume ls -q --filter label=a --filter dangling=true --json",
        "volume inspect vol other",
        "volume rm -f vol",
        "volume prune -a --filter label=a -f",
        "volume rename vol new",
        "volume clone vol new",
        "volume backup vol a.tar.zst",
        "volume backup --volumes-from web all.tar.gz",
        "volume restore --force vol a.tar",
        "--root store volume ls",
        "--version",
        "union mnt -o lowerdir=lower,ro",
        "volume --help",
    ],
    "unionfs-overlay": [
        "-o lowerdir=lower:lower2,upperdir=upper,workdir=work mnt",
        '-f -d -o noacl,context="a,b" n mnt',
        "--version",
    ],
    "mount.unionfs": [
        "n mnt -o lowerdir=lower,upperdir=upper,workdir=work -v",
        "n mnt -o remount,rw -N /proc/self/ns/mnt",
        "-sf n mnt -t fuse.unionfs",
    ],
}
WORDS = (
    b"--",
    b"-o",
    b"-v",
    b"--mount",
    b"--help",
    b"--json",
    b"mount",
    b"volume",
    b"",
    b"lower",
    b"mnt",
    b"-",
    b"--name",
    b"--filter",
)
SECONDS = 30.0
QUICK = 10
"""Up to so many seconds only one of the undamaged lines of each program is tried."""


def words_of(dice: random.Random, program: str) -> list[str]:
    """A command line, damaged."""
    separator = b"\x1f"
    seeds = [line.replace(" ", "\x1f").encode() for line in LINES[program]]
    line = mutated(dice, seeds, [separator, *(separator + word + separator for word in WORDS)])
    words = [os.fsdecode(word[:2000]) for word in line.replace(b"\0", b"").split(separator)]
    return words[:60]


def judge(program: str, words: list[str], status: int, out: str, err: str) -> str | None:
    """What is wrong with how a command ended, None where nothing is."""
    if program == "unionfs" and len(words) == 4 and words[2] == "-o":
        program = "mount.unionfs"  # as /sbin/mount.fuse calls it
    if "Traceback" in err or "Traceback" in out:
        return "a traceback"
    if status not in STATUSES[program]:
        return f"exit status {status}"
    said = [line for line in err.splitlines() if not line.startswith("unionfs-overlay: unknown option ignored")]
    if status and not out and (len(said) != 1 or not said[0].startswith("unionfs: ")):
        return f"{len(said)} lines of error"
    return None


def run_one(program: str, words: list[str], where: Path) -> str | None:
    """Run one command line; what was wrong with it."""
    try:
        done = subprocess.run(
            [sys.executable, *PROGRAMS[program], *words],
            cwd=where,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it hung"
    err = done.stderr.decode(errors="surrogateescape")
    wrong = judge(program, words, done.returncode, done.stdout.decode(errors="surrogateescape"), err)
    return wrong and f"{wrong}: {[program, *words]!r}: {err[-600:]!r}"


def prepare(where: Path) -> None:
    """Things that command lines name."""
    for name in ("lower", "lower2", "upper", "mnt"):
        (where / name).mkdir()
    (where / "work.toml").write_text('lower = "lower"\nmountpoint = "mnt"\n')
    (where / "a.tar").write_bytes(bytes(1024))


def inside(seconds: float, seed: int) -> dict[str, object]:
    """Fuzz, in the sandbox; the working directory is a fresh one."""
    dice = random.Random(seed)
    wrong: list[str] = []
    runs = 0
    where = Path.cwd()
    prepare(where)
    for program, lines in LINES.items():
        for line in lines if seconds > QUICK else lines[:1]:
            runs += 1
            wrong += [found for found in [run_one(program, line.split(" "), where)] if found]
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(wrong) < 5:
        program = dice.choice(("unionfs", "unionfs", "unionfs", "unionfs-overlay", "mount.unionfs"))
        runs += 1
        wrong += [found for found in [run_one(program, words_of(dice, program), where)] if found]
    return {"runs": runs, "wrong": wrong}


def fuzz(seconds: float, seed: int) -> tuple[int, list[str]]:
    """Fuzz the command line in a sandbox for some seconds; how often, and what was wrong. Needs root."""
    base = Path(tempfile.mkdtemp(prefix="ufst-cli-", dir="/var/tmp"))
    try:
        base.chmod(0o755)
        home = base / "home"
        home.mkdir()
        os.chown(home, ALICE, ALICE)
        user = (
            f"setpriv --reuid={ALICE} --regid={ALICE} --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs"
        )
        driver = f"'{sys.executable}' -m tests.fuzz.command_line {seconds} {seed}"
        script = f"""set -e
            {opened_interpreter()}
            mount --bind '{home}' '{home}'
            for place in $(cut -d' ' -f5 /proc/self/mountinfo); do
                case "$place" in '{home}'|/proc*|/dev*|/sys*) ;; *) mount -o remount,bind,ro "$place" 2>/dev/null || true;; esac
            done
            cd '{home}'
            exec {user} {driver}
        """
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--propagation", "private", "sh", "-c", script],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={
                **environment(),
                "HOME": str(home),
                "TMPDIR": str(home),
                "USER": "alice",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            timeout=seconds + 300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout)
        return int(found["runs"]), list(found["wrong"])
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    print(json.dumps(inside(float(sys.argv[1]), int(sys.argv[2]))))
