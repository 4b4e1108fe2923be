"""`unionfs volume ...`: what the arguments mean and what is printed, word for word as Docker's.

The work is done by the modules below; the root command's object is what `--root` says.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from unionfs.commands.clihelp import Argument, Block, Group, directories, exit_status, files
from unionfs.errors import UnionError, UsageError, VolumeError, one_line
from unionfs.store.volumemodel import DRIVER, Volume, parse_options

if TYPE_CHECKING:
    from unionfs.store.volumes import Store


def _blocks(*examples: str) -> list[Block]:
    return [("Examples", examples), exit_status((0, 2, 4, 7))]


@click.group(cls=Group)
def volume() -> None:
    """Manage volumes: named directories that outlive mounts."""


def _store(root: str | None) -> Store:
    from unionfs.store.volumes import Store

    return Store.open(root)


def _each(names: Sequence[str], do: Callable[[str], None]) -> None:
    """Do something to each of `names`; all errors are told, the last one by raising it."""
    errors: list[UnionError] = []
    for name in names:
        try:
            do(name)
        except UnionError as error:
            errors.append(error)
    _tell(errors)


def _tell(errors: Sequence[UnionError]) -> None:
    """Print all errors but the last one, which is raised."""
    for error in errors[:-1]:
        _warn(str(error))
    if errors:
        raise errors[-1]


# --- filters --------------------------------------------------------------------------------------

Wanted = Callable[[Volume], bool]


def _split_filters(words: Sequence[str], known: Sequence[str]) -> dict[str, list[str]]:
    """Read `--filter KEY=VALUE` words: key → values; a key that ends in `!` is the negation.

    Raises UsageError.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise UsageError(f"--filter {word}: use {', '.join(f'{name}=' for name in known)}")
        found.setdefault(key, []).append(value)
    return found


def _truth(key: str, value: str) -> bool:
    if value.lower() in ("1", "true"):
        return True
    if value.lower() in ("0", "false"):
        return False
    raise UsageError(f"--filter {key}={value}: use true or false")


def _has_label(volume: Volume, label: str) -> bool:
    key, equals, value = label.partition("=")
    return key in volume.labels and (not equals or volume.labels[key] == value)


def _matches(name: str, pattern: str) -> bool:
    """Whether the name has the pattern in it, a regular expression as Docker takes it."""
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return pattern in name


def _wanted(filters: dict[str, list[str]]) -> Wanted:
    """All `label` filters must fit, none of `label!`, and one of each other kind."""
    names, drivers = filters.get("name", []), filters.get("driver", [])

    def fits(volume: Volume) -> bool:
        return (
            all(_has_label(volume, label) for label in filters.get("label", []))
            and not any(_has_label(volume, label) for label in filters.get("label!", []))
            and (not names or any(_matches(volume.name, pattern) for pattern in names))
            and (not drivers or DRIVER in drivers)
        )

    return fits


# --- commands -------------------------------------------------------------------------------------

filters_option = click.option("--filter", "filters", metavar="KEY=VALUE", multiple=True, help="Repeatable, see above.")
names_argument = click.argument("names", cls=Argument, nargs=-1, required=True, metavar="NAME...")


@volume.command(
    blocks=_blocks(
        "unionfs volume create web",
        "unionfs volume create --label app=shop --label tier=db shop-db",
        "unionfs volume create -o type=none,device=/srv/data,o=bind data",
    )
)
@click.argument("name", cls=Argument, required=False, metavar="[NAME]")
@click.option("--label", "labels", metavar="KEY[=VALUE]", multiple=True, help="Repeatable.")
@click.option(
    "-o",
    "--opt",
    "options",
    metavar="KEY=VALUE[,...]",
    multiple=True,
    help="type=none, o=bind (or ro), device=DIR: the content lies in DIR. Repeatable.",
)
@click.option("-d", "--driver", metavar="NAME", default=DRIVER, show_default=True)
@click.pass_obj
def create(root: str | None, name: str | None, labels: Sequence[str], options: Sequence[str], driver: str) -> None:
    """Make a volume and print its name.

    Without NAME it is anonymous, with a name of 64 hexadecimal digits. One that
    exists already is left as it is.
    """
    if driver != DRIVER:
        raise UsageError(f"--driver {driver}: there is only {DRIVER}")
    asked = {key: value for key, _, value in (word.partition("=") for word in labels)}
    if "" in asked:
        raise UsageError("--label: write KEY=VALUE")
    print(_store(root).create(name, labels=asked, options=parse_options(options)).name)


