"""The command line: what the arguments mean and what is printed; the work is done by the modules below.

pyfuse3 and trio are imported by the daemon only, rich by the commands that draw with it, so that `mount`
starts fast.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, cast, get_args

import typer

import unionfs
from unionfs.config import LogLevel, parse_mount
from unionfs.errors import EXIT_CODES, UnionError, UsageError
from unionfs.volume_cli import volume_app
from unionfs.volumespec import BindMode, MountVolumes, VolumeSpec

app = typer.Typer(
    name="unionfs",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(volume_app, name="volume")


def _epilog(*blocks: tuple[str, Sequence[str]]) -> str:
    """Lay out (heading, lines) blocks under a help text, and the exit status last."""
    status = [f"{code}  {text}" for code, text in EXIT_CODES.items()]
    texts = [
        "\n".join([f"[bold]{heading}[/bold]", *(f"  {line}" for line in body)])
        for heading, body in [*blocks, ("Exit status", status)]
    ]
    return "\n\n".join(texts)


MOUNT_EPILOG = _epilog(
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
    ("Options of -o: mount(8)'s", ["ro, nosuid, nodev, noexec, sync, dirsync, noatime"]),
    (
        "Options of -o: this program's",
        [
            "timeout=SECONDS   of the kernel's entry and attribute caches, 0: none",
            "allow_other       others see the mount; root's default",
            "noallow_other     they don't",
            "fsname=NAME       the source that /proc/mounts shows",
            "whiteout=KIND     how removals are marked: auto, char, xattr, wh",
            "native=off        file data goes through Python",
            "passthrough=off   the kernel does not read and write files of upper by itself",
        ],
    ),
)
UMOUNT_EPILOG = _epilog(
    ("Examples", ["unionfs umount /mnt", "unionfs umount --lazy /mnt", "unionfs umount --rm -v web"])
)


def _version(wanted: bool) -> None:
    if wanted:
        from unionfs.doctor import versions

        print(f"unionfs {unionfs.__version__} ({versions()})")
        raise typer.Exit


@app.callback(
    epilog=_epilog(
        (
            "Examples",
            [
                "unionfs mount /srv/base /srv/changes /mnt",
                "unionfs ls",
                "unionfs umount /mnt",
                "unionfs doctor /srv",
            ],
        )
    )
)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and end.")
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="Where volumes and the memory of mounts lie. Default: /var/lib/unionfs, or the user's data directory.",
        ),
    ] = None,
) -> None:
    """Lay directories over one another, see them as one, and keep changes apart.

    What is changed in the merged directory goes to the upper one; the lower ones
    stay as they are. Semantics and on-disk format are overlayfs's own, served
    from user space, for root and ordinary users.
    """
    context.obj = store


@app.command(epilog=MOUNT_EPILOG)
def mount(
    context: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="LOWER[:LOWER...] [UPPER] MOUNTPOINT",
            help="The leftmost lower is on top. A colon in a name is written \\:, and ::LOWER is a data-only "
            "layer. Without UPPER the union is read-only.",
            show_default=False,
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("-o", "--options", metavar="OPT[,OPT...]", help="Mount options, see below. Repeatable."),
    ] = None,
    work: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Work directory, on the file system of UPPER. Default: .NAME.unionfs-work beside UPPER.",
        ),
    ] = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            "-v",
            "--volume",
            metavar="[SRC:]DST[:OPTS]",
            help="Bind a host directory or file, or a named volume, on DST in the union; without SRC an anonymous "
            "volume. OPTS: ro, nocopy. Repeatable.",
        ),
    ] = None,
    mounts: Annotated[
        list[str] | None,
        typer.Option(
            "--mount",
            metavar="KEY=VALUE,...",
            help="The same, spelled out: type=bind|volume,source=SRC,target=DST[,readonly]. A missing SRC is refused.",
        ),
    ] = None,
    volumes_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MOUNT[:ro]", help="Take over the volumes of another mount, by its name or mount point. Repeatable."
        ),
    ] = None,
    bind_mode: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(get_args(BindMode)),
            help="Who serves the volumes: the kernel by real bind mounts, or the daemon. Default: auto.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="A name for the mount; it is remembered, see umount --rm.")
    ] = None,
    config_file: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="Read the mount from a TOML file; options add to it.")
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Stay in the foreground, log to standard error.")
    ] = False,
    log_level: Annotated[
        str, typer.Option(metavar="|".join(get_args(LogLevel)), help="What to log at least.")
    ] = "warning",
    log_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Log to FILE. Default: the system log. SIGUSR1 makes the daemon log its counters and tasks.",
        ),
    ] = None,
) -> None:
    """Mount a union and return when it answers."""
    from unionfs import daemon, preflight
    from unionfs.mountfile import MountFile, read_mount_file

    if log_level not in get_args(LogLevel):
        raise UsageError(f"--log-level {log_level}: use one of {', '.join(get_args(LogLevel))}")
    file = read_mount_file(config_file) if config_file is not None else MountFile()
    if not paths and not file.positionals:
        raise UsageError("give LOWER[:LOWER...] UPPER MOUNTPOINT, or LOWER[:LOWER...] MOUNTPOINT to read only")
    if paths and len(paths) == 1 and file.positionals:
        paths = [*file.positionals[:-1], *paths]
    privileged = os.geteuid() == 0
    config = parse_mount(
        paths or file.positionals,
        [*file.options, *(options or [])],
        work=work or file.work,
        allow_other_default=privileged or preflight.user_allow_other(),
        privileged=privileged,
        foreground=foreground,
        log_level=cast(LogLevel, log_level),
        log_file=log_file,
    )
    volumes = _volumes(
        context.obj,
        name or file.name,
        bind_mode or file.bind_mode or "auto",
        [*file.volumes, *_given_volumes(volume or [], mounts or [])],
        [*file.volumes_from, *(volumes_from or [])],
    )
    preflight.check(config)
    if foreground:
        daemon.serve(config, lambda: None, volumes)
    else:
        daemon.start(config, volumes)


def _given_volumes(short: Sequence[str], long: Sequence[str]) -> list[VolumeSpec]:
    from unionfs.volumespec import parse_mount_words, parse_volume

    return [*map(parse_volume, short), *map(parse_mount_words, long)]


def _volumes(
    store: str | None, name: str | None, bind_mode: str, specs: list[VolumeSpec], others: list[str]
) -> MountVolumes:
    """Put together what a mount's volumes are: its own, then those of --volumes-from at other targets."""
    from unionfs.volumespec import check_targets, merge_volumes, parse_name

    if bind_mode not in get_args(BindMode):
        raise UsageError(f"--bind-mode {bind_mode}: use one of {', '.join(get_args(BindMode))}")
    check_targets(specs)
    merged = tuple(specs)
    if others:
        from unionfs.volumes import Store

        opened = Store.open(store)
        for word in others:
            merged = merge_volumes(merged, opened.volumes_from(word))
    return MountVolumes(parse_name(name) if name is not None else None, merged, cast(BindMode, bind_mode), store)


