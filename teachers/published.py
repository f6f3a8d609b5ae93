"""Models whose outputs others have published, as ``reinforcements`` or as labels, and what a config takes of labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from teachers.spec import CaptionerSpec, ModelInfo, ModelSpec, TeacherSpec


class Published(ModelSpec):
    """Only these keys are used, since no model is loaded."""

    uses_precision: ClassVar[bool] = False
    published: ClassVar[bool] = True
    used: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _check_used(self) -> Published:
        if unused := self.model_fields_set - {"family", "model", *self.used}:
            raise ValueError(f"{', '.join(sorted(unused))}: not used with family published; remove it")
        return self


class PublishedTeacherSpec(Published, TeacherSpec):
    used = ("columns", "logit_scale", "codec", "codec_sample")

    columns: tuple[int, int] | None = Field(
        None,
        strict=False,
        description="family published: first and end column of its vectors in the published embeddings",
    )

    @model_validator(mode="after")
    def _check_columns(self) -> PublishedTeacherSpec:
        if self.columns is None:
            raise ValueError("`columns` and `family: published` require each other, as in `columns: [0, 768]`")
        if not 0 <= self.columns[0] < self.columns[1]:
            raise ValueError(f"columns: expected 0 <= first < end, got {[*self.columns]}")
        if self.logit_scale is None:
            raise ValueError("a teacher of family published needs `logit_scale`, since no model is loaded that has one")
        return self

    def describe(self) -> ModelInfo:
        assert self.columns is not None
        first, end = self.columns
        identity = {"family": self.family, "model": self.model, "columns": [first, end]}
        return ModelInfo(end - first, images=True, texts=True, identity=identity)


class PublishedCaptionerSpec(Published, CaptionerSpec):
    used = ("captions",)

    def describe(self) -> ModelInfo:
        identity = {"family": self.family, "texts": self.model, "captions": self.captions}
        return ModelInfo(dim=None, images=True, texts=False, identity=identity)


#: What may join labels and images, strongest first.
JOINS = ("uid", "sha256", "digest", "url", "key")
if TYPE_CHECKING:
    Join = str
else:
    Join = Literal[JOINS]


@dataclass(frozen=True)
class Taken:
    """The part of labels that is taken, by their dataset.json: entries of ``layers`` by name, the fingerprint of their
    samples, and the image policy on which their crops were made."""

    layers: Mapping[str, Mapping[str, Any]]
    samples: str
    image_policy: str
    count: int  # augmentation records of a sample
    embedded: bool = False  # whether the images are there, and their digests in the index alone

    @property
    def crops(self) -> bool:
        """Whether vectors of augmented images are taken, and so the augmentation records."""
        return any(name.endswith("/images") for name in self.layers)

    def identity(self, name: str, join: str) -> dict[str, Any]:
        """The part of the labels that the fingerprints of a model's layers cover; empty if nothing is taken."""
        layers = {
            layer: str(entry["fingerprint"]) for layer, entry in self.layers.items() if layer.split("/")[1] == name
        }
        return {"labels": {"join": join, "layers": layers}} if layers else {}


class Labels(BaseModel):
    """Labels that others have published as a dataset, with or without images, and what is taken of them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    url: str = Field(min_length=1, description="folder or fsspec URI, as written by `reinforce export labels`")
    layers: list[str] = Field(
        min_length=1,
        description="layers that are taken: captions/NAME, embeddings/NAME (all of a teacher) or embeddings/NAME/TEXTS",
    )
    join: Join = Field(
        "url",
        description="weakest agreement that joins samples and labels: uid, sha256, digest, url; key: also by key, "
        "where neither side states anything else",
    )
    _taken: Taken | None = PrivateAttr(None)

    def taking(self, taken: Taken) -> Labels:
        """These labels, with what is taken of them."""
        copy = self.model_copy()
        copy._taken = taken
        return copy

    @property
    def taken(self) -> Taken:
        """What is taken; a plan reads it before anything else."""
        assert self._taken is not None, "the labels have not been read"
        return self._taken


class LabelTeacherSpec(Published, TeacherSpec):
    """A teacher that is only in labels."""

    used = ("logit_scale", "codec", "codec_sample", "info", "image")

    info: ModelInfo
    image: dict[str, Any] | None = None

    @property
    def stated(self) -> Mapping[str, Any]:
        return {"dim": self.info.dim, "image": self.image}

    def describe(self) -> ModelInfo:
        return self.info


class LabelCaptionerSpec(Published, CaptionerSpec):
    """A captioner that is only in labels."""

    used = ("captions", "info")

    info: ModelInfo

    def describe(self) -> ModelInfo:
        return self.info
