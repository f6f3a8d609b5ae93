"""The base of all configs: typed sections, YAML files with overrides, errors that name the key and the fix, and JSON
schemas, by which editors complete and check YAML.

A schema accepts what the config's own validation accepts, except rules between several keys, which only the validation
has. Editors and `jsonschema` take 1.0 for an integer; the validation does not.
"""

from __future__ import annotations

import csv
import functools
import inspect
import itertools
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, ParamSpec, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic.annotated_handlers import GetJsonSchemaHandler
from pydantic_core import CoreSchema

from reinforce.errors import UserError
from teachers.redact import is_secret, redact_values

Schema = dict[str, Any]
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class InSchema:
    """Annotation with what a validator function accepts: from the schema of the type behind it to the one to show."""

    change: Callable[[Schema], Schema]

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return self.change(dict(handler(core_schema)))


def either(*schemas: Schema) -> Schema:
    """A schema that accepts what one of these accepts."""
    return {"anyOf": [*schemas]}


def keys_match(pattern: str, *reserved: str) -> InSchema:
    """Annotation of a mapping whose keys match a pattern and are not reserved."""
    keys: Schema = {"pattern": pattern, **({"not": {"enum": [*reserved]}} if reserved else {})}
    return InSchema(lambda mapping: {**mapping, "propertyNames": keys})


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


def _check_count(what: str, value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"must be a number of {what}, at least 1, or auto, got {value!r}")
    return value


_COUNT_OR_AUTO = InSchema(lambda _: either({"type": "integer", "minimum": 1}, {"const": "auto"}))
#: Images of a batch.
Batch = Annotated[int | Literal["auto"], BeforeValidator(functools.partial(_check_count, "images")), _COUNT_OR_AUTO]
#: Microbatches of a training run's batch.
Microbatches = Annotated[
    int | Literal["auto"], BeforeValidator(functools.partial(_check_count, "microbatches")), _COUNT_OR_AUTO
]


def json_schema(model: type[BaseModel]) -> Schema:
    """The JSON schema of a config; every key of every section has a description."""
    schema = model.model_json_schema(by_alias=True)
    sections = schema.get("$defs", {})
    for section in (schema, *sections.values()):
        section.pop("title", None)
        if "description" in section:
            # The first paragraph of a docstring, as Markdown, which editors show.
            text, _, _ = section["description"].partition("\n\n")
            section["description"] = " ".join(text.replace("``", "`").split())
    for section in (schema, *sections.values()):
        for key, value in section.get("properties", {}).items():
            # Without a title; a section as value has no default and, as description, its own.
            shown = section["properties"][key] = {name: part for name, part in value.items() if name != "title"}
            if "$ref" in value:
                shown.pop("default", None)
                shown.setdefault("description", sections[value["$ref"].rpartition("/")[2]].get("description", ""))
            if isinstance(shown.get("default"), dict) and shown["default"]:
                del shown["default"]
    return {"$schema": _DIALECT, **schema}


def partial(schema: Any) -> Any:
    """A schema, or a value in one, in which no key is required, at any depth.

    In a mapping of sections by name, such as sets, null is accepted: it removes a section.
    """
    if isinstance(schema, list):
        return [partial(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: inner for name, inner in schema.items() if not (name == "required" and isinstance(inner, list))}
    kept.pop("$schema", None)
    named = kept.get("additionalProperties")
    if isinstance(named, dict) and "$ref" in named:
        kept["additionalProperties"] = either(named, {"type": "null"})
    return {name: partial(inner) for name, inner in kept.items()}


Model = TypeVar("Model", bound=BaseModel)
P = ParamSpec("P")
T = TypeVar("T")


class Section(BaseModel):
    """Base class of every part of a config. Unknown keys and values that need type conversion are errors.

    By ``place`` and ``configs``, errors find the key here for that of another library: the name of the section in the
    config that has it, and the configs of which keys have values that are mappings.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)
    place: ClassVar[str] = ""
    configs: ClassVar[Mapping[str, type[BaseModel]]] = {}


class _Loader(yaml.SafeLoader):
    """Reads ``1e-5`` as a number, as YAML 1.2 does; YAML 1.1 wants ``1.0e-5``."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d{1,3}$"), [*"-+.0123456789"]
)