@volume.command(
    "ls",
    blocks=_blocks(
        "unionfs volume ls --filter dangling=true",
        "unionfs volume ls --filter label=app=shop -q",
        "unionfs volume ls --filter name=web --filter driver=local",
    ),
)
@filters_option
@click.option("-q", "--quiet", is_flag=True, help="Names only.")
@click.option(
    "--format",
    "form",
    metavar="table|json",
    default="table",
    show_default=True,
    help="json: one object on each line.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, as inspect does.")
@click.pass_obj
def list_volumes(root: str | None, filters: Sequence[str], quiet: bool, form: str, as_json: bool) -> None:
    """List volumes.

    Filters: dangling=true|false (no mount refers to it), driver=NAME,
    label=KEY[=VALUE], name=PART.
    """
    if form not in ("table", "json"):
        raise UsageError(f"--format {form}: use table or json (for single fields: --json and jq)")
    asked = _split_filters(filters, ("dangling", "driver", "label", "name"))
    dangling = {_truth("dangling", value) for value in asked.get("dangling", [])}
    only = dangling.pop() if len(dangling) == 1 else None
    volumes = list(filter(_wanted(asked), _store(root).volumes(dangling=only)))
    if quiet:
        for volume in volumes:
            print(volume.name)
    elif as_json:
        _print_json([volume.as_docker() for volume in volumes])
    elif form == "json":
        for volume in volumes:
            print(json.dumps(_as_line(volume), separators=(",", ":")))
    else:
        _print_table(volumes)


def _as_line(volume: Volume) -> dict[str, str]:
    """Return the object that `docker volume ls --format json` prints."""
    return {
        "Availability": "N/A",
        "Driver": DRIVER,
        "Group": "N/A",
        "Labels": ",".join(f"{key}={value}" for key, value in sorted(volume.labels.items())),
        "Links": "N/A",
        "Mountpoint": volume.mountpoint,
        "Name": volume.name,
        "Scope": "local",
        "Size": "N/A",
        "Status": "N/A",
    }


def _print_table(volumes: Sequence[Volume]) -> None:
    if not sys.stdout.isatty():  # no spaces at the ends of lines
        for driver, name in [("DRIVER", "VOLUME NAME"), *((DRIVER, volume.name) for volume in volumes)]:
            print(f"{driver:10}{name}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("DRIVER", "VOLUME NAME", box=None, pad_edge=False, padding=(0, 4, 0, 0))
    for volume in volumes:
        table.add_row(DRIVER, volume.name)  # a name has no markup in it
    Console().print(table)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=4) + "\n")


@volume.command(blocks=_blocks("unionfs volume inspect web", "unionfs volume inspect web | jq -r '.[].Mountpoint'"))
@names_argument
@click.option("-f", "--format", "form", metavar="json", help="One object on each line.")
@click.pass_obj
def inspect(root: str | None, names: Sequence[str], form: str | None) -> None:
    """Print what is known of volumes, as JSON."""
    if form not in (None, "json"):
        raise UsageError(f"--format {form}: use json (for single fields: jq)")
    store = _store(root)
    found: list[dict[str, Any]] = []
    try:
        _each(names, lambda name: found.append(store.find(name).as_docker()))
    finally:
        if form is None:
            _print_json(found)
        else:
            for one in found:
                print(json.dumps(one, separators=(",", ":")))


@volume.command("rm", blocks=_blocks("unionfs volume rm web", "unionfs volume rm -f web old"))
@names_argument
@click.option("-f", "--force", is_flag=True, help="A volume that doesn't exist is no error.")
@click.pass_obj
def remove(root: str | None, names: Sequence[str], force: bool) -> None:
    """Remove volumes that no mount uses.

    A remembered mount that isn't running is no hindrance. What lies in a
    device=DIR stays.
    """
    store = _store(root)

    def do(name: str) -> None:
        if not force or store.exists(name):
            store.remove(name)
        print(name)

    _each(names, do)


