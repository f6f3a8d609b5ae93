"""The command ``reinforce select``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reinforce.cli.common import Address
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
    address: Address = None,
) -> None:
    """Choose samples of a dataset by rules from what is stored of them, and write a view.

    A view names the samples that are kept, and why each of the others is left out. It copies nothing: reinforce.open
    reads the dataset through it.

    Works on a Ray cluster, or in a process for each core. The same command continues one that was stopped.
    """
    from reinforce.config import Config
    from reinforce.selection.config import load_config
    from reinforce.selection.select import report_lines, select

    log = lambda line: typer.echo(escape(redact(line)), err=True)  # noqa: E731

    def reinforce(references: Config) -> None:
        from reinforce.engine.run import run

        log(f"embedding the images of {references.source} that are not embedded yet")
        run(references, address=address)

    view = select(load_config(config, overrides), log, address, reinforce=reinforce)
    for line in report_lines(view):
        typer.echo(escape(redact(line)))
