"""Batches of images and of texts through the models, one batch at a time on the accelerator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from reinforce.config import Config
from reinforce.dataset.layers import Layer
from reinforce.engine.models import Counters, Models
from reinforce.engine.outcome import raising_layer_failure
from reinforce.engine.pixel_cells import PixelCells, runs
from reinforce.engine.rows import Row
from reinforce.engine.traces import shorten
from reinforce.engine.watch import WAITING, LeaseWatch
from reinforce.seeds import seed_for
from teachers.pixels import to_pixels
from teachers.protocols import Captioner, ImageSpec, Teacher

Floats = npt.NDArray[np.float32]
Seeds = npt.NDArray[np.uint64]
_Texts: TypeAlias = "Callable[[], Sequence[list[str] | None]]"

#: Largest difference of an embedding's norm from 1, in every precision.
NORM_TOLERANCE = 0.01


class Inference:
    """Runs the models that make ``layers``. ``counters`` receives the busy time of this shard, ``watch`` its steps."""

    def __init__(
        self,
        config: Config,
        layers: Iterable[Layer],
        models: Models,
        counters: Counters,
        watch: LeaseWatch | None = None,
    ) -> None:
        self._config, self._models, self._counters = config, models, counters
        self._watch = watch or LeaseWatch()
        self._order = models.turns.next_order()
        computed = [layer for layer in layers if not layer.published]
        self.image_layers = [layer for layer in computed if layer.kind == "images"]
        self.caption_layers = [layer for layer in computed if layer.kind == "captions"]

    @property
    def captioner_specs(self) -> tuple[ImageSpec, ...]:
        """The image preprocessing of the captioners, each once."""
        return tuple(sorted({self._captioner(layer).image for layer in self.caption_layers}, key=repr))

    def run(self, rows: Sequence[Row], pixels: PixelCells) -> dict[str, Any]:
        """The outputs for one batch by layer: embeddings float32 [B, K, D] or B lists of captions (None for NaN).

        ``pixels`` hold the cells of the rows. Raises LayerFailure.
        """
        if not self.image_layers and not self.caption_layers:
            return {}
        # The CPU's part comes first, so that the other shard can use the accelerator meanwhile.
        put = self._models.accelerator.put_parts
        cells = [row.cell for row in rows if row.cell is not None]
        crops = None
        if self.image_layers:
            assert pixels.crops is not None
            crops = put(runs(pixels.crops, cells)).flatten(0, 1)
        views = {spec: put(runs(pixels.views[spec], cells)) for spec in self.captioner_specs}
        seeds = {layer.name: self._caption_seeds(layer, rows) for layer in self.caption_layers}
        what = f"{len(rows)} rows, keys {rows[0].key!r} to {rows[-1].key!r}"
        with self._watch.stage(WAITING), self._models.use_accelerator(self._counters, self._order):
            embeddings, captions = self._embed(crops, rows, what), self._caption(views, seeds, what)
        return {**embeddings, **self._texts(captions, len(rows), what)}

    def encode_texts(self, layer: Layer, texts: Sequence[list[str] | None]) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Embeddings [rows, count, dim] of each row's texts, and the rows that have texts [rows].

        Each distinct text is encoded once, in a batch with texts of similar length. Raises LayerFailure.
        """
        teacher = self._teacher(layer)
        distinct = sorted({t for row in texts if row for t in row}, key=lambda t: (len(t), t))
        index = {text: i for i, text in enumerate(distinct)}
        encoded = np.zeros((len(distinct), teacher.dim), np.float32)
        size = self._config.workers.batch
        for start in range(0, len(distinct), size):
            batch = distinct[start : start + size]
            what = f"{len(batch):,} texts, the first {shorten(batch[0], 60)!r}"
            with self._run(layer.name, what):
                encode = self._models.text_encoder(teacher, batch)
                wait, turn = self._watch.stage(WAITING), self._models.use_accelerator(self._counters, self._order)
                with wait, turn, self._watch.stage(layer.name, what):
                    encoded[start : start + size] = to_numpy(encode(), len(batch), teacher.dim)
        values = np.zeros((len(texts), layer.count, teacher.dim), np.float32)
        for i, row in enumerate(texts):
            if row:
                values[i] = encoded[[index[text] for text in row]]
        return values, np.array([bool(row) for row in texts], bool)

    @contextlib.contextmanager
    def _run(self, layer: str, what: str) -> Iterator[None]:
        """Run a layer's model on ``what``."""
        with self._watch.stage(layer, what), raising_layer_failure(layer):
            yield

    def _embed(self, crops: torch.Tensor | None, rows: Sequence[Row], what: str) -> dict[str, Any]:
        """Image embeddings [rows, K, D] by layer, from crops [rows * K, S, S, 3]."""
        count = self._config.augmentations.count
        placeholders = np.repeat([row.unreadable is not None for row in rows], count)
        prepared: dict[ImageSpec, torch.Tensor] = {}
        encoded: dict[str, torch.Tensor] = {}
        for layer in self.image_layers:
            teacher = self._teacher(layer)
            assert teacher.image is not None
            assert crops is not None
            with self._run(layer.name, what):
                if teacher.image not in prepared:
                    prepared[teacher.image] = to_pixels(crops, teacher.image)
                encoded[layer.name] = teacher.encode_images(prepared[teacher.image])
        outputs = {}
        for layer in self.image_layers:  # copied to the CPU only when all teachers' work is queued
            dim = self._teacher(layer).dim
            with self._run(layer.name, what):
                values = to_numpy(encoded[layer.name], len(rows) * count, dim, placeholders)
            outputs[layer.name] = values.reshape(len(rows), count, dim)
        return outputs

    def _caption(
        self, views: Mapping[ImageSpec, torch.Tensor], seeds: Mapping[str, Seeds], what: str
    ) -> dict[str, _Texts]:
        """Functions that return the captions, by layer, with ``seeds`` [B, captions] of each layer."""
        captions = {}
        for layer in self.caption_layers:
            captioner = self._captioner(layer)
            with self._run(layer.name, what):
                pixels = to_pixels(views[captioner.image], captioner.image)
                captions[layer.name] = self._models.captions(captioner, pixels, seeds[layer.name])
        return captions

    def _texts(self, captions: Mapping[str, _Texts], count: int, what: str) -> dict[str, Any]:
        """The captions of ``count`` images, by layer."""
        outputs = {}
        for layer in self.caption_layers:
            with self._run(layer.name, what):
                texts = outputs[layer.name] = captions[layer.name]()
                if len(texts) != count or any(row is not None and len(row) != layer.count for row in texts):
                    raise ValueError(
                        f"{layer.model}: caption() must return {layer.count} texts for each of {count} images"
                    )
        return outputs

    def _caption_seeds(self, layer: Layer, rows: Sequence[Row]) -> Seeds:
        seed = self._config.seed
        seeds = [[seed_for(seed, row.key, layer.name, n) for n in range(layer.count)] for row in rows]
        return np.array(seeds, np.uint64)

    def _teacher(self, layer: Layer) -> Teacher:
        return self._models.teachers[str(layer.model)]

    def _captioner(self, layer: Layer) -> Captioner:
        return self._models.captioners[str(layer.model)]


def to_numpy(out: torch.Tensor, rows: int, dim: int, ignored: npt.NDArray[np.bool_] | None = None) -> Floats:
    """Embeddings on the CPU as float32.

    Raises ValueError unless they are [rows, dim] and have norm 1. The norm of ``ignored`` rows [rows] and of rows with
    NaN or infinity is not checked.
    """
    if tuple(out.shape) != (rows, dim):
        raise ValueError(f"embeddings must have shape {(rows, dim)}, got {tuple(out.shape)}; correct encode_* or `dim`")
    values: Floats = out.float().cpu().numpy()
    norms = np.sqrt(np.einsum("ij,ij->i", values, values))
    wrong = ~(np.abs(norms - 1) <= NORM_TOLERANCE)
    if ignored is not None:
        wrong &= ~ignored
    if wrong.any():
        wrong[wrong] = np.isfinite(values[wrong]).all(axis=1)
        for row in np.flatnonzero(wrong)[:1]:
            raise ValueError(
                f"embeddings must have norm 1, got {norms[row]:.3f} in row {row + 1} of {rows}; normalize them"
            )
    return values