@volume.command(
    blocks=_blocks(
        "unionfs volume prune",
        "unionfs volume prune --all --force",
        "unionfs volume prune --filter label=temporary --filter label!=keep",
    )
)
@click.option("-a", "--all", "everything", is_flag=True, help="Named volumes too.")
@filters_option
@click.option("-f", "--force", is_flag=True, help="Don't ask.")
@click.pass_obj
def prune(root: str | None, everything: bool, filters: Sequence[str], force: bool) -> None:
    """Remove anonymous volumes that no mount uses or remembers.

    Filters: label=KEY[=VALUE], label!=KEY[=VALUE], all=true.
    """
    asked = _split_filters(filters, ("label", "label!", "all"))
    everything = everything or True in {_truth("all", value) for value in asked.get("all", [])}
    if not force and not _confirmed("all" if everything else "anonymous"):
        return
    fits = _wanted(asked)
    names, freed, errors = _store(root).prune(lambda volume: (everything or volume.anonymous) and fits(volume))
    if names:
        print("Deleted Volumes:", *names, "", sep="\n")
    print(f"Total reclaimed space: {_human(freed)}")
    _tell(errors)


def _confirmed(which: str) -> bool:
    """Ask whether volumes shall be removed.

    Raises UsageError where there is nobody to ask.
    """
    if not sys.stdin.isatty():
        raise UsageError("prune asks before it removes, and this is no terminal: use --force")
    print(f"WARNING! This will remove {which} local volumes not used by at least one mount.")
    try:
        return input("Are you sure you want to continue? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _human(size: float) -> str:
    """Return a size in bytes as Docker writes it: four digits, decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.4g}{unit}"
        size /= 1000
    return f"{size:.4g}PB"


@volume.command(blocks=_blocks("unionfs volume rename web web-old"))
@click.argument("old", cls=Argument, metavar="OLD")
@click.argument("new", cls=Argument, metavar="NEW")
@click.pass_obj
def rename(root: str | None, old: str, new: str) -> None:
    """Give a volume that no mount uses another name.

    Mounts that are remembered find it under the new one.
    """
    _store(root).rename(old, new)


@volume.command(blocks=_blocks("unionfs volume clone web web-test"))
@click.argument("source", cls=Argument, metavar="SOURCE")
@click.argument("name", cls=Argument, metavar="NAME")
@click.pass_obj
def clone(root: str | None, source: str, name: str) -> None:
    """Make a volume NAME with the content and labels of SOURCE.

    It appears when it is complete. Where the file system can, the data is shared
    until one of the two changes it.
    """
    from unionfs.archives import tarwrite
    from unionfs.archives.copytree import copy_tree
    from unionfs.archives.tarformat import Root

    def copy(origin: str, target: str) -> None:
        with _progress("cloning") as told:
            if told is None:
                copy_tree(origin, target)
                return
            done, total = 0, tarwrite.content_bytes([Root("", origin)])

            def count(more: int) -> None:
                nonlocal done
                done += more
                told(done, total)

            copy_tree(origin, target, progress=count)

    try:
        _store(root).clone(source, name, copy)
    except OSError as exc:
        where = os.fsdecode(exc.filename) if exc.filename is not None else source
        raise VolumeError(f"volume {source} could not be copied: {where}: {exc.strerror}") from exc
    print(name)


def _add_alias(name: str, command: click.Command) -> None:
    """Let a command have another name, which the help doesn't show."""
    alias = copy.copy(command)
    alias.hidden = True
    volume.add_command(alias, name)


# Docker's other names for two of them.
_add_alias("list", list_volumes)
_add_alias("remove", remove)


# --- backup and restore ---------------------------------------------------------------------------

words_argument = click.argument(
    "words", cls=Argument, nargs=-1, required=True, metavar="[NAME] FILE|-", shell_complete=files
)
volumes_from_option = click.option(
    "--volumes-from",
    metavar="MOUNT",
    shell_complete=directories,
    help="All volumes of a mount, by its name or mount point.",
)


@volume.command(
    blocks=_blocks(
        "unionfs volume backup web web.tar.zst",
        "unionfs volume backup web - | ssh host unionfs volume restore web -",
        "unionfs volume backup --volumes-from shop shop.tar.gz",
    )
)
@words_argument
@volumes_from_option
@click.pass_obj
def backup(root: str | None, words: Sequence[str], volumes_from: str | None) -> None:
    """Write the content of a volume into a tar archive.

    Compressed by the ending of FILE: .tar, .tar.gz, .tar.zst. With --volumes-from
    each volume lies under its path in the union. FILE appears when it is
    complete.
    """
    from unionfs.archives import archive

    store = _store(root)
    parts, file = _parts(store, words, volumes_from)
    with store.reading([name for _, name in parts]) as volumes, _progress("backup") as told:
        roots = [archive.Root(prefix, volume.path) for (prefix, _), volume in zip(parts, volumes, strict=True)]
        if file != "-":
            archive.backup_file(roots, file, progress=told, warn=_warn)
        elif sys.stdout.isatty():
            raise UsageError("an archive is not for the terminal: give a file, or a pipe")
        else:
            archive.backup(roots, sys.stdout.buffer, progress=told, warn=_warn)


@volume.command(
    blocks=_blocks(
        "unionfs volume restore web web.tar.zst",
        "unionfs volume restore --force web web.tar.zst",
        "unionfs volume restore --volumes-from shop shop.tar.gz",
    )
)
@words_argument
@volumes_from_option
@click.option("-f", "--force", is_flag=True, help="Replace the content of one that isn't empty.")
@click.pass_obj
def restore(root: str | None, words: Sequence[str], volumes_from: str | None, force: bool) -> None:
    """Make the content of a tar archive that of a volume.

    The volume is made where missing, and must not be in use. If anything fails,
    the old content stays.
    """
    from unionfs.archives import archive

    store = _store(root)
    parts, file = _parts(store, words, volumes_from)
    if file == "-" and sys.stdin.isatty():
        raise UsageError("an archive can't be typed: give a file, or a pipe")
    with store.replacing([name for _, name in parts], force=force) as paths, _progress("restore") as told:
        roots = [archive.Root(prefix, path) for (prefix, _), path in zip(parts, paths, strict=True)]
        if file == "-":
            archive.restore(sys.stdin.buffer, roots, progress=told, warn=_warn)
        else:
            archive.restore_file(file, roots, progress=told, warn=_warn)


def _parts(store: Store, words: Sequence[str], mount: str | None) -> tuple[list[tuple[str, str]], str]:
    """Return (path in the archive, volume's name) of all that is meant, and the archive's file.

    Raises UsageError; VolumeError for an unknown mount or one without volumes.
    """
    if mount is None:
        if len(words) != 2:
            raise UsageError("give the NAME of a volume and a FILE, or --volumes-from MOUNT and a FILE ('-': a pipe)")
        return [("", words[0])], words[1]
    if len(words) != 1:
        raise UsageError("with --volumes-from give only a FILE ('-': a pipe)")
    found = store.find_mount(mount)
    parts: dict[str, str] = {}
    for spec in found.specs:
        if spec.kind == "bind":
            _warn(f"{spec.source} at {spec.target} is no volume: left out")
        elif not spec.source:
            raise VolumeError(f"the anonymous volume of {found} at {spec.target} was removed: mount it once more")
        elif spec.source in parts:
            raise VolumeError(f"volume {spec.source} is mounted twice in {found}: name it instead of --volumes-from")
        else:
            parts[spec.source] = spec.target.lstrip("/")
    if not parts:
        raise VolumeError(f"{found} has no volumes")
    return [(target, name) for name, target in parts.items()], words[0]


def _warn(line: str) -> None:
    print(f"unionfs: {one_line(line)}", file=sys.stderr)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """Draw a bar with bytes and time left while somebody looks at standard error; else yield None."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
