"""Sections of `loss` in the config of a student."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from reinforce.config_schema import InSchema, either
from reinforce.settings import Section


class Anchor(Section):
    """What keeps a fine-tuned student near its start; each part is added to the loss by its weight, for any lambda."""

    teacher: str | None = Field(
        None,
        min_length=1,
        description="the stored (or online) teacher that is the student before its fine-tuning, for `similarities` and "
        "`features`; it is read in addition to `data.teachers`, and no part of the ensemble",
    )
    similarities: float | None = Field(
        None, gt=0, description="weight of distilling the similarities of images and texts of `teacher` alone"
    )
    features: float | None = Field(
        None, gt=0, description="weight of 1 - cosine of the student's vectors and those of `teacher`, not projected"
    )
    weights: float | None = Field(
        None, gt=0, description="weight of half the squared distance of all weights from their start (L2-SP)"
    )

    @model_validator(mode="after")
    def _teacher_of_parts(self) -> Anchor:
        stored = self.similarities or self.features
        if stored and self.teacher is None:
            raise ValueError("`similarities` and `features` need `teacher`: the name of the student's stored vectors")
        if not stored and (self.teacher is not None or self.weights is None):
            raise ValueError("set a weight: `similarities` or `features` of `teacher`, or `weights`")
        return self


def _as_dense_loss(value: Any) -> Any:
    """Accept the weight alone."""
    return {"weight": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


class DenseLoss(Section):
    """How the student's spatial map approaches the patch vectors of teachers; see student/terms/dense.py."""

    weight: float = Field(gt=0, description="weight of the loss, which is added to the others, whichever lambda is")
    teachers: list[str] | None = Field(
        None, min_length=1, description="teachers whose patches are learnt; default: all that have some"
    )
    stage: int = Field(
        -1, description="stage or block of the image tower whose output is the map, from the end if negative"
    )
    cosine: float = Field(0.9, ge=0, description="weight of 1 - cosine of each patch")
    smooth_l1: float = Field(0.1, ge=0, description="weight of the smooth L1 distance of each number")

    @model_validator(mode="after")
    def _some_distance(self) -> DenseLoss:
        if not self.cosine + self.smooth_l1:
            raise ValueError("`cosine` and `smooth_l1` are both 0, so nothing would be learnt; set one")
        return self


#: Also a weight alone.
DenseOrWeight = Annotated[
    DenseLoss | None,
    BeforeValidator(_as_dense_loss),
    InSchema(lambda section: either({"exclusiveMinimum": 0, "type": "number"}, section)),
]
