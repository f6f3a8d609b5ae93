"""The command line: ``reinforce run``, ``plan``, ``status``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from reinforce.config import load_config
from reinforce.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Multi-modal dataset reinforcement: teachers' embeddings and synthetic captions beside every image-text pair.",
)
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/demo.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config, e.g. --set workers.cpus=4"),
]


@app.command()
def run(
    config: ConfigPath,
    set_: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to use: 'auto' or HOST:PORT. Default: RAY_ADDRESS, else this machine."),
    ] = None,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Try the shards again that were given up as a whole.")
    ] = False,
) -> None:
    """Compute the layers that are missing, and nothing else.

    A fresh run, a resume after a crash and an added teacher are the same command.

    Exits 0 when every shard is finished, or quarantined within failures.allowed_share.
    """
    from reinforce.runner import run as run_config

    checked = load_config(config, set_)
    try:
        summary = run_config(checked, address=address, retry_quarantined=retry_quarantined)
    except KeyboardInterrupt:
        typer.echo("stopped; what is finished is kept, run again to go on", err=True)
        raise typer.Exit(130) from None
    typer.echo(summary.text(checked.output))
    raise typer.Exit(summary.status)


@app.command()
def plan(config: ConfigPath, set_: Overrides = None) -> None:
    """Show what is missing, per layer, and how many bytes it will be. Starts and writes nothing."""
    from reinforce.plan import make_plan
    from reinforce.status import plan_table
    from reinforce.summary import human_bytes

    from reinforce.estimate import expected_bytes  # isort: skip

    made = make_plan(load_config(config, set_))
    expected = expected_bytes(made)
    Console().print(plan_table(made, expected))
    total = sum(size or 0 for size in expected.values())
    size = human_bytes(total) if None not in expected.values() else f"{human_bytes(total)} or more"
    typer.echo(f"{made.shards:,} shards, {len(made.work):,} with something missing, about {size} to write")


@app.command()
def status(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="folder or fsspec URL of a reinforced dataset")],
) -> None:
    """Show what a dataset holds, what is in quarantine and why, and how the last run ended."""
    from reinforce.status import status_of, status_table

    found = status_of(dataset)
    Console().print(status_table(found))
    for layer, entry in found["quarantine"].items():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in entry["reasons"].items())
        typer.echo(f"quarantine/{layer}: {entry['files']:,} shards; {reasons}")
    if last := found["last_run"]:
        typer.echo(f"last run {last['run']}: {last['shards']:,} shards in {last['seconds']:.0f} s, {last['message']}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors of the user's are one message, and the exit status tells."""
    if os.getcwd() not in sys.path:  # a class of the user's own lies beside the config
        sys.path.insert(0, os.getcwd())
    try:
        app(args=arguments)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
