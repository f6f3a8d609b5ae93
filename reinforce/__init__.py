"""Multi-modal dataset reinforcement: image-text shards in, Parquet layers out, students trained from them.

``reinforce.run("configs/demo.yaml")`` makes a dataset, ``reinforce.train("student.yaml")`` trains a student from it,
and ``reinforce.open`` reads it. On the dataset that ``make demo`` makes:

>>> import reinforce
>>> data = reinforce.open("demo/dataset", teachers=["conv-64", "conv-48"], captioners=["coca"])
>>> for sample in data:
...     image = sample.augmented(0)  # PIL image: the crop that the teachers saw
...     targets = [sample.images[teacher][0] for teacher in data.teachers]  # their embeddings of it, float32 [D]
...     captions = [sample.caption, *sample.captions["coca"]]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reinforce.api import losses
    from reinforce.api.commands import (
        adapt,
        check,
        evaluate,
        init,
        inspect,
        plan,
        run,
        select,
        train,
    )
    from reinforce.api.examples import Examples
    from reinforce.api.student import Student
    from reinforce.config import Config, load_config
    from reinforce.dataset.reading import Dataset, open
    from reinforce.dataset.sample import Sample
    from reinforce.errors import UserError

__version__ = "0.2.0"  # read by pyproject.toml; a job's checkout is not installed

__all__ = [
    "Config", "Dataset", "Examples", "Sample", "Student", "UserError", "adapt", "check", "evaluate", "init", "inspect",
    "load_config", "losses", "open", "plan", "run", "select", "train",
]  # fmt: skip

_HOMES = {
    **dict.fromkeys(
        ("adapt", "check", "evaluate", "init", "inspect", "plan", "run", "select", "train"), "api.commands"
    ),
    "Config": "config",
    "Dataset": "dataset.reading",
    "Examples": "api.examples",
    "Sample": "dataset.sample",
    "Student": "api.student",
    "UserError": "errors",
    "load_config": "config",
    "losses": "api",
    "open": "dataset.reading",
}


def __getattr__(name: str) -> Any:
    """Import on first use: reading a dataset imports neither Ray nor torch, planning does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'reinforce' has no attribute {name!r}")
    if name == "losses":
        return importlib.import_module("reinforce.api.losses")
    return getattr(importlib.import_module(f"reinforce.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Names for completion, which are not imported yet."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
