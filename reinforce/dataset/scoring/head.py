"""A linear head on a teacher's embeddings of the images, as scores of aesthetics or of unsafe content are made."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from reinforce.config import Score
from reinforce.dataset.layers import embeddings_layer
from reinforce.dataset.scoring.base import Floats, Scorer, StoredRows
from teachers import weights


class Head(Scorer):
    """``weight`` [N, D] or [D] and ``bias`` [N] of a safetensors file, applied to each augmented image of a row.

    Each output gives its mean and its maximum over the augmentations: ``score_mean`` and ``score_max``.
    """

    key = "head"

    def __init__(self, spec: Score, version: int | None = None) -> None:
        assert spec.head is not None
        assert spec.teacher is not None
        self._file, self._teacher, self._outputs = spec.head, spec.teacher, spec.names
        self.names = tuple(f"{name}_{statistic}" for name in self._outputs for statistic in ("mean", "max"))
        self.needs = (embeddings_layer(spec.teacher, "images"),)

    def identity(self) -> dict[str, Any]:
        return {"head": weights.identity(self._file), "teacher": self._teacher, "names": self._outputs}

    @cached_property
    def _parameters(self) -> tuple[Floats, Floats]:
        """Weights [N, D] and biases [N]. Raises ValueError."""
        from safetensors.numpy import load_file

        tensors = load_file(weights.fetch(self._file))
        if "weight" not in tensors or tensors.keys() - {"weight", "bias"}:
            found = ", ".join(sorted(tensors)[:5])
            raise ValueError(f"{self._file} must have `weight` [N, D], and may have `bias` [N]; it has {found}")
        weight = np.atleast_2d(tensors["weight"].astype(np.float32))
        bias = np.atleast_1d(tensors.get("bias", np.zeros(len(weight))).astype(np.float32))
        if weight.ndim != 2 or bias.shape != (len(weight),) or len(weight) != len(self._outputs):
            raise ValueError(
                f"{self._file}: weight {list(tensors['weight'].shape)} and bias {list(bias.shape)} do not give "
                f"{len(self._outputs)} outputs; set `names` to one name for each output"
            )
        return weight, bias

    def scores(self, rows: StoredRows) -> Mapping[str, Floats]:
        weight, bias = self._parameters
        vectors = rows.values(self.needs[0])
        if vectors.shape[2] != weight.shape[1]:
            raise ValueError(f"{self._file} is for vectors of {weight.shape[1]} numbers, not {vectors.shape[2]}")
        outputs = vectors @ weight.T + bias
        means, largest = outputs.mean(axis=1), outputs.max(axis=1)
        found: dict[str, Floats] = {}
        for n, name in enumerate(self._outputs):
            found |= {f"{name}_mean": means[:, n], f"{name}_max": largest[:, n]}
        return found
