"""From the rows of a row group to examples: one augmentation, one text of each kind, and the teachers' vectors of them.

Only what was picked is taken out of the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.config import Limits
from reinforce.dataset import vectors
from reinforce.dataset.augment import Augmentation, from_records
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, captions_layer, embeddings_layer
from reinforce.errors import UserError
from reinforce.seeds import uniforms
from reinforce.source.image import IMAGE_POLICY
from reinforce.source.shards import referenced_images
from reinforce.source.tar import DamagedTar
from schemas import image_column

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float32]

#: Reads one layer of a row group.
ReadLayer: TypeAlias = Callable[[str], pa.Table]


@dataclass(frozen=True)
class Choice:
    """What an example takes of a sample, and how it is picked.

    ``seeing`` and ``reading`` are the teachers whose vectors of images and of texts are wanted, ``captioners`` have
    weights. With ``mixed`` an example has one text, a synthetic one with probability ``synthetic``; with ``both`` it
    has the true caption and, where there are captioners, a synthetic one.
    """

    seeing: tuple[str, ...]
    reading: tuple[str, ...]
    captioners: Mapping[str, float]
    captions: Literal["both", "mixed"]
    synthetic: float
    pick: Literal["random", "sequential"]
    seed: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of an example's texts in a batch."""
        return ("caption", "synthetic") if self.captions == "both" and self.captioners else ("caption",)

    def sources(self, kind: str) -> dict[str, float]:
        """Where texts of a kind come from: TRUE_CAPTION or captioners, with weights."""
        if self.captions == "both" or not self.captioners:
            return {TRUE_CAPTION: 1.0} if kind == "caption" else dict(self.captioners)
        total = sum(self.captioners.values()) or 1.0
        mixed = {
            TRUE_CAPTION: 1 - self.synthetic,
            **{c: self.synthetic * w / total for c, w in self.captioners.items()},
        }
        return {source: weight for source, weight in mixed.items() if weight > 0}

    @property
    def targets(self) -> list[tuple[str, str]]:
        """(teacher, ``image`` or kind of text) of an example's vectors, in their order."""
        return [(t, "image") for t in self.seeing] + [(t, kind) for kind in self.kinds for t in self.reading]

    def columns(self, images: Literal["embed", "reference"]) -> dict[str, tuple[str, ...]]:
        """Columns that are read, by layer; of a dataset whose samples layer keeps ``images`` in that way."""
        sources = list(dict.fromkeys(source for kind in self.kinds for source in self.sources(kind)))
        samples = ["key", "augmentations", image_column(images)]
        columns: dict[str, tuple[str, ...]] = {
            SAMPLES: (*samples, "caption") if TRUE_CAPTION in sources else (*samples,)
        }
        columns |= {captions_layer(source): ("key", "captions") for source in sources if source != TRUE_CAPTION}
        layers = [embeddings_layer(t, "images") for t in self.seeing]
        layers += [embeddings_layer(t, source) for t in self.reading for source in sources]
        return columns | dict.fromkeys(layers, ("key", "embeddings"))


class Origin(NamedTuple):
    """The samples file that an example stands in, and within which limits and by which policy its image was read."""

    path: str
    limits: Limits
    policy: str = IMAGE_POLICY


class Example(NamedTuple):
    """One training example whose pixels and tokens are still to be made."""

    origin: Origin
    key: str
    image: bytes
    augmentation: Augmentation
    texts: tuple[str, ...]  # by ``Choice.kinds``
    vectors: Floats  # those of ``Choice.targets`` end to end


class Examples(NamedTuple):
    """Examples of consecutive rows, None where a row is not usable, and how many are not for which reason."""

    rows: list[Example | None]
    unusable: dict[str, int]


