"""The images of a set as uint8 batches: decoded ahead in threads, and kept if they fit."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from reinforce.config import Limits
from reinforce.evaluation.reading import Example
from reinforce.evaluation.sets import Examples
from reinforce.prefetch import prefetch
from reinforce.source.image import ImageRefused, decode
from reinforce.source.shards import Refusal
from schemas import Reason
from teachers.pixels import fit
from teachers.protocols import ImageSpec


@dataclass(frozen=True)
class Batch:
    """``pixels`` uint8 [B, height, width, 3]; ``targets`` of the B examples."""

    pixels: np.ndarray
    targets: list[Any]


@dataclass
class Memory:
    """Bytes that are left for keeping decoded images, over all sets."""

    free: int


@dataclass(frozen=True)
class _Kept:
    geometry: tuple[object, ...]
    pixels: np.ndarray
    targets: list[Any]
    bytes: int


class Pictures:
    """The images of one set. ``refused`` holds those of the last whole pass that could not be decoded."""

    def __init__(self, examples: Examples, count: int, limits: Limits, memory: Memory) -> None:
        self.refused: list[Refusal] = []
        self._examples = examples
        self._count = count
        self._limits = limits
        self._memory = memory
        self._kept: _Kept | None = None

    def batches(self, spec: ImageSpec, size: int, threads: int) -> Iterator[Batch]:
        """Batches of ``size`` (the last may be smaller) in the set's order, for a model that wants ``spec``.

        Once gone through to the end, they come from memory the next time, if they fit and the geometry is the same.
        """
        geometry = (spec.height, spec.width, spec.interpolation, spec.resize)
        if self._kept is not None and self._kept.geometry == geometry:
            kept = self._kept
            for start in range(0, len(kept.targets), size):
                yield Batch(kept.pixels[start : start + size], kept.targets[start : start + size])
            return
        self._forget()
        yield from self._decoded(spec, size, threads, geometry)

    def _decoded(self, spec: ImageSpec, size: int, threads: int, geometry: tuple[object, ...]) -> Iterator[Batch]:
        needed = self._count * spec.height * spec.width * 3
        keeps = needed <= self._memory.free
        whole = np.empty((self._count if keeps else 0, spec.height, spec.width, 3), np.uint8)
        targets: list[Any] = []
        refused: list[Refusal] = []

        def good(pool: ThreadPoolExecutor) -> Generator[tuple[np.ndarray, Any], None, None]:
            for item in prefetch(pool, lambda item: self._decode(item, spec), self._examples(), 2 * size + threads):
                if isinstance(item, Refusal):
                    refused.append(item)
                else:
                    yield item

        # whoever stops early does not wait for what was to be decoded ahead
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool, closing(good(pool)) as items:
            while taken := list(itertools.islice(items, size)):
                batch = Batch(np.stack([pixels for pixels, _ in taken]), [target for _, target in taken])
                if keeps:
                    whole[len(targets) : len(targets) + len(taken)] = batch.pixels
                    targets += batch.targets
                yield batch
        self.refused = refused
        if keeps:
            self._memory.free -= needed
            self._kept = _Kept(geometry, whole[: len(targets)], targets, needed)

    def _decode(self, item: Example | Refusal, spec: ImageSpec) -> tuple[np.ndarray, Any] | Refusal:
        if isinstance(item, Refusal):
            return item
        data = item.load()
        if len(data) > self._limits.image_bytes:  # a dataset may have been made with wider limits
            return Refusal(item.key, Reason.IMAGE_BYTES, f"{len(data)} bytes, above limits.image_bytes")
        try:
            return fit(decode(data, self._limits), spec), item.target
        except ImageRefused as refused:
            return Refusal(item.key, refused.reason, refused.detail)

    def _forget(self) -> None:
        if self._kept is not None:
            self._memory.free += self._kept.bytes
            self._kept = None
