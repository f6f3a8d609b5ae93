"""Batches of images with captions, from any step on: a pure function of the seed, the rank and the step's number.

The examples of an epoch come in a seeded order, and epochs follow one another without an end. Step ``s`` takes the
positions [s * ranks * batch, (s + 1) * ranks * batch) of that sequence, of which a rank takes its block: so the global
batch depends on its size alone, not on the number of ranks, and no step needs to know what came before.

A batch is a mapping of, with B samples of a rank:

===========  ===========================  =================================================================
``key``      list[str]                    sample keys
``image``    uint8 [B, size, size, 3]     RandomResizedCrop of the image, RGB
``caption``  int64 [B, context]           start, words, end, padding
``length``   list[int]                    tokens of ``caption`` that are predicted: the words and the end
===========  ===========================  =================================================================
"""

from __future__ import annotations

import functools
import itertools
import logging
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
from reinforce.dataset.augment import replay, sample_augmentation
from reinforce.errors import UserError
from reinforce.prefetch import prefetch
from reinforce.seeds import permutation, uniforms
from reinforce.source.image import ImageRefused, decode

#: Images in a row that may be broken before that is no accident.
_MOST_BROKEN = 100

_log = logging.getLogger(__name__)

Tokenize = Callable[[Sequence[str]], torch.Tensor]


class Example(NamedTuple):
    """One image with one of its captions; ``draw`` numbers the crops of an image."""

    image: int
    caption: int
    draw: int


class CaptionFeed:
    """The feed of a fine-tuning.

    ``tokenize`` gives int64 [B, context] of B texts, ``end`` is its token behind the last word. An image that cannot
    be decoded is logged with the reason and counted; another one, which follows from its place, stands in for it.
    """

    def __init__(self, pairs: Pairs, data: Data, seed: int, size: int, tokenize: Tokenize, end: int) -> None:
        self._pairs = pairs
        self._data = data
        self._seed = seed
        self._policy = Augmentations(count=1, size=size, scale=data.crop, rand_augment=RandAugment(ops=0))
        self._tokenize = tokenize
        self._end = end
        self._lock = threading.Lock()
        self._known: set[int] = set()  # images that turned out to be broken
        counts = pairs.counts() if data.use == "all" else np.ones(len(pairs), np.int64)
        self._ends = np.cumsum(counts)  # of each image's examples
        self.samples = int(self._ends[-1])
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def batches(self, rank: int, ranks: int, batch: int, start: int) -> Iterator[dict[str, Any]]:
        """Endless batches of ``batch`` samples for one rank, from step ``start`` on.

        Whole batches are made ahead in ``data.threads`` threads, as many as there are threads and one more.
        Raises UserError where no image can be decoded, and what the storage raises.
        """
        with ThreadPoolExecutor(self._data.threads, thread_name_prefix="captions") as pool:
            firsts = ((step * ranks + rank) * batch for step in itertools.count(start))
            yield from prefetch(pool, lambda first: self._batch(first, batch), firsts, self._data.threads + 1)

    def example(self, position: int) -> Example:
        """What stands at a position of the endless sequence of examples."""
        epoch, place = divmod(position, self.samples)
        return self._example(int(self._order(epoch)[place]), epoch)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return permutation(self.samples, self._seed, "captioning", epoch)

    def _example(self, index: int, epoch: int) -> Example:
        """Example ``index`` of an epoch before it is shuffled."""
        image = int(np.searchsorted(self._ends, index, side="right"))
        count = len(self._pairs.captions(image))
        if self._data.use == "all":
            caption = index - (int(self._ends[image - 1]) if image else 0)
            return Example(image, caption, epoch * count + caption)
        drawn = uniforms(self._seed, [self._pairs.key(image)], "caption", epoch, 1)
        return Example(image, int(drawn.item() * count), epoch)

    def _batch(self, first: int, size: int) -> dict[str, Any]:
        examples = [self.example(position) for position in range(first, first + size)]
        encoded = read_images([self._pairs.place(example.image) for example in examples])
        crops = np.empty((size, self._policy.size, self._policy.size, 3), np.uint8)
        for row, data in enumerate(encoded):
            examples[row], crops[row] = self._crop(examples[row], data, first + row)
        texts = [self._pairs.captions(example.image)[example.caption] for example in examples]
        with self._lock:  # fast tokenizers are not made for threads, slow ones gain nothing by them
            tokens = self._tokenize(texts)
        return {
            "key": [self._pairs.key(example.image) for example in examples],
            "image": torch.from_numpy(crops),
            "caption": tokens,
            "length": predicted(tokens, self._end),
        }

    def _crop(self, example: Example, data: bytes, position: int) -> tuple[Example, np.ndarray]:
        """The crop of an example, or of the next one in the list whose image is whole."""
        epoch, place = divmod(position, self.samples)
        for step in range(1, _MOST_BROKEN + 1):
            try:
                image = decode(data, self._data.limits)
            except ImageRefused as refused:
                self._note(example.image, refused)
                fault = refused
                example = self._example((int(self._order(epoch)[place]) + step) % self.samples, epoch)
                [data] = read_images([self._pairs.place(example.image)])
                continue
            record = sample_augmentation(
                self._policy, self._seed, self._pairs.key(example.image), example.draw, *image.size
            )
            return example, np.asarray(replay(image, record))
        raise UserError(f"data: {_MOST_BROKEN} images in a row cannot be decoded, the last: {fault}. Check the shards.")

    def _note(self, image: int, refused: ImageRefused) -> None:
        with self._lock:
            if image in self._known:
                return
            self._known.add(image)
            count = len(self._known)
        key, url = self._pairs.key(image), self._pairs.table["url"][image]
        _log.warning(
            "image %s of %s is left out, another one stands in for it: %s (%d images so far)", key, url, refused, count
        )


def predicted(tokens: torch.Tensor, end: int) -> list[int]:
    """How many tokens of each row [context] are predicted: those behind the start, up to the first end."""
    return [int(place) for place in (tokens == end).int().argmax(dim=1)]
