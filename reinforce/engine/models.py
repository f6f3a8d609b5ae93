"""The loaded models of a worker, and the accelerator that they share."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from reinforce.config import Config
from reinforce.dataset.layers import Layer
from reinforce.errors import UserError
from teachers.device import Accelerator
from teachers.pixels import to_pixels
from teachers.protocols import Captioner, ImageSpec, Teacher
from teachers.registry import load_captioner, load_teacher


@dataclass
class Counters:
    """What a worker (read by the driver while shards run) or one of its shards has done so far."""

    samples: int = 0
    busy: float = 0.0  # seconds the accelerator worked


@dataclass
class Models:
    """The loaded models of a worker and the accelerator they share, one batch at a time."""

    teachers: Mapping[str, Teacher]
    captioners: Mapping[str, Captioner]
    accelerator: Accelerator
    counters: Counters = field(default_factory=Counters)
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)

    def text_encoder(self, teacher: Teacher, texts: Sequence[str]) -> Callable[[], torch.Tensor]:
        """What is left to do at the accelerator for a batch of texts, tokenized now where the teacher lets us."""
        tokenize = getattr(teacher, "tokenize", None)
        if tokenize is None:
            return lambda: teacher.encode_texts(texts)
        with self._tokenizing:
            tokens = tokenize(texts)
        return lambda: teacher.encode_tokens(tokens)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def turn(self, shard: Counters | None = None) -> Iterator[None]:
        """The accelerator to oneself; time in here is what counts as busy, for the worker and for ``shard``."""
        with self._turn, torch.inference_mode():
            start = time.perf_counter()
            try:
                yield
            finally:
                seconds = time.perf_counter() - start
                self.counters.busy += seconds
                if shard is not None:
                    shard.busy += seconds


def load_models(config: Config, layers: Iterable[Layer]) -> Models:
    """The models that make these layers, tried out once. Raises UserError if one cannot be loaded or does not fit."""
    layers = [layer for layer in layers if not layer.published]
    device = "cuda" if config.workers.gpus else "cpu"
    captioners = {layer.model for layer in layers if layer.kind == "captions"}
    teachers = {layer.model for layer in layers if layer.kind in ("images", "texts")}
    try:
        models = Models(
            {name: load_teacher(name, spec, device) for name, spec in config.teachers.items() if name in teachers},
            {
                name: load_captioner(name, spec, device)
                for name, spec in config.captioners.items()
                if name in captioners
            },
            Accelerator(device),
        )
    except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
        raise UserError(str(error)) from error
    try_out(models, layers)
    return models


def try_out(models: Models, layers: Iterable[Layer]) -> None:
    """One grey image and one short text through every model, so that a wrong shape ends the run before it starts.

    Raises UserError naming the model and what it gave.
    """
    for layer in layers:
        if layer.model is None:
            continue
        try:
            with models.turn():
                if layer.kind == "captions":
                    captioner = models.captioners[layer.model]
                    pixels = _grey(models, captioner.image)
                    texts = captioner.caption(pixels, np.arange(layer.count, dtype=np.uint64)[None])
                    if [row is not None and len(row) for row in texts] != [layer.count]:
                        raise ValueError(f"caption() gave {texts!r} for one image, want a list of {layer.count} texts")
                    continue
                teacher = models.teachers[layer.model]
                if layer.kind == "images":
                    out = teacher.encode_images(_grey(models, teacher.image))
                else:
                    out = teacher.encode_texts(["a photo"])
            if tuple(out.shape) != (1, teacher.dim):
                raise ValueError(f"{layer.kind} embeddings of shape {tuple(out.shape)}, want {(1, teacher.dim)}")
            norm = torch.linalg.vector_norm(out.float()).item()
            if not 0.99 < norm < 1.01:
                raise ValueError(f"{layer.kind} embeddings of norm {norm:.3f}, want 1")
        except Exception as error:
            raise UserError(f"{layer.model} fails on a first {layer.kind} input: {error}") from error
    models.counters = Counters()


def _grey(models: Models, spec: ImageSpec | None) -> torch.Tensor:
    if spec is None:
        raise ValueError("it has no `image` (an ImageSpec), so it cannot encode images")
    return to_pixels(models.accelerator.put(np.full((1, spec.height, spec.width, 3), 128, np.uint8)), spec)
