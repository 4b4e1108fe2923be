"""`--help` of every command, at every width and into a pipe, and completion in the shell."""

from __future__ import annotations

import re

import pytest

from tests.support.cli import unionfs

COMMANDS = ["mount", "umount", "inspect", "ls", "doctor", "volume"]
VOLUME_COMMANDS = ["create", "ls", "inspect", "rm", "prune", "rename", "clone", "backup", "restore"]
ALL = ["", *COMMANDS, *(f"volume {name}" for name in [*VOLUME_COMMANDS, "list", "remove"])]


def page(command: str, columns: int = 80) -> str:
    said = unionfs(*command.split(), "--help", env={"COLUMNS": str(columns)})
    assert (said.status, said.err) == (0, "")
    return said.out


def section(text: str, heading: str) -> list[str]:
    """The lines below a heading, up to the next one."""
    return text.partition(f"\n{heading}:\n")[2].partition("\n\n")[0].splitlines()


@pytest.mark.parametrize("command", ALL)
def test_every_command_has_a_page(command: str) -> None:
    text = page(command)
    assert text.startswith(f"Usage: unionfs {command}".rstrip())
    assert re.search(r"^  -h, --help +Show this message and exit\.$", text, re.MULTILINE)
    assert unionfs(*command.split(), "-h", env={"COLUMNS": "80"}).out == text
    if command not in ("inspect", "ls", "doctor", "volume"):
        assert section(text, "Examples")
        assert section(text, "Exit status")[0].split() == ["0", "done"]


@pytest.mark.parametrize("columns", [50, 80, 120, 300])
def test_pages_fit_the_terminal_and_break_no_words(columns: int) -> None:
    """Only examples may be longer: they are for copying."""
    words = page("mount", 100).split()
    for command in ("", "mount", "volume backup"):
        text = page(command, columns)
        examples = section(text, "Examples")
        assert all(line.startswith("  unionfs ") for line in examples)
        if columns > 50:
            longest = max(len(line) for line in text.splitlines() if line not in examples)
            assert longest <= min(columns, 100)
    assert page("mount", columns).split() == words


def test_pages_name_commands_in_order() -> None:
    assert [line.split()[0] for line in section(page(""), "Commands")] == COMMANDS
    assert [line.split()[0] for line in section(page("volume"), "Commands")] == VOLUME_COMMANDS


@pytest.mark.parametrize("command", ["", "volume"])
def test_no_command_shows_help(command: str) -> None:
    said = unionfs(*command.split(), env={"COLUMNS": "80"})
    assert (said.status, said.err) == (2, "")
    assert said.out == page(command)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("unionfs mo", "plain,mount"),
        ("unionfs volume re", "plain,rename plain,restore"),
        ("unionfs umount --l", "plain,--lazy"),
        ("unionfs mount /srv/b", "dir,/srv/b"),
        ("unionfs mount --config w", "file,w"),
    ],
)
def test_completion(words: str, completed: str) -> None:
    wanted = {"_UNIONFS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    said = unionfs(env=wanted)
    assert (said.status, said.err) == (0, "")
    assert said.out.split() == completed.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_gets_its_script(shell: str) -> None:
    assert "_UNIONFS_COMPLETE" in unionfs(env={"_UNIONFS_COMPLETE": f"{shell}_source"}).out
