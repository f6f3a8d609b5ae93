"""What comes of a lease: a result, or which kind of failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ShardResult:
    """What came of one lease."""

    shard: str
    layers: tuple[str, ...]  # committed now
    samples: int
    refused: Mapping[str, int]  # rows in quarantine now, by reason
    given_up: str | None  # why the shard as a whole was refused, if it was
    seconds: float
    busy: float
    bytes: int
    cleaned: Mapping[
        str, Mapping[str, int]
    ]  # what `clean` did to captions, by captioner and teachers.postprocess.COUNTS


class LayerFailure(RuntimeError):
    """A model raised; ``args`` are the layer's name and the error's text."""

    @property
    def layer(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class ShardFailure(RuntimeError):
    """What came of a shard that raised, in words: errors of many storages cannot travel between processes.

    ``args`` are the text and whether the worker may be at fault, as where an accelerator is in a bad state.
    """

    @property
    def of_worker(self) -> bool:
        return bool(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])