@app.command(epilog=UMOUNT_EPILOG)
def umount(
    context: typer.Context,
    mountpoints: Annotated[list[str], typer.Argument(metavar="MOUNTPOINT|NAME...", show_default=False)],
    lazy: Annotated[bool, typer.Option("--lazy", "-l", help="Detach now; it ends when the last user lets go.")] = False,
    forget: Annotated[
        bool, typer.Option("--rm", help="Forget the mount's name and volumes too; unmounted ones as well.")
    ] = False,
    volumes: Annotated[bool, typer.Option("-v", "--volumes", help="With --rm: remove its anonymous volumes.")] = False,
) -> None:
    """Unmount a union and return when its daemon has ended.

    Its volumes go first. A busy one stays, and the message names who uses it. A
    dead one (its daemon was killed) is cleared. A mount with a name or volumes is
    remembered, for --volumes-from, until --rm.
    """
    from unionfs.unmount import unmount

    if volumes and not forget:
        raise UsageError("-v removes anonymous volumes together with the memory of the mount: use --rm -v")
    for word in mountpoints:
        said = unmount(word, lazy=lazy, forget=forget, anonymous=volumes, store=context.obj)
        if said:
            print(f"unionfs: {said}", file=sys.stderr)


@app.command()
def inspect(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="MOUNTPOINT|NAME...", show_default=False)],
) -> None:
    """Print all that is known of a mount, as a JSON list.

    Under Mounts stand its volumes, in Docker's words; BindMode says who serves
    them. A mount that is only remembered has the state "unmounted".
    """
    from unionfs.inspection import inspect_mount

    found: list[dict[str, Any]] = []
    error: UnionError | None = None
    for word in words:
        try:
            found.append(inspect_mount(word, context.obj))
        except UnionError as exc:
            error = error or exc
    print(json.dumps(found, indent=4))
    if error is not None:
        raise error


