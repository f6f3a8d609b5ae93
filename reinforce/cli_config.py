"""Commands that help to write configs: ``reinforce schema``."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

Kind = Literal["run", "student", "tune", "captioner"]


def schema(
    kind: Annotated[
        Kind, typer.Argument(metavar="KIND", help="run, student, tune or captioner: what the config is for.")
    ],
) -> None:
    """Print the JSON schema of a config, by which editors complete and check YAML.

    Editors with yaml-language-server use the schema that the first line of a config names.
    """
    typer.echo(json.dumps(schema_of(kind), indent=1))


def schema_of(kind: Kind) -> dict[str, Any]:
    """The JSON schema of a kind of config."""
    from reinforce.config_schema import json_schema

    if kind == "run":
        from reinforce.config import Config

        return json_schema(Config)
    if kind == "student":
        from reinforce.student.config import StudentConfig

        return json_schema(StudentConfig)
    if kind == "captioner":
        from reinforce.captioning.config import CaptionerConfig

        return json_schema(CaptionerConfig)
    return _tune_schema()


def _tune_schema() -> dict[str, Any]:
    """The schema of a tuning, in which `student` and `trial` are parts of the config of a student."""
    from reinforce.config_schema import either, json_schema, partial
    from reinforce.student.config import StudentConfig
    from reinforce.tuning.config import TuneConfig

    schema = json_schema(TuneConfig)
    student, sections = partial(json_schema(StudentConfig), "Student")
    schema["$defs"] |= {**sections, "StudentConfig": student}
    reference = {"$ref": "#/$defs/StudentConfig"}
    properties = schema["properties"]
    for name, value in (("student", either({"type": "string"}, reference)), ("trial", reference)):
        properties[name] = {**value, "description": properties[name]["description"]}
    return schema
