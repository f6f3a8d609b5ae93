"""A class of the user's, named by ``class``. It is imported while planning already, and may import anything."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast

from pydantic import Field, model_validator

from teachers.decoding.postprocess import cleaning_identity
from teachers.protocols import LEAST_TEMPERATURE, MOST_TEMPERATURE, Captioner, ImageSpec, Scorer, Teacher
from teachers.redact import redact_values
from teachers.spec import (
    CHAT_FIELDS,
    DECODING_FIELDS,
    CaptionerSpec,
    ModelInfo,
    ModelSpec,
    TeacherSpec,
)
from teachers.timm.family import check_source, hosts_of, model_identity

if TYPE_CHECKING:
    import torch

    from teachers.runtime.accelerator import Accelerator


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


class Classifier(Protocol):
    """A model that gives logits of classes for images.

    A class of your own needs no base class. Name it by ``classifiers: {NAME: {class: package.module:Class}}``; it is
    built as ``Class(device, **options)``, and its ``version`` is that of a teacher (see ``teachers.protocols``).
    """

    #: Number of classes.
    classes: int
    #: Preprocessing of ``pixels``.
    image: ImageSpec
    #: Names of the classes, in their order; optional.
    names: Sequence[str]

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Classify float32 [B, 3, H, W] on the device, preprocessed by ``image`` -> floating point [B, classes].

        The result are logits. A row with NaN or infinity is stored as null and quarantined as ``not_finite``; a logit
        of minus infinity is that of a class of probability 0.
        """
        ...


class ClassifierSpec(ModelSpec):
    """One entry of ``classifiers:``, a model of timm or a custom class whose most likely classes are stored."""

    section: ClassVar[str] = "classifiers"
    label: ClassVar[str] = "classifier {}"
    methods: ClassVar[tuple[str, ...]] = ("classify",)
    takes_options: ClassVar[bool] = True

    family: Literal["timm"] = Field("timm", description="library that `model` belongs to")
    model: str | None = Field(
        None,
        description="name of a model of timm with its tag, such as resnet50.a1_in1k, hf-hub:ORG/REPO, or "
        "local-dir:PATH",
    )
    pretrained: str | None = Field(
        None, description="checkpoint file by path or fsspec URI; default: the weights that timm names"
    )
    class_: str | None = Field(
        None, alias="class", description="a custom class, package.module:Class; see teachers/custom.py"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments of the custom class, or of timm.create_model, such as num_classes",
    )
    k: int = Field(20, ge=1, le=4096, description="most likely classes that are stored, with their probabilities")
    temperature: float = Field(
        1.0,
        ge=LEAST_TEMPERATURE,
        le=MOST_TEMPERATURE,
        description="by which logits are divided before the softmax",
    )
    sees: Literal["crops", "image"] = Field(
        "crops", description="crops: each augmented image; image: the image as a whole, once"
    )

    @property
    def uses_precision(self) -> bool:  # type: ignore[override]
        return self.class_ is None

    @property
    def imports(self) -> str | None:
        return self.class_

    @model_validator(mode="after")
    def _check_model(self) -> ClassifierSpec:
        if self.class_ is not None:
            _ = self._class  # raises what is wrong
        elif self.precision == "fp8":
            raise ValueError("`precision: fp8` is for image towers of teachers: set bf16 or auto")
        else:
            check_source(self.name)
        return self

    @property
    def _class(self) -> ClassSpec:
        """The custom class, with the keys of this entry that it uses."""
        return ClassSpec(class_=self.class_, options=self.options, pretrained=self.pretrained, precision=self.precision)

    def describe(self) -> ModelInfo:
        if self.class_ is not None:
            cls = self._class.import_class()
            if not callable(getattr(cls, "classify", None)):
                raise ValueError(f"class {self.class_} has no method `classify(pixels)`")
            classes = getattr(cls, "classes", None)
            dim = classes if isinstance(classes, int) else None
            return ModelInfo(dim, True, False, self._class.identity(cls), hash_of_code(cls))
        return ModelInfo(dim=None, images=True, texts=False, identity=model_identity(self))

    def load(self, name: str, device: str) -> Any:
        """The classifier with its number of classes as ``dim``."""
        if self.class_ is not None:
            classifier = self._class.build(device)
            self._class.check_image(classifier, "classifies images")
            classifier.dim = getattr(classifier, "classes", None)
            if not isinstance(classifier.dim, int) or classifier.dim < 1:
                raise ValueError(f"class {self.class_} must set `classes`, their number, got {classifier.dim!r}")
        else:
            from teachers.runtime.accelerator import Accelerator

            classifier = _Timm(self, Accelerator(device, self.precision))
        return classifier

    def stated_by(self, model: Any) -> dict[str, Any]:
        names = getattr(model, "names", None)
        if not isinstance(names, list | tuple) or len(names) != model.dim:
            return {"dim": model.dim}
        return {"dim": model.dim, "names": [str(name) for name in names]}

    def hosts(self) -> Iterator[str]:
        return hosts_of(self) if self.class_ is None else iter(())


class _Timm:
    """A model of timm by its spec. Raises ValueError or FileNotFoundError for a wrong spec."""

    def __init__(self, spec: ClassifierSpec, accelerator: Accelerator) -> None:
        from teachers.timm.teacher import image_spec, load_model

        model = load_model(spec)
        self.dim = int(model.num_classes)
        if self.dim < 1:
            raise ValueError(f"model {spec.name} has no classes: set `num_classes` in `options`")
        self.image = image_spec(model, spec)
        self.names = model.pretrained_cfg.get("label_names")
        self._model, self._accelerator = accelerator.prepare(model), accelerator

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        with self._accelerator.forward():
            logits: torch.Tensor = self._model(self._accelerator.layout(pixels)).float()
            return logits
