"""`unionfs volume ...`: what the arguments mean and what is printed, word for word as Docker's.

The work is done by the modules below; the root command's `ctx.obj` is what `--root` says.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unionfs.errors import EXIT_CODES, UnionError, UsageError, VolumeError, one_line
from unionfs.volumemodel import DRIVER, Volume, parse_options

if TYPE_CHECKING:
    from unionfs.volumes import Store

volume_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Manage volumes: named directories that outlive mounts.",
)


def _epilog(*examples: str) -> str:
    status = [f"{code}  {EXIT_CODES[code]}" for code in (0, 2, 4, 7)]
    blocks = (("Examples", examples), ("Exit status", status))
    return "\n\n".join(
        "\n".join([f"[bold]{title}[/bold]", *(f"  {line}" for line in lines)]) for title, lines in blocks
    )


def _store(ctx: typer.Context) -> Store:
    from unionfs.volumes import Store

    return Store.open(ctx.find_root().obj)


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

Filters = Annotated[list[str] | None, typer.Option("--filter", metavar="KEY=VALUE", help="Repeatable, see above.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", show_default=False)]


@volume_app.command(
    epilog=_epilog(
        "unionfs volume create web",
        "unionfs volume create --label app=shop --label tier=db shop-db",
        "unionfs volume create -o type=none,device=/srv/data,o=bind data",
    )
)
def create(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="NAME", show_default=False)] = None,
    labels: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY[=VALUE]", help="Repeatable.", show_default=False)
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            "--opt",
            metavar="KEY=VALUE[,...]",
            help="type=none, o=bind (or ro), device=DIR: the content lies in DIR. Repeatable.",
            show_default=False,
        ),
    ] = None,
    driver: Annotated[str, typer.Option("--driver", "-d", metavar="NAME")] = DRIVER,
) -> None:
    """Make a volume and print its name.

    Without NAME it is anonymous, with a name of 64 hexadecimal digits. One that
    exists already is left as it is.
    """
    if driver != DRIVER:
        raise UsageError(f"--driver {driver}: there is only {DRIVER}")
    asked = {key: value for key, _, value in (word.partition("=") for word in labels or [])}
    if "" in asked:
        raise UsageError("--label: write KEY=VALUE")
    print(_store(ctx).create(name, labels=asked, options=parse_options(options or [])).name)


@volume_app.command(
    "ls",
    epilog=_epilog(
        "unionfs volume ls --filter dangling=true",
        "unionfs volume ls --filter label=app=shop -q",
        "unionfs volume ls --filter name=web --filter driver=local",
    ),
)
def list_volumes(
    ctx: typer.Context,
    filters: Filters = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names only.")] = False,
    form: Annotated[
        str, typer.Option("--format", metavar="table|json", help="json: one object on each line.")
    ] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, as inspect does.")] = False,
) -> None:
    """List volumes.

    Filters: dangling=true|false (no mount refers to it), driver=NAME,
    label=KEY[=VALUE], name=PART.
    """
    if form not in ("table", "json"):
        raise UsageError(f"--format {form}: use table or json (for single fields: --json and jq)")
    asked = _split_filters(filters or [], ("dangling", "driver", "label", "name"))
    dangling = {_truth("dangling", value) for value in asked.get("dangling", [])}
    only = dangling.pop() if len(dangling) == 1 else None
    volumes = list(filter(_wanted(asked), _store(ctx).volumes(dangling=only)))
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


@volume_app.command(epilog=_epilog("unionfs volume inspect web", "unionfs volume inspect web | jq -r '.[].Mountpoint'"))
def inspect(
    ctx: typer.Context,
    names: Names,
    form: Annotated[str | None, typer.Option("--format", "-f", metavar="json", help="One object on each line.")] = None,
) -> None:
    """Print what is known of volumes, as JSON."""
    if form not in (None, "json"):
        raise UsageError(f"--format {form}: use json (for single fields: jq)")
    store = _store(ctx)
    found: list[dict[str, Any]] = []
    try:
        _each(names, lambda name: found.append(store.find(name).as_docker()))
    finally:
        if form is None:
            _print_json(found)
        else:
            for one in found:
                print(json.dumps(one, separators=(",", ":")))


@volume_app.command("rm", epilog=_epilog("unionfs volume rm web", "unionfs volume rm -f web old"))
def remove(
    ctx: typer.Context,
    names: Names,
    force: Annotated[bool, typer.Option("--force", "-f", help="A volume that doesn't exist is no error.")] = False,
) -> None:
    """Remove volumes that no mount uses.

    A remembered mount that isn't running is no hindrance. What lies in a
    device=DIR stays.
    """
    store = _store(ctx)

    def do(name: str) -> None:
        if not force or store.exists(name):
            store.remove(name)
        print(name)

    _each(names, do)


@volume_app.command(
    epilog=_epilog(
        "unionfs volume prune",
        "unionfs volume prune --all --force",
        "unionfs volume prune --filter label=temporary --filter label!=keep",
    )
)
def prune(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Named volumes too.")] = False,
    filters: Filters = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Don't ask.")] = False,
) -> None:
    """Remove anonymous volumes that no mount uses or remembers.

    Filters: label=KEY[=VALUE], label!=KEY[=VALUE], all=true.
    """
    asked = _split_filters(filters or [], ("label", "label!", "all"))
    everything = everything or True in {_truth("all", value) for value in asked.get("all", [])}
    if not force and not _confirmed("all" if everything else "anonymous"):
        return
    fits = _wanted(asked)
    names, freed, errors = _store(ctx).prune(lambda volume: (everything or volume.anonymous) and fits(volume))
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


@volume_app.command(epilog=_epilog("unionfs volume rename web web-old"))
def rename(
    ctx: typer.Context,
    old: Annotated[str, typer.Argument(metavar="OLD", show_default=False)],
    new: Annotated[str, typer.Argument(metavar="NEW", show_default=False)],
) -> None:
    """Give a volume that no mount uses another name.

    Mounts that are remembered find it under the new one.
    """
    _store(ctx).rename(old, new)


@volume_app.command(epilog=_epilog("unionfs volume clone web web-test"))
def clone(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
) -> None:
    """Make a volume NAME with the content and labels of SOURCE.

    It appears when it is complete. Where the file system can, the data is shared
    until one of the two changes it.
    """
    from unionfs import tarwrite
    from unionfs.copytree import copy_tree
    from unionfs.tarformat import Root

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
        _store(ctx).clone(source, name, copy)
    except OSError as exc:
        where = os.fsdecode(exc.filename) if exc.filename is not None else source
        raise VolumeError(f"volume {source} could not be copied: {where}: {exc.strerror}") from exc
    print(name)


# Docker's other names for two of them.
volume_app.command("list", hidden=True)(list_volumes)
volume_app.command("remove", hidden=True)(remove)


# --- backup and restore ---------------------------------------------------------------------------

Words = Annotated[list[str], typer.Argument(metavar="[NAME] FILE|-", show_default=False)]
VolumesFrom = Annotated[
    str | None,
    typer.Option("--volumes-from", metavar="MOUNT", help="All volumes of a mount, by its name or mount point."),
]


@volume_app.command(
    epilog=_epilog(
        "unionfs volume backup web web.tar.zst",
        "unionfs volume backup web - | ssh host unionfs volume restore web -",
        "unionfs volume backup --volumes-from shop shop.tar.gz",
    )
)
def backup(ctx: typer.Context, words: Words, volumes_from: VolumesFrom = None) -> None:
    """Write the content of a volume into a tar archive.

    Compressed by the ending of FILE: .tar, .tar.gz, .tar.zst. With --volumes-from
    each volume lies under its path in the union. FILE appears when it is
    complete.
    """
    from unionfs import archive

    store = _store(ctx)
    parts, file = _parts(store, words, volumes_from)
    with store.reading([name for _, name in parts]) as volumes, _progress("backup") as told:
        roots = [archive.Root(prefix, volume.path) for (prefix, _), volume in zip(parts, volumes, strict=True)]
        if file != "-":
            archive.backup_file(roots, file, progress=told, warn=_warn)
        elif sys.stdout.isatty():
            raise UsageError("an archive is not for the terminal: give a file, or a pipe")
        else:
            archive.backup(roots, sys.stdout.buffer, progress=told, warn=_warn)


@volume_app.command(
    epilog=_epilog(
        "unionfs volume restore web web.tar.zst",
        "unionfs volume restore --force web web.tar.zst",
        "unionfs volume restore --volumes-from shop shop.tar.gz",
    )
)
def restore(
    ctx: typer.Context,
    words: Words,
    volumes_from: VolumesFrom = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the content of one that isn't empty.")] = False,
) -> None:
    """Make the content of a tar archive that of a volume.

    The volume is made where missing, and must not be in use. If anything fails,
    the old content stays.
    """
    from unionfs import archive

    store = _store(ctx)
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
