"""From the rows of a row group to examples: one augmentation, one text of each kind, and the targets of them.

Only the picked elements are taken out of the columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, PickedValues, captions_layer, embeddings_layer
from reinforce.errors import UserError
from reinforce.evaluation.reading import is_in_json, read_captions
from reinforce.images.policy import IMAGE_POLICY
from reinforce.images.records import AUGMENTATION_BACKEND, Augmentation, from_records
from reinforce.source.config import Limits
from reinforce.source.references import ImageRoots, referenced_images
from reinforce.source.samples import DamagedTar
from schemas import IMAGE_DIGEST, TRUE_CAPTIONS, image_columns
from schemas.seeds import uniforms

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.intp]

#: Samples the augmentation of an image by its width and height in pixels.
SampleCrop: TypeAlias = Callable[[int, int], Augmentation]
_TEXTS = pa.list_(pa.string())
#: Reads one layer of a row group.
ReadLayer: TypeAlias = Callable[[str], pa.Table]
#: Takes one value of every row [rows] of a layer, by its name and the places of the values in their rows.
PickValues: TypeAlias = Callable[[str, Ints], PickedValues]


@dataclass(frozen=True)
class ExampleSpec:
    """The parts of a sample that an example takes, and how they are picked.

    ``crops`` are the layers with targets of the augmented image, ``texts`` the teachers with vectors of the texts;
    ``captioners`` maps names to weights. With ``captions: mixed`` an example has one text, a synthetic one with
    probability ``synthetic``; with ``both`` it has the true caption and, if there are captioners, a synthetic one; with
    ``none`` it has no text. ``captioners`` include the ``parallel`` texts, whose targets are those of the true caption:
    ``json:FIELD`` of the metadata, or a captioner.
    """

    crops: tuple[str, ...]
    texts: tuple[str, ...]
    captioners: Mapping[str, float]
    captions: Literal["both", "mixed", "none"]
    synthetic: float
    pick: Literal["random", "sequential", "epoch"]
    seed: int
    several: bool = False  # whether the samples keep several true captions
    parallel: frozenset[str] = frozenset()
    images: bool = True  # whether examples have images
    pixels: bool = True  # whether these are read

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of text of an example, as they are named in a batch."""
        if self.captions == "none":
            return ()
        return ("caption", "synthetic") if self.captions == "both" and self.captioners else ("caption",)

    def sources(self, kind: str) -> dict[str, float]:
        """Sources of the texts of a kind, TRUE_CAPTION or captioners, with weights."""
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
        """The layer of each target of an example, in order, with ``image`` or the kind of text that it is of.

        For a text, the layer is that of its first source: it has the same tensors as those of the others.
        """
        of_texts = [
            (embeddings_layer(teacher, self.target_of(next(iter(self.sources(kind))))), kind)
            for kind in self.kinds
            for teacher in self.texts
        ]
        return [*((layer, "image") for layer in self.crops), *of_texts]

    def target_of(self, source: str) -> str:
        """The source of texts whose vectors are the targets of the texts of ``source``."""
        return TRUE_CAPTION if source in self.parallel else source

    def columns(self, images: Literal["embed", "reference"]) -> dict[str, tuple[str, ...]]:
        """Columns to read by layer; ``images`` is how the samples layer of the dataset stores images."""
        sources = list(dict.fromkeys(source for kind in self.kinds for source in self.sources(kind)))
        samples = ["key", *(("augmentations", *image_columns(images)) if self.images else ())]
        own = (TRUE_CAPTIONS if self.several else "caption",) if TRUE_CAPTION in sources else ()
        fields = [source for source in sources if is_in_json(source)]
        columns: dict[str, tuple[str, ...]] = {SAMPLES: (*samples, *own, *(("metadata",) if fields else ()))}
        others = [source for source in sources if source != TRUE_CAPTION and source not in fields]
        columns |= {captions_layer(source): ("key", "captions") for source in others}
        targets = dict.fromkeys(self.target_of(source) for source in sources)
        layers = [*self.crops, *(embeddings_layer(teacher, source) for teacher in self.texts for source in targets)]
        return columns | {layer: kind_of(layer).columns for layer in layers}


class SampleFile(NamedTuple):
    """The samples file of an example, with the limits and the policy by which its image was decoded.

    ``backend`` is the augmentation backend that replays its record, ``roots`` where referenced images may be read.
    """

    path: str
    limits: Limits
    policy: str = IMAGE_POLICY
    backend: str = AUGMENTATION_BACKEND
    roots: ImageRoots = ImageRoots()


class Example(NamedTuple):
    """One training example before its pixels and tokens are made."""

    file: SampleFile
    key: str
    image: bytes  # empty if it is not read; there is no augmentation, either, if examples have no images
    augmentation: Augmentation | SampleCrop | None
    texts: tuple[str, ...]  # one for each of ``ExampleSpec.kinds``
    targets: tuple[npt.NDArray[Any], ...]  # the tensors of ``ExampleSpec.targets``


#: Why a row without a true caption is unusable.
NO_CAPTION = "no caption"


