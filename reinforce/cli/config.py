"""Commands that help to write configs: ``reinforce init`` and ``schema``."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reinforce.cli.run import run as run_config
from reinforce.terminal import escape
from teachers.redact import redact

if TYPE_CHECKING:
    from pydantic import BaseModel

Kind = Literal["run", "student", "tune", "captioner", "select", "adapt"]
_MODELS: dict[Kind, str] = {
    "run": "config:Config", "student": "student.config:StudentConfig", "tune": "tuning.config:TuneConfig",
    "captioner": "captioning.config:CaptionerConfig", "select": "selection.config:SelectConfig",
    "adapt": "adapting.config:AdaptConfig",
}  # fmt: skip


def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder, file or pattern of any format of a source.")],
    output: Annotated[
        Path | None, typer.Argument(metavar="[OUTPUT.yaml]", help="Config to write. Default: named after DATA.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a config that exists.")] = False,
    run: Annotated[
        bool, typer.Option("--run", help="Also run the config; one that exists is kept, and its run continues.")
    ] = False,
) -> None:
    """Write a commented config for the data, which `plan` and `run` accept as it is.

    The format, the columns and the captions are recognised, and models are proposed for the GPU, or for CPUs.
    """
    from reinforce.api.commands import init as write_config
    from reinforce.engine.starter.starter import default_path

    path = output or default_path(data)
    if force or not (run and path.exists()):
        written = write_config(data, str(path), force=force)
        for line in written.lines:
            typer.echo(escape(redact(line)))
        typer.echo(escape(f"written: {written.path}" + f"; next: reinforce plan {written.path}" * (not run)))
    if run:
        run_config(path)


def schema(
    kind: Annotated[
        Kind,
        typer.Argument(metavar="KIND", help="run, student, tune, captioner, select or adapt: what the config is for."),
    ],
) -> None:
    """Print the JSON schema of a config, by which editors complete and check YAML.

    Editors with yaml-language-server use the schema that the first line of a config names.
    """
    typer.echo(json.dumps(schema_of(kind), indent=1))


def model_of(kind: Kind) -> type[BaseModel]:
    """The class of a kind of config."""
    module, name = _MODELS[kind].split(":")
    model: type[BaseModel] = getattr(importlib.import_module(f"reinforce.{module}"), name)
    return model


def schema_of(kind: Kind) -> dict[str, Any]:
    """The JSON schema of a kind of config."""
    from reinforce.config_schema import json_schema

    return _tune_schema() if kind == "tune" else json_schema(model_of(kind))


def _tune_schema() -> dict[str, Any]:
    """The schema of a tuning, in which `student` and `trial` are parts of the config of a student."""
    from reinforce.config_schema import either, json_schema, partial

    schema = json_schema(model_of("tune"))
    student, sections = partial(json_schema(model_of("student")), "Student")
    schema["$defs"] |= {**sections, "StudentConfig": student}
    reference = {"$ref": "#/$defs/StudentConfig"}
    properties = schema["properties"]
    for name, value in (("student", either({"type": "string"}, reference)), ("trial", reference)):
        properties[name] = {**value, "description": properties[name]["description"]}
    return schema
