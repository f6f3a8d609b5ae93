"""The images of a set as uint8 batches: decoded ahead in threads, and cached if they fit into memory."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from reinforce.config import Limits
from reinforce.evaluation.reading import Example
from reinforce.evaluation.sets import Examples
from reinforce.images.policy import IMAGE_POLICY, ImageRefused, decode
from reinforce.processes.prefetch import prefetch
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.preprocessing.fit import fit
from teachers.protocols import ImageSpec


@dataclass(frozen=True)
class Batch:
    """``pixels`` uint8 [B, height, width, 3]; ``targets`` of the B examples."""

    pixels: np.ndarray
    targets: list[Any]


@dataclass
class CacheBudget:
    """Bytes that are still free for cached images; shared by all sets."""

    free: int


@dataclass(frozen=True)
class _Cached:
    geometry: tuple[object, ...]
    pixels: np.ndarray
    targets: list[Any]
    bytes: int


class ImageBatches:
    """The images of one set. ``refused`` lists those that could not be decoded in the last complete pass."""

    def __init__(self, examples: Examples, count: int, limits: Limits, budget: CacheBudget) -> None:
        self.refused: list[Refusal] = []
        self._examples = examples
        self._count = count
        self._limits = limits
        self._budget = budget
        self._cached: _Cached | None = None

    def batches(self, spec: ImageSpec, size: int, threads: int) -> Iterator[Batch]:
        """Yield batches of ``size`` (the last may be smaller) in the set's order, resized by ``spec``.

        After one complete pass, batches come from the cache if they fit into the budget and the geometry is the same.
        """
        geometry = (spec.height, spec.width, spec.interpolation, spec.resize)
        if self._cached is not None and self._cached.geometry == geometry:
            cached = self._cached
            for start in range(0, len(cached.targets), size):
                yield Batch(cached.pixels[start : start + size], cached.targets[start : start + size])
            return
        self._clear_cache()
        yield from self._decode_batches(spec, size, threads, geometry)

    def _decode_batches(
        self, spec: ImageSpec, size: int, threads: int, geometry: tuple[object, ...]
    ) -> Iterator[Batch]:
        needed = self._count * spec.height * spec.width * 3
        caches = needed <= self._budget.free
        cache = np.empty((self._count if caches else 0, spec.height, spec.width, 3), np.uint8)
        targets: list[Any] = []
        refused: list[Refusal] = []

        batches = decode_batches(self._examples(), [spec], size, threads, self._limits, refused)
        with closing(batches):
            for (pixels,), found in batches:
                if caches:
                    cache[len(targets) : len(targets) + len(found)] = pixels
                    targets += found
                yield Batch(pixels, found)
        self.refused = refused
        if caches:
            self._budget.free -= needed
            self._cached = _Cached(geometry, cache[: len(targets)], targets, needed)

    def _clear_cache(self) -> None:
        if self._cached is not None:
            self._budget.free += self._cached.bytes
            self._cached = None


def decode_batches(
    examples: Iterator[Example | Refusal],
    specs: Sequence[ImageSpec],
    size: int,
    threads: int,
    limits: Limits,
    refused: list[Refusal],
    policy: str = IMAGE_POLICY,
) -> Generator[tuple[list[np.ndarray], list[Any]], None, None]:
    """Yield batches of ``size`` in order: uint8 [B, height, width, 3] by each spec, and targets.

    The last batch may be smaller. Each image is decoded once, in threads, and resized by each spec; without specs it is
    only loaded. Those that cannot be decoded are added to ``refused``.
    """

    def convert(item: Example | Refusal) -> tuple[list[np.ndarray], Any] | Refusal:
        if isinstance(item, Refusal):
            return item
        data = item.load()
        if len(data) > limits.image_bytes:  # a dataset may have been made with wider limits
            return Refusal(item.key, Reason.IMAGE_BYTES, f"{len(data)} bytes, above limits.image_bytes")
        if not specs:  # only read
            return [], item.target
        try:
            image = decode(data, limits, policy=policy)
            return [fit(image, spec) for spec in specs], item.target
        except ImageRefused as error:
            return Refusal(item.key, error.reason, error.detail)

    def decoded(pool: ThreadPoolExecutor) -> Generator[tuple[list[np.ndarray], Any], None, None]:
        for item in prefetch(pool, convert, examples, 2 * size + threads):
            if isinstance(item, Refusal):
                refused.append(item)
            else:
                yield item

    # closing() cancels pending decodes when the consumer stops early
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool, closing(decoded(pool)) as items:
        while taken := list(itertools.islice(items, size)):
            pixels = [np.stack(images) for images in zip(*(images for images, _ in taken), strict=True)]
            yield pixels, [target for _, target in taken]
