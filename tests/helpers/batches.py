"""Batches of three rows for the models of ``config_of``, and models without a shard."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from reinforce.config import Config, parse_config
from reinforce.dataset.layers import Layer
from reinforce.engine.decode.cells import PixelCells
from reinforce.engine.decode.row import Row
from reinforce.engine.inference.inference import Inference
from reinforce.engine.inference.models import Counters, Models
from reinforce.engine.inference.session import Session
from reinforce.engine.plan.recipe import build_layers, describe_models
from reinforce.engine.worker.producers.registry import make_producers
from reinforce.engine.worker.producers.text_embeddings import TextEmbeddings
from tests.helpers.data import config_of
from tests.helpers.models import SeedCaptioner

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


def make_inference(
    config: Config, layers: Iterable[Layer], models: Models, counters: Counters | None = None
) -> Inference:
    """The models of layers as a worker runs them on batches."""
    session = Session(config, models, counters)
    return Inference(session, make_producers(layers, session))


def text_encoder(config: Config, layer: Layer, models: Models, counters: Counters | None = None) -> TextEmbeddings:
    """The producer of a layer of texts."""
    return TextEmbeddings([layer], Session(config, models, counters))
