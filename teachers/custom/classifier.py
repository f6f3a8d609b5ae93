"""Classifiers: models of timm by name, and classes of the user's, that give logits of classes for images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from teachers.custom.family import ClassSpec, hash_of_code
from teachers.protocols import ImageSpec
from teachers.spec import ModelInfo, ModelSpec
from teachers.timm.family import check_source, hosts_of, model_identity

if TYPE_CHECKING:
    import torch

    from teachers.runtime.accelerator import Accelerator

#: Bounds of temperatures: with others, logits or their loss leave the range of float32.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 1e3


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
        None, alias="class", description="a custom class, package.module:Class; see teachers/custom/classifier.py"
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
