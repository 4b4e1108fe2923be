"""The README and the help pages have every option and every exit status that the programs have, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from tests.support.readme import quoted, section, tables
from unionfs import errors
from unionfs.commands import podman_cli
from unionfs.commands.cli import root
from unionfs.commands.mount_cli import BLOCKS, mount
from unionfs.commands.volume_cli import volume
from unionfs.config import is_known, known_options

COMMAND_LINE = section("Command line")
MOUNT = COMMAND_LINE.partition("### `unionfs mount")[2].partition("\n### ")[0]


def first_column(table: list[list[str]]) -> list[str]:
    """What stands between backticks in the first column."""
    return [word for row in table for word in quoted(row[0])]


def names(words: list[str]) -> set[str]:
    """The names of `-o` options, without their values."""
    return {re.match(r"[\w-]+\+?", word)[0] for word in words}  # type: ignore[index]


def options(of: click.Command) -> Iterator[list[str]]:
    """The spellings of each option of a command."""
    for parameter in of.params:
        if isinstance(parameter, click.Option) and "--help" not in parameter.opts:
            yield parameter.opts


def test_options_of_mount() -> None:
    written = {word.split()[0] for word in first_column(tables(MOUNT)[0])}
    assert written == {name for spellings in options(mount) for name in spellings}


def test_mount_options() -> None:
    written = names([word for table in tables(MOUNT)[1:] for word in first_column(table)])
    assert written - {"x-"} == set(known_options())
    assert is_known("x-anything")


def test_mount_options_in_help() -> None:
    """But those that are accepted without effect."""
    lines = [line for title, block in BLOCKS if title.startswith("Options of -o") for line in block]
    text = " ".join(line if isinstance(line, str) else " ".join(line) for line in lines)
    shown = names(first_column([*tables(MOUNT)[1], *tables(MOUNT)[3]]))
    assert {name for name in shown if not re.search(rf"(?<![\w-]){re.escape(name)}(?!\w)", text)} == {
        "nfs_export",
        "verity",
    }


def test_other_commands() -> None:
    """Each of their options is named where the command is, in one of its spellings."""
    for name, each in root.commands.items():
        if each not in (mount, volume):
            text = COMMAND_LINE.partition(f"### `unionfs {name}")[2].partition("\n### ")[0]
            for spellings in options(each):
                assert any(re.search(rf"{one}\b", text) for one in spellings), (name, spellings)
    for spellings in options(root):
        assert f"`unionfs {spellings[0]}" in COMMAND_LINE


def test_volume_commands() -> None:
    (table,) = [table for table in tables(section("Volumes")) if "volume create" in table[0][0]]
    written: dict[str, str] = {}
    for usage in first_column(table):
        name = usage.split()[1]
        written[name] = written.get(name, "") + usage
    commands = {name: each for name, each in volume.commands.items() if not each.hidden}  # without Docker's other names
    assert set(written) == set(commands)
    for name, each in commands.items():
        for spellings in options(each):
            assert any(f"{one} " in written[name] or f"{one}]" in written[name] for one in spellings), (name, spellings)


def test_options_of_the_mount_program() -> None:
    table = tables(section("podman"))[0]
    written = names([word for word in first_column(table) if word != "..."])
    assert written >= podman_cli._TUNING | {"fsync", "context"}
    assert all(is_known(name) for name in written - podman_cli._TUNING - {"fsync", "context"})
    assert set(podman_cli._UNSUPPORTED) <= {word.partition("=")[0] for word in quoted(section("podman"))}


def test_exit_statuses() -> None:
    (table,) = tables(COMMAND_LINE.partition("### Exit status")[2])
    assert {int(status): meaning for status, meaning in table} == errors.EXIT_CODES
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.UnionError)]
    assert {0, *(each.exit_code for each in classes)} == set(errors.EXIT_CODES)
