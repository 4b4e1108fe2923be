"""What all commands have in common: help pages, usage errors of one line, and completion of paths.

Help pages are click's, with what it does not have: positionals are explained, examples and lists stand line by
line under headings of their own, and commands come in the order in which they are declared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from unionfs.errors import EXIT_CODES, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# A heading and what stands below it: lines that are kept as they are, or (term, text) whose text is folded.
Block = tuple[str, Sequence[str] | Sequence[tuple[str, str]]]

# Lines of help are no longer than this, however wide the terminal is.
HELP_COLUMNS = 100

# Terms that are longer than this get a line of their own.
TERM_COLUMNS = 30

# What the main command gives to all others.
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": HELP_COLUMNS}


def exit_status(codes: Iterable[int] = EXIT_CODES) -> Block:
    """Return the block that explains exit statuses."""
    return "Exit status", [(str(code), EXIT_CODES[code]) for code in codes]


class _Formatter(click.HelpFormatter):
    """click's, but words stay whole: a broken `--volumes-from` could not be read, nor copied."""

    def write_text(self, text: str) -> None:
        """Write paragraphs, each folded."""
        indent = " " * self.current_indent
        folded = [_fold(part, self.width - len(indent)) for part in text.split("\n\n")]
        self.write("\n\n".join("\n".join(indent + line for line in lines) for lines in folded) + "\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = TERM_COLUMNS, col_spacing: int = 2) -> None:
        """Write terms and their texts in two columns; a longer term gets a line of its own."""
        rows = list(rows)
        indent = " " * self.current_indent
        column = min(max(len(term) for term, _ in rows), col_max) + col_spacing
        for term, text in rows:
            lines = _fold(text, self.width - len(indent) - column)
            if len(term) > column - col_spacing or not lines:
                lines.insert(0, "")
            first, *others = lines
            self.write(f"{indent}{term:{column}}{first}".rstrip() + "\n")
            self.write("".join(f"{indent}{'':{column}}{line}\n" for line in others))


def _fold(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False)


class _Context(click.Context):
    formatter_class = _Formatter


class Argument(click.Argument):
    """A positional; its metavar stands in the help as it is written here."""

    def __init__(self, *args: Any, explain: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explain = explain


class _Page(click.Command):
    """The help page of a command: usage, text, positionals, options, and `blocks`."""

    context_class = _Context

    def __init__(self, *args: Any, blocks: Sequence[Block] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.blocks = blocks

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; an error of the parser itself doesn't know yet whose words it was about."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the positionals, if there is something to say about them, and the options."""
        rows = [
            (param.metavar or param.human_readable_name, param.explain)
            for param in self.get_params(ctx)
            if isinstance(param, Argument) and param.explain
        ]
        if rows:
            with formatter.section("Arguments"):
                formatter.write_dl(rows)
        super().format_options(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the blocks."""
        for heading, lines in self.blocks:
            with formatter.section(heading):
                for line in lines:
                    if isinstance(line, str):
                        formatter.write(f"{'':{formatter.current_indent}}{line}\n")
                pairs = [line for line in lines if not isinstance(line, str)]
                if pairs:
                    formatter.write_dl(pairs)


class Command(_Page):
    """A command with a help page of ours."""


class Group(_Page, click.Group):
    """A command with commands below it; without any of them it shows its help."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of their declaration."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the words after the command; with none of them, show the help: that is no use, but no secret."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit(UsageError.exit_code)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first word names, or names that are like it."""
        known, asked = self.list_commands(ctx), args[0]
        if asked in known or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        import difflib

        close = " or ".join(f"'{name}'" for name in difflib.get_close_matches(asked, known))
        raise click.UsageError(f"No such command '{asked}'" + (f", did you mean {close}?" if close else ""), ctx)


def run(command: click.Command, name: str) -> int:
    """Run a command line to its end and return its exit status.

    Raises UsageError for what click can't read, UnionError for what the command can't do, and KeyboardInterrupt.
    """
    try:
        status = command.main(prog_name=name, standalone_mode=False)
    except click.UsageError as error:
        raise UsageError(_one_clear_line(error, name)) from None
    except click.Abort:
        raise KeyboardInterrupt from None
    return status or 0


def _one_clear_line(error: click.UsageError, name: str) -> str:
    """Return click's words in the form of our own errors; they name the bad word, and here is added where to look."""
    message = error.format_message()
    message = message[:1].lower() + message[1:].removesuffix(".")
    if message.endswith(("?", "?)")):  # click has a better idea
        return message
    return f"{message}: see {error.ctx.command_path if error.ctx else name} --help"


# --- completion -----------------------------------------------------------------------------------


def directories(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete directories."""
    return _by_the_shell("dir", incomplete)


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete files and directories."""
    return _by_the_shell("file", incomplete)


def _by_the_shell(kind: str, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type=kind)]
