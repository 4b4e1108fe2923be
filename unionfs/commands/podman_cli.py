"""`unionfs-overlay`: a union for podman and buildah, called as they call fuse-overlayfs, their `mount_program`.

    unionfs-overlay [-f] [-d] [-o OPT[,OPT...]]... [NAME] MOUNTPOINT

What differs from `unionfs mount`:

- Options that only fuse-overlayfs has are taken: those that tune its inside are left out; those that would change what
  is seen or stored, and are not supported, are refused. An option that nobody knows is named and ignored, as there.
- `metacopy` is off unless asked for: the same store may be mounted tomorrow by somebody who can't read it. An option
  that needs privilege adapts where that is missing, since the store's configuration is the same for all users.
- Where the kernel can, podman lays id-mapped mounts under the layers, and asks for the mapping as well. Together they
  would map twice, so layers are taken from below such mounts (`_from_below`).
- A value may stand in double quotes, with commas in it (`context="..."`, an SELinux label for the kernel).
- `--version` has the form in which fuse-overlayfs tells its own; podman shows it in `podman info`.
"""

from __future__ import annotations

import dataclasses
import getopt
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import unionfs
from unionfs.config import LogLevel, MountConfig, fsname_option, is_known, parse_mount
from unionfs.errors import UsageError, one_line
from unionfs.host.mountinfo import Mount, Place, place_of, read_mounts

NAME = "unionfs-overlay"

USAGE = f"""\
Usage: {NAME} [-f] [-d] [-o OPT[,OPT...]]... MOUNTPOINT

The mount_program of podman and buildah, in place of fuse-overlayfs.

  -o lowerdir=A[:B...]         the layers, the leftmost on top
  -o upperdir=DIR,workdir=DIR  where changes go; without them it is read-only
  -o uidmapping=STORED:SHOWN:LENGTH[:STORED:SHOWN:LENGTH...], gidmapping=...
                               show other owners than the layers have
  -o squash_to_root, squash_to_uid=ID, squash_to_gid=ID
                               show one owner for everything
  -o static_nlink              directories show a link count of 1
  -o noacl                     no POSIX ACLs
  -o volatile, fsync=0         don't wait for the disk
  -o timeout=SECONDS           how long the kernel may keep names and attributes
  -o redirect_dir=, metacopy=, index=, xino=, ...   as for unionfs mount
  -f, --foreground             stay in the foreground
  -d, --debug                  the same, and log all there is
  -V, --version, -h, --help    show this, or the version, and end"""

# Options of fuse-overlayfs that tune what there isn't here.
_TUNING = frozenset(("threaded", "fast_ino", "writeback", "ino32_t", "clone_fd", "max_threads", "max_idle_threads"))

# Those that would change what is seen: the values that mean nothing here, and what is said of others.
_UNSUPPORTED = {
    "xattr_permissions": ("0", "keeping owner and mode in attributes is not supported"),
    "noxattrs": ("0", "extended attributes can't be turned off"),
    "plugins": ("", "plugins are not supported"),
}

