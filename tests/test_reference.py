"""docs/reference.md names every command and every flag that `diffdefend --help` shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from diffdefend_core.cli.group import cli

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "reference.md").read_text(encoding="utf-8")


def commands(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield the words of each command and the command."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from commands(inner, *path, name)


def rows(path: tuple[str, ...]) -> str:
    """Return the rows of the table of commands whose first cell names the command."""
    found = [line for line in PAGE.splitlines() if line.startswith("| `")]
    first = {line: re.split(r"(?<!\\)\|", line)[1] for line in found}
    words = [rf"(?<![\w-]){re.escape(word)}(?![\w-])" for word in path]
    return "\n".join(line for line, cell in first.items() if all(re.search(word, cell) for word in words))


def test_every_command_has_a_row() -> None:
    found = [path for path, _ in commands(cli)]
    assert len(found) > 25 and [path for path in found if not rows(path)] == []


def test_every_flag_is_named_here_or_on_the_page_that_the_row_leads_to() -> None:
    lacking = []
    for path, command in commands(cli):
        pages = set(re.findall(r"\(([\w-]+\.md)", rows(path)))
        text = PAGE + "".join((DOCS / page).read_text(encoding="utf-8") for page in pages)
        flags = [item for item in command.params if isinstance(item, click.Option) and not item.hidden]
        lacking += [
            (*path, flag.opts[-1])
            for flag in flags
            if not any(re.search(rf"(?<![\w-]){name}(?![\w-])", text) for name in flag.opts)
        ]
    assert lacking == []
