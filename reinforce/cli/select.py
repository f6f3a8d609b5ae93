"""The command ``reinforce select``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reinforce.terminal import escape
from teachers.redact import redact


def select(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config: the dataset, a name, and rules.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key of the config, repeatable: --set dataset=demo/dataset"
        ),
    ] = None,
) -> None:
    """Choose samples of a dataset by rules from what is stored of them, and write a view.

    A view names the samples that are kept, and why each of the others is left out. It copies nothing: reinforce.open
    reads the dataset through it.
    """
    from reinforce.selection.config import load_config
    from reinforce.selection.select import report_lines, select

    view = select(load_config(config, overrides), log=lambda line: typer.echo(escape(redact(line)), err=True))
    for line in report_lines(view):
        typer.echo(escape(redact(line)))
