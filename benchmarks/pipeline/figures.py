"""Figures with their limits, and what the sections that measure them share."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.pipeline.inputs import photo

Rule = Literal["", "limit", "at most", "at least"]


@dataclass(frozen=True)
class Figure:
    """A measured ``value``, and the ``limit`` that ``rule`` says how to compare it with.

    ``limit`` as a rule is a value that cannot be improved on; ``at most`` and ``at least`` are targets.
    """

    section: str
    name: str
    value: float
    unit: str
    limit: float | None = None
    rule: Rule = ""
    rounds: Sequence[float] = ()

    @property
    def met(self) -> bool | None:
        """Whether a target is met; None if there is none."""
        if self.limit is None or self.rule in ("", "limit"):
            return None
        return self.value <= self.limit if self.rule == "at most" else self.value >= self.limit


@dataclass(frozen=True)
class Scale:
    """How much is measured. ``host`` is the numbers of images of a shard by the number of augmentations."""

    rounds: int = 3
    host_rounds: int = 5
    host: Mapping[int, int] = field(default_factory=lambda: {2: 512, 10: 192})
    growth_shards: int = 4
    growth_images: int = 96
    busy_workers: Sequence[int] = (1, 2, 4)
    busy_shards: int = 16
    busy_images: int = 128
    memory_megabytes: tuple[int, int] = (40, 640)
    texts: int = 16
    loader_images: int = 1024
    loader_batches: int = 4
    loader_batch: int = 256


QUICK = Scale(
    rounds=1,
    host_rounds=1,
    host={2: 16, 10: 8},
    growth_shards=1,
    growth_images=8,
    busy_workers=(2,),
    busy_shards=4,
    busy_images=16,
    memory_megabytes=(1, 2),
    texts=2,
    loader_images=64,
    loader_batches=1,
    loader_batch=8,
)


@dataclass(frozen=True)
class Bench:
    """The place, device, cores and scale of the measurements; ``log`` shows a line of progress."""

    folder: Path
    device: str
    cores: int
    scale: Scale
    log: Callable[[str], None] = print
    photos: Sequence[bytes] = field(default_factory=lambda: [photo(i) for i in range(32)])

    def output(self) -> AbstractContextManager[str]:
        """A new folder for a dataset, which is deleted at the end of the context."""
        return tempfile.TemporaryDirectory(dir=self.folder, prefix="out-")


def alternate(variants: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> dict[str, list[float]]:
    """Measure the variants alternately; return the values of all rounds as ``VARIANT KEY``."""
    values: dict[str, list[float]] = {}
    for _ in range(rounds):
        for variant, measure in variants.items():
            for key, value in measure().items():
                values.setdefault(f"{variant} {key}", []).append(value)
    return values


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in values.items()}
