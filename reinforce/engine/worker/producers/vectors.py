"""Tables of vectors, which image and text embeddings share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.dataset import vectors
from reinforce.dataset.codecs.codebooks import load
from reinforce.dataset.codecs.registry import find_codec
from reinforce.dataset.layers import Layer
from reinforce.engine.messages.results import raising_layer_failure
from reinforce.engine.worker.producers.base import Mask, Producer, RowGroup
from schemas import Reason

Floats = npt.NDArray[np.float32]


class Embeddings(Producer):
    """Layers of vectors. A row that is not finite, or has a vector of length 0 in its codec, is null and refused."""

    @abstractmethod
    def vectors(self, layer: Layer, group: RowGroup) -> tuple[Floats, Mask]:
        """Computed embeddings [rows, count, dim], and which rows have some [rows]; records why others have none."""

    def table(self, layer: Layer, group: RowGroup) -> pa.Table:
        codec = find_codec(layer.dtype)
        shape = (len(group.rows), layer.count, layer.dim or 0)
        values, valid = np.zeros(shape, np.float32), np.zeros(shape[0], bool)
        if layer in self.computed:
            values, valid = self.vectors(layer, group)
            values = codec.prepare(values)
        codes: dict[int, Any] = {}  # of labels, which are stored as they are
        for place, value in self.labels(layer, group.rows):
            valid[place] = True
            if codec.fitted:
                codes[place] = value
            else:
                values[place] = value
        finite = np.asarray(np.isfinite(values).all(axis=(1, 2)))
        valid = self.refuse_not_finite(layer, group, valid, finite)
        lengths = vectors.with_length(values)
        lengths[[*codes]] = True
        valid = self.refuse(layer, group, valid, lengths, Reason.ZERO_VECTOR, vectors.zero_vector(codec))
        codebook = layer.codebook_at(self.session.config.output)
        if codebook is not None:
            load(codebook).codec.require_encoder()  # what is lost or missing ends the run: no model is the cause
        with raising_layer_failure(layer.name):
            columns = vectors.encode_as(values, codec, codebook, valid)
        if codes:
            columns = [vectors.with_rows(columns[0], codes)]
        table = pa.table([pa.array(group.keys, pa.string()), *columns], schema=self.schema(layer))
        return table.replace_schema_metadata(None if codebook is None else codebook.metadata())