@app.command("ls")
def list_mounts(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, one object for each mount.")] = False,
) -> None:
    """List the unions that are mounted.

    The states: mounted; dead (the daemon was killed: unionfs umount clears it);
    stuck (it does not answer); elsewhere (in another mount namespace, or detached
    but in use); unknown (another user's or program's).
    """
    from unionfs import control

    entries = control.entries()
    if as_json:
        print(json.dumps([_as_object(entry) for entry in entries], indent=2))
        return
    if not entries:
        print("nothing is mounted")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("MOUNT POINT", "NAME", "STATE", "PID", "UPPER", "LOWERS", "VOLUMES"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        record = entry.record
        if record is None:
            row = [entry.mountpoint, "-", entry.state.value, *"----"]
        else:
            lowers = "\n".join([*record.lowers, *(f"::{path}" for path in record.data_lowers)])
            volumes = "\n".join(str(volume["Destination"]) for volume in record.volumes)
            row = [entry.mountpoint, record.name or "-", entry.state.value, str(record.pid)]
            row += [record.upper or "(read-only)", lowers, volumes or "-"]
        table.add_row(*map(_printable, row))
    _console().print(table)


def _as_object(entry: Any) -> dict[str, Any]:
    fields = asdict(entry.record) if entry.record is not None else {}
    return {"mountpoint": entry.mountpoint, "state": entry.state.value} | {
        name: value for name, value in fields.items() if name not in ("mountpoint", "start", "pidns")
    }


def _printable(text: str) -> Any:
    """Return text for rich: markup is off, undecodable bytes are shown as escapes."""
    from rich.text import Text

    return Text(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _console() -> Any:
    from rich.console import Console

    # Into a pipe or file a long line is better than a folded one.
    return Console() if sys.stdout.isatty() else Console(width=10_000)


@app.command()
def doctor(
    directory: Annotated[
        str, typer.Argument(metavar="[DIRECTORY]", help="Where an upper shall lie.", show_default=False)
    ] = ".",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, one object for each check.")] = False,
) -> None:
    """Check this machine and a directory's file system.

    Each line says good, or what to do. Exit status 5 if mounting can't work.
    """
    from unionfs.doctor import Verdict, examine

    findings = examine(directory)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        from rich.text import Text

        styles = {Verdict.GOOD: "green", Verdict.LIMITED: "yellow", Verdict.BAD: "bold red"}
        console = _console()
        for finding in findings:
            line = Text(f"{finding.verdict.value:8}", style=styles[finding.verdict])
            line.append(f"{finding.subject}: ", style="bold").append(_printable(finding.text))
            console.print(line)
    if any(finding.verdict is Verdict.BAD for finding in findings):
        raise typer.Exit(5)
