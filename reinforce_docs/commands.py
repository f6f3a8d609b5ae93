"""Reference of the command line, from the commands themselves."""

from __future__ import annotations

from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from reinforce.cli import app


def commands_page() -> str:
    """The page of all commands, with what ``--help`` prints."""
    command = get_command(app)
    return get_docs_for_click(obj=command, ctx=Context(command), name="reinforce", title="Commands")
