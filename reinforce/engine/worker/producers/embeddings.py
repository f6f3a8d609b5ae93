"""Embeddings of the augmented images, and of texts: the true caption, or the captions of a captioner."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from reinforce.config import Config
from reinforce.dataset.layers import TRUE_CAPTION, Layer
from reinforce.engine.messages import shorten
from reinforce.engine.worker.decode import Row
from reinforce.engine.worker.inference import Batch, Outputs
from reinforce.engine.worker.models import Demand, LoadedModels, OutOfMemory, texts_per_batch, to_numpy
from reinforce.engine.worker.producers.base import Capability, Embeddings, Floats, Mask, RowGroupTables
from reinforce.engine.worker.self_test import LONG_TEXT, TEXTS, check_encoder, check_fp8, check_text_encoder, of_images
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.spec import ModelInfo, Precision


class ImageEmbeddingsProducer(Embeddings):
    kind = "images"
    counted = 32

    @staticmethod
    def side(models: LoadedModels, name: str, info: ModelInfo, precision: Precision) -> Capability | None:
        if not info.images:
            return None
        teacher = models.loaded["teachers"][name]
        start = of_images(models, teacher.image, partial(models.encode_images, teacher))
        return Capability(partial(check_encoder, models, name, "images", start, precision), start)

    def encode(self, batch: Batch, prepared: Any) -> Callable[[], Outputs]:
        """Embeddings [rows, K, D] by layer."""
        assert batch.crops is not None
        count, models = self.session.config.augmentations.count, self.session.models
        unlabelled = {layer.name: self.without_label(layer, batch.rows) for layer in self.computed}
        size = models.batches.fitting("crops", len(batch.crops))
        placeholders = np.repeat([row.unreadable is not None for row in batch.rows], count)
        prepared_pixels: dict[ImageSpec, torch.Tensor] = {}
        waiting = Counter(self.session.models.of(layer).image for layer in self.computed)
        encoded: dict[str, torch.Tensor] = {}
        for layer in self.computed:
            teacher = self.session.models.of(layer)
            assert teacher.image is not None
            if layer.model in models.uncompared and not placeholders.all():
                check_fp8(models, layer.model, to_pixels(batch.crops[~placeholders], teacher.image))
                models.uncompared.discard(layer.model)
            waiting[teacher.image] -= 1
            crops, places = batch.crops, unlabelled[layer.name]
            if not places:
                continue
            if few := len(places) < len(batch.rows):
                crops = crops.unflatten(0, (-1, count))[places].flatten(0, 1)
            with self.session.stage(layer.name, batch.what, len(crops)):
                if few or len(crops) > size:
                    parts = [
                        models.encode_images(teacher, to_pixels(part, teacher.image)) for part in crops.split(size)
                    ]
                    encoded[layer.name] = torch.cat(parts)
                    continue
                if teacher.image not in prepared_pixels:
                    prepared_pixels[teacher.image] = to_pixels(crops, teacher.image)
                pixels = prepared_pixels[teacher.image]
                # A teacher may change its pixels, so only the last one that shares them gets the tensor itself.
                own = pixels.clone() if waiting[teacher.image] else pixels
                encoded[layer.name] = models.encode_images(teacher, own)
        outputs: Outputs = {}
        for layer in self.computed:  # copied to the CPU only when all teachers' work is queued
            dim = self.session.models.of(layer).dim
            with self.session.stage(layer.name, batch.what):
                places = unlabelled[layer.name]
                values = np.zeros((0, dim), np.float32)
                if places:
                    values = to_numpy(encoded[layer.name], placeholders.reshape(-1, count)[places].ravel())
                outputs[layer.name] = values = values.reshape(-1, count, dim)
                if len(places) < len(batch.rows):
                    outputs[layer.name] = np.zeros((len(batch.rows), count, dim), np.float32)
                    outputs[layer.name][places] = values
        return lambda: outputs

    def vectors(self, layer: Layer, group: RowGroupTables) -> tuple[Floats, Mask]:
        readable = self.refuse_unreadable(layer, group)
        return np.concatenate(group.outputs(layer.name)), readable


_Texts: TypeAlias = "list[str] | None"


class TextEmbeddingsProducer(Embeddings):
    kind = "texts"
    counted = len(TEXTS)

    @staticmethod
    def side(models: LoadedModels, name: str, info: ModelInfo, precision: Precision) -> Capability | None:
        if not info.texts:
            return None

        def start(rows: Sequence[int]) -> Callable[[], Any]:
            texts = [f"{TEXTS[row]}, {place}" for place, row in enumerate(rows)]
            return lambda: models.text_encoder(models.loaded["teachers"][name], texts)()  # noqa: PLW0108 - tokenizes each time

        return Capability(partial(check_text_encoder, models, name, precision), start)

    @staticmethod
    def full_batch(models: LoadedModels, layer: Layer, config: Config) -> int:
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
        return replace(super().demand(layer, rows), bound="texts", one=f"{layer.name}: one text does")

    def vectors(self, layer: Layer, group: RowGroupTables) -> tuple[Floats, Mask]:
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
