"""Configs in general: typed sections, YAML files with overrides, and faults told with their place and the mend."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from reinforce.errors import UserError
from teachers.redact import is_secret, redact_values

Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """Base of every part of a config: unknown keys and loose types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


def load(model: type[Model], path: str | Path, overrides: list[str] | None = None, section: str | None = None) -> Model:
    """Read a YAML config, or one ``section`` of it, and apply ``key.sub=value`` overrides (values are YAML).

    Raises UserError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror or error}. Give the path of a YAML file.") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not YAML: {_problem(error)}") from None  # the error quotes the file
    if section is not None and isinstance(data, dict):
        if section not in data:
            raise UserError(f"config {path} has no `{section}`: add it, or give a config that has it.")
        data = data[section]
        path = f"{path}, {section}"
    if not isinstance(data, dict):
        raise UserError(f"config {path}: want a mapping of keys such as {_example(model)}, got {type(data).__name__}")
    for override in overrides or []:
        _override(data, override)
    return parse(model, data, where=f"config {path}")


def parse(model: type[Model], data: Mapping[str, Any], where: str = "config") -> Model:
    """Check a mapping against a schema. Raises UserError with one line for each fault."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [f"  {_location(fault['loc'])}: {_explain(model, dict(fault))}" for fault in error.errors()]
        raise UserError(f"{where} has {len(lines)} fault{'s' * (len(lines) > 1)}:\n" + "\n".join(lines)) from None


def _example(model: type[BaseModel]) -> str:
    fields = model.model_fields.items()
    required = [(name, field) for name, field in fields if field.is_required()] or [*fields]
    return " and ".join(f"`{field.alias or name}`" for name, field in required[:2])


def _location(loc: tuple[int | str, ...]) -> str:
    """Keys and indices; the names that pydantic gives to members of unions, such as ``list[str]``, are left out."""
    types_ = ("[key]", "str", "int", "float", "bool")
    parts = [str(part) for part in loc if part not in types_ and "[" not in str(part)]
    return ".".join(parts) or "(whole)"


def _explain(model: type[BaseModel], fault: dict[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        return f"unknown key; {_neighbours(model, fault['loc'])}"
    if fault["type"] == "missing":
        return "is required"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return message
    hidden = any(is_secret(str(part)) for part in fault["loc"])
    return message if hidden else f"{message}, got {redact_values(fault['input'])!r}"


def _neighbours(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """Name the keys that would have been right at this place."""
    place: Any = model
    for part in loc[:-1]:
        place = _inside(place, part)
    sections = _sections(place)
    if not sections:
        return "remove it"
    keys = [field.alias or name for name, field in sections[0].model_fields.items()]
    return "known keys here: " + ", ".join(keys)


def _inside(annotation: Any, part: int | str) -> Any:
    """The annotation of what stands at ``part`` in a value of ``annotation``."""
    for section in _sections(annotation):
        for name, field in section.model_fields.items():
            if part in (name, field.alias):
                return field.annotation
    for member in _members(annotation):
        if typing.get_origin(member) in (dict, list, tuple) and "[" not in str(part):
            return typing.get_args(member)[-1]
    return annotation  # the name of a member of a union


def _members(annotation: Any) -> list[Any]:
    """The members of a union, without what ``Annotated`` adds."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(annotation) for inner in _members(member)]
    return [annotation]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    return [m for m in _members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")  # of which the value is not told: it may be a secret
    if not equals or not path:
        raise UserError(f"--set {path!r}: want key.sub=value, for example --set workers.cpus=4")
    *parents, last = path.split(".")
    node: Any = data
    for part in parents:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"--set {path}: `{part}` is not a section")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {path}: the value is not YAML: {_problem(error)}") from None


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the text itself."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or type(error).__name__
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}" if mark else problem
