"""Patch features of the augmented images: encoded and stored by a codec as soon as a batch is on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from reinforce.dataset.codecs.codebooks import load
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layer_file import MAX_BYTES
from reinforce.dataset.layers import Layer
from reinforce.engine.worker.inference import Batch, Outputs
from reinforce.engine.worker.models import LoadedModels
from reinforce.engine.worker.producers.base import Capability, Producer, RowGroupTables
from reinforce.engine.worker.self_test import check_encoder, of_images
from reinforce.errors import UserError
from schemas.seeds import philox_bits, seed_for
from teachers.pixels import to_pixels
from teachers.spec import ModelInfo, Precision

_KIND = KINDS["patches"]
_READ = {2: 2, 1: 5}  # times the stored bytes that a reader holds of a row group, by the bytes of a number


class PatchFeaturesProducer(Producer):
    kind = "patches"
    counted = 32

    @staticmethod
    def side(models: LoadedModels, name: str, info: ModelInfo, precision: Precision) -> Capability:
        encoder = models.encoder(_KIND, name)

        def compute(pixels: torch.Tensor) -> torch.Tensor:
            """The grid of each image as one vector."""
            return torch.nn.functional.normalize(encoder.encode(pixels).flatten(1), dim=1)

        start = of_images(models, encoder.image, compute)

        def check(batch: int | None) -> None:
            check_encoder(models, name, "patches", start, precision, batch)

        return Capability(check, start)

    def schema(self, layer: Layer) -> pa.Schema:
        entry, grid = self.session.models.encoder(_KIND, str(layer.model)).entry, layer.recipe["patches"]["grid"]
        rows, columns = entry["grid"]
        if [rows, columns] != grid:
            raise UserError(
                f"teachers.{layer.model}.patches.grid: {grid} in this config, and the model has {rows} x {columns} "
                f"patches of its images; set grid: [{rows}, {columns}]"
            )
        try:
            layer.kind.codec(layer).dim(entry["dim"])
        except ValueError as error:
            raise UserError(f"teachers.{layer.model}.patches.codec: {error}") from None
        return layer.schema(self.session.config.images, entry["dim"])

    def encode(self, batch: Batch, prepared: Any) -> Callable[[], Outputs]:
        """The stored patches of rows, cells [rows] as ``_stored`` makes them, by layer."""
        assert batch.crops is not None
        models, count = self.session.models, self.session.config.augmentations.count
        size = models.batches.fitting("crops", len(batch.crops))
        found: dict[str, npt.NDArray[np.float32]] = {}
        for layer in self.layers:
            encoder = models.encoder(_KIND, str(layer.model))
            with self.session.stage(layer.name, batch.what, len(batch.crops)):
                parts = [
                    encoder.encode(to_pixels(part, encoder.image)).flatten(1, 2).cpu().numpy()
                    for part in batch.crops.split(size)
                ]
                patches = np.concatenate(parts)
            found[layer.name] = patches.reshape(-1, count, *patches.shape[1:])
        keys = [row.key for row in batch.rows]
        return lambda: {layer.name: self._stored(layer, found.pop(layer.name), keys) for layer in self.layers}

    def _stored(self, layer: Layer, patches: npt.NDArray[np.float32], keys: Sequence[str]) -> npt.NDArray[Any]:
        """The cells of patches [rows, K, N, D]."""
        field = self.schema(layer).field("patches").type
        # The cells of a row: the numbers that are stored, and whether all are finite.
        stored = ("patches", field.value_type.to_pandas_dtype(), tuple(field.shape))
        cells = np.zeros(len(keys), [stored, ("finite", np.bool_)])
        place = layer.codebook_at(self.session.config.output)
        if place is None:
            patches = np.stack(
                [_pick(self.session.config.seed, layer, *row) for row in zip(keys, patches, strict=True)]
            )
            with np.errstate(over="ignore"):
                values = patches.astype(np.float16)
            cells["finite"] = np.isfinite(values).all(axis=(1, 2, 3))
        else:
            cells["finite"] = np.isfinite(patches).all(axis=(1, 2, 3))
            patches[~cells["finite"]] = 0
            values = load(place).encode(patches)
            if values.dtype == np.float16:
                cells["finite"] &= np.isfinite(values).all(axis=(1, 2, 3))
        cells["patches"] = values.reshape(len(keys), *field.shape)
        return cells

    def table(self, layer: Layer, group: RowGroupTables) -> pa.Table:
        readable = self.refuse_unreadable(layer, group)
        cells = np.concatenate(group.outputs(layer.name))
        most = MAX_BYTES // _READ[cells["patches"].itemsize]
        if cells["patches"].nbytes > most:
            raise UserError(
                f"teachers.{layer.model}.patches.codec: {layer.dtype} takes {cells['patches'].nbytes:,} bytes in "
                f"{len(cells):,} rows, and at most {most:,} are read together. Choose pca128 or pq96"
            )
        valid = self.refuse_not_finite(layer, group, readable, cells["finite"], "patches with NaN or infinity")
        return self.tensor_table(layer, group, {"patches": cells["patches"]}, valid)


def _pick(seed: int, layer: Layer, key: str, patches: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Random patches of a row [K, N, D] -> [K, picked, D]."""
    count = math.prod(layer.recipe["patches"]["grid"])
    bits = philox_bits(seed_for(seed, key, layer.name), count)
    return patches[:, np.sort(np.argsort(bits, kind="stable")[: layer.recipe["patches"]["picked"]])]
