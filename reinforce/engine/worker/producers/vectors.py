"""Tables of vectors, which image and text embeddings share."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.dataset import vectors
from reinforce.dataset.layers import Layer
from reinforce.engine.messages.results import raising_layer_failure
from reinforce.engine.worker.producers.base import Producer, RowGroup
from reinforce.source.samples import Refusal
from schemas import Reason

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


class Embeddings(Producer):
    """Layers of vectors. A row that is not finite is null and refused."""

    @abstractmethod
    def vectors(self, layer: Layer, group: RowGroup) -> tuple[Floats, Mask]:
        """Computed embeddings [rows, count, dim], and which rows have some [rows]; records why others have none."""

    @staticmethod
    def smaller_model(layer: Layer) -> str:
        """What to change in the config if one input does not fit."""
        return f"teachers.{layer.model}: a smaller model, or `precision: bf16`"

    def table(self, layer: Layer, group: RowGroup) -> pa.Table:
        values, valid = self._published_vectors(layer, group) if layer.published else self.vectors(layer, group)
        for i, row in enumerate(group.rows if layer.labels is not None and not layer.published else ()):
            if self.has_label(layer, row):
                values[i], valid[i] = self.label(layer, row), True
        finite = np.isfinite(values).all(axis=(1, 2))
        for key, refused in zip(group.keys, valid & ~finite, strict=True):
            if refused:
                detail = f"{layer.model} returned NaN or infinity"
                self.refusals.add(layer.name, Refusal(key, Reason.NOT_FINITE, detail))
        with raising_layer_failure(layer.name):
            columns = vectors.encode(values, layer.dtype, valid & finite)
        return pa.table([pa.array(group.keys, pa.string()), *columns], schema=self.schema(layer))

    def _published_vectors(self, layer: Layer, group: RowGroup) -> tuple[Floats, Mask]:
        found = self.published(layer, group)
        values = np.zeros((len(found), layer.count, layer.dim or 0), np.float32)
        valid = np.array([value is not None for value in found], bool)
        for i in np.flatnonzero(valid):
            values[i] = found[i]
        return values, valid
