"""Probabilities of classes of the augmented images, or of the images as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from reinforce.dataset.layers import Layer
from reinforce.engine.worker.inference import Batch, Outputs
from reinforce.engine.worker.models import Floats, LoadedModels
from reinforce.engine.worker.producers.base import CROPS, Capability, Producer, RowGroupTables
from reinforce.engine.worker.self_test import check_numbers, of_images
from reinforce.errors import UserError
from teachers.pixels import to_pixels
from teachers.spec import ModelInfo, Precision

_COLUMNS = ("classes", "probabilities", "rest")


class ClassProbabilitiesProducer(Producer):
    kind = "probabilities"
    counted = 32

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        for layer in self.layers:
            if layer.recipe["top"] > (classes := self.session.models.of(layer).dim):
                raise UserError(f"classifiers.{layer.model}: it has {classes} classes: set `k` to at most {classes}")

    # -- models

    @staticmethod
    def side(models: LoadedModels, name: str, info: ModelInfo, precision: Precision) -> Capability:
        classifier = models.loaded["classifiers"][name]

        def compute(pixels: torch.Tensor) -> Floats:
            return np.asarray(_probabilities(classifier, pixels, 1.0).cpu())

        start = of_images(models, classifier.image, compute)
        return Capability(partial(check_numbers, models, name, "probabilities", classifier, start), start)

    # -- batches

    def encode(self, batch: Batch, prepared: Any) -> Callable[[], Outputs]:
        """The cells of rows [rows] by layer: numbers by column."""
        size = self.session.models.batches.fitting(CROPS, len(batch.rows) * self.session.config.augmentations.count)
        found: dict[str, list[list[torch.Tensor]]] = {}
        for layer in self.layers:
            classifier = self.session.models.of(layer)
            images = batch.crops if layer.sees == CROPS else batch.whole[classifier.image]
            assert images is not None
            with self.session.stage(layer.name, batch.what, len(images)):
                pixels = (to_pixels(part, classifier.image) for part in images.split(size))
                found[layer.name] = [_most_likely(layer, classifier, part) for part in pixels]
        outputs: Outputs = {}
        for layer in self.layers:  # copied to the CPU only when all work is queued
            with self.session.stage(layer.name, batch.what):
                # The cells of a row: classes and their probabilities [K, k], and the rest [K].
                shape = (layer.count, layer.recipe["top"])
                types = zip(_COLUMNS, (np.int32, np.float32, np.float32), (shape, shape, shape[:1]), strict=True)
                cells = outputs[layer.name] = np.zeros(len(batch.rows), [*types])
                for place, name in enumerate(_COLUMNS):
                    values = torch.cat([part[place] for part in found[layer.name]])
                    cells[name] = values.cpu().numpy().reshape(cells[name].shape)
        return lambda: outputs

    # -- tables

    def table(self, layer: Layer, group: RowGroupTables) -> pa.Table:
        readable = self.refuse_unreadable(layer, group)
        cells = np.concatenate(group.outputs(layer.name))
        finite = np.isfinite(cells["probabilities"]).all(axis=(1, 2))
        valid = self.refuse_not_finite(layer, group, readable, finite)
        return self.tensor_table(layer, group, {name: cells[name] for name in _COLUMNS}, valid)


def _probabilities(classifier: Any, pixels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities of all classes, float32 [B, classes]. Raises ValueError for logits of another shape."""
    logits: object = classifier.classify(pixels)
    wanted = (len(pixels), classifier.dim)
    if isinstance(logits, torch.Tensor) and tuple(logits.shape) == wanted and logits.is_floating_point():
        return torch.softmax(logits.float() / temperature, dim=1)
    found = (
        f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
    )
    raise ValueError(f"logits must be floating point of shape {wanted}, got {found} from {type(classifier).__name__}")


def _most_likely(layer: Layer, classifier: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The most likely classes of images and their probabilities [B, k], and the sum of all others [B].

    Of equal probabilities, the class of the lower number comes first. All are NaN if a logit is NaN or infinite.
    """
    top = layer.recipe["top"]
    values, classes = _probabilities(classifier, pixels, layer.recipe["temperature"]).sort(
        dim=1, descending=True, stable=True
    )
    return [classes[:, :top].int(), values[:, :top].clone(), values[:, top:].sum(dim=1)]
