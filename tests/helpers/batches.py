"""Batches of three rows for the models of ``config_of``, and models without a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from reinforce.config import Config, parse_config
from reinforce.dataset.layers import Layer
from reinforce.engine.plan.plan import build_layers, describe_models
from reinforce.engine.worker.decode import PixelCells, Row
from reinforce.engine.worker.inference import Inference, Session
from reinforce.engine.worker.models import Counters, LoadedModels
from reinforce.engine.worker.producers.embeddings import TextEmbeddingsProducer
from reinforce.engine.worker.producers.registry import make_producers
from teachers.runtime.accelerator import Accelerator
from tests.helpers.data import config_of
from tests.helpers.models import ColorTeacher, SeedCaptioner

CPU = torch.device("cpu")
CONFIG = parse_config(config_of("x.tar", "out", workers={"batch": 3}))
LAYERS = build_layers(CONFIG, describe_models(CONFIG))
WHOLE = SeedCaptioner(CPU).image


def rows(count: int) -> list[Row]:
    return [Row(f"key{i}", None, i) for i in range(count)]


def pixels() -> PixelCells:
    """The pixels of three rows, with two crops each."""
    rng = np.random.default_rng(0)
    whole = {WHOLE: rng.integers(0, 255, (3, 8, 8, 3), np.uint8)}
    return PixelCells(rng.integers(0, 255, (3, 2, 24, 24, 3), np.uint8), whole)


class Changed(ColorTeacher):
    """A teacher whose embeddings are what ``change`` makes of them and of the inputs."""

    def __init__(self, change: Callable[[torch.Tensor, Any], Any], **options: Any) -> None:
        super().__init__(CPU, **options)
        self.change = change

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.change(super().encode_images(pixels), pixels)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self.change(super().encode_texts(texts), texts)


class Writing(SeedCaptioner):
    """A captioner whose texts are what ``change`` makes of them, of the seeds and of the number of the call."""

    def __init__(self, change: Callable[[list[list[str]], np.ndarray, int], Any]) -> None:
        super().__init__(CPU)
        self.change, self.calls = change, 0

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str]]:
        self.calls += 1
        return self.change(super().caption(pixels, seeds), seeds, self.calls)


def models_of(
    red: Any = None, namer: Any = None, blue: Any = None, accelerator: Accelerator | None = None
) -> LoadedModels:
    """The models of ``config_of``, or others in their place."""
    teachers = {"red": red or ColorTeacher(CPU), "blue": blue or ColorTeacher(CPU, size=24, dim=12, seed=1)}
    captioners = {"namer": namer or SeedCaptioner(CPU)}
    return LoadedModels({"teachers": teachers, "captioners": captioners}, accelerator or Accelerator("cpu"))


def make_inference(
    config: Config, layers: Iterable[Layer], models: LoadedModels, counters: Counters | None = None
) -> Inference:
    """The models of layers as a worker runs them on batches."""
    session = Session(config, models, counters)
    return Inference(session, make_producers(layers, session))


def text_encoder(
    config: Config, layer: Layer, models: LoadedModels, counters: Counters | None = None
) -> TextEmbeddingsProducer:
    """The producer of a layer of texts."""
    return TextEmbeddingsProducer([layer], Session(config, models, counters))
