"""Families of models: their config, how they are described while planning and loaded in the workers.

A family is a package with a module ``family.py``, and one line of ``FAMILIES``. Models and torch are imported when one
is loaded.
"""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

from pydantic import Field, GetCoreSchemaHandler, create_model
from pydantic_core import CoreSchema, core_schema

from teachers.fast_paths.usage import in_force, loading
from teachers.spec import CaptionerSpec, ModelInfo, ModelSpec, TeacherSpec


class Family(NamedTuple):
    """The classes that a family derives from ``TeacherSpec`` and ``CaptionerSpec``, as ``package.module:Class``."""

    teacher: str | None = None
    captioner: str | None = None


#: Key of the family whose entries have ``class`` instead of ``family``.
_CLASS = "class"
#: Families by the value of ``family``.
FAMILIES: dict[str, Family] = {
    "open_clip": Family("teachers.open_clip.family:OpenClipTeacherSpec", "teachers.open_clip.family:CocaSpec"),
    "transformers": Family(
        "teachers.transformers.family:TransformersTeacherSpec", "teachers.transformers.family:TransformersCaptionerSpec"
    ),
    "timm": Family("teachers.timm.family:TimmTeacherSpec"),
    "published": Family("teachers.published:PublishedTeacherSpec", "teachers.published:PublishedCaptionerSpec"),
    "openai": Family(captioner="teachers.server.family:ServerCaptionerSpec"),
    _CLASS: Family("teachers.custom:ClassTeacherSpec", "teachers.custom:ClassCaptionerSpec"),
}


def teacher_spec(**values: Any) -> TeacherSpec:
    """Validate the keys of a teacher. Raises pydantic's ValidationError, which is a ValueError."""
    return AnyTeacher.model_validate(values)


def describe_model(name: str, spec: ModelSpec) -> ModelInfo:
    """Describe a model without loading it. Raises ValueError or OSError that names the model and the fix."""
    with _errors_naming(spec.label.format(name)):
        return spec.describe()


def load_model(name: str, spec: ModelSpec, device: str) -> Any:
    """Load a model with its weights on a device (``auto``, ``cpu``, ``cuda:0``, ...).

    Raises ValueError, OSError (FileNotFoundError included) for a wrong config and RuntimeError for errors in the
    model's own code. Each message starts with the model's name.
    """
    with _errors_naming(spec.label.format(name)), loading(name):
        return in_force(spec).load(name, device)


@contextmanager
def _errors_naming(what: str) -> Iterator[None]:
    """Prefix the message of every error with ``what``; errors of other types become RuntimeError."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what}: {error}") from error
    except OSError as error:
        raise OSError(f"{what}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
            raise  # of the program, by its handler of the signal, and not of the model's code
        raise RuntimeError(f"{what}: {type(error).__name__}: {error}") from error


def _specs(role: str) -> dict[str, type[ModelSpec]]:
    """The classes of all families with such models, by family."""
    paths = {name: path.split(":") for name, family in FAMILIES.items() if (path := getattr(family, role))}
    return {name: getattr(importlib.import_module(module), spec) for name, (module, spec) in paths.items()}


class _AnyFamily:
    """Base of the classes in configs. They have the keys of all families, for JSON schemas, pages and messages.

    Validation returns the spec of the family that a mapping names: a union discriminated by ``family``. A union of
    pydantic would divide the JSON schema and could not discriminate by ``class``.
    """

    role: ClassVar[str]
    base: ClassVar[type[ModelSpec]]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        keys = dict(handler.resolve_ref_schema(handler(source)))
        ref = keys.pop("ref")  # of the whole, so that JSON schemas name it
        as_its_class = core_schema.wrap_serializer_function_ser_schema(
            lambda value, serialize: serialize(value), schema=core_schema.any_schema()
        )
        return core_schema.no_info_wrap_validator_function(cls._validate, keys, ref=ref, serialization=as_its_class)

    @classmethod
    def _validate(cls, value: Any, handler: Callable[[Any], Any]) -> Any:
        if type(value) is cls.base:  # made in Python, with the common keys alone
            value = value.model_dump(exclude_unset=True)
        elif isinstance(value, cls.base):
            return value
        family = value.get("family", "open_clip") if isinstance(value, Mapping) else None
        if not isinstance(family, str) or family not in FAMILIES or family == _CLASS:
            return handler(value)  # raises what is wrong
        specs = _specs(cls.role)
        if family not in specs:
            [other] = {"teacher", "captioner"} - {cls.role}
            names = ", ".join(name for name in specs if name != _CLASS)
            raise ValueError(f"family {family} is for {other}s; {cls.role}s are of {names} or a `class`")
        if value.get(_CLASS, value.get("class_")) is not None:
            if not specs[family].uses_precision:
                raise ValueError(f"class: not used with family {family}; remove it")
            family = _CLASS
        own, foreign = specs.pop(family), set()
        for name, spec in specs.items():
            theirs = spec.model_fields.keys() - own.model_fields.keys()
            if given := [key for key in value if key in theirs and value[key] is not None]:
                raise ValueError(f"{', '.join(given)}: used only with family {name}; remove it")
            foreign |= theirs
        return own.model_validate({key: item for key, item in value.items() if key not in foreign})


class _AnyTeacher(_AnyFamily):
    role, base = "teacher", TeacherSpec


class _AnyCaptioner(_AnyFamily):
    role, base = "captioner", CaptionerSpec


def _with_keys(kind: type[_AnyFamily]) -> Any:
    """The class of all families' keys. It is named as its base, since JSON schemas show the name."""
    names: Any = Literal[tuple(name for name in FAMILIES if name != _CLASS)]
    family: Any = (names, Field("open_clip", description=kind.base.model_fields["family"].description))
    parents: Any = (kind, *_specs(kind.role).values())
    return create_model(kind.base.__name__, __base__=parents, __doc__=kind.base.__doc__, family=family)


if TYPE_CHECKING:
    AnyTeacher: TypeAlias = TeacherSpec
    AnyCaptioner: TypeAlias = CaptionerSpec
else:
    AnyTeacher, AnyCaptioner = _with_keys(_AnyTeacher), _with_keys(_AnyCaptioner)