def load_yaml(text: str) -> Any:
    """The value of a YAML text, of plain types alone. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read(path: str | os.PathLike[str], model: type[BaseModel] | None = None) -> dict[str, Any]:
    """The mapping of a YAML file of a ``model``, which is not validated. Raises UserError."""
    try:
        data = load_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror or error}. Give the path of a YAML file.") from error
    except yaml.YAMLError as error:
        # Not chained: the YAML error quotes the file, which may hold secrets.
        raise UserError(f"config {path} is not valid YAML: {_describe_yaml(error)}") from None
    return _mapping(data, path, model)


def section_of(path: str | os.PathLike[str], section: str, model: type[BaseModel] | None = None) -> dict[str, Any]:
    """A section of a YAML file, which is not validated. Raises UserError."""
    data = read(path, model)
    if section not in data:
        raise UserError(f"config {path} has no section `{section}`. Add it, or give a config that has it.")
    return _mapping(data[section], f"{path}, {section}", model)


def _mapping(data: Any, where: object, model: type[BaseModel] | None = None) -> dict[str, Any]:
    if not isinstance(data, dict):
        keys = "" if model is None else f" with keys such as {_example(model)}"
        raise UserError(f"config {where}: must be a mapping{keys}, got {type(data).__name__}")
    return data


def load(model: type[Model], path: str | Path, overrides: list[str] | None = None, section: str | None = None) -> Model:
    """Read a YAML config, or one ``section`` of it, and apply ``key.sub=value`` overrides (values are YAML).

    Raises UserError.
    """
    data = read(path, model) if section is None else section_of(path, section, model)
    if section is not None:
        path = f"{path}, {section}"
    for override in overrides or []:
        apply_override(data, override)
    return parse(model, data, where=f"config {path}")


#: Keys of a training run of which a config has exactly one.
LENGTHS = ("steps", "epochs")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any], exclusive: tuple[str, ...] = ()) -> dict[str, Any]:
    """``base`` with the values of ``changes``, section by section; null removes a section.

    Of the ``exclusive`` keys a section has at most one: those of ``base`` go where ``changes`` have another.
    """
    merged = dict(base)
    if any(key in changes for key in exclusive):
        merged = {key: value for key, value in merged.items() if key not in exclusive}
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            merged[key] = merge(before, value, exclusive)
        elif value is None and isinstance(before, Mapping):
            del merged[key]
        else:
            merged[key] = value
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "", separator: str = ".") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings with dotted keys, or with another ``separator``."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}{separator}", separator)
        else:
            yield f"{prefix}{key}", value


def as_config(
    model: type[Model], config: Model | str | os.PathLike[str] | Mapping[str, Any] | None, **keys: Any
) -> Model:
    """A validated config from a config, a YAML file or a mapping, or from ``keys``, which change it section by section.

    Values may be of Python's own types: paths, tuples and NumPy's numbers are converted. Raises UserError.
    """
    if isinstance(config, model) and not keys:
        return config
    where = "config"
    if isinstance(config, model):
        data = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    elif isinstance(config, Mapping):
        data = _as_yaml(config)
    elif isinstance(config, (str, os.PathLike)):
        data, where = read(config, model), f"config {config}"
    elif config is None and keys:
        data = {}
    else:
        raise UserError(
            f"config: want the path of a YAML file, a mapping, or keywords such as {_example(model)}, got "
            f"{'none' if config is None else type(config).__name__}"
        )
    return parse(model, merge(data, _as_yaml(keys), LENGTHS), where)


def _as_yaml(value: Any) -> Any:
    """A value of Python as a YAML file would have it."""
    if isinstance(value, Mapping):
        return {key: _as_yaml(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_yaml(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def as_names(value: Any) -> Any:
    return [value] if isinstance(value, str) else _as_yaml(value)


#: Types of arguments for ``checked_arguments``: a path or URI, and one name or several.
Address = Annotated[str, BeforeValidator(_as_yaml)]
Names = Annotated[list[str], BeforeValidator(as_names)]


def checked_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a public function: arguments of unknown names or wrong types raise UserError.

    Types are the annotations of the parameters, without conversion; ``config`` and ``**keys`` are checked by others.
    """
    parameters = inspect.signature(function).parameters.values()
    checked = [
        one.name for one in parameters if one.name not in ("cls", "self", "config") and one.kind != one.VAR_KEYWORD
    ]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            bound = inspect.signature(function).bind(*args, **kwargs)
        except TypeError as error:
            raise UserError(f"{function.__name__}: {error}. It takes: {', '.join(checked)}.") from None
        for name in checked:
            if name not in bound.arguments:
                continue
            value = bound.arguments[name]
            try:
                bound.arguments[name] = _adapter(function, name).validate_python(value)
            except ValidationError as error:
                messages = dict.fromkeys(one["msg"].removeprefix("Value error, ") for one in error.errors())
                raise UserError(f"{function.__name__}: {name}: {'; '.join(messages)}, got {value!r:.100}") from None
        return function(*bound.args, **bound.kwargs)

    return call


