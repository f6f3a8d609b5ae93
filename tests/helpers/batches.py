"""Batches of three rows for the models of ``config_of``."""

from __future__ import annotations

import numpy as np
import torch

from reinforce.config import parse_config
from reinforce.engine.decode.cells import PixelCells
from reinforce.engine.decode.row import Row
from reinforce.engine.plan.recipe import build_layers, describe_models
from tests.helpers.data import config_of
from tests.helpers.models import SeedCaptioner

CPU = torch.device("cpu")
CONFIG = parse_config(config_of("x.tar", "out", workers={"batch": 3}))
LAYERS = build_layers(CONFIG, describe_models(CONFIG))
VIEW = SeedCaptioner(CPU).image


def rows(count: int) -> list[Row]:
    return [Row(f"key{i}", None, i) for i in range(count)]


def pixels() -> PixelCells:
    """The pixels of three rows, with two crops each."""
    rng = np.random.default_rng(0)
    views = {VIEW: rng.integers(0, 255, (3, 8, 8, 3), np.uint8)}
    return PixelCells(rng.integers(0, 255, (3, 2, 24, 24, 3), np.uint8), views)
