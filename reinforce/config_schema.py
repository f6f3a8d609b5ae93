"""JSON schemas of configs, by which editors complete and check YAML, and types of keys that several configs have.

A schema accepts what the config's own validation accepts, except rules between several keys, which only the validation
has. Editors and `jsonschema` take 1.0 for an integer; the validation does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic.annotated_handlers import GetJsonSchemaHandler
from pydantic_core import CoreSchema

Schema = dict[str, Any]
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


class InSchema:
    """Annotation with what a validator function accepts: from the schema of the type behind it to the one to show."""

    def __init__(self, change: Callable[[Schema], Schema]) -> None:
        self._change = change

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return self._change(dict(handler(core_schema)))


def either(*schemas: Schema) -> Schema:
    """A schema that accepts what one of these accepts."""
    return {"anyOf": [*schemas]}


def keys_match(pattern: str, *reserved: str) -> InSchema:
    """Annotation of a mapping whose keys match a pattern and are not reserved."""
    keys: Schema = {"pattern": pattern, **({"not": {"enum": [*reserved]}} if reserved else {})}
    return InSchema(lambda mapping: {**mapping, "propertyNames": keys})


def former_keys(**keys: str) -> Callable[[Schema], None]:
    """The ``json_schema_extra`` of a section that still reads former names of keys."""

    def add(schema: Schema) -> None:
        properties = schema["properties"]
        for former, key in keys.items():
            properties[former] = {**properties[key], "deprecated": True, "description": f"former name of `{key}`"}

    return add


#: Pattern of the names of teachers, captioners and scores, which become names of folders.
LAYER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _check_layer_name(name: str) -> str:
    if not LAYER_NAME.fullmatch(name) or name in ("caption", "images"):
        raise ValueError(
            f"{name!r} cannot name a layer: use letters, digits, '.', '_' and '-'; 'caption' and 'images' are reserved"
        )
    return name


LayerName = Annotated[str, AfterValidator(_check_layer_name)]
_Value = TypeVar("_Value")
#: A mapping from layer names.
Named = Annotated[dict[LayerName, _Value], keys_match(f"^{LAYER_NAME.pattern}$", "caption", "images")]
#: One text, or a list of texts.
OneOrMore = Annotated[
    list[str],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    InSchema(lambda texts: either({"type": "string"}, texts)),
]
ImagesFrom = Annotated[
    OneOrMore | None,
    Field(description="folders or URLs of the tars from which images that a dataset stores by reference may be read"),
]


def _count_of(what: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"must be a number of {what}, at least 1, or auto, got {value!r}")
        return value

    return BeforeValidator(check)


_COUNT_OR_AUTO = InSchema(lambda _: either({"type": "integer", "minimum": 1}, {"const": "auto"}))
#: Images of a batch.
Batch = Annotated[int | Literal["auto"], _count_of("images"), _COUNT_OR_AUTO]
#: Microbatches of a training run's batch.
Microbatches = Annotated[int | Literal["auto"], _count_of("microbatches"), _COUNT_OR_AUTO]


def json_schema(model: type[BaseModel]) -> Schema:
    """The JSON schema of a config; every key of every section has a description."""
    schema = model.model_json_schema(by_alias=True)
    sections = schema.get("$defs", {})
    for section in (schema, *sections.values()):
        section.pop("title", None)
        if "description" in section:
            section["description"] = _paragraph(section["description"])
    for section in (schema, *sections.values()):
        for key, value in section.get("properties", {}).items():
            section["properties"][key] = _described(value, sections)
    return {"$schema": _DIALECT, **schema}


def partial(schema: Schema, prefix: str) -> tuple[Schema, dict[str, Schema]]:
    """A schema in which no key is required, and its sections, whose names begin with ``prefix``.

    In a mapping of sections by name, such as sets, null is accepted: it removes a section.
    """
    renamed = _optional(schema, prefix)
    sections = {f"{prefix}{name}": section for name, section in renamed.pop("$defs", {}).items()}
    renamed.pop("$schema", None)
    return renamed, sections


def _described(value: Schema, sections: dict[str, Schema]) -> Schema:
    """A key of a section: without a title; a section as value has no default and, as description, its own."""
    shown = {name: part for name, part in value.items() if name != "title"}
    if "$ref" in value:
        shown.pop("default", None)
        shown.setdefault("description", sections[value["$ref"].rpartition("/")[2]].get("description", ""))
    if isinstance(shown.get("default"), dict) and shown["default"]:
        del shown["default"]
    return shown


def _paragraph(text: str) -> str:
    """The first paragraph of a docstring, as Markdown, which editors show."""
    return " ".join(text.partition("\n\n")[0].replace("``", "`").split())


def _optional(value: Any, prefix: str) -> Any:
    if isinstance(value, list):
        return [_optional(inner, prefix) for inner in value]
    if not isinstance(value, dict):
        return value
    kept = {name: inner for name, inner in value.items() if not (name == "required" and isinstance(inner, list))}
    if "$ref" in kept:
        kept["$ref"] = kept["$ref"].replace("#/$defs/", f"#/$defs/{prefix}")
    named = kept.get("additionalProperties")
    if isinstance(named, dict) and "$ref" in named:
        kept["additionalProperties"] = either(named, {"type": "null"})
    return {name: inner if name == "$ref" else _optional(inner, prefix) for name, inner in kept.items()}
