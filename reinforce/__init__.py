"""Multi-modal dataset reinforcement: image-text shards in, layers of Parquet out, students trained from them.

>>> reinforce.run("configs/demo.yaml")
>>> for sample in reinforce.open("demo/dataset", teachers=["small"]): ...
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reinforce.config import Config, load_config
    from reinforce.dataset.reader import Dataset, Sample, open
    from reinforce.engine.runner import run
    from reinforce.errors import UserError
    from reinforce.student.train import train

__all__ = ["Config", "Dataset", "Sample", "UserError", "load_config", "open", "run", "train"]

_HOMES = {
    "Config": "config",
    "Dataset": "dataset.reader",
    "Sample": "dataset.reader",
    "UserError": "errors",
    "load_config": "config",
    "open": "dataset.reader",
    "run": "engine.runner",
    "train": "student.train",
}


def __getattr__(name: str) -> Any:
    """Import on first use: whoever reads a dataset does not need Ray, whoever plans does not need torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'reinforce' has no attribute {name!r}")
    return getattr(importlib.import_module(f"reinforce.{_HOMES[name]}"), name)
