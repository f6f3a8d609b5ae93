"""Reference of the command line, from the commands themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from reinforce.cli import app

#: The examples of a command as typer prints them: each with an empty line after it.
_EXAMPLES = re.compile(r"^(Examples?):\n\n((?:\$ .*\n+)+)", re.MULTILINE)
_WHOLE = 10_000  # characters of a summary, which typer cuts


def commands_page() -> str:
    """The page of all commands, with what ``--help`` prints: whole summaries, and examples as blocks of code."""
    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=Context(command), name="reinforce", title="Commands")
    for name, summary in summaries(command):
        text = re.sub(rf"(?m)^\* `{name}`: .*$", lambda _, line=f"* `{name}`: {summary}": line, text)  # type: ignore[misc]
    return _EXAMPLES.sub(lambda found: f"{found[1]}:\n\n```console\n{_lines(found[2])}\n```\n\n", text)


def summaries(group: Any) -> Iterator[tuple[str, str]]:
    """The name and the first sentence of each command of a group and of its groups."""
    for name, command in group.commands.items():
        yield name, command.get_short_help_str(_WHOLE)
        if hasattr(command, "commands"):
            yield from summaries(command)


def _lines(text: str) -> str:
    return "\n".join(filter(None, text.splitlines()))
