"""The images of a set as uint8 batches: decoded ahead in threads, and cached if they fit into memory.

Their content is hashed while it is read: what a kept result was made of. Images, labels, captions, metadata, class
names and templates count, in their order. Names of files and keys of samples do not, so that a copy in other shards is
the same set.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from reinforce.evaluation.reading import LabelledImage, SetReader
from reinforce.images.policy import IMAGE_POLICY, ImageRefused, decode
from reinforce.processes.attempts import prefetch
from reinforce.source.config import Limits
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.fit import fit
from teachers.protocols import ImageSpec

_BYTES = 16


@dataclass
class ContentDigest:
    """The digest of one pass over a set: of its class names and templates, and of its ``examples``, each hashed."""

    texts: list[Sequence[str]] = field(default_factory=list)
    examples: list[bytes] = field(default_factory=list)

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        return hash_content(self.texts, b"".join(self.examples)).hex()


def hash_content(value: Any, data: bytes = b"") -> bytes:
    """Hash an example: its target, a JSON value or one with such an attribute ``content``, and its image."""
    text = json.dumps(value, default=attrgetter("content")).encode()
    digest = hashlib.blake2b(text + b"\0", digest_size=_BYTES)
    digest.update(data)
    return digest.digest()


T = TypeVar("T")
#: uint8 [B, height, width, 3] for each spec, and the targets of the B examples.
_Decoded = tuple[list[np.ndarray], list[Any]]


@dataclass
class CacheBudget:
    """Bytes that are still free for cached images; shared by all sets."""

    free: int


def geometry_of(spec: ImageSpec) -> tuple[object, ...]:
    """Settings that determine the pixels of an image before they are normalised."""
    return spec.height, spec.width, spec.interpolation, spec.resize


class ImageBatches:
    """The images of one set. ``refused`` lists those that could not be decoded in the last complete pass.

    They are cached if ``count`` of them, the number of examples, fit into the ``budget``. ``digest`` receives what is
    read, and ``progress`` the number of images after each batch.
    """

    def __init__(
        self,
        examples: SetReader,
        count: int = 0,
        limits: Limits | None = None,
        budget: CacheBudget | None = None,
        policy: str = IMAGE_POLICY,
        digest: ContentDigest | None = None,
        progress: Callable[[int], None] = lambda images: None,
    ) -> None:
        self.refused: list[Refusal] = []
        self.digest = digest
        self._examples, self._count, self._policy, self._progress = examples, count, policy, progress
        self._limits, self._budget = limits or Limits(), budget or CacheBudget(0)
        self._cached: tuple[object, list[_Decoded], int] | None = None  # geometry, batches, bytes

    def decode(self, specs: Sequence[ImageSpec], size: int, threads: int) -> Iterator[_Decoded]:
        """Yield batches of ``size`` in the set's order: uint8 [B, height, width, 3] by each spec, and targets.

        The last batch may be smaller. Each image is decoded once, in threads, and resized by each spec; without specs
        it is only loaded. After one complete pass, batches come from the cache if the images fit into the budget, and
        size and geometry are the same.
        """
        geometry = size, [*map(geometry_of, specs)]
        if self._cached is not None:
            known, cached, taken = self._cached
            if known == geometry:
                yield from cached
                return
            self._budget.free += taken
            self._cached = None
        needed = self._count * sum(spec.height * spec.width * 3 for spec in specs)
        kept: list[_Decoded] | None = [] if 0 < needed <= self._budget.free else None
        done = 0

        def convert(item: LabelledImage, data: bytes) -> tuple[list[np.ndarray], Any]:
            if not specs:  # only read
                self._check_size(data)
                return [], item.target
            image = self.open(data)
            return [fit(image, spec) for spec in specs], item.target

        with closing(self._converted(convert, 2 * size, threads)) as items:
            while found := list(itertools.islice(items, size)):
                pixels = [np.stack(images) for images in zip(*(images for images, _ in found), strict=True)]
                batch = pixels, [target for _, target in found]
                del found
                if kept is not None:
                    kept.append(batch)
                yield batch
                done += len(batch[1])
                self._progress(done)
        if kept is not None:
            self._budget.free -= needed
            self._cached = geometry, kept, needed

    def whole(
        self, make: Callable[[Image.Image, Any], T], size: int, threads: int, only: Callable[[Any], bool]
    ) -> Iterator[T]:
        """Yield what ``make`` makes of each image, RGB at its own size, and its target, in the set's order.

        ``make`` runs ahead in threads, for ``size`` images. Images whose target is not ``only`` are loaded for the
        digest alone, and not decoded. Nothing is cached.
        """

        def convert(item: LabelledImage, data: bytes) -> T | None:
            return make(self.open(data), item.target) if only(item.target) else None

        skip = None if self.digest is not None else only
        with closing(self._converted(convert, size, threads, skip)) as items:
            found = (item for item in items if item is not None)
            for done, item in enumerate(found, start=1):
                yield item
                self._progress(done)

    def open(self, data: bytes) -> Image.Image:
        """Decode an image to RGB at its own size, as all of this set. Raises ImageRefused. Thread-safe."""
        self._check_size(data)
        return decode(data, self._limits, policy=self._policy)

    def _check_size(self, data: bytes) -> None:
        if len(data) > self._limits.image_bytes:  # a dataset may have been made with wider limits
            raise ImageRefused(Reason.IMAGE_BYTES, f"{len(data)} bytes, above limits.image_bytes")

    def _converted(
        self,
        convert: Callable[[LabelledImage, bytes], T],
        ahead: int,
        threads: int,
        only: Callable[[Any], bool] | None = None,
    ) -> Generator[T, None, None]:
        """What ``convert`` gives for each example, in threads; their hashes go to ``digest``, those it refuses to
        ``refused``. Closing it cancels pending decodes when the consumer stops early."""
        refused: list[Refusal] = []

        def run(item: LabelledImage | Refusal) -> tuple[bytes, T | Refusal]:
            if isinstance(item, Refusal):
                return hash_content(item.reason.value), item
            data = item.load()
            content = hash_content(item.target, data) if self.digest is not None else b""
            try:
                return content, convert(item, data)
            except ImageRefused as error:
                return content, Refusal(item.key, error.reason, error.detail)

        examples = self._examples()
        if only is not None:
            examples = (item for item in examples if isinstance(item, Refusal) or only(item.target))
        with (
            ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
            closing(prefetch(pool, run, examples, ahead + threads)) as found,
        ):
            for content, item in found:
                if self.digest is not None:
                    self.digest.examples.append(content)
                if isinstance(item, Refusal):
                    refused.append(item)
                else:
                    yield item
        self.refused = refused
