"""Embeddings of texts: the true caption, or the captions of a captioner."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from reinforce.config import Config
from reinforce.dataset.layers import TRUE_CAPTION, Layer
from reinforce.engine.decode.row import Row
from reinforce.engine.inference.batch_sizes import Demand, OutOfMemory, texts_per_batch
from reinforce.engine.inference.inference import Outputs
from reinforce.engine.inference.models import Models
from reinforce.engine.inference.outputs import to_numpy
from reinforce.engine.inference.self_test import LONG_TEXT, TEXTS, check_text_encoder
from reinforce.engine.messages.tracebacks import shorten
from reinforce.engine.worker.producers.base import Mask, RowGroup, Side
from reinforce.engine.worker.producers.vectors import Embeddings, Floats
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.spec import ModelInfo, Precision

_Texts: TypeAlias = "list[str] | None"


class TextEmbeddings(Embeddings):
    kind = "texts"
    counted = len(TEXTS)

    @staticmethod
    def side(models: Models, name: str, info: ModelInfo, precision: Precision) -> Side | None:
        if not info.texts:
            return None

        def start(rows: Sequence[int]) -> Callable[[], Any]:
            texts = [f"{TEXTS[row]}, {place}" for place, row in enumerate(rows)]
            return lambda: models.text_encoder(models.teachers[name], texts)()  # noqa: PLW0108 - tokenizes each time

        return Side(partial(check_text_encoder, models, name, precision), start)

    @staticmethod
    def full_batch(models: Models, layer: Layer, config: Config) -> int:
        return models.batches.fitting("texts", texts_per_batch(config))

    def encode_group(self, rows: Sequence[Row]) -> Outputs:
        """Embeddings of the rows' own captions, which come again in turn where they are fewer than the vectors, and
        which rows have some, by layer."""
        layers = [layer for layer in self.computed if layer.texts == TRUE_CAPTION]
        most = max((layer.count for layer in layers), default=0)
        texts = [[*itertools.islice(itertools.cycle(row.captions), most)] or None for row in rows]
        return {layer.name: self.encode_texts(layer, self._own(layer, rows, texts)) for layer in layers}

    def _own(self, layer: Layer, rows: Sequence[Row], texts: Sequence[_Texts]) -> Sequence[_Texts]:
        """The texts of each row, None for those that have labels."""
        if layer.labels is None:
            return texts
        return [None if self.has_label(layer, row) else one for row, one in zip(rows, texts, strict=True)]

    def encode_texts(self, layer: Layer, texts: Sequence[list[str] | None]) -> tuple[Floats, Mask]:
        """Embeddings [rows, count, dim] of each row's texts, and the rows that have texts [rows].

        Each distinct text is encoded once, in a batch with texts of similar length. Raises LayerFailure, and UserError
        if a single text does not fit in the memory of the device.
        """
        session = self.session
        teacher = session.models.of(layer)
        distinct = sorted({t for row in texts if row for t in row}, key=lambda t: (len(t), t))
        index = {text: i for i, text in enumerate(distinct)}
        encoded = np.zeros((len(distinct), teacher.dim), np.float32)
        start = 0
        while start < len(distinct):
            batch = distinct[start : start + session.models.batches.fitting("texts", texts_per_batch(session.config))]
            count, what = len(batch), f"{len(batch):,} texts, the first {shorten(batch[0], 60)!r}"
            with session.stage(layer.name, what):
                encode = session.models.text_encoder(teacher, batch)
            output, shared = session.attempt(partial(self._encode, layer, encode, count, what))
            if isinstance(output, OutOfMemory):
                session.halve(output, self.demand(layer, len(texts)), count, shared)
            else:
                encoded[start : start + count] = output
                start += count
        values = np.zeros((len(texts), layer.count, teacher.dim), np.float32)
        for i, row in enumerate(texts):
            if row:
                values[i] = encoded[[index[text] for text in row]]
        return values, np.array([bool(row) for row in texts], bool)

    def _encode(self, layer: Layer, encode: Callable[[], torch.Tensor], count: int, what: str, shared: bool) -> Floats:
        """Embeddings [B, dim] of texts that must fit."""
        with self.session.use_accelerator(), self.session.stage(layer.name, what):
            with self.session.meter.stage(layer.name, count):
                vectors = encode()
            return to_numpy(vectors)

    def fill(self) -> None:
        for layer in self.computed:
            rows = -(-self.session.models.batches.fitting("texts", texts_per_batch(self.session.config)) // layer.count)
            self.encode_texts(layer, [[f"{i} {n} {LONG_TEXT}" for n in range(layer.count)] for i in range(rows)])

    def demand(self, layer: Layer, rows: int) -> Demand:
        return Demand("texts", f"{layer.name}: one text does", self.smaller_model(layer))

    def vectors(self, layer: Layer, group: RowGroup) -> tuple[Floats, Mask]:
        if layer.texts == TRUE_CAPTION:
            values, valid = group.outputs(layer.name)[0]
            where = f"none at input.captions ({', '.join(self.session.config.input.caption_fields) or 'empty'})"
        else:
            captions = layer.needs[-1]
            values, valid = self.encode_texts(layer, self._own(layer, group.rows, group.values(captions)))
            where = f"{captions} has none for this key"
        for row, encoded in zip(group.rows, valid, strict=True):
            if not encoded and not self.has_label(layer, row):
                self.refusals.add(layer.name, Refusal(row.key, Reason.NO_TEXT, f"no caption to encode: {where}"))
        return values, valid