class ReplayedExamples(NamedTuple):
    """Examples of consecutive rows, None for an unusable row, and counts of unusable rows by reason."""

    rows: list[Example | None]
    unusable: dict[str, int]


def make_examples(
    samples: pa.Table, read: ReadLayer, rows: slice | Ints, file: SampleFile, spec: ExampleSpec, epoch: int
) -> ReplayedExamples:
    """Make the examples of some ``rows`` of a row group, which follow one another or are given by number, in one epoch.

    ``read`` reads the row group of another layer; one layer is in memory at a time. A row is usable if it has a text
    of every kind and all targets, each of which is usable; if one captioner has none for it, its text comes from
    another one. Images that are stored by reference are read from their tar, in the tar's order. Raises UserError
    if they cannot be read, and ChangedImages.
    """

    def take(table: pa.Table) -> pa.Table:
        return table[rows] if isinstance(rows, slice) else table.take(rows)

    def rows_of(layer: str) -> pa.Table:
        return take(read(layer))

    samples = take(samples)
    keys: list[str] = samples["key"].to_pylist()
    picks = _Picks(spec, epoch, keys)

    augmentations: Sequence[Augmentation | None] = [None] * len(keys)
    crops = np.zeros(len(keys), np.intp)
    if spec.images:
        records = _ListColumn(samples["augmentations"])
        crops = picks.index(0, records.counts)
        augmentations = from_records(records.take(crops))
    usable, unusable, texts, blocks = _pick_rows(
        samples,
        rows_of,
        lambda layer, index: kind_of(layer).pick(rows_of(layer), index),
        crops,
        spec,
        picks,
        file.limits,
    )
    places = np.flatnonzero(usable).tolist()
    examples: list[Example | None] = [None] * len(keys)
    images: Iterable[bytes] = itertools.repeat(b"", len(places))
    if spec.images and spec.pixels:
        images = _read_images(samples, places, file.roots)
    for i, image in zip(places, images, strict=True):
        targets = tuple(block[i] for block in blocks)
        examples[i] = Example(file, keys[i], image, augmentations[i], tuple(text[i] for text in texts), targets)
    return ReplayedExamples(examples, unusable)


def find_stored(
    samples: pa.Table, read: ReadLayer, stored: Callable[[str], Bools], spec: ExampleSpec, limits: Limits
) -> tuple[Bools, dict[str, int]]:
    """The rows [rows] of a row group that have all that an example takes, and counts of the others by reason.

    ``stored`` is where the values of a layer are not null. No value is read, so that a row with one that cannot be
    trained on, such as a vector of zeros, counts as usable.
    """

    def pick(layer: str, _: Ints) -> PickedValues:
        return PickedValues((), rows := stored(layer), rows)

    picks, first = _Picks(spec, 0, samples["key"].to_pylist()), np.zeros(len(samples), np.intp)
    usable, unusable, _, _ = _pick_rows(samples, read, pick, first, spec, picks, limits)
    return usable, unusable


def _pick_rows(
    samples: pa.Table, read: ReadLayer, pick: PickValues, crops: Ints, spec: ExampleSpec, picks: _Picks, limits: Limits
) -> tuple[Bools, dict[str, int], list[list[str]], list[npt.NDArray[Any]]]:
    """The usable rows, counts of the others by reason, the texts of each kind, and the arrays of ``spec.targets``."""
    usable, unusable = np.ones(len(samples), bool), dict[str, int]()

    def require(present: Bools, reason: str) -> None:
        if lost := int((usable & ~present).sum()):
            unusable[reason] = lost
            usable[~present] = False

    blocks: list[npt.NDArray[Any]] = []
    for layer in spec.crops:
        picked = pick(layer, crops)
        require(picked.stored, f"{layer} is null")
        require(picked.usable, f"{layer} is {kind_of(layer).unusable}")
        blocks += picked.arrays
    texts: list[list[str]] = []
    for number, of_text in enumerate(spec.kinds):
        weights = spec.sources(of_text)
        sources = [_pick_texts(samples, read, pick, name, spec, picks, limits) for name in weights]
        chosen, found = picks.source(2 + number, [source.complete for source in sources], list(weights.values()))
        name = "caption" if of_text == TRUE_CAPTION else "synthetic caption"
        lacking = NO_CAPTION if of_text == TRUE_CAPTION else f"no {name}"
        require(np.any([source.has_text for source in sources], axis=0), lacking)
        for layer, picked in (item for source in sources for item in source.picked.items()):
            require(found | ~picked.stored | picked.usable, f"{layer} is {kind_of(layer).unusable}")
        require(found, f"no vectors of the {name}")
        texts.append([sources[source].texts[row] or "" for row, source in enumerate(chosen.tolist())])
        for of_sources in zip(*(source.picked.values() for source in sources), strict=True):
            for arrays in zip(*(of_source.arrays for of_source in of_sources), strict=True):
                blocks.append(np.stack(arrays)[chosen, np.arange(len(samples))])
    return usable, unusable, texts, blocks


