"""Read source shards of every format as streams of samples and refusals."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from reinforce.source.config import Input
from reinforce.source.formats.base import Shard, find_format
from reinforce.source.linked_images import Places
from reinforce.source.samples import (
    Item,
    RawSample,
    ReadBudget,
    Refusal,
    UnreadSample,
    captions_of,
    refusing_absent,
)

_MOST_CAPTIONS = 64  # of a sample, as in the config
_FIRST_ROWS = 8


def read_samples(shard: Shard, spec: Input, budget: ReadBudget | None = None) -> Iterator[RawSample | Refusal]:
    """Yield the samples of a shard in order, with refusals in between, as ``read_shard`` does for tars.

    In tables each row is a sample; a key that occurs again is refused. ``budget`` bounds what is read of a tar; of the
    other formats little is read before the first sample.
    """
    format_ = find_format(shard.format)
    samples = format_.read(shard, spec, budget)
    if format_.is_table:
        samples = _with_images(samples, shard.file, spec)
    return refusing_absent(shard.file, samples)  # type: ignore[arg-type]  # only tables name files of images


@dataclass(frozen=True)
class SeveralCaptions:
    """True captions of the first samples of a shard: of each the texts at the first place that has some.

    ``rows`` is whether several rows of a table name one image, and are a sample each unless captions are kept together.
    """

    texts: Sequence[Sequence[str]]
    rows: bool

    @property
    def most(self) -> int:
        """The most of a sample."""
        return max(map(len, self.texts), default=0)


def find_several(shard: Shard, spec: Input, samples: Sequence[RawSample]) -> SeveralCaptions:
    """Find the captions of ``samples``, the first ones of a shard; of a table those of more, without their images.

    Raises the errors of the storage.
    """
    items: Iterable[Item] = samples
    rows = False
    format_ = find_format(shard.format)
    if format_.is_table:
        wide = spec.model_copy(update={"captions_per_sample": _MOST_CAPTIONS})
        items = [*itertools.islice(format_.read(shard, wide), _FIRST_ROWS)]
        apart = spec.model_copy(update={"captions_per_sample": None, "key": None})
        images = [_image(item) for item in itertools.islice(format_.read(shard, apart), 2)]
        rows = images[1:] == images[:1] != [None]
    return SeveralCaptions([_captions(item, spec) for item in items if not isinstance(item, Refusal)], rows)


def _image(item: Item) -> str | bytes | None:
    if isinstance(item, Refusal):
        return None
    return item.location if isinstance(item, UnreadSample) else item.image


def _captions(item: RawSample | UnreadSample, spec: Input) -> list[str]:
    sidecars = item.all_sidecars if isinstance(item, RawSample) else item.sidecars
    found = (captions_of(sidecars, [field], spec.limits, _MOST_CAPTIONS) for field in spec.caption_fields)
    return next(filter(None, found), [])


def _with_images(items: Iterator[Item], table: str, spec: Input) -> Iterator[RawSample | Refusal]:
    """Yield the items; images in files of their own are read."""
    for item in items:
        if isinstance(item, UnreadSample):
            yield from Places(table, spec).samples(itertools.chain([item], items))
            return
        yield item
