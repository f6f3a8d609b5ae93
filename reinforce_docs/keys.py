"""Reference of the configs: every key with type, default, bounds and meaning, from the pydantic models."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel, PlainSerializer
from pydantic.fields import FieldInfo

from reinforce.captioning.config import CaptionerConfig
from reinforce.config import Config
from reinforce.explore.config import SelectConfig
from reinforce.settings import InSchema, union_members
from reinforce.student.config import StudentConfig
from reinforce.tuning.adapt_config import AdaptConfig
from reinforce.tuning.config import TuneConfig
from reinforce_docs.tables import cell, code, table

#: Name of a page -> its config, and the commands that read it.
CONFIGS: dict[str, tuple[type[BaseModel], str]] = {
    "run": (Config, "`reinforce run`, `plan` and `check`"),
    "student": (StudentConfig, "`reinforce train`"),
    "tune": (TuneConfig, "`reinforce tune`"),
    "captioner": (CaptionerConfig, "`reinforce finetune-captioner`"),
    "select": (SelectConfig, "`reinforce select`"),
    "adapt": (AdaptConfig, "`reinforce adapt`"),
}
_NAMES = {str: "string", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any"}
_SIGNS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


@dataclass(frozen=True)
class Key:
    """One key of a config. ``name`` is its path, such as ``teachers.NAME.model``."""

    name: str
    type: str
    default: str
    bounds: str
    meaning: str


@dataclass(frozen=True)
class Group:
    """The keys of one section of a config; ``path`` is empty for the top level."""

    path: str
    section: type[BaseModel]
    keys: tuple[Key, ...]

    @property
    def description(self) -> str:
        return inspect.getdoc(self.section) or ""


def groups(model: type[BaseModel], path: str = "") -> Iterator[Group]:
    """The sections of a config, the top level first. A section's own keys come before those of its sections."""
    prefix = f"{path}." if path else ""
    fields = [(prefix + (field.alias or name), field) for name, field in model.model_fields.items()]
    own = tuple(_key(name, field) for name, field in fields if _choices(field) or not _is_model(field.annotation))
    yield Group(path, model, own)
    for name, field in fields:
        if _choices(field):
            continue
        for suffix, section in _sections(field.annotation):
            yield from groups(section, name + suffix)


def keys_page(name: str) -> str:
    """The page of one of CONFIGS."""
    model, commands = CONFIGS[name]
    parts = [
        f"# Config of {commands.replace('`', '')}\n",
        f"Read by {commands}. {_text(inspect.getdoc(model) or '')}\n",
    ]
    for group in groups(model):
        if group.path:
            parts += [f"## {group.path.replace('.NAME', '')}\n", _text(group.description) + "\n"]
        if group.keys:
            rows = [
                (code(key.name.removeprefix(f"{group.path}.")), cell(key.meaning), cell(key.type), code(key.default),
                 cell(key.bounds))
                for key in group.keys
            ]  # fmt: skip
            parts.append(table(("key", "meaning", "type", "default", "bounds"), rows))
    return "\n".join(parts)


def _text(docstring: str) -> str:
    return docstring.replace("``", "`")


def _choices(field: FieldInfo) -> list[str]:
    """The names that a config has instead of the keys of a section; none of other fields."""
    shown = (
        [note.change({}) for note in field.metadata if isinstance(note, InSchema)]
        if _is_model(field.annotation)
        else []
    )
    return [name for schema in shown for name in schema.get("enum", ())]


def _key(name: str, field: FieldInfo) -> Key:
    bounds = [f"{sign} {getattr(limit, attribute):,}" for limit in field.metadata for attribute, sign in _SIGNS
              if getattr(limit, attribute, None) is not None]  # fmt: skip
    bounds += ["not empty" for limit in field.metadata if isinstance(limit, annotated_types.MinLen)]
    type_ = " / ".join(_choices(field)) or type_text(field.annotation)
    return Key(name, type_, _default(field), ", ".join(bounds), field.description or "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    for note in field.metadata:
        if isinstance(note, PlainSerializer):
            value = note.func(value)  # type: ignore[call-arg]
    if isinstance(value, BaseModel):
        return "see below"
    return json.dumps(list(value) if isinstance(value, tuple) else value, default=str)


def _is_model(value: Any) -> bool:
    return inspect.isclass(value) and typing.get_origin(value) is None and issubclass(value, BaseModel)


def _sections(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections that a key may hold, with what their path adds: ``.NAME`` in mappings, ``[]`` in lists."""
    for member in union_members(annotation):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if _is_model(member):
            yield "", member
        elif origin is dict:
            yield from ((f".NAME{suffix}", section) for suffix, section in _sections(arguments[1]))
        elif origin in (list, tuple):
            yield from ((f"[]{suffix}", section) for suffix, section in _sections(arguments[0]))


def type_text(annotation: Any) -> str:
    """A type in words, such as ``list of string, or null``."""
    return ", or ".join(dict.fromkeys(_member_text(member) for member in union_members(annotation)))


def _member_text(member: Any) -> str:
    origin, arguments = typing.get_origin(member), typing.get_args(member)
    if origin is Literal:
        return " / ".join(str(choice) for choice in arguments)
    if origin is dict:
        return f"mapping of names to {type_text(arguments[1])}"
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(type_text(argument) for argument in arguments if argument is not Ellipsis)}]"
    if _is_model(member):
        return "section"
    return _NAMES.get(member, str(getattr(member, "__name__", member)))