@functools.cache
def _adapter(function: Callable[..., Any], name: str) -> TypeAdapter[Any]:
    own = types.SimpleNamespace(__annotations__={name: function.__annotations__[name]})
    hints = typing.get_type_hints(own, getattr(function, "__globals__", None), include_extras=True)
    return TypeAdapter(hints[name], config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def parse(model: type[Model], data: Mapping[str, Any], where: str = "config") -> Model:
    """Validate a mapping. Raises UserError with one line per error, each with the key and the fix."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = []
        for entry in error.errors():
            # Names that pydantic adds for members of unions, such as ``list[str]``, are left out.
            type_names = ("[key]", "str", "int", "float", "bool")
            parts = [str(part) for part in entry["loc"] if part not in type_names and "[" not in str(part)]
            kind, loc, what = entry["type"], entry["loc"], entry["msg"].removeprefix("Value error, ")
            if kind == "extra_forbidden":
                what = f"unknown key; {_name_elsewhere(model, loc) or _known_keys(model, loc)}"
            elif kind == "missing":
                what = "is required"
            elif kind != "value_error" and not any(is_secret(str(part)) for part in loc):
                what += f", got {redact_values(entry['input'])!r}"
            lines.append(f"  {'.'.join(parts) or '(top level)'}: {what}")
        raise UserError(f"{where} has {len(lines)} error{'s' * (len(lines) > 1)}:\n" + "\n".join(lines)) from None


def _example(model: type[BaseModel]) -> str:
    """Name up to two keys of the config, required ones if there are any."""
    fields = model.model_fields.items()
    required = [(name, field) for name, field in fields if field.is_required()] or [*fields]
    return " and ".join(f"`{field.alias or name}`" for name, field in required[:2])


@functools.cache
def names_elsewhere() -> tuple[dict[str, str], ...]:
    """Names of other libraries for keys here, as in docs/names.md; ``key`` is empty where there is none."""
    text = Path(__file__).with_name("names_elsewhere.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


def _name_elsewhere(model: type[BaseModel], loc: tuple[int | str, ...]) -> str | None:
    """Our key for the unknown one at ``loc``, where another library has it: of several, the nearest one."""
    name = str(loc[-1]).lstrip("-").replace("-", "_").lower()
    found = []
    # The model may be a section of a config alone, or have other configs as parts.
    section, parts = ([model.place], model.configs) if issubclass(model, Section) else ([], {})
    for row in (one for one in names_elsewhere() if one["name"] == name):
        whole = row["key"].split(".")
        ends = [whole[at:] for at in range(len(whole)) if at < max(1, len(whole) - 1) or whole[:at] == section]
        keys = [one for one in ends if has_key(model, one)]
        keys += [[part, *one] for part, inner in parts.items() for one in ends if has_key(inner, one)]
        key = keys[0] if keys else []
        if key or not row["key"]:
            shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(loc, key, strict=False))
            found.append((len([*shared]), row, f" is `{'.'.join(key)}` here" if key else ""))
    if not found:
        return None
    _, row, place = max(found, key=lambda one: one[0])
    return f"{name} of {row['library']}{place}{': ' * bool(row['note'])}{row['note']}"


def has_key(model: type[BaseModel], key: Sequence[str]) -> bool:
    """Whether a config has the key of these parts, of which NAME is any name in a mapping."""
    annotation: Any = model
    for part in key:
        fields = [field for section in _sections(annotation) for field in section.model_fields.items()]
        inner = [field.annotation for name, field in fields if part == (field.alias or name)]
        if part == "NAME":
            inner = [typing.get_args(m)[-1] for m in union_members(annotation) if typing.get_origin(m) is dict]
        if not inner:
            return False
        annotation = inner[0]
    return True


def _known_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """Name the keys that are valid in the section of ``loc``."""
    annotation: Any = model
    for part in loc[:-1]:
        fields = [field for section in _sections(annotation) for field in section.model_fields.items()]
        inner = [field.annotation for name, field in fields if part in (name, field.alias)]
        if "[" not in str(part):
            members = union_members(annotation)
            inner += [typing.get_args(m)[-1] for m in members if typing.get_origin(m) in (dict, list, tuple)]
        if inner:  # otherwise ``part`` is the name of a member of a union
            annotation = inner[0]
    sections = _sections(annotation)
    if not sections:
        return "remove it"
    keys = [field.alias or name for name, field in sections[0].model_fields.items()]
    return "known keys here: " + ", ".join(keys)


def union_members(annotation: Any) -> list[Any]:
    """Return the members of a union; ``Annotated`` is unwrapped."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return union_members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(annotation) for inner in union_members(member)]
    return [annotation]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    # In Python 3.10, ``list[int]`` counts as an instance of ``type``.
    classes = [m for m in union_members(annotation) if isinstance(m, type) and typing.get_origin(m) is None]
    return [m for m in classes if issubclass(m, BaseModel)]


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set the ``key.sub=value`` of an option --set in nested mappings. Raises UserError."""
    path, equals, value = override.partition("=")  # messages leave the value out: it may be a secret
    if not equals or not path:
        raise UserError(f"--set {path!r}: must be key.sub=value, for example --set workers.cpus=4")
    node, rest = data, path
    while "." in rest:
        # a name of the user's, such as that of a model, may have dots
        named = (key for key in node if isinstance(key, str) and rest.startswith(f"{key}."))
        part = max(named, key=len, default=rest.partition(".")[0])
        rest = rest[len(part) + 1 :]
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"--set {path}: `{part}` is not a section")
    try:
        node[rest] = load_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {path}: the value is not valid YAML: {_describe_yaml(error)}") from None


def _describe_yaml(error: yaml.YAMLError) -> str:
    """Describe what is wrong and where, without quoting the text."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or type(error).__name__
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}" if mark else problem


#: The key ``accelerator`` of configs: whether a process uses fast paths.
Accelerated = Annotated[
    Literal["fast", "plain"],
    Field(
        description="plain: turn every fast path of accelerators off (compiled code, CUDA graphs, held weights, fused "
        "attention), as REINFORCE_ACCELERATOR=plain in the environment does; results differ in rounding at most"
    ),
]
_Config = TypeVar("_Config", bound=BaseModel)


def use_accelerator(wanted: Literal["fast", "plain"]) -> Literal["fast", "plain"]:
    """Set up this process, before it loads models -> what is in force: ``plain`` if the environment says so.

    Counts of fast paths begin anew. Raises UserError for another value in the environment.
    """
    from teachers.fast_paths.usage import enabled, set_enabled

    set_enabled(wanted == "fast")
    try:
        return "fast" if enabled() else "plain"
    except ValueError as error:
        raise UserError(f"{error}.") from None


def with_accelerator(config: _Config) -> _Config:
    """Set up this process -> the config with ``accelerator`` as it is in force here, for processes on other nodes."""
    wanted: Literal["fast", "plain"] = getattr(config, "accelerator")  # noqa: B009 - a key of each config of models
    return config.model_copy(update={"accelerator": use_accelerator(wanted)})
