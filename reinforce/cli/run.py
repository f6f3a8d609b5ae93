"""Commands about a dataset that is made: ``reinforce run``, ``plan`` and ``check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reinforce.cli.common import Address, AsJson, Overrides, config_argument, only_json, print_lines
from reinforce.errors import UserError
from reinforce.terminal import escape, print_table
from teachers.redact import redact

if TYPE_CHECKING:
    from reinforce.api.results import Planned


def run(
    config: Annotated[Path, config_argument("demo.yaml")],
    set_: Overrides = None,
    address: Address = None,
    retry_quarantined: Annotated[
        bool,
        typer.Option(
            "--retry-quarantined",
            help="Retry the shards that are quarantined as a whole, or whose labels could not all be read.",
        ),
    ] = False,
    accept_changed_classes: Annotated[
        bool,
        typer.Option(
            "--accept-changed-classes", help="Extend layers of classes whose file has changed and `version` has not."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compute the missing layers of a dataset, and nothing else.

    Starting, resuming after a crash and adding a teacher are the same command.

    Exits with status 0 if every shard is finished or, up to failures.allowed_share of the shards, quarantined.
    """
    from reinforce.config import load_config
    from reinforce.engine.run import run as run_config

    with only_json(as_json) as print_json:
        checked = load_config(config, set_)
        try:
            summary = run_config(
                checked,
                address=address,
                retry_quarantined=retry_quarantined,
                accept_changed_classes=accept_changed_classes,
            )
        except KeyboardInterrupt:
            typer.echo("stopped; finished shards are kept. Run the same command again to resume.", err=True)
            raise typer.Exit(130) from None
        if as_json:
            print_json({"output": checked.output, **asdict(summary)})
        else:
            typer.echo(escape(summary.text(checked.output)))
    raise typer.Exit(summary.status)


def plan(
    config: Annotated[Path, config_argument("demo.yaml")],
    set_: Overrides = None,
    uses: Annotated[bool, typer.Option("--uses", help="Only name the classes and hosts that it would use.")] = False,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to check: 'auto' or HOST:PORT. Default: RAY_ADDRESS, or this machine."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Images a second of one worker's models. Default: as the last run measured.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price of a worker (a GPU and its cores) for an hour.")] = None,
    hours: Annotated[float | None, typer.Option(help="Also estimate how many workers finish in this time.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is missing in each layer, how large it will be, and how long it may take. Starts and writes nothing.

    Reads one sample of the source, and fails where a run would fail before it starts. Custom classes are imported.
    """
    from reinforce.api.commands import plan_config
    from reinforce.config import load_config
    from reinforce.engine.preflight.access import config_uses

    given = {"rate": rate, "price": price}
    options = [f"estimate.{key}={value}" for key, value in given.items() if value is not None]
    with only_json(as_json) as print_json:
        checked = load_config(config, [*(set_ or []), *options])
        used = config_uses(checked)
        if as_json and uses:
            print_json(asdict(used))
        for line in () if as_json else used.lines(every=uses):
            typer.echo(escape(redact(line)))
        if uses:
            return
        planned = plan_config(checked, used, address, hours, lambda found: _show_plan(found, as_json))
        if as_json:
            print_json(planned.as_json())


def _show_plan(planned: Planned, as_json: bool) -> None:
    """Print a plan, or with ``as_json`` its warnings alone."""
    if not as_json:
        print_table(planned.table())
        print_lines(planned.lines())
    for note in planned.warnings:
        typer.echo(escape(redact(note)), err=True)


def check(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="YAML config of a run, or a class as module:Class.")],
    set_: Overrides = None,
    options: Annotated[
        str | None, typer.Option(metavar="JSON", help="Keyword arguments of the class: '{\"width\": 32}'.")
    ] = None,
    kind: Annotated[
        Literal["teacher", "captioner"] | None, typer.Option(help="What the class is. Default: by its methods.")
    ] = None,
    labels: Annotated[
        bool,
        typer.Option("--labels", help="Compare the vectors of `labels` with those that the config's models compute."),
    ] = False,
) -> None:
    """Load teachers and captioners, test them as before a run, and measure their speed.

    Starts nothing and writes nothing. Exits with status 2 if a model fails.
    """
    from reinforce.engine.check_models import check_target

    if labels:
        from reinforce.config import load_config
        from reinforce.engine.label_check import check_labels

        print_lines(check_labels(load_config(target, set_)))
        return
    report = check_target(target, options, kind, set_)
    if report.rows:
        print_table(report.table())
    print_lines(report.notes)
    if report.errors:
        raise UserError("\n".join(report.errors))