def examples_of(
    samples: pa.Table, read: ReadLayer, first: int, stop: int, origin: Origin, choice: Choice, epoch: int
) -> Examples:
    """Rows ``first`` to ``stop`` of a row group as examples of one pass.

    ``read`` gives the row group of another layer; one is in memory at a time. A row is usable where a text of every
    kind and all vectors are there; if one captioner could not serve it, its text comes from another. Images that are
    referred to are read from their tar, in its order; raises UserError where they cannot be.
    """
    samples = samples.slice(first, stop - first)
    keys: list[str] = samples["key"].to_pylist()
    draws = _Draws(choice, epoch, keys)
    usable, unusable = np.ones(len(keys), bool), {}

    def rows_of(layer: str) -> pa.Table:
        return read(layer).slice(first, stop - first)

    def need(present: Bools, reason: str) -> None:
        if lost := int((usable & ~present).sum()):
            unusable[reason] = lost
            usable[~present] = False

    records = _Lists(samples["augmentations"])
    views = draws.index(0, records.counts)
    augmentations = from_records(records.take(views))
    blocks: list[Floats] = []
    for teacher in choice.seeing:
        layer = embeddings_layer(teacher, "images")
        picked, valid = vectors.pick(rows_of(layer), views)
        need(valid, f"{layer} is null")
        blocks.append(picked)
    texts: list[list[str]] = []
    for number, kind in enumerate(choice.kinds):
        weights = choice.sources(kind)
        sources = [_source(samples, rows_of, name, choice.reading, draws) for name in weights]
        which, found = draws.source(2 + number, [source.whole for source in sources], list(weights.values()))
        name = "caption" if kind == TRUE_CAPTION else "synthetic caption"
        need(np.any([source.written for source in sources], axis=0), f"no {name}")
        need(found, f"no vectors of the {name}")
        texts.append([sources[source].texts[row] or "" for row, source in enumerate(which.tolist())])
        for of_sources in zip(*(source.vectors for source in sources), strict=True):
            blocks.append(np.stack(of_sources)[which, np.arange(len(keys))])
    block = np.concatenate(blocks, axis=1) if blocks else np.empty((len(keys), 0), np.float32)

    places = np.flatnonzero(usable).tolist()
    examples: list[Example | None] = [None] * len(keys)
    for i, image in zip(places, _images(samples, places), strict=True):
        examples[i] = Example(origin, keys[i], image, augmentations[i], tuple(text[i] for text in texts), block[i])
    return Examples(examples, unusable)


class _Draws:
    """The random numbers of every row in one pass, or its turns."""

    def __init__(self, choice: Choice, epoch: int, keys: Sequence[str]) -> None:
        self._fresh = uniforms(choice.seed, keys, "example", epoch, 2 + len(choice.kinds))
        self._turn = uniforms(choice.seed, keys, "turn", 0, 2) if choice.pick == "sequential" else None
        self._epoch = epoch

    def index(self, number: int, counts: Ints) -> Ints:
        """One of ``counts`` things for every row; by turns, all of them come up in as many passes."""
        if self._turn is None:
            return (self._fresh[:, number] * counts).astype(np.intp)
        return ((self._turn[:, number] * counts).astype(np.intp) + self._epoch) % np.maximum(counts, 1)

    def source(self, number: int, whole: Sequence[Bools], weights: Sequence[float]) -> tuple[Ints, Bools]:
        """Which source each row's text comes from, by weight among those that are whole, and whether one is."""
        edges = np.cumsum([rows * weight for rows, weight in zip(whole, weights, strict=True)], axis=0)
        which = (edges <= self._fresh[:, number] * edges[-1]).sum(axis=0)
        return np.minimum(which, len(edges) - 1), edges[-1] > 0


class _Source(NamedTuple):
    """What was picked of one source of texts, for every row."""

    texts: list[str | None]
    vectors: list[Floats]  # by teacher
    written: Bools  # where there is a text
    whole: Bools  # and all vectors of it


def _source(samples: pa.Table, read: ReadLayer, name: str, reading: Sequence[str], draws: _Draws) -> _Source:
    if name == TRUE_CAPTION:
        texts = samples["caption"].to_pylist()
        written = np.asarray(samples["caption"].is_valid())
        index = np.zeros(len(texts), np.intp)
    else:
        lists = _Lists(read(captions_layer(name))["captions"])
        written = lists.counts > 0
        index = draws.index(1, lists.counts)
        texts = lists.take(index)
    picked = [vectors.pick(read(embeddings_layer(teacher, name)), index) for teacher in reading]
    whole = np.logical_and.reduce([written, *(valid for _, valid in picked)])
    return _Source(texts, [found for found, _ in picked], written, whole)


def _images(samples: pa.Table, rows: Sequence[int]) -> Iterator[bytes]:
    """Encoded images of ascending rows."""
    if "image" in samples.column_names:
        column = samples["image"]
        yield from (column[row].as_py() for row in rows)
        return
    references = samples["image_ref"].take(pa.array(rows)).to_pylist()
    try:
        yield from referenced_images(references)
    except (OSError, DamagedTar) as error:
        tars = ", ".join(sorted({reference["url"] for reference in references}))
        raise UserError(
            f"images are kept by reference, and {tars} cannot be read: {type(error).__name__}: {error}. Restore it."
        ) from error


class _Lists:
    """A column of lists, of each of which one element is taken."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        offsets = array.offsets.to_numpy()
        self._values, self._starts = array.values, offsets[:-1]
        self.counts: Ints = np.where(np.asarray(array.is_valid()), np.diff(offsets), 0)

    def take(self, index: Ints) -> list[Any]:
        """Element ``index[row]`` of every row, None where there is none."""
        return self._values.take(pa.array(self._starts + index, mask=self.counts == 0)).to_pylist()
