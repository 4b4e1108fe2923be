"""`unionfs mount`: what its arguments mean together with a mount file; the work is done by the modules below."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, cast, get_args

import click

from unionfs.commands.clihelp import Argument, Block, Command, directories, exit_status, files
from unionfs.commands.mountfile import MountFile, read_mount_file
from unionfs.config import LogLevel, MountConfig, parse_mount
from unionfs.errors import UsageError
from unionfs.volumespec import (
    BindMode,
    MountVolumes,
    VolumeSpec,
    check_targets,
    merge_volumes,
    parse_mount_words,
    parse_name,
    parse_volume,
)

BLOCKS: list[Block] = [
    (
        "Examples",
        [
            "unionfs mount /srv/base /srv/changes /mnt",
            "unionfs mount /srv/app:/srv/base /srv/changes /mnt   (app on top of base)",
            "unionfs mount /srv/app:/srv/base /mnt   (read-only)",
            "unionfs mount --work /disk/work /srv/base /disk/upper /mnt",
            "unionfs mount -o noatime,metacopy=off,timeout=0 /srv/base /srv/changes /mnt",
            "unionfs mount -v /srv/data:/data -v cache:/var/cache /srv/base /srv/changes /mnt",
            "unionfs mount --config work.toml",
        ],
    ),
    (
        "Options of -o: overlayfs's own",
        [
            "redirect_dir=on|follow|nofollow|off, metacopy=on|off, index=on|off,",
            "xino=on|auto|off, uuid=auto|on|null|off, userxattr, volatile,",
            "lowerdir=, upperdir=, workdir=, lowerdir+=, datadir+=",
        ],
    ),
    ("Options of -o: mount(8)'s", ["ro, nosuid, nodev, noexec, sync, dirsync, noatime, and their opposites"]),
    (
        "Options of -o: this program's",
        [
            ("timeout=SECONDS", "of the kernel's entry and attribute caches, 0: none"),
            ("allow_other", "others see the mount; root's default"),
            ("noallow_other", "they don't"),
            ("fsname=NAME", "the source that /proc/mounts shows"),
            ("uidmapping=, gidmapping=", "show other owners: STORED:SHOWN:LENGTH[:...]"),
            ("squash_to_root", "show root as the owner of all; also squash_to_uid=, squash_to_gid="),
            ("static_nlink", "directories show a link count of 1"),
            ("noacl", "no POSIX ACLs"),
            ("whiteout=KIND", "how removals are marked: auto, char, xattr, wh"),
            ("native=off", "file data goes through Python"),
            ("slow_lower=auto|on|off", "lowers on slow storage hold up only who needs something of them"),
            ("lower=watch", "changes of lowers are noticed while they are mounted"),
            ("passthrough=off", "the kernel does not read and write files of upper by itself"),
        ],
    ),
    exit_status(),
]


@click.command(cls=Command, blocks=BLOCKS)
@click.argument(
    "paths",
    cls=Argument,
    nargs=-1,
    metavar="LOWER[:LOWER...] [UPPER] MOUNTPOINT",
    shell_complete=directories,
    explain="The leftmost lower is on top. A colon in a name is written \\:, and ::LOWER is a data-only "
    "layer. Without UPPER the union is read-only.",
)
@click.option(
    "-o",
    "--options",
    metavar="OPT[,OPT...]",
    multiple=True,
    help="Mount options, see below. Repeatable.",
)
@click.option(
    "--work",
    metavar="DIR",
    shell_complete=directories,
    help="Work directory, on the file system of UPPER. Default: .NAME.unionfs-work beside UPPER.",
)
@click.option(
    "-v",
    "--volume",
    "short_volumes",
    metavar="[SRC:]DST[:OPTS]",
    multiple=True,
    help="Bind a host directory or file, or a named volume, on DST in the union; without SRC an anonymous "
    "volume. OPTS: ro, nocopy, cached. Repeatable.",
)
@click.option(
    "--mount",
    "long_volumes",
    metavar="KEY=VALUE,...",
    multiple=True,
    help="The same, spelled out: type=bind|volume, source=SRC, target=DST and readonly, joined by commas. "
    "A missing SRC is refused. Repeatable.",
)
@click.option(
    "--volumes-from",
    metavar="MOUNT[:ro]",
    multiple=True,
    help="Take over the volumes of another mount, by its name or mount point. Repeatable.",
)
@click.option(
    "--bind-mode",
    metavar="|".join(get_args(BindMode)),
    help="Who serves the volumes: the kernel by real bind mounts, or the daemon. Default: auto.",
)
@click.option("--name", metavar="NAME", help="A name for the mount; it is remembered, see umount --rm.")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    shell_complete=files,
    help="Read the mount from a TOML file; options add to it.",
)
@click.option(
    "--auto-restart",
    is_flag=True,
    help="Have another daemon take over when one dies; open files go on. Needs Linux 6.9; slower.",
)
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground, log to standard error.")
@click.option(
    "--log-level",
    metavar="|".join(get_args(LogLevel)),
    default="warning",
    show_default=True,
    help="What to log at least.",
)
@click.option(
    "--log-file",
    metavar="FILE",
    shell_complete=files,
    help="Log to FILE. Default: the system log. SIGUSR1 makes the daemon log its counters and tasks.",
)
@click.pass_obj
def mount(
    store: str | None,
    /,
    config_file: str | None,
    foreground: bool,
    auto_restart: bool,
    name: str | None,
    bind_mode: str | None,
    short_volumes: Sequence[str],
    long_volumes: Sequence[str],
    volumes_from: Sequence[str],
    **given: Any,
) -> None:
    """Mount a union and return when it answers."""
    from unionfs.host import preflight
    from unionfs.service import starting

    file = read_mount_file(config_file) if config_file is not None else MountFile()
    config = _config(file, foreground=foreground, **given)
    volumes = _volumes(
        store,
        name or file.name,
        bind_mode or file.bind_mode or "auto",
        [*file.volumes, *map(parse_volume, short_volumes), *map(parse_mount_words, long_volumes)],
        [*file.volumes_from, *volumes_from],
    )
    if auto_restart or file.auto_restart:
        _check_restartable(config, volumes)
        config = dataclasses.replace(config, auto_restart=True)
    preflight.check(config)
    if foreground:
        starting.start_in_foreground(config, volumes)
    else:
        starting.start(config, volumes)


def _check_restartable(config: MountConfig, volumes: MountVolumes) -> None:
    """Raise UsageError for what a daemon that takes a mount over can't go on with."""
    for given, what in (
        (bool(volumes.specs or volumes.name), "volumes and --name"),
        (config.volatile, "-o volatile"),
        (config.lower == "watch", "-o lower=watch"),
        (not config.native, "-o native=off"),
    ):
        if given:
            raise UsageError(f"--auto-restart does not work with {what}: leave one of them out")


