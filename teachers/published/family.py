"""Models whose outputs are read from the config's ``reinforcements``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

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
    used = ("columns", "logit_scale", "dtype")

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
