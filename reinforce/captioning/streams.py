"""Batches of images with captions: the pairs of a source in the streams and the order of students.

Memory holds, of each stream, the encoded images of a window and of a group: a row group of Parquet, 1,024 rows of
another table, or a tar. ``reinforce.training.order`` describes the order. A batch of B samples of a rank is a mapping:

===========  ===========================  =================================================================
``key``      list[str]                    sample keys
``image``    uint8 [B, size, size, 3]     RandomResizedCrop of the image, RGB
``caption``  int64 [B, context]           start, words, end, padding
``length``   list[int]                    number of predicted tokens of ``caption``: the words and the end
===========  ===========================  =================================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.held_out import HeldOut, load_held_out
from reinforce.captioning.source import PairSource
from reinforce.config import Augmentations, RandAugment
from reinforce.dataset.augment.backends import sample_augmentation
from reinforce.errors import UserError
from reinforce.seeds import uniforms
from reinforce.source.formats.base import Shard
from reinforce.source.samples import RawSample
from reinforce.source.urls import canonical
from reinforce.student.data.assembly import Assembler
from reinforce.student.data.examples import Example, Examples, SampleFile
from reinforce.student.data.feed import StreamFeed, Streams
from reinforce.student.data.parts import PartMaker, Tokenize
from reinforce.training.order import GroupChunk


@dataclass(frozen=True)
class StreamedPairs:
    """The pairs of a source in groups; implements ``reinforce.student.data.reader.Streamed``.

    ``counts`` int64 [groups] are the examples of each group, ``size`` the side of images in pixels.
    """

    source: PairSource
    shards: Sequence[Shard]
    counts: npt.NDArray[np.int64]
    size: int
    weight: float = 1.0

    @property
    def url(self) -> str:
        return "data.source"

    def hint(self, unusable: Collection[str]) -> str:
        return "Name the member or field with captions in data.captions."

    @property
    def groups(self) -> npt.NDArray[np.int64]:
        return self.counts[:, None]

    def describe(self) -> str:
        """Return the number of examples and a hash of the names and examples of the groups."""
        names = [canonical(shard.file).rpartition("/")[2] for shard in self.shards]
        digest = hashlib.sha256(json.dumps([names, self.counts.tolist()]).encode()).hexdigest()[:16]
        return f"{self.counts.sum():,} examples in {len(names):,} groups, SHA-256 {digest}"

    def load(self, chunk: GroupChunk, epoch: int, keep: bool = False) -> Examples:
        """Read the examples of a chunk of a group in one epoch; see ``Streamed``.

        Samples that are refused have no row where they were read to be counted, and are the last ones of a group
        otherwise. Raises UserError for a shard that cannot be read completely.
        """
        refused = Counter[str]()
        rows = [*self._rows(chunk, refused)]
        keys, seed = [item.key for item, _, _ in rows], self.source.seed
        uniform: list[float] = uniforms(seed, keys, "caption", epoch, 1)[:, 0].tolist() if rows else []
        file = SampleFile(canonical(self.shards[chunk.group].file), self.source.data.limits)
        examples: list[Example | None] = []
        for (item, captions, which), number in zip(rows, uniform, strict=True):
            if which is None:
                draw, text = epoch, captions[int(number * len(captions))]
            else:
                draw, text = epoch * len(captions) + which, captions[which]
            crop = partial(sample_augmentation, self._policy, seed, item.key, draw)
            examples.append(Example(file, item.key, item.image, crop, (text,), ()))
        missing = chunk.rows - len(examples)
        reasons = dict(refused) or {"fewer samples than were counted": missing}
        return Examples([*examples, *[None] * missing], reasons if missing else {})

    def _rows(self, chunk: GroupChunk, refused: Counter[str]) -> Iterator[tuple[RawSample, Sequence[str], int | None]]:
        """Yield the samples of a chunk with their captions, and with ``use: all`` the number of one of these."""
        number, every = 0, self.source.data.use == "all"
        for item, captions in self.source.pairs(self.shards[chunk.group], refused):
            assert isinstance(item, RawSample)
            count = len(captions) if every else 1
            for which in range(max(0, chunk.first - number), min(count, chunk.stop - number)):
                yield item, captions, which if every else None
            number += count
            if number >= chunk.stop:
                return

    @cached_property
    def _policy(self) -> Augmentations:
        return Augmentations(count=1, size=self.size, scale=self.source.data.crop, rand_augment=RandAugment(ops=0))


class CaptionStreams(StreamFeed):
    """The feed of a training run whose source is streamed; ``data`` and the order depend on the counts of the groups.

    ``tokenize`` maps B texts to int64 [B, context], ``end`` is the token after the last word. With ``pin``, batches are
    in pinned memory. An image that cannot be decoded is replaced by one of a later batch.
    """

    def __init__(self, pairs: StreamedPairs, tokenize: Tokenize, end: int, pin: bool = False) -> None:
        data = pairs.source.data
        maker = PartMaker(pairs.size, (), tokenize, replaces=True)
        described = pairs.describe()
        super().__init__(
            Streams(data.window or 4096, data.streams, data.workers, data.prefetch or 4),
            pairs.source.seed,
            [pairs],
            maker,
            Assembler(("caption",), (), (), pin),
            int(pairs.counts.sum()),
            files=described,
        )
        self._end = end
        self.data = {"data": described}

    def batches(self, rank: int, ranks: int, batch: int, start: int) -> Generator[dict[str, Any]]:
        """See ``StreamFeed.batches``."""
        with contextlib.closing(super().batches(rank, ranks, batch, start)) as batches:
            for one in batches:
                found = {name: one[name] for name in ("key", "image", "caption")}
                yield {**found, "length": predicted_lengths(one["caption"], self._end)}


def predicted_lengths(tokens: torch.Tensor, end: int) -> list[int]:
    """Return the number of predicted tokens of each row [context]: those after the start, up to the first end token."""
    return [int(position) for position in (tokens == end).int().argmax(dim=1)]


def load_streams(config: CaptionerConfig, size: int) -> tuple[StreamedPairs, HeldOut]:
    """The pairs of a config for images of ``size`` pixels a side, and the held-out ones.

    Raises UserError for shards that cannot be read completely, and for too few training or held-out images.
    """
    data, batch = config.data, config.train.batch
    source = PairSource("data", data.source, data.view, data, config.seed, config.held_out.share)
    found = source.groups()
    counts = source.counted(found, config.output)
    if sum(counts) < batch:
        raise UserError(
            f"data: {sum(counts):,} examples are left for training, fewer than train.batch ({batch}), so a batch would "
            f"contain an image twice. Lower train.batch or held_out.share, or check data.captions."
        )
    shards = tuple(shard for shard, _ in found)
    streamed = StreamedPairs(source, shards, np.array(counts, np.int64), size)
    return streamed, load_held_out(config, source, shards)
