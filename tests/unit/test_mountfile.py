"""A mount in a TOML file."""

from __future__ import annotations

from pathlib import Path

import pytest

from unionfs.commands.mountfile import MountFile, read_mount_file
from unionfs.config import parse_mount
from unionfs.errors import UsageError
from unionfs.volumespec import VolumeSpec

WHOLE = """
lower = ["app", "/srv/b:c"]
data = ["/srv/objects"]
upper = "changes"
mountpoint = "/mnt/work"
name = "work"
work = "w"
options = ["noatime", "timeout=1"]
bind-mode = "kernel"
volumes-from = ["other:ro"]
auto-restart = true

[[volume]]
source = "data"
type = "bind"
target = "/data"
readonly = true

[[volume]]
source = "cache"
target = "/var/cache"
nocopy = true

[[volume]]
target = "/scratch"
"""


def read(tmp_path: Path, text: str) -> MountFile:
    """Read `text` as a mount file in `tmp_path`."""
    (tmp_path / "m.toml").write_text(text)
    return read_mount_file(str(tmp_path / "m.toml"))


def test_whole(tmp_path: Path) -> None:
    file = read(tmp_path, WHOLE)
    config = parse_mount(file.positionals, file.options, work=file.work)
    assert config.lowers == (f"{tmp_path}/app", "/srv/b:c")
    assert config.data_lowers == ("/srv/objects",)
    assert (config.upper, config.work) == (f"{tmp_path}/changes", f"{tmp_path}/w")
    assert (config.mountpoint, config.timeout) == ("/mnt/work", 1.0)
    assert (file.name, file.bind_mode, file.volumes_from) == ("work", "kernel", ("other:ro",))
    assert file.auto_restart
    assert file.volumes == (
        VolumeSpec("bind", f"{tmp_path}/data", "/data", read_only=True),
        VolumeSpec("volume", "cache", "/var/cache", nocopy=True),
        VolumeSpec("volume", "", "/scratch"),
    )


def test_smallest(tmp_path: Path) -> None:
    file = read(tmp_path, 'lower = "/l"\nmountpoint = "/m"')
    config = parse_mount(file.positionals, file.options)
    assert (config.lowers, config.upper, config.mountpoint) == (("/l",), None, "/m")
    assert not file.auto_restart


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lower = ", "Invalid value"),
        ("colour = 1", "unknown key 'colour'"),
        ('lower = "/l"', "at least lower and mountpoint"),
        ('lower = [1]\nmountpoint = "/m"', "lower must be a text or a list"),
        ('lower = "/l"\nmountpoint = 3', "mountpoint must be a text"),
        ('lower = "/l"\nmountpoint = "/m"\nauto-restart = 1', "auto-restart must be true or false"),
        ('lower = "/l"\nmountpoint = "/m"\nvolume = 1', r"\[\[volume\]\]"),
        ('lower = "/l"\nmountpoint = "/m"\n[[volume]]\nsource = "/a"', "volume 1: give source= and target="),
        ('lower = "/l"\nmountpoint = "/m"\n[[volume]]\ntarget = "/a"\ncolour = 1', "volume 1: unknown key 'colour'"),
    ],
)
def test_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        read(tmp_path, text)
    assert str(tmp_path / "m.toml") in str(refused.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_mount_file(str(tmp_path / "none"))
