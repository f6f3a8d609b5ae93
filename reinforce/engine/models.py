"""The loaded models of a worker, and the accelerator that they share."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from reinforce.config import Config
from reinforce.dataset.backends import load_backend
from reinforce.dataset.layers import Layer
from reinforce.engine.traces import user_frames
from reinforce.errors import UserError
from teachers.device import Accelerator
from teachers.protocols import Captioner, Teacher
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
    """Load the models that make ``layers``. Raises UserError if one, or the augmentation backend, cannot be loaded."""
    load_backend(config.augmentations.backend)  # decode processes use it; here an error ends the run
    layers = [layer for layer in layers if not layer.published]
    device = "cuda" if config.workers.gpus else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "a worker has a GPU, but torch does not see it. Install a torch that supports it, or set workers.gpus to 0."
        )
    captioners = {layer.model for layer in layers if layer.kind == "captions"}
    teachers = {layer.model for layer in layers if layer.kind in ("images", "texts")}
    try:
        return Models(
            {name: load_teacher(name, spec, device) for name, spec in config.teachers.items() if name in teachers},
            {
                name: load_captioner(name, spec, device)
                for name, spec in config.captioners.items()
                if name in captioners
            },
            Accelerator(device),
        )
    except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
        raise UserError(f"{error}{user_frames(error)}") from error
