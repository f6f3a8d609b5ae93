"""Batches of images with captions, a pure function of the seed, the rank and the step; any step can be the first.

The examples of each epoch are shuffled by seed, and the epochs form an endless sequence. Step ``s`` takes positions
[s * ranks * batch, (s + 1) * ranks * batch) of this sequence, and each rank one block of them. So the global batch does
not depend on the number of ranks, and no step needs the state of earlier ones.

A batch of B samples of a rank is a mapping:

===========  ===========================  =================================================================
``key``      list[str]                    sample keys
``image``    uint8 [B, size, size, 3]     RandomResizedCrop of the image, RGB
``caption``  int64 [B, context]           start, words, end, padding
``length``   list[int]                    number of predicted tokens of ``caption``: the words and the end
===========  ===========================  =================================================================
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from reinforce.captioning.config import Data
from reinforce.captioning.images import read_images
from reinforce.captioning.pairs import Pairs
from reinforce.config import Augmentations, RandAugment
from reinforce.dataset.augment.records import replay
from reinforce.dataset.augment.sampling import sample_augmentation
from reinforce.errors import UserError
from reinforce.images.policy import ImageRefused, decode
from reinforce.processes.prefetch import prefetch
from reinforce.seeds import permutation, uniforms
from reinforce.terminal import plural
from reinforce.training.order import ORDER
from reinforce.training.task import Reading

#: Consecutive broken images after which the feed fails.
_MOST_BROKEN = 100

_log = logging.getLogger(__name__)

Tokenize = Callable[[Sequence[str]], torch.Tensor]


class Example(NamedTuple):
    """Indices of an image and of one of its captions; ``draw`` numbers the crops of an image."""

    image: int
    caption: int
    draw: int


class CaptionFeed:
    """The feed of a fine-tuning; implements ``reinforce.training.task.Feed``.

    ``tokenize`` maps B texts to int64 [B, context], ``end`` is the token after the last word. An image that cannot be
    decoded is logged with its reason and replaced by one of another batch of the epoch that can. (In version 1 of the
    order it was the next one in the order before shuffling, the same for neighbours.)
    """

    def __init__(self, pairs: Pairs, data: Data, seed: int, size: int, tokenize: Tokenize, end: int) -> None:
        self._pairs = pairs
        self._data = data
        self._seed = seed
        self._policy = Augmentations(count=1, size=size, scale=data.crop, rand_augment=RandAugment(ops=0))
        self._tokenize = tokenize
        self._end = end
        self._lock = threading.Lock()
        self._broken: set[int] = set()  # images that could not be decoded
        counts = pairs.caption_counts() if data.use == "all" else np.ones(len(pairs), np.int64)
        self._example_ends = np.cumsum(counts)  # of each image
        self.samples = int(self._example_ends[-1])
        self.data = {"data": pairs.describe()}
        self._order = functools.lru_cache(maxsize=2)(self._shuffled_examples)
        self._order_version = ORDER
        self._threads = data.threads or 1

    def set_up(
        self,
        ranks: int,
        batch: int,
        start: int,
        loaders: int,
        streams: int | None,
        order: int,
        row_processes: int | None = None,
    ) -> Reading:
        """See ``reinforce.training.task.Feed``; the order of samples depends on nothing that is chosen here."""
        self._order_version = order
        self._threads = self._data.threads or loaders
        return Reading(self._threads, f"{plural(self._threads, 'loader thread')}")

    def batches(self, rank: int, ranks: int, batch: int, start: int) -> Iterator[dict[str, Any]]:
        """Yield endless batches of ``batch`` samples for one rank, beginning with step ``start``.

        n threads (``data.threads``) make up to n + 1 batches ahead. Raises UserError where no image can be decoded, and
        the errors of the storage.
        """
        with ThreadPoolExecutor(self._threads, thread_name_prefix="captions") as pool:
            firsts = ((step * ranks + rank) * batch for step in itertools.count(start))
            yield from prefetch(pool, lambda first: self._batch(first, batch), firsts, self._threads + 1)

    def example(self, position: int) -> Example:
        """Return the example at a position of the endless sequence."""
        epoch, index = divmod(position, self.samples)
        return self._example(int(self._order(epoch)[index]), epoch)

    def _shuffled_examples(self, epoch: int) -> np.ndarray:
        return permutation(self.samples, self._seed, "captioning", epoch)

    def _example(self, index: int, epoch: int) -> Example:
        """Return example ``index`` of an epoch in the order before shuffling."""
        image = int(np.searchsorted(self._example_ends, index, side="right"))
        count = len(self._pairs.captions(image))
        if self._data.use == "all":
            caption = index - (int(self._example_ends[image - 1]) if image else 0)
            return Example(image, caption, epoch * count + caption)
        drawn = uniforms(self._seed, [self._pairs.key(image)], "caption", epoch, 1)
        return Example(image, int(drawn.item() * count), epoch)

    def _batch(self, first: int, size: int) -> dict[str, Any]:
        examples = [self.example(position) for position in range(first, first + size)]
        encoded = read_images([self._pairs.location(example.image) for example in examples])
        crops = np.empty((size, self._policy.size, self._policy.size, 3), np.uint8)
        for row, data in enumerate(encoded):
            examples[row], crops[row] = self._crop(examples[row], data, first + row)
        texts = [self._pairs.captions(example.image)[example.caption] for example in examples]
        with self._lock:  # fast tokenizers are not thread-safe, slow ones do not benefit from threads
            tokens = self._tokenize(texts)
        return {
            "key": [self._pairs.key(example.image) for example in examples],
            "image": torch.from_numpy(crops),
            "caption": tokens,
            "length": predicted_lengths(tokens, self._end),
        }

    def _crop(self, example: Example, data: bytes, position: int) -> tuple[Example, np.ndarray]:
        """Return an example and its crop, or another example whose image can be decoded."""
        epoch, index = divmod(position, self.samples)
        for step in range(1, _MOST_BROKEN + 1):
            try:
                image = decode(data, self._data.limits)
            except ImageRefused as refused:
                self._log_broken(example.image, refused)
                last = refused
                example = self._example(self._replacement(epoch, index, step), epoch)
                [data] = read_images([self._pairs.location(example.image)])
                continue
            record = sample_augmentation(
                self._policy, self._seed, self._pairs.key(example.image), example.draw, *image.size
            )
            return example, np.asarray(replay(image, record))
        raise UserError(f"data: {_MOST_BROKEN} images in a row cannot be decoded, the last: {last}. Check the shards.")

    def _replacement(self, epoch: int, index: int, step: int) -> int:
        """The index, before shuffling, of the example that is tried as number ``step`` in place of one of an epoch."""
        if self._order_version == 1:
            return (int(self._order(epoch)[index]) + step) % self.samples
        # Multiples of the golden ratio: the replacements of one batch are apart from it and from each other.
        stride = next(n for n in itertools.count(round(0.618 * self.samples)) if math.gcd(n, self.samples) == 1)
        return int(self._order(epoch)[(index + step * stride) % self.samples])

    def _log_broken(self, image: int, refused: ImageRefused) -> None:
        with self._lock:
            if image in self._broken:
                return
            self._broken.add(image)
            count = len(self._broken)
        key, url = self._pairs.key(image), self._pairs.table["url"][image]
        _log.warning(
            "image %s of %s cannot be decoded and is replaced by another one: %s (%d images so far)",
            key,
            url,
            refused,
            count,
        )


def predicted_lengths(tokens: torch.Tensor, end: int) -> list[int]:
    """Return the number of predicted tokens of each row [context]: those after the start, up to the first end token."""
    return [int(position) for position in (tokens == end).int().argmax(dim=1)]
