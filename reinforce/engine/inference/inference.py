"""Batches of images and of texts through the models, one batch at a time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from reinforce.config import Config
from reinforce.dataset.layers import Layer
from reinforce.dataset.vectors import NORM_TOLERANCE
from reinforce.engine.decode.cells import PixelCells, runs
from reinforce.engine.decode.row import Row
from reinforce.engine.inference.batch_sizes import rows_per_batch
from reinforce.engine.inference.models import Counters, Models
from reinforce.engine.inference.out_of_memory import OutOfMemory, attempt
from reinforce.engine.inference.stage_meter import StageMeter
from reinforce.engine.messages.pulse import PREPARING, SERVER, WAITING, LeaseWatch
from reinforce.engine.messages.results import raising_layer_failure
from reinforce.engine.messages.tracebacks import shorten
from reinforce.seeds import seed_for
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import Captioner, ImageSpec, NoCaptions, Teacher

Floats = npt.NDArray[np.float32]
Seeds = npt.NDArray[np.uint64]
_Texts: TypeAlias = "Callable[[], Sequence[list[str] | NoCaptions | None]]"
_T = TypeVar("_T")
_Pixels: TypeAlias = "tuple[torch.Tensor | None, dict[ImageSpec, torch.Tensor]]"


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
        self._config, self._models = config, models
        self._watch = watch or LeaseWatch()
        self._order = models.lock.next_order()
        self.meter = StageMeter(models.accelerator, models.costs, models.counters, counters)
        computed = [layer for layer in layers if not layer.published]
        self.image_layers = [layer for layer in computed if layer.kind.name == "images"]
        self.caption_layers = [layer for layer in computed if layer.kind.name == "captions"]

    @property
    def captioner_specs(self) -> tuple[ImageSpec, ...]:
        """The image preprocessing of the captioners, each once."""
        return tuple(sorted({self._captioner(layer).image for layer in self.caption_layers}, key=repr))

    @property
    def rows_per_batch(self) -> int:
        """Rows of the next batch."""
        return self._models.batches.rows(rows_per_batch(self._config))

    def run(self, rows: Sequence[Row], pixels: PixelCells) -> dict[str, Any]:
        """The outputs for one batch by layer: embeddings float32 [B, K, D] or B lists of captions (None for NaN).

        ``pixels`` hold the cells of the rows. A batch that does not fit in the memory of the device is run in parts.
        Raises LayerFailure, and UserError if a single row does not fit.
        """
        if not self.image_layers and not self.caption_layers:
            return {}
        parts: list[dict[str, Any]] = []
        layers = {layer.name: layer for layer in (*self.image_layers, *self.caption_layers)}
        rest = rows
        while rest:
            part = rest[: self._models.batches.rows(len(rest))]
            what = f"{len(part)} rows, keys {part[0].key!r} to {part[-1].key!r}"
            output, shared = self._attempt(partial(self._compute, part, pixels, what))
            if isinstance(output, OutOfMemory):
                self._halve(output, layers.get(output.layer or ""), len(part), shared)
            else:
                embeddings, captions = output
                parts.append({**embeddings, **self._texts(captions, len(part), what)})
                rest = rest[len(part) :]
        return parts[0] if len(parts) == 1 else {name: _join([part[name] for part in parts]) for name in parts[0]}

    def encode_texts(self, layer: Layer, texts: Sequence[list[str] | None]) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Embeddings [rows, count, dim] of each row's texts, and the rows that have texts [rows].

        Each distinct text is encoded once, in a batch with texts of similar length. Raises LayerFailure, and UserError
        if a single text does not fit in the memory of the device.
        """
        teacher = self._teacher(layer)
        distinct = sorted({t for row in texts if row for t in row}, key=lambda t: (len(t), t))
        index = {text: i for i, text in enumerate(distinct)}
        encoded = np.zeros((len(distinct), teacher.dim), np.float32)
        start = 0
        while start < len(distinct):
            batch = distinct[start : start + self._models.batches.texts(self._config.workers.images)]
            what = f"{len(batch):,} texts, the first {shorten(batch[0], 60)!r}"
            with self._run(layer.name, what):
                encode = self._models.text_encoder(teacher, batch)
            output, shared = self._attempt(partial(self._encode, layer, encode, len(batch), what))
            if isinstance(output, OutOfMemory):
                self._halve(output, layer, len(batch), shared)
            else:
                encoded[start : start + len(batch)] = output
                start += len(batch)
        values = np.zeros((len(texts), layer.count, teacher.dim), np.float32)
        for i, row in enumerate(texts):
            if row:
                values[i] = encoded[[index[text] for text in row]]
        return values, np.array([bool(row) for row in texts], bool)

    def _attempt(self, work: Callable[[bool], _T]) -> tuple[_T | OutOfMemory, bool]:
        """The result of ``work``, which holds tensors on the device, and its argument: whether others may, too."""
        with self._watch.stage(WAITING), self._models.batches.on_device() as shared:
            return attempt(partial(work, shared)), shared

    def _halve(self, shortage: OutOfMemory, layer: Layer | None, size: int, shared: bool) -> None:
        """Halve the batches after one of ``size`` inputs did not fit. Raises UserError if they cannot be smaller."""
        self._models.batches.halve(shortage, layer, size, self._config, shared)
        with self._models.lock.take(self._order):
            self._models.release_memory()

    def _compute(
        self, rows: Sequence[Row], pixels: PixelCells, what: str, shared: bool
    ) -> tuple[dict[str, Any], dict[str, _Texts]]:
        """Embeddings and captions of rows that must fit."""
        seeds = {layer.name: self._caption_seeds(layer, rows) for layer in self.caption_layers}
        # The copies come first, on a stream of their own, while the other shard uses the accelerator.
        copied = self._put(rows, pixels, what) if shared else None
        with self._use_accelerator():
            crops, views = copied or self._put(rows, pixels, what)
            self._models.accelerator.wait_for_copies([*views.values(), *([] if crops is None else [crops])])
            return self._embed(crops, rows, what), self._caption(views, seeds, what)

    def _encode(self, layer: Layer, encode: Callable[[], torch.Tensor], count: int, what: str, shared: bool) -> Floats:
        """Embeddings [B, dim] of texts that must fit."""
        with self._use_accelerator(), self._run(layer.name, what):
            with self.meter.stage(layer.name, count):
                vectors = encode()
            return to_numpy(vectors, count, self._teacher(layer).dim)

    @contextlib.contextmanager
    def _use_accelerator(self) -> Iterator[None]:
        with self._models.use_accelerator(self._order):
            yield
            self.meter.update()

    def _put(self, rows: Sequence[Row], pixels: PixelCells, what: str) -> _Pixels:
        """Crops [rows * K, S, S, 3] and whole images by preprocessing, on the device after ``wait_for_copies``."""
        put = self._models.accelerator.put_parts
        cells = [row.cell for row in rows if row.cell is not None]
        crops = None
        with self._watch.stage(PREPARING, what), self._models.accelerator.copy_stream():
            if self.image_layers:
                assert pixels.crops is not None
                crops = put(runs(pixels.crops, cells)).flatten(0, 1)
            return crops, {spec: put(runs(pixels.views[spec], cells)) for spec in self.captioner_specs}

    @contextlib.contextmanager
    def _run(self, layer: str, what: str, inputs: int = 0) -> Iterator[None]:
        """Run a layer's model on ``what``; the time for ``inputs`` is measured."""
        measured = self.meter.stage(layer, inputs) if inputs else contextlib.nullcontext()
        with self._watch.stage(layer, what), raising_layer_failure(layer), measured:
            yield

    def _embed(self, crops: torch.Tensor | None, rows: Sequence[Row], what: str) -> dict[str, Any]:
        """Image embeddings [rows, K, D] by layer, from crops [rows * K, S, S, 3]."""
        count = self._config.augmentations.count
        size = self._models.batches.crops(len(rows) * count)
        placeholders = np.repeat([row.unreadable is not None for row in rows], count)
        prepared: dict[ImageSpec, torch.Tensor] = {}
        encoded: dict[str, torch.Tensor] = {}
        for layer in self.image_layers:
            teacher = self._teacher(layer)
            assert teacher.image is not None
            assert crops is not None
            with self._run(layer.name, what, len(crops)):
                if len(crops) > size:
                    parts = [teacher.encode_images(to_pixels(part, teacher.image)) for part in crops.split(size)]
                    encoded[layer.name] = torch.cat(parts)
                    continue
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
            with self._run(layer.name, what, seeds[layer.name].size):
                pixels = to_pixels(views[captioner.image], captioner.image)
                captions[layer.name], tokens = self._models.captions(captioner, pixels, seeds[layer.name])
            self.meter.add_tokens(layer.name, tokens)
        return captions

    def _texts(self, captions: Mapping[str, _Texts], count: int, what: str) -> dict[str, Any]:
        """The captions of ``count`` images, by layer."""
        outputs = {}
        for layer in self.caption_layers:
            stage = SERVER if getattr(self._captioner(layer), "waits", False) else layer.name
            with self._watch.stage(stage, what), raising_layer_failure(layer.name):
                texts = outputs[layer.name] = captions[layer.name]()
                rows = [row for row in texts if row is not None and not isinstance(row, NoCaptions)]
                if len(texts) != count or any(len(row) != layer.count for row in rows):
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


def _join(parts: Sequence[Any]) -> Any:
    """The outputs of a layer for a batch, from those of its parts."""
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else list(itertools.chain(*parts))


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