class _Picks:
    """The picks of every row in one epoch: random numbers, or turns."""

    def __init__(self, spec: ExampleSpec, epoch: int, keys: Sequence[str]) -> None:
        self._random = uniforms(spec.seed, keys, "example", epoch, 2 + len(spec.kinds))
        self._turn: npt.NDArray[np.float64] | None = None
        if spec.pick != "random":
            same = np.zeros((len(keys), 2))
            self._turn = same if spec.pick == "epoch" else uniforms(spec.seed, keys, "turn", 0, 2)
        self._spec, self._keys, self._epoch = spec, keys, epoch

    def index(self, number: int, counts: Ints) -> Ints:
        """One of ``counts`` [rows] items for every row; in turn, all items come up in as many epochs."""
        return self._of((self._random if self._turn is None else self._turn)[:, number], counts)

    def true_captions(self, counts: Ints) -> Ints:
        """As ``index``, for true captions; the random numbers differ, since most datasets keep one caption."""
        if self._spec.pick == "epoch":
            return self._of(np.zeros(len(counts)), counts)
        index = self._epoch if self._turn is None else 0
        return self._of(uniforms(self._spec.seed, self._keys, "true caption", index, 1)[:, 0], counts)

    def _of(self, numbers: npt.NDArray[np.float64], counts: Ints) -> Ints:
        first = (numbers * counts).astype(np.intp)
        return first if self._turn is None else (first + self._epoch) % np.maximum(counts, 1)

    def source(self, number: int, complete: Sequence[Bools], weights: Sequence[float]) -> tuple[Ints, Bools]:
        """The source of each row's text, by weight among the complete ones, and whether there is one."""
        edges = np.cumsum([rows * weight for rows, weight in zip(complete, weights, strict=True)], axis=0)
        chosen = (edges <= self._random[:, number] * edges[-1]).sum(axis=0)
        return np.minimum(chosen, len(edges) - 1), edges[-1] > 0


class _PickedTexts(NamedTuple):
    """The texts picked from one source, for every row."""

    texts: list[str | None]
    picked: dict[str, PickedValues]  # by layer, one for each teacher
    has_text: Bools
    complete: Bools  # has a text and all targets of it


def _pick_texts(
    samples: pa.Table,
    read: ReadLayer,
    pick: PickValues,
    source: str,
    spec: ExampleSpec,
    picks: _Picks,
    limits: Limits,
) -> _PickedTexts:
    if is_in_json(source):
        rows = [{"json": (metadata or "{}").encode()} for metadata in samples["metadata"].to_pylist()]
        lists = _ListColumn(pa.chunked_array([[read_captions(row, [source], limits) for row in rows]], _TEXTS))
        has_text, index = lists.counts > 0, picks.index(1, lists.counts)
        texts = lists.take(index)
    elif source == TRUE_CAPTION and TRUE_CAPTIONS not in samples.column_names:
        texts = samples["caption"].to_pylist()
        has_text = np.asarray(samples["caption"].is_valid())
        index = np.zeros(len(texts), np.intp)
    else:
        own = source == TRUE_CAPTION
        lists = _ListColumn(samples[TRUE_CAPTIONS] if own else read(captions_layer(source))["captions"])
        has_text = lists.counts > 0
        index = picks.true_captions(lists.counts) if own else picks.index(1, lists.counts)
        texts = lists.take(index)
    if source in spec.parallel:  # several texts of the first true caption
        index = np.zeros(len(texts), np.intp)
    layers = [embeddings_layer(teacher, spec.target_of(source)) for teacher in spec.texts]
    picked = {layer: pick(layer, index) for layer in layers}
    complete = np.logical_and.reduce([has_text, *(of_layer.usable for of_layer in picked.values())])
    return _PickedTexts(texts, picked, has_text, complete)


def _read_images(samples: pa.Table, rows: Sequence[int], roots: ImageRoots) -> Iterator[bytes]:
    """Encoded images of the given rows, which must ascend."""
    if "image" in samples.column_names:
        column = samples["image"]
        yield from (column[row].as_py() for row in rows)
        return
    wanted = pa.array(rows, pa.int64())
    references = samples["image_ref"].take(wanted).to_pylist()
    digests = samples[IMAGE_DIGEST].take(wanted).to_pylist()
    try:
        yield from referenced_images(references, roots, digests=digests)
    except (OSError, DamagedTar) as error:
        tars = ", ".join(sorted({reference["url"] for reference in references}))
        raise UserError(
            f"images are stored by reference, and {tars} cannot be read: {type(error).__name__}: {error}. Restore it."
        ) from error


class _ListColumn:
    """A list column of which one element per row is taken."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        offsets = array.offsets.to_numpy()
        self._values, self._starts = array.values, offsets[:-1]
        self.counts: Ints = np.where(np.asarray(array.is_valid()), np.diff(offsets), 0)

    def take(self, index: Ints) -> list[Any]:
        """Element ``index[row]`` of every row, None for an empty or null list."""
        return self._values.take(pa.array(self._starts + index, mask=self.counts == 0)).to_pylist()
