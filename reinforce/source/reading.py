"""Read source shards of every format as streams of samples and refusals."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from reinforce.config import Input
from reinforce.source.formats.base import Shard
from reinforce.source.formats.registry import find_format
from reinforce.source.linked_images.places import Places
from reinforce.source.samples import Item, Place, RawSample, ReadBudget, Refusal, refusing_absent


def read_samples(shard: Shard, spec: Input, budget: ReadBudget | None = None) -> Iterator[RawSample | Refusal]:
    """Yield the samples of a shard in order, with refusals in between, as ``read_shard`` does for tars.

    In tables each row is a sample; a key that occurs again is refused. ``budget`` bounds what is read of a tar; of the
    other formats little is read before the first sample.
    """
    samples = find_format(shard.format).read(shard, spec, budget)
    yield from refusing_absent(shard.file, _with_images(samples, shard.file, spec))


def _with_images(items: Iterator[Item], table: str, spec: Input) -> Iterator[RawSample | Refusal]:
    """Yield the items; images in files of their own are read."""
    for item in items:
        if isinstance(item, Place):
            yield from Places(table, spec).samples(itertools.chain([item], items))
            return
        yield item
