"""k nearest neighbours: each test image gets the class of the most similar training images, as in DINO's evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, field_validator

from reinforce.evaluation.kinds.parts import Features, TwoPartSet, two_part_kind
from reinforce.evaluation.report import Metrics

if TYPE_CHECKING:
    from teachers.runtime.accelerator import Accelerator


class KnnSet(TwoPartSet):
    """A set on which the nearest training images of an image vote for its class, each with exp(cosine / temperature).

    Needs no texts. The metrics are ``kK/top1`` for each number K of neighbours.
    """

    k: list[Annotated[int, Field(ge=1)]] = Field(
        [10, 20, 100, 200], min_length=1, description="numbers of neighbours; each gives a metric"
    )
    temperature: float = Field(0.07, gt=0, description="temperature of the votes")

    @field_validator("k")
    @classmethod
    def _check_k(cls, k: list[int]) -> list[int]:
        if len({*k}) < len(k):
            raise ValueError("k: a number is there twice; remove it")
        return k

    @property
    def scores(self) -> list[str]:
        return [f"k{count}/top1" for count in self.k]

    def fault(self, counts: np.ndarray) -> str | None:
        if max(self.k) <= (images := int(counts.sum())):
            return None
        return (
            f"k of {max(self.k)} neighbours is above the {images:,} usable images of the training part: set `k` to "
            f"smaller numbers, such as [{min(10, images)}]."
        )


def _classify(config: TwoPartSet, features: Features, accelerator: Accelerator) -> Metrics:
    import torch

    from reinforce.evaluation.probing import classify

    assert isinstance(config, KnnSet)
    accelerator = accelerator.of_float64("nearest neighbours")
    labels, true = (torch.from_numpy(part) for part in (features.train_labels, features.test_labels))
    found = classify(features.train, labels, features.test, config.k, config.temperature, accelerator)
    return {f"k{count}/top1": float((predicted == true).double().mean()) for count, predicted in found.items()}


KIND = two_part_kind("knn", _classify)
