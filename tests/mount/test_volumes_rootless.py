"""Volumes without privilege: root of a user namespace has the kernel bind them, an ordinary user the daemon."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.mount.test_rootless import NAMESPACES, as_ordinary_user
from tests.support.mounts import environment
from tests.support.people import REPOSITORY, in_user_namespace

SCENARIO = """
cd '{ground}/place'
u() {{ '{python}' -m unionfs --root "$PWD/store" "$@"; }}
refused() {{ if "$@" 2>said; then echo "not refused: $*"; exit 1; fi; }}
mkdir lower upper mnt other host lower/vol
echo from-lower > lower/vol/seed
echo from-host > host/f

u mount --name first -v "$PWD/host:/data" -v vol:/vol -v vol:/again:ro -v /anon lower upper mnt
grep -q from-host mnt/data/f
echo changed > mnt/data/f; grep -q changed host/f
echo outside > host/new; grep -q outside mnt/data/new
grep -q from-lower mnt/vol/seed
echo more > mnt/vol/seed; grep -q more mnt/again/seed; grep -q more store/volumes/vol/_data/seed
refused touch mnt/again/x; grep -q 'Read-only' said
refused rmdir mnt/data; grep -q busy said
refused mv mnt/data mnt/moved; grep -q busy said
ln mnt/data/f mnt/data/link; mv mnt/data/link mnt/data/link2; test "$(stat -c %h host/link2)" = 2
touch mnt/anon/x
u inspect first | grep -c '"BindMode": "{mode}"' | grep -qx 4
refused u volume rm vol; grep -q 'in use by' said

# A read-only union can't make mount points: upper, as a lower, has them.
u mount --volumes-from first:ro lower:upper other
grep -q more other/vol/seed
refused touch other/data/x; grep -q 'Read-only' said
u umount --rm other
if [ {mode} = fuse ]; then
    refused u mount --mount "type=bind,src=$PWD/host,dst=/data,bind-nonrecursive" lower:upper other
    grep -q 'bind-nonrecursive needs root' said
fi
u umount first
u volume backup vol vol.tar.gz; tar tzf vol.tar.gz | grep -q seed
u volume restore back vol.tar.gz; grep -q more store/volumes/back/_data/seed
u umount --rm -v first
u volume rm vol back
test -z "$(u volume ls -q)"
echo done
"""


def scenario(ground: Path, mode: str) -> str:
    (ground / "place").mkdir(mode=0o777)
    (ground / "place").chmod(0o777)
    return SCENARIO.format(ground=ground, python=sys.executable, mode=mode)


@NAMESPACES
@pytest.mark.fault_seconds(200)
def test_root_of_a_user_namespace(ground: Path) -> None:
    done = in_user_namespace(["sh", "-euc", scenario(ground, "kernel")], cwd=REPOSITORY, env=environment())
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr


@NAMESPACES
@pytest.mark.fault_seconds(200)
def test_ordinary_user_through_fusermount3(ground: Path) -> None:
    done = as_ordinary_user("# mounts by fusermount3\n" + scenario(ground, "fuse"), ground)
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr
