"""Batches as nested mappings of tensors and lists: moved to the device, and cut into microbatches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from reinforce.training.task import Batch
from teachers.runtime.accelerator import Accelerator


class Prefetcher:
    """Batches on the device; each is copied there while the device computes the one before."""

    def __init__(self, batches: Iterable[Batch], accelerator: Accelerator) -> None:
        self._batches = iter(batches)
        self._accelerator = accelerator
        self._ready: Batch | None = None

    def fetch(self) -> None:
        """Wait for the next batch of the feed and start copying it. Raises RuntimeError if the feed has ended."""
        batch = next(self._batches, None)
        if batch is None:
            raise RuntimeError("the feed ended before the training: its batches must be endless")
        with self._accelerator.copy_stream():
            self._ready = _to_device(batch, self._accelerator)

    def take(self) -> Batch:
        """Return the batch that was fetched last, once."""
        batch, self._ready = self.peek(), None
        return batch

    def peek(self) -> Batch:
        """Return the batch that was fetched last and keep it."""
        assert self._ready is not None
        self._accelerator.wait_for_copies(_tensors(self._ready))
        return self._ready


def slice_batch(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Samples ``start`` to ``stop`` of a batch, without a copy."""
    return {
        name: slice_batch(value, start, stop) if isinstance(value, Mapping) else value[start:stop]
        for name, value in batch.items()
    }


def _to_device(batch: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    def place(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _to_device(value, accelerator)
        return accelerator.put(value) if isinstance(value, torch.Tensor) else value

    return {name: place(value) for name, value in batch.items()}


def _tensors(batch: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for value in batch.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value
