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
    """Counts of a worker (read by the driver while shards run) or of one of its shards."""

    samples: int = 0
    busy: float = 0.0  # seconds in which the accelerator was in use


@dataclass
class Models:
    """The loaded models of a worker and the accelerator they share, one batch at a time."""

    teachers: Mapping[str, Teacher]
    captioners: Mapping[str, Captioner]
    accelerator: Accelerator
    counters: Counters = field(default_factory=Counters)
    _in_use: threading.Lock = field(default_factory=threading.Lock)
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)

    def text_encoder(self, teacher: Teacher, texts: Sequence[str]) -> Callable[[], torch.Tensor]:
        """A function that encodes ``texts`` on the accelerator. They are tokenized now if the teacher supports it."""
        tokenize = getattr(teacher, "tokenize", None)
        if tokenize is None:
            return lambda: teacher.encode_texts(texts)
        with self._tokenizing:
            tokens = tokenize(texts)
        return lambda: teacher.encode_tokens(tokens)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def use_accelerator(self, shard: Counters | None = None) -> Iterator[None]:
        """Exclusive use of the accelerator. The time in it counts as busy, for the worker and for ``shard``."""
        with self._in_use, torch.inference_mode():
            start = time.perf_counter()
            try:
                yield
            finally:
                seconds = time.perf_counter() - start
                self.counters.busy += seconds
                if shard is not None:
                    shard.busy += seconds


def load_models(config: Config, layers: Iterable[Layer]) -> Models:
    """Load and check the models that make ``layers``. Raises UserError if one cannot be loaded or does not fit."""
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
    check_models(models, layers)
    return models


def check_models(models: Models, layers: Iterable[Layer]) -> None:
    """Run every model on a gray image or a short text, so that a wrong shape ends the run before it starts.

    Raises UserError with the model's name and what it returned.
    """
    for layer in layers:
        if layer.model is None:
            continue
        try:
            with models.use_accelerator():
                if layer.kind == "captions":
                    captioner = models.captioners[layer.model]
                    pixels = _gray_image(models, captioner.image)
                    texts = captioner.caption(pixels, np.arange(layer.count, dtype=np.uint64)[None])
                    if [row is not None and len(row) for row in texts] != [layer.count]:
                        raise ValueError(
                            f"caption() must return a list of {layer.count} texts for one image, got {texts!r}"
                        )
                    continue
                teacher = models.teachers[layer.model]
                if layer.kind == "images":
                    out = teacher.encode_images(_gray_image(models, teacher.image))
                else:
                    out = teacher.encode_texts(["a photo"])
            if tuple(out.shape) != (1, teacher.dim):
                raise ValueError(
                    f"{layer.kind} embeddings must have shape {(1, teacher.dim)}, got {tuple(out.shape)}; correct "
                    "encode_* or `dim`"
                )
            norm = torch.linalg.vector_norm(out.float()).item()
            if not 0.99 < norm < 1.01:
                raise ValueError(f"{layer.kind} embeddings must have norm 1, got {norm:.3f}; normalize them")
        except Exception as error:
            raise UserError(f"{layer.model} fails on its first {layer.kind} input: {error}") from error
    models.counters = Counters()


def _gray_image(models: Models, spec: ImageSpec | None) -> torch.Tensor:
    if spec is None:
        raise ValueError("it has no `image` (an ImageSpec), so it cannot encode images")
    return to_pixels(models.accelerator.put(np.full((1, spec.height, spec.width, 3), 128, np.uint8)), spec)
