"""Commands about a dataset that is made: ``reinforce run``, ``plan``, ``check`` and ``init``."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reinforce.cli.common import Address, AsJson, Overrides, config_argument, only_json, print_lines
from reinforce.errors import UserError
from reinforce.terminal import escape, print_table
from teachers.redact import redact

if TYPE_CHECKING:
    from pydantic import BaseModel

    from reinforce.api.commands import Planned


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
    from reinforce.processes.signals import Terminated

    with only_json(as_json) as print_json:
        checked = load_config(config, set_)
        try:
            summary = run_config(
                checked,
                address=address,
                retry_quarantined=retry_quarantined,
                accept_changed_classes=accept_changed_classes,
            )
        except (KeyboardInterrupt, Terminated) as stopped:
            typer.echo("stopped; finished shards are kept. Run the same command again to resume.", err=True)
            raise typer.Exit(stopped.status if isinstance(stopped, Terminated) else 130) from None
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
    storage_price: Annotated[float | None, typer.Option(help="Price of a gigabyte (1e9 bytes) for a month.")] = None,
    currency: Annotated[str, typer.Option(help="Currency of the prices.")] = "USD",
    hours: Annotated[float | None, typer.Option(help="Also estimate how many workers finish in this time.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is missing in each layer, how large it will be, and how long it may take. Starts and writes nothing.

    Reads one sample of the source, and fails where a run would fail before it starts. Custom classes are imported.
    """
    from reinforce.api.commands import plan_config
    from reinforce.config import load_config
    from reinforce.engine.preflight.check_machines import config_uses

    assumed = {"rate": rate, "price": price, "storage_price": storage_price, "currency": currency, "hours": hours}
    with only_json(as_json) as print_json:
        checked = load_config(config, set_)
        used = config_uses(checked)
        if as_json and uses:
            print_json(asdict(used))
        for line in () if as_json else used.lines(every=uses):
            typer.echo(escape(redact(line)))
        if uses:
            return
        planned = plan_config(checked, used, address, assumed, lambda found: _show_plan(found, as_json))
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
        from reinforce.engine.recompute import check_labels

        print_lines(check_labels(load_config(target, set_)))
        return
    report = check_target(target, options, kind, set_)
    if report.rows:
        print_table(report.table())
    print_lines(report.notes)
    if report.errors:
        raise UserError("\n".join(report.errors))


Kind = Literal["run", "student", "tune", "captioner", "select", "adapt"]
_MODELS: dict[Kind, str] = {
    "run": "config:Config", "student": "student.config:StudentConfig", "tune": "tuning.config:TuneConfig",
    "captioner": "captioning.config:CaptionerConfig", "select": "explore.config:SelectConfig",
    "adapt": "tuning.adapt_config:AdaptConfig",
}  # fmt: skip


def init(
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="Folder, file or pattern of any format of a source.")
    ] = None,
    output: Annotated[
        Path | None, typer.Argument(metavar="[OUTPUT.yaml]", help="Config to write. Default: named after DATA.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a config that exists.")] = False,
    run_it: Annotated[
        bool, typer.Option("--run", help="Also run the config; one that exists is kept, and its run continues.")
    ] = False,
    schema: Annotated[
        Kind | None,
        typer.Option(help="Instead, print the JSON schema of a kind of config, with every key, for editors."),
    ] = None,
) -> None:
    """Write a commented config for the data, which `plan` and `run` accept as it is.

    The format, the columns and the captions are recognised, and models are proposed for the GPU, or for CPUs.

    Editors with yaml-language-server complete and check YAML by the schema that the first line of a config names.
    """
    if schema is not None:
        if data is not None or run_it or force:
            raise UserError("--schema prints a schema and reads no data: leave out DATA and the other options.")
        typer.echo(json.dumps(schema_of(schema), indent=1))
        return
    if data is None:
        raise UserError("name the data: reinforce init DATA; --schema run prints the schema of a config.")
    from reinforce.api.commands import init as write_config
    from reinforce.engine.starter import default_path

    path = output or default_path(data)
    if force or not (run_it and path.exists()):
        written = write_config(data, str(path), force=force)
        for line in written.lines:
            typer.echo(escape(redact(line)))
        typer.echo(escape(f"written: {written.path}" + f"; next: reinforce plan {written.path}" * (not run_it)))
    if run_it:
        run(path)


def model_of(kind: Kind) -> type[BaseModel]:
    """The class of a kind of config."""
    module, name = _MODELS[kind].split(":")
    model: type[BaseModel] = getattr(importlib.import_module(f"reinforce.{module}"), name)
    return model


def schema_of(kind: Kind) -> dict[str, Any]:
    """The JSON schema of a kind of config."""
    from reinforce.settings import json_schema

    return _tune_schema() if kind == "tune" else json_schema(model_of(kind))


def _tune_schema() -> dict[str, Any]:
    """The schema of a tuning, in which `student` and `trial` are parts of the config of a student.

    Their sections have the names that they have in the schema of a student; the two kinds share no other name.
    """
    from reinforce.settings import either, json_schema, partial

    schema = json_schema(model_of("tune"))
    student = partial(json_schema(model_of("student")))
    schema["$defs"] |= {**student.pop("$defs"), "StudentConfig": student}
    reference = {"$ref": "#/$defs/StudentConfig"}
    properties = schema["properties"]
    for name, value in (("student", either({"type": "string"}, reference)), ("trial", reference)):
        properties[name] = {**value, "description": properties[name]["description"]}
    return schema
