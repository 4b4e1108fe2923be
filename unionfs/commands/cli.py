"""The command line: what the arguments mean and what is printed; the work is done by the modules below.

A command's start must be short, for `mount` above all: modules are imported by the command that needs them,
pyfuse3 and trio by the daemon only, rich by what draws with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

import unionfs
from unionfs.commands import clihelp
from unionfs.commands.clihelp import CONTEXT, Argument, Group, directories, exit_status
from unionfs.errors import UnionError, UsageError, one_line

if TYPE_CHECKING:
    from unionfs.host.control import Entry


def run() -> int:
    """Run the program's command line and return its exit status; raises UnionError and KeyboardInterrupt."""
    return clihelp.run(root, "unionfs")


def is_command(word: str) -> bool:
    """Whether a word is the name of a command."""
    return word in (*root.commands, *_OF_OTHER_MODULES)


# `mount` and `volume` have modules of their own, which only they load.
_OF_OTHER_MODULES = ("mount", "volume")


class _Root(Group):
    """The main command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["mount", *super().list_commands(ctx), "volume"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "mount":
            from unionfs.commands.mount_cli import mount

            return mount
        if cmd_name == "volume":
            from unionfs.commands.volume_cli import volume

            return volume
        return super().get_command(ctx, cmd_name)


def _version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from unionfs.commands.doctor import versions

        print(f"unionfs {unionfs.__version__} ({versions()})")
        ctx.exit()


@click.group(
    cls=_Root,
    context_settings=CONTEXT,
    blocks=[
        (
            "Examples",
            [
                "unionfs mount /srv/base /srv/changes /mnt",
                "unionfs ls",
                "unionfs umount /mnt",
                "unionfs doctor /srv",
            ],
        ),
        exit_status(),
    ],
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show versions and end."
)
@click.option(
    "--root",
    "store",
    metavar="DIR",
    shell_complete=directories,
    help="Where volumes and the memory of mounts lie. Default: /var/lib/unionfs, or the user's data directory.",
)
@click.pass_context
def root(ctx: click.Context, store: str | None) -> None:
    """Lay directories over one another, see them as one, and keep changes apart.

    What is changed in the merged directory goes to the upper one; the lower ones
    stay as they are. Semantics and on-disk format are overlayfs's own, served
    from user space, for root and ordinary users.
    """
    ctx.obj = store


@root.command(
    blocks=[
        ("Examples", ["unionfs umount /mnt", "unionfs umount --lazy /mnt", "unionfs umount --rm -v web"]),
        exit_status(),
    ]
)
@click.argument(
    "mountpoints", cls=Argument, nargs=-1, required=True, metavar="MOUNTPOINT|NAME...", shell_complete=directories
)
@click.option("-l", "--lazy", is_flag=True, help="Detach now; it ends when the last user lets go.")
@click.option("--rm", "forget", is_flag=True, help="Forget the mount's name and volumes too; unmounted ones as well.")
@click.option("-v", "--volumes", is_flag=True, help="With --rm: remove its anonymous volumes.")
@click.pass_obj
def umount(store: str | None, mountpoints: Sequence[str], lazy: bool, forget: bool, volumes: bool) -> None:
    """Unmount a union and return when its daemon has ended.

    Its volumes go first. A busy one stays, and the message names who uses it. A
    dead one (its daemon was killed) is cleared. A mount with a name or volumes is
    remembered, for --volumes-from, until --rm.
    """
    from unionfs.service.unmount import unmount

    if volumes and not forget:
        raise UsageError("-v removes anonymous volumes together with the memory of the mount: use --rm -v")
    for word in mountpoints:
        said = unmount(word, lazy=lazy, forget=forget, anonymous=volumes, store=store)
        if said:
            print(f"unionfs: {one_line(said)}", file=sys.stderr)


@root.command()
@click.argument(
    "words", cls=Argument, nargs=-1, required=True, metavar="MOUNTPOINT|NAME...", shell_complete=directories
)
@click.pass_obj
def inspect(store: str | None, words: Sequence[str]) -> None:
    """Print all that is known of a mount, as a JSON list.

    Under Mounts stand its volumes, in Docker's words; BindMode says who serves
    them. A mount that is only remembered has the state "unmounted".
    """
    from unionfs.service.inspection import inspect_mount

    found: list[dict[str, Any]] = []
    error: UnionError | None = None
    for word in words:
        try:
            found.append(inspect_mount(word, store))
        except UnionError as exc:
            error = error or exc
    print(json.dumps(found, indent=4))
    if error is not None:
        raise error


@root.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, one object for each mount.")
def list_mounts(as_json: bool) -> None:
    """List the unions that are mounted.

    The states: mounted; dead (the daemon was killed: unionfs umount clears it);
    stuck (it does not answer); elsewhere (in another mount namespace, or detached
    but in use); unknown (another user's or program's).
    """
    from unionfs.host import control

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
            row = [one_line(entry.mountpoint), "-", entry.state.value, *"----"]
        else:
            lowers = "\n".join(map(one_line, [*record.lowers, *(f"::{path}" for path in record.data_lowers)]))
            volumes = "\n".join(one_line(str(volume["Destination"])) for volume in record.volumes)
            row = [entry.mountpoint, record.name or "-", entry.state.value, str(record.pid)]
            row += [record.upper or "(read-only)"]
            row = [*map(one_line, row), lowers, volumes or "-"]
        table.add_row(*map(_printable, row))
    _console().print(table)


def _as_object(entry: Entry) -> dict[str, Any]:
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


@root.command()
@click.argument(
    "directory",
    cls=Argument,
    default=".",
    metavar="[DIRECTORY]",
    shell_complete=directories,
    explain="Where an upper shall lie.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, one object for each check.")
@click.pass_context
def doctor(ctx: click.Context, directory: str, as_json: bool) -> None:
    """Check this machine and a directory's file system.

    Each line says good, or what to do. Exit status 5 if mounting can't work.
    """
    from unionfs.commands.doctor import Verdict, examine

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
        ctx.exit(5)
