"""A class of the user's, named by ``class``. It is imported while planning already, and may import anything."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import model_validator

from teachers.decoding.postprocess import cleaning_identity
from teachers.protocols import Captioner, ImageSpec, Scorer, Teacher
from teachers.redact import redact_values
from teachers.spec import CHAT_FIELDS, DECODING_FIELDS, CaptionerSpec, ModelInfo, ModelSpec, TeacherSpec


class ClassSpec(ModelSpec):
    """A class, and the keyword arguments that it is built with."""

    uses_precision: ClassVar[bool] = False
    takes_options: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_class(self) -> ClassSpec:
        module, _, name = self.imports.partition(":")
        if not module or not name:
            raise ValueError(f"`class` must be package.module:Class, got {self.class_!r}")
        if self.pretrained is not None:
            raise ValueError("`pretrained` belongs to `model`; pass weights to your class in `options`")
        return self

    @property
    def imports(self) -> str:
        assert self.class_ is not None
        return self.class_

    def import_class(self) -> type:
        """Import the class and check the options against its ``__init__``. Raises ValueError."""
        module_name, _, class_name = self.imports.partition(":")
        cls = import_named(self.imports)
        if not isinstance(cls, type):
            file = sys.modules[module_name].__file__
            raise ValueError(f"class {self.class_}: {file} has a {type(cls).__name__} of that name, not a class")
        if self.precision not in ("auto", "fp32"):
            raise ValueError("`precision` is not used with `class`; pass it to your class in `options`")
        try:
            json.dumps(self.options)
        except TypeError as error:
            raise ValueError(f"options of {self.class_}: {error}; use numbers, strings, lists and mappings") from error
        signature = inspect.signature(cls)
        first = next(iter(signature.parameters.values()), None)
        if first is None or first.kind is first.KEYWORD_ONLY or first.name in self.options:
            raise ValueError(
                f"class {self.class_}: its signature is {class_name}{signature}, and it is built with a torch.device "
                "first: add `device` as the first parameter of its `__init__`, before those of `options`"
            )
        try:
            signature.bind("device", **self.options)
        except TypeError as error:
            raise ValueError(f"options of {self.class_}: {error}; its signature is {class_name}{signature}") from error
        return cls

    def build(self, device: str) -> Any:
        from teachers.runtime.accelerator import Accelerator

        return self.import_class()(Accelerator(device).device, **self.options)

    def check_image(self, model: Any, why: str) -> None:
        """Raise ValueError unless a model states its preprocessing."""
        image = getattr(model, "image", None)
        if not isinstance(image, ImageSpec):
            raise ValueError(
                f"class {self.class_} {why} and must set `image` to a teachers.protocols.ImageSpec, got {image!r}"
            )

    def identity(self, cls: type) -> dict[str, Any]:
        identity: dict[str, Any] = {"class": self.class_, "options": redact_values(self.options)}
        version = getattr(cls, "version", None)
        if isinstance(version, (str, int, float)):
            identity["version"] = version
        return identity


class ClassTeacherSpec(ClassSpec, TeacherSpec):
    def describe(self) -> ModelInfo:
        cls = self.import_class()
        if given := [key for key in self.fast_paths if getattr(self, key) is not None]:
            raise ValueError(f"`{given[0]}` is not used with `class`; make your class fast itself")
        images = callable(getattr(cls, "encode_images", None)) and getattr(cls, "image", "unset") is not None
        texts = callable(getattr(cls, "encode_texts", None))
        if not images and not texts:
            raise ValueError(f"class {self.class_} has neither `encode_images` nor `encode_texts`")
        dim = getattr(cls, "dim", None)
        return ModelInfo(dim if isinstance(dim, int) else None, images, texts, self.identity(cls), hash_of_code(cls))

    def load(self, name: str, device: str) -> Teacher:
        teacher = self.build(device)
        dim = getattr(teacher, "dim", None)
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"class {self.class_} must set `dim`, the length of its embeddings, got {dim!r}")
        if callable(getattr(teacher, "encode_images", None)):
            if getattr(teacher, "image", "unset") is not None:
                self.check_image(teacher, "has `encode_images`")
        else:
            teacher.image = None
        if self.logit_scale is not None or not hasattr(teacher, "logit_scale"):
            teacher.logit_scale = self.logit_scale
        return cast(Teacher, teacher)


class ClassCaptionerSpec(ClassSpec, CaptionerSpec):
    @property
    def count(self) -> int:
        stated = None if "captions" in self.model_fields_set else self._stated(self.import_class())
        return self.captions if stated is None else stated

    def describe(self) -> ModelInfo:
        cls = self.import_class()
        if not callable(getattr(cls, "caption", None)):
            raise ValueError(f"class {self.class_} has no method `caption(pixels, seeds)`")
        if given := [field for field in (*DECODING_FIELDS, *CHAT_FIELDS) if field in self.model_fields_set]:
            raise ValueError(f"{', '.join(given)}: not used with `class`; pass them to your class in `options`")
        self._check_captions(self._stated(cls))
        identity = {**self.identity(cls), "captions": self.count, **cleaning_identity(self.clean)}
        return ModelInfo(dim=None, images=True, texts=False, identity=identity, code=hash_of_code(cls))

    def load(self, name: str, device: str) -> Captioner:
        captioner = self.build(device)
        self.check_image(captioner, "captions images")
        captions = getattr(captioner, "captions", None)
        self._check_captions(captions)
        captioner.captions = self.count
        return cast(Captioner, captioner)

    def _stated(self, cls: type) -> int | None:
        """Captions of an image by ``options``, the class's attribute or its argument's default; None if not stated."""
        parameter = inspect.signature(cls).parameters.get("captions")
        default = None if parameter is None else parameter.default
        numbers = (self.options.get("captions"), getattr(cls, "captions", None), default)
        return next((number for number in numbers if isinstance(number, int) and number > 0), None)

    def _check_captions(self, captions: Any) -> None:
        """Raise ValueError if the class gives another number of captions."""
        if captions not in (None, self.count):
            raise ValueError(
                f"class {self.class_} gives {captions} captions an image, not {self.count}: set `captions: {captions}` "
                "or change the class"
            )


#: What a scorer can see besides layers.
PIXELS, CAPTION, METADATA = "pixels", "caption", "metadata"


class ClassScorerSpec(ClassSpec):
    """The class of an entry of ``scores``; ``inputs`` and ``names`` replace the class's own."""

    section: ClassVar[str] = "scores"
    label: ClassVar[str] = "scores.{}"
    methods: ClassVar[tuple[str, ...]] = ("score",)

    inputs: list[str] | None = None
    names: list[str] | None = None

    def describe(self) -> ModelInfo:
        cls = self.import_class()
        score = getattr(cls, "score", None)
        if not callable(score):
            raise ValueError(f"class {self.class_} has no method `score`")
        inputs, names = self._texts(cls, "inputs"), self._texts(cls, "names")
        if wrong := [one for one in inputs if one not in (PIXELS, CAPTION, METADATA) and "/" not in one]:
            raise ValueError(
                f"class {self.class_} has the input {wrong[0]!r}; use {PIXELS}, {CAPTION}, {METADATA}, or a layer such "
                "as embeddings/TEACHER/images or captions/CAPTIONER"
            )
        if PIXELS in inputs and (others := [one for one in inputs if one not in (PIXELS, CAPTION)]):
            raise ValueError(
                f"class {self.class_} sees {PIXELS} and {', '.join(others)}, which are not computed at the same time; "
                f"beside {PIXELS} use {CAPTION} alone, or make two scores"
            )
        signature = inspect.signature(score)
        try:
            signature.bind(*range(1 + len(inputs)))
        except TypeError as error:
            raise ValueError(
                f"class {self.class_}: score{signature} does not take its inputs {', '.join(inputs)}: {error}"
            ) from error
        identity = {**self.identity(cls), "inputs": inputs, "names": names}
        return ModelInfo(None, PIXELS in inputs, CAPTION in inputs, identity, hash_of_code(cls))

    def load(self, name: str, device: str) -> Scorer:
        scorer = self.build(device)
        if PIXELS in self._texts(type(scorer), "inputs"):
            self.check_image(scorer, f"sees {PIXELS}")
        return cast(Scorer, scorer)

    def _texts(self, cls: type, key: Literal["inputs", "names"]) -> list[str]:
        """``inputs`` or ``names``, of the config or the class. Raises ValueError."""
        given = getattr(self, key)
        found = getattr(cls, key, None) if given is None else given
        if not isinstance(found, (list, tuple)) or not found or not all(one and isinstance(one, str) for one in found):
            raise ValueError(f"class {self.class_} must set `{key}` to a list of texts, got {found!r}")
        if len({*found}) < len(found):
            raise ValueError(f"class {self.class_}: `{key}` has a text twice: {', '.join(found)}")
        return [*found]


def import_named(path: str) -> Any:
    """What ``package.module:Name`` names. Raises ValueError.

    The working folder is searched, too, after the installed packages: a file in it replaces none of them.
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing the module may raise anything
        raise ValueError(
            f"class {path} cannot be imported: {type(error).__name__}: {error}. "
            "Install its package, or put its folder on PYTHONPATH."
        ) from error
    found = getattr(module, name, None)
    if found is None:
        raise ValueError(f"class {path}: {module.__file__} has no such name")
    return found


def hash_of_code(cls: type) -> str | None:
    """Hash of the file that defines a class -> 16 hex digits; None if there is none."""
    try:
        path = inspect.getsourcefile(cls)
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest() if path else None
    except (OSError, TypeError):
        return None
