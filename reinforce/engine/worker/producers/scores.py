"""Scores: computed from the layers that are stored, or computed beside them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from reinforce.dataset.layers import Layer, model_of
from reinforce.dataset.scoring.registry import make_scorer
from reinforce.engine.inference.session import Session
from reinforce.engine.messages.results import raising_layer_failure
from reinforce.engine.worker.producers.base import Producer, RowGroup
from reinforce.engine.worker.refusals import Refusals


class Scores(Producer):
    kind = "scores"

    def __init__(
        self, layers: Iterable[Layer], session: Session, refusals: Refusals | None = None, source: str = ""
    ) -> None:
        super().__init__(layers, session, refusals, source)
        self._scorers = {layer.name: make_scorer(session.config.scores[model_of(layer.name)]) for layer in self.layers}

    @property
    def sample_columns(self) -> set[str]:
        return {column for scorer in self._scorers.values() for column in scorer.columns}

    def table(self, layer: Layer, group: RowGroup) -> pa.Table:
        what = f"{len(group.keys)} rows"
        with self.session.watch.stage(layer.name, what), raising_layer_failure(layer.name):
            scores = self._scorers[layer.name].scores(group)
            columns = [np.asarray(scores[name], np.float32) for name in layer.names]
        schema = self.schema(layer)
        arrays = [pa.array(values, mask=~np.isfinite(values)) for values in columns]
        scores = pa.StructArray.from_arrays(arrays, fields=[*schema.field("scores").type])
        return pa.table([pa.array(group.keys, pa.string()), scores], schema=schema)
