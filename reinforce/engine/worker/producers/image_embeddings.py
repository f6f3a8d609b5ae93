"""Embeddings of the augmented images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from reinforce.dataset.layers import Layer
from reinforce.engine.inference.inference import Batch, Outputs
from reinforce.engine.inference.models import Models
from reinforce.engine.inference.outputs import to_numpy
from reinforce.engine.inference.self_test import check_encoder, check_fp8, of_images
from reinforce.engine.worker.producers.base import Mask, RowGroup, Side
from reinforce.engine.worker.producers.vectors import Embeddings, Floats
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.spec import ModelInfo, Precision


class ImageEmbeddings(Embeddings):
    kind = "images"
    counted = 32

    @staticmethod
    def side(models: Models, name: str, info: ModelInfo, precision: Precision) -> Side | None:
        if not info.images:
            return None
        teacher = models.teachers[name]
        start = of_images(models, teacher.image, partial(models.encode_images, teacher))
        return Side(partial(check_encoder, models, name, "images", start, precision), start)

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

    def vectors(self, layer: Layer, group: RowGroup) -> tuple[Floats, Mask]:
        readable = self.refuse_unreadable(layer, group)
        return np.concatenate(group.outputs(layer.name)), readable
