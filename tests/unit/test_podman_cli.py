"""The options of `unionfs-overlay` by themselves."""

from __future__ import annotations

import pytest

from unionfs.commands.podman_cli import split_quoted


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a,b=c", ["a", "b=c"]),
        (",,a,,b,", ["a", "b"]),
        (
            'lowerdir=/a:/b,context="system_u:object_r:file_t:s0:c1,c2",x',
            ["lowerdir=/a:/b", 'context="system_u:object_r:file_t:s0:c1,c2"', "x"],
        ),
        (r"upperdir=/a\,b,c", [r"upperdir=/a\,b", "c"]),
        ('odd="open,a', ['odd="open', "a"]),
        ("end\\", ["end\\"]),
        ("", []),
    ],
)
def test_options_are_split_outside_of_quotes(text: str, options: list[str]) -> None:
    assert split_quoted(text) == options
