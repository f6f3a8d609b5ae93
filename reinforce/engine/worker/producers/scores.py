"""Scores: computed from the layers that are stored, or computed beside them, or by classes of the user's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from reinforce.config import Config
from reinforce.dataset.kinds.scores import make_scorer
from reinforce.dataset.layers import SAMPLES, Layer, model_of
from reinforce.engine.messages import raising_layer_failure
from reinforce.engine.worker.decode import Row
from reinforce.engine.worker.inference import Batch, Outputs
from reinforce.engine.worker.models import Demand, Floats, LoadedModels, OutOfMemory
from reinforce.engine.worker.producers.base import Capability, Producer, RowGroupTables
from reinforce.engine.worker.self_test import LONG_TEXT, check_numbers, score_probes
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.custom import CAPTION, METADATA, PIXELS
from teachers.pixels import to_pixels
from teachers.spec import ModelInfo, Precision

Mask = npt.NDArray[np.bool_]


class ScoresProducer(Producer):
    kind = "scores"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        specs, captions = self.session.config.scores, self.session.config.input.captions_per_sample or 1
        self._scorers = {
            layer.name: make_scorer(specs[model_of(layer.name)], captions)
            for layer in self.layers
            if layer.model is None
        }
        self._seeing = [layer for layer in self.layers if layer.sees]

    @staticmethod
    def side(models: LoadedModels, name: str, info: ModelInfo, precision: Precision) -> Capability | None:
        if not {*info.identity["inputs"]} <= {PIXELS, CAPTION}:  # others cannot be made for a test
            return None
        score = partial(score_probes, models, name, info.identity["inputs"], info.identity["names"])

        def start(rows: Sequence[int]) -> Callable[[], Floats]:
            return partial(score, rows)

        check = partial(check_numbers, models, f"scores.{name}", "scores", models.loaded["scores"][name], start)
        return Capability(check, start)

    @staticmethod
    def full_batch(models: LoadedModels, layer: Layer, config: Config) -> int:
        if layer.sees:
            return Producer.full_batch(models, layer, config)
        return models.batches.fitting("samples", config.workers.images)

    @property
    def sample_columns(self) -> set[str]:
        columns = {column for scorer in self._scorers.values() for column in scorer.columns}
        return columns | {METADATA for layer in self.layers if METADATA in _inputs(layer)}

    # -- classes that see pixels

    def encode(self, batch: Batch, prepared: Any) -> Callable[[], Outputs]:
        """Scores [rows, names] by layer; NaN where an input is missing."""
        outputs: Outputs = {}
        for layer in self._seeing:
            image, inputs = self.session.models.of(layer).image, _inputs(layer)
            given = _usable(layer, batch.rows)
            outputs[layer.name] = np.full((len(given), len(layer.names)), np.nan, np.float32)
            if not given.any():
                continue
            with self.session.stage(layer.name, batch.what, int(given.sum())):
                pixels = batch.whole[image]
                pixels = to_pixels(pixels if given.all() else pixels[torch.from_numpy(given).to(pixels.device)], image)
                texts = [row.caption for row, usable in zip(batch.rows, given, strict=True) if usable]
                values = [pixels if one == PIXELS else texts for one in inputs]
                models = self.session.models
                outputs[layer.name][given] = models.score(models.of(layer), values, len(texts), layer.names)
        return lambda: outputs

    # -- classes that see none

    def _score_batches(self, layer: Layer, values: Sequence[Any], places: npt.NDArray[np.int64]) -> Floats:
        """Scores [places, names] of the ``places`` in the ``values`` of each input.

        Raises LayerFailure, and UserError if a single sample does not fit in the memory of the device.
        """
        session, found, start = self.session, np.zeros((len(places), len(layer.names)), np.float32), 0
        while start < len(places):
            chosen = places[start : start + session.models.batches.fitting("samples", session.config.workers.images)]
            output, shared = session.attempt(partial(self._run, layer, values, chosen))
            if isinstance(output, OutOfMemory):
                session.halve(output, self.demand(layer, len(chosen)), len(chosen), shared)
            else:
                found[start : start + len(chosen)] = output
                start += len(chosen)
        return found

    def _run(self, layer: Layer, values: Sequence[Any], places: npt.NDArray[np.int64], shared: bool) -> Floats:
        with self.session.use_accelerator(), self.session.stage(layer.name, f"{len(places)} samples", len(places)):
            inputs = [
                self.session.models.accelerator.put(one[places])
                if isinstance(one, np.ndarray)
                else [one[place] for place in places]
                for one in values
            ]
            return self.session.models.score(self.session.models.of(layer), inputs, len(places), layer.names)

    def fill(self) -> None:
        rows = self.session.models.batches.fitting("samples", self.session.config.workers.images)
        for layer in self.layers:
            if _inputs(layer) == [CAPTION]:
                self._score_batches(layer, [[f"{i} {LONG_TEXT}" for i in range(rows)]], np.arange(rows))

    def demand(self, layer: Layer, rows: int) -> Demand:
        one = f"{layer.name}: one sample does"
        return Demand("rows" if layer.sees else "samples", one, f"a smaller model in scores.{layer.model}")

    # -- tables

    def table(self, layer: Layer, group: RowGroupTables) -> pa.Table:
        if layer.model is None:
            with self.session.watch.stage(layer.name, f"{len(group.keys)} rows"), raising_layer_failure(layer.name):
                scores = self._scorers[layer.name].scores(group.tables, group.values)
                values = np.stack([np.asarray(scores[name], np.float32) for name in layer.names], axis=1)
        else:
            values = self._of_class(layer, group)
        schema = self.schema(layer)
        arrays = [pa.array(column, mask=~np.isfinite(column)) for column in np.ascontiguousarray(values.T)]
        structs = pa.StructArray.from_arrays(arrays, fields=[*schema.field("scores").type])
        return pa.table([pa.array(group.keys, pa.string()), structs], schema=schema)

    def _of_class(self, layer: Layer, group: RowGroupTables) -> Floats:
        """Scores [rows, names] of a class; records why rows have none."""
        if layer.sees:
            self.refuse_unreadable(layer, group)
            values = np.concatenate(group.outputs(layer.name))
            given = _usable(layer, group.rows)
        else:
            inputs, given = [], np.ones(len(group.rows), bool)
            for name in _inputs(layer):
                found: Any  # of each row: an array whose first axis is that of the rows, or a list with None
                if name == CAPTION:
                    found = [row.caption or None for row in group.rows]
                elif name == METADATA:
                    texts = group.tables[SAMPLES][METADATA].to_pylist()
                    found = [None if text is None else json.loads(text) for text in texts]
                else:
                    found = group.values(name)
                if isinstance(found, np.ndarray):
                    given &= np.isfinite(found).reshape(len(found), -1).all(axis=1)
                else:
                    given &= np.array([one is not None for one in found], bool)
                inputs.append(found)
            values = np.full((len(given), len(layer.names)), np.nan, np.float32)
            values[given] = self._score_batches(layer, inputs, np.flatnonzero(given))
        finite = np.isfinite(values)
        for row in np.flatnonzero(given & ~finite.all(axis=1)):
            names = ", ".join(np.array(layer.names)[~finite[row]])
            detail = f"{layer.identity['class']} returned NaN or infinity for {names}"
            self.refusals.add(layer.name, Refusal(group.keys[row], Reason.NOT_FINITE, detail))
        return values


def _inputs(layer: Layer) -> Sequence[str]:
    """The arguments of a class; none of scores that no class computes."""
    found: Sequence[str] = layer.identity.get("inputs", ())
    return found


def _usable(layer: Layer, rows: Sequence[Row]) -> Mask:
    """Rows passed to a class that takes pixels."""
    texts = CAPTION in _inputs(layer)
    return np.array([not row.unreadable and bool(row.caption or not texts) for row in rows], bool)
