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
from unionfs.errors import EXIT_CODES, UsageError

app = typer.Typer(
    name="unionfs",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
UMOUNT_EPILOG = _epilog(("Examples", ["unionfs umount /mnt", "unionfs umount --lazy /mnt"]))


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
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and end.")
    ] = False,
) -> None:
    """Lay directories over one another, see them as one, and keep changes apart.

    What is changed in the merged directory goes to the upper one; the lower ones
    stay as they are. Semantics and on-disk format are overlayfs's own, served
    from user space, for root and ordinary users.
    """


@app.command(epilog=MOUNT_EPILOG)
def mount(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="LOWER[:LOWER...] [UPPER] MOUNTPOINT",
            help="The leftmost lower is on top. A colon in a name is written \\:, and ::LOWER is a data-only "
            "layer. Without UPPER the union is read-only.",
            show_default=False,
        ),
    ],
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

    if log_level not in get_args(LogLevel):
        raise UsageError(f"--log-level {log_level}: use one of {', '.join(get_args(LogLevel))}")
    privileged = os.geteuid() == 0
    config = parse_mount(
        paths,
        options or [],
        work=work,
        allow_other_default=privileged or preflight.user_allow_other(),
        privileged=privileged,
        foreground=foreground,
        log_level=cast(LogLevel, log_level),
        log_file=log_file,
    )
    preflight.check(config)
    if foreground:
        daemon.serve(config, lambda: None)
    else:
        daemon.start(config)


@app.command(epilog=UMOUNT_EPILOG)
def umount(
    mountpoints: Annotated[list[str], typer.Argument(metavar="MOUNTPOINT...", show_default=False)],
    lazy: Annotated[bool, typer.Option("--lazy", "-l", help="Detach now; it ends when the last user lets go.")] = False,
) -> None:
    """Unmount a union and return when its daemon has ended.

    A busy one stays, and the message names who uses it. A dead one (its daemon
    was killed) is cleared.
    """
    from unionfs.unmount import unmount

    for mountpoint in [os.path.abspath(path) if path else path for path in mountpoints]:
        said = unmount(mountpoint, lazy=lazy)
        if said:
            print(f"unionfs: {said}", file=sys.stderr)


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
    for name in ("MOUNT POINT", "STATE", "PID", "UPPER", "LOWERS"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        record = entry.record
        row = [entry.mountpoint, entry.state.value]
        if record is None:
            row += ["-", "-", "-"]
        else:
            lowers = "\n".join([*record.lowers, *(f"::{path}" for path in record.data_lowers)])
            row += [str(record.pid), record.upper or "(read-only)", lowers]
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
