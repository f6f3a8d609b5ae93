"""Probabilities of classes of the augmented images, or of the images as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from reinforce.config import Config
from reinforce.dataset import vectors
from reinforce.dataset.layers import Layer
from reinforce.engine.inference.batch_sizes import Demand
from reinforce.engine.inference.inference import Batch, Outputs
from reinforce.engine.inference.models import Models, crops_per_batch
from reinforce.engine.inference.outputs import Floats
from reinforce.engine.inference.self_test import check_numbers, probe_images
from reinforce.engine.worker.producers.base import Producer, RowGroup, Side, image_batches
from reinforce.errors import UserError
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.spec import ModelInfo, Precision

_COLUMNS = ("classes", "probabilities", "rest")
_CROPS: Final = "crops"


class ClassProbabilities(Producer):
    kind = "probabilities"
    counted = 32

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        for layer in self.layers:
            if layer.recipe["top"] > (classes := self.session.models.of(layer).dim):
                raise UserError(f"classifiers.{layer.model}: it has {classes} classes: set `k` to at most {classes}")

    # -- models

    @staticmethod
    def side(models: Models, name: str, info: ModelInfo, precision: Precision) -> Side:
        classifier = models.loaded["classifiers"][name]

        def compute(rows: Sequence[int]) -> Floats:
            found = _probabilities(classifier, probe_images(models, classifier.image, rows), 1.0)
            return np.asarray(found.cpu())

        check = partial(check_numbers, models, name, "probabilities", classifier, compute)
        return Side(check, image_batches(models, classifier.image, classifier.classify))

    @staticmethod
    def full_batch(models: Models, layer: Layer, config: Config) -> int:
        return crops_per_batch(models, config) if layer.sees == _CROPS else Producer.full_batch(models, layer, config)

    # -- batches

    @property
    def crops(self) -> bool:
        return any(layer.sees == _CROPS for layer in self.layers)

    @property
    def whole(self) -> Iterable[ImageSpec]:
        return [self.session.models.of(layer).image for layer in self.layers if layer.sees != _CROPS]

    def encode(self, batch: Batch, prepared: Any) -> Callable[[], Outputs]:
        """The cells of rows, [rows] of ``_cells``, by layer."""
        size = self.session.models.batches.fitting(_CROPS, len(batch.rows) * self.session.config.augmentations.count)
        found: dict[str, list[list[torch.Tensor]]] = {}
        for layer in self.layers:
            classifier = self.session.models.of(layer)
            images = batch.crops if layer.sees == _CROPS else batch.whole[classifier.image]
            assert images is not None
            with self.session.stage(layer.name, batch.what, len(images)):
                pixels = (to_pixels(part, classifier.image) for part in images.split(size))
                found[layer.name] = [_most_likely(layer, classifier, part) for part in pixels]
        outputs: Outputs = {}
        for layer in self.layers:  # copied to the CPU only when all work is queued
            with self.session.stage(layer.name, batch.what):
                cells = outputs[layer.name] = np.zeros(len(batch.rows), _cells(layer))
                for place, name in enumerate(_COLUMNS):
                    values = torch.cat([part[place] for part in found[layer.name]])
                    cells[name] = values.cpu().numpy().reshape(cells[name].shape)
        return lambda: outputs

    def demand(self, layer: Layer, rows: int) -> Demand:
        crops = rows == 1 and layer.sees == _CROPS
        one, fix = f"{layer.name}: one image does", f"classifiers.{layer.model}: a smaller model, or `precision: bf16`"
        return Demand("crops" if crops else "rows", one, fix)

    # -- tables

    def table(self, layer: Layer, group: RowGroup) -> pa.Table:
        self.refuse_unreadable(layer, group)
        cells = np.concatenate(group.outputs(layer.name))
        readable = np.array([row.unreadable is None for row in group.rows], bool)
        finite = np.isfinite(cells["probabilities"]).all(axis=(1, 2))
        for row in np.flatnonzero(readable & ~finite):
            detail = f"{layer.model} returned NaN or infinity"
            self.refusals.add(layer.name, Refusal(group.keys[row], Reason.NOT_FINITE, detail))
        valid = readable & finite
        cells[~valid] = np.zeros(1, cells.dtype)
        schema = self.schema(layer)
        columns = [
            vectors.tensor_column(cells[name].astype(field.type.value_type.to_pandas_dtype()), field.type.shape, valid)
            for name, field in ((name, schema.field(name)) for name in _COLUMNS)
        ]
        return pa.table([pa.array(group.keys, pa.string()), *columns], schema=schema)


def _cells(layer: Layer) -> npt.DTypeLike:
    """The cells of a row: classes and their probabilities [K, k], and the rest [K]."""
    shape = (layer.count, layer.recipe["top"])
    return [*zip(_COLUMNS, (np.int32, np.float32, np.float32), (shape, shape, shape[:1]), strict=True)]


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