def _config(
    file: MountFile,
    *,
    paths: Sequence[str],
    options: Sequence[str],
    work: str | None,
    foreground: bool,
    log_level: str,
    log_file: str | None,
) -> MountConfig:
    """Put together what the mount file and the command line say of layers and options.

    Raises UsageError.
    """
    from unionfs.host import preflight

    if log_level not in get_args(LogLevel):
        raise UsageError(f"--log-level {log_level}: use one of {', '.join(get_args(LogLevel))}")
    if not paths and not file.positionals:
        raise UsageError("give LOWER[:LOWER...] UPPER MOUNTPOINT, or LOWER[:LOWER...] MOUNTPOINT to read only")
    if len(paths) == 1 and file.positionals:
        paths = [*file.positionals[:-1], *paths]
    privileged = os.geteuid() == 0
    return parse_mount(
        list(paths or file.positionals),
        [*file.options, *options],
        work=work or file.work,
        allow_other_default=privileged or preflight.user_allow_other(),
        privileged=privileged,
        foreground=foreground,
        log_level=cast(LogLevel, log_level),
        log_file=log_file,
    )


def _volumes(
    store: str | None, name: str | None, bind_mode: str, specs: list[VolumeSpec], others: list[str]
) -> MountVolumes:
    """Put together what a mount's volumes are: its own, then those of --volumes-from at other targets."""
    if bind_mode not in get_args(BindMode):
        raise UsageError(f"--bind-mode {bind_mode}: use one of {', '.join(get_args(BindMode))}")
    check_targets(specs)
    merged = tuple(specs)
    if others:
        from unionfs.store.volumes import Store

        opened = Store.open(store)
        for word in others:
            merged = merge_volumes(merged, opened.volumes_from(word))
    return MountVolumes(parse_name(name) if name is not None else None, merged, cast(BindMode, bind_mode), store)