# Where an option ends: at a comma outside of double quotes and not escaped.
_OPTION = re.compile(r'(?:[^,"\\]|\\.|"[^"]*"|["\\])+', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """A command line: `options` are the single options of all -o."""

    source: str | None
    mountpoint: str
    options: tuple[str, ...] = ()
    foreground: bool = False
    debug: bool = False


def run(words: Sequence[str]) -> None:
    """Do what a command line says, and return when the mount answers, or with -f when it has ended.

    Raises a UnionError that says what keeps it from being done.
    """
    pairs, rest = _split(words)
    if any(name in ("-h", "--help") for name, _ in pairs):
        print(USAGE)
    elif any(name in ("-V", "--version") for name, _ in pairs):
        print(version())
    else:
        _mount(_call(pairs, rest))


def version() -> str:
    """Return the lines that tell the program's version, and those of what it stands on."""
    from unionfs.commands.doctor import versions

    return f"{NAME}: version {unionfs.__version__}\n{versions()}"


def _split(words: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    try:
        return getopt.gnu_getopt(list(words), "fdhVo:", ["foreground", "debug", "help", "version"])
    except getopt.GetoptError as error:
        raise UsageError(f"{error}: see {NAME} --help") from None


def _call(pairs: list[tuple[str, str]], rest: list[str]) -> Call:
    if not 1 <= len(rest) <= 2:
        raise UsageError(f"give one mount point: see {NAME} --help")
    given = dict(pairs)
    debug = "-d" in given or "--debug" in given
    options = tuple(option for name, value in pairs if name == "-o" for option in split_quoted(value))
    foreground = debug or "-f" in given or "--foreground" in given
    return Call(rest[0] if len(rest) == 2 else None, rest[-1], options, foreground, debug)


def split_quoted(text: str) -> list[str]:
    """Split an `-o` argument into its options; quotes and escapes stay."""
    return _OPTION.findall(text)


def _mount(call: Call) -> None:
    from unionfs.host import preflight
    from unionfs.service import daemon, notify, starting

    config = _config(call, allow_other=preflight.user_allow_other())
    preflight.check(config)
    if call.foreground:
        daemon.serve(config, lambda: notify.tell(notify.READY))
    else:
        starting.start(config)


def _config(call: Call, *, allow_other: bool) -> MountConfig:
    privileged = os.geteuid() == 0
    context = [option for option in call.options if option.startswith("context=")]
    given = [option for option in call.options if option not in context]
    log_level: LogLevel = "debug" if call.debug else "warning"
    config = parse_mount(
        [call.mountpoint],
        ["metacopy=off", *([fsname_option(call.source)] if call.source else []), *_translated(given)],
        allow_other_default=privileged or allow_other,
        privileged=privileged,
        foreground=call.foreground,
        log_level=log_level,
    )
    if config.ids.uids or config.ids.gids:
        config = dataclasses.replace(config, lowers=_from_below(config.lowers))
    # What was asked for by name may adapt, too.
    explicit = config.explicit - {"metacopy", "redirect_dir", "index"}
    labels = tuple(option.replace('"', "").replace(",", "\\,") for option in context)
    return dataclasses.replace(config, explicit=explicit, mount_options=(*config.mount_options, *labels))


def _from_below(lowers: Sequence[str]) -> tuple[str, ...]:
    """Return lowers by paths that lead over no id-mapped mount, as far as there are such paths."""
    mounts = read_mounts()
    return tuple(_plain_path(path, mounts) for path in lowers)


def _plain_path(path: str, mounts: Sequence[Mount]) -> str:
    try:
        place = place_of(path, mounts)
    except OSError:
        return path  # it will be said when layers are checked
    if not any(mount.mount_id == place.mount_id and mount.is_idmapped for mount in mounts):
        return path
    for mount in mounts:
        if not mount.is_idmapped and place.is_within(Place(mount.mount_id, mount.dev, mount.root)):
            other = os.path.normpath(os.path.join(mount.mountpoint, os.path.relpath(place.path, mount.root)))
            if _is_there(other, path, mount):
                return other
    return path


def _is_there(other: str, path: str, mount: Mount) -> bool:
    """Whether a path leads to the same directory over a certain mount; something may be mounted over it."""
    try:
        return os.path.samefile(path, other) and place_of(other, [mount]).mount_id == mount.mount_id
    except OSError:
        return False


def _translated(options: Sequence[str]) -> Iterator[str]:
    """Yield options of ours for those of fuse-overlayfs.

    Raises UsageError for what is not supported.
    """
    for option in options:
        name, _, value = option.partition("=")
        if name == "fsync":
            if value == "0":
                yield "volatile"
        elif name in _UNSUPPORTED:
            harmless, reason = _UNSUPPORTED[name]
            if value != harmless:
                raise UsageError(f"option {option}: {reason}")
        elif is_known(name):
            yield option
        elif name not in _TUNING:
            print(f"{NAME}: unknown option ignored: {one_line(option)}", file=sys.stderr)
