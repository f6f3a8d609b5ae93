"""Batches as nested mappings of tensors and lists: brought to the device, and cut into parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from reinforce.training.task import Batch
from teachers.device import Accelerator


class Prefetcher:
    """Batches on the device, each of which travels there while the one before it is computed."""

    def __init__(self, batches: Iterable[Batch], accelerator: Accelerator) -> None:
        self._batches = iter(batches)
        self._accelerator = accelerator
        self._ready: Batch | None = None

    def fetch(self) -> None:
        """Wait for the next batch of the feed and send it off. Raises RuntimeError where the feed has none."""
        batch = next(self._batches, None)
        if batch is None:
            raise RuntimeError("the feed ended before the training: it must go on for ever")
        with self._accelerator.copy_stream():
            self._ready = _placed(batch, self._accelerator)

    def take(self) -> Batch:
        """The batch that was fetched last."""
        assert self._ready is not None
        batch, self._ready = self._ready, None
        self._accelerator.wait_for_copies(_tensors(batch))
        return batch


def part(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Samples ``start`` to ``stop`` of a batch, without a copy."""
    return {
        name: part(value, start, stop) if isinstance(value, Mapping) else value[start:stop]
        for name, value in batch.items()
    }


def _placed(batch: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    def place(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _placed(value, accelerator)
        return accelerator.put(value) if isinstance(value, torch.Tensor) else value

    return {name: place(value) for name, value in batch.items()}


def _tensors(batch: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for value in batch.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value
