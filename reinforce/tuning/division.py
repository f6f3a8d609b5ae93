"""Images divided into those that are trained on and those that are held out, with all copies of an image on one side.

Copies have equal bytes, or vectors of the released model whose cosine is at least ``copies`` of the config. Vectors are
of whole images: those of the stored crops differ more between copies than between some other images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

import schemas
from reinforce.dataset.aligned import AlignedLayers
from reinforce.dataset.kinds.samples import true_captions
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.reading import Dataset
from reinforce.dataset.store import Store
from reinforce.dataset.view import View, open_view
from reinforce.errors import UserError
from reinforce.evaluation.encoding import load_models
from reinforce.evaluation.reading import ImageBatches, LabelledImage, Table, input_of, read_samples
from reinforce.explore.config import SelectConfig
from reinforce.explore.duplicates import digests
from reinforce.explore.select import select
from reinforce.processes.cores import available_cores
from reinforce.source.formats.folder import CLASS
from reinforce.source.samples import Refusal, parse_json
from reinforce.storage import Storage
from reinforce.terminal import plural
from reinforce.tuning import adapt_config
from reinforce.tuning.adapt_config import HELD_OUT, RELEASED, TRAIN, AdaptConfig
from teachers.spec import ModelSpec

_MOST_COMPARED = 2**17  # images; each is compared with all
_BLOCK = 1024
_ROUNDING = 2.0**-18  # of a cosine in float32
FACTS = "division.json"

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Division:
    """The views of both sides, and what a user must know of them.

    Attributes:
        views: by name, those of the images that are trained on and that are held out.
        units: of each held-out image in order, a number that its copies have, too.
        classes: images of each class on both sides; empty without classes.
        lines: copies and captions, one line each.
        without_caption: images to train on that have none, and so cannot be used.
    """

    views: Mapping[str, View]
    units: Sequence[int]
    classes: Mapping[str, int]
    lines: Sequence[str]
    without_caption: int

    @property
    def unequal(self) -> bool:
        """Whether classes have unequal numbers of images, so that a large one decides the share of right images."""
        return len({*self.classes.values()}) > 1


def divide(
    config: AdaptConfig, domain: adapt_config.Domain, data: Dataset, begun: bool, encode: Callable[[], Floats]
) -> Division:
    """Divide the images, unless a training has ``begun`` by a division. Raises UserError for too few.

    ``encode`` gives the vectors by which near copies are found [images, D], as ``encode_images``.
    """
    storage = Storage(config.output)
    groups: list[list[str]] = []
    held_out = adapt_config.held_out_images(config, len(data))
    if not begun:
        groups, facts = _find_copies(data, config.copies, held_out, encode)
        storage.write_json(facts, FACTS)
    views = {one.name: _view(one, data.shards, begun) for one in adapt_config.views(config, held_out, groups)}
    held, trained = (_rows(data.store, views[name]) for name in (HELD_OUT, TRAIN))
    unit_of = {name: group[0] for group in views[HELD_OUT].rules[0]["sample"]["together"] for name in group}
    numbers: dict[str, int] = {}
    units = [numbers.setdefault(unit_of.get(name, name), len(numbers)) for name, _, _ in held]
    classes = Counter(of for _, of, _ in (*held, *trained) if of is not None) if domain.classes else {}
    facts, lines, near = storage.read_json(FACTS) or {}, [], ""
    if facts["compared"]:
        near = f", and {facts['near']:,} more have a near copy (cosine of {config.copies:g})"
    else:
        lines.append(
            f"warning: near copies are not looked for, since {facts['why']}; only images of equal bytes are kept on "
            "one side. Another cosine is chosen by --set copies=0.99"
        )
    lines.append(
        f"copies: {facts['equal']:,} of {plural(facts['images'], 'image')} have the bytes of another{near}; copies of "
        f"an image are on one side, and the {len(units):,} held-out images are {len(numbers):,} different ones"
    )
    if domain.captions:
        seen = {text for _, _, texts in trained for text in texts}
        with_captions = [texts for _, _, texts in held if texts]
        both = sum(not seen.isdisjoint(texts) for texts in with_captions)
        less = len(held) - len(with_captions)
        lines.append(
            f"captions: {both:,} of {plural(len(with_captions), 'held-out image')} have a caption that an image of the "
            f"training has, too{f'; {less:,} have none and are not measured' * (less > 0)}"
        )
    return Division(views, units, classes, lines, sum(not texts for _, _, texts in trained))


def _view(config: SelectConfig, shards: Collection[str], begun: bool) -> View:
    """The view of a config, which is made unless it exists with these rules and of the samples of these shards.

    One by which a training has ``begun`` stays as it is.
    """
    store = Store(config.dataset)
    rules = [rule.model_dump(mode="json", exclude_none=True) for rule in config.rules]
    try:
        view = open_view(store, read_manifest(store), config.name)
        if begun or ([*view.rules] == rules and view.seed == config.seed and {*view.counts} == {*shards}):
            return view
    except UserError:  # there is none, or one of other samples
        if begun:
            raise
    return select(config, log=lambda line: None, processes=1)


def _rows(store: Store, view: View) -> list[tuple[str, str | None, list[str]]]:
    """``SHARD/KEY``, class and captions of the samples of a view in order."""
    names = ("key", "metadata", "caption", schemas.TRUE_CAPTIONS)
    layers = AlignedLayers(store, {SAMPLES: view.inputs[SAMPLES]}, {SAMPLES: names}, view=view.rows)
    found = []
    for shard in sorted(view.counts):
        with layers.open(shard) as opened:
            for number in range(opened.row_groups):
                samples = opened.row_group(number).samples
                columns = samples["key"].to_pylist(), samples["metadata"].to_pylist(), true_captions(samples)
                found += [
                    (f"{shard}/{key}", fields.get(CLASS) if isinstance(fields, dict) else None, texts)
                    for key, metadata, texts in zip(*columns, strict=True)
                    for fields in [parse_json((metadata or "").encode())]
                ]
    return found


def _find_copies(
    data: Dataset, threshold: float, held_out: int, encode: Callable[[], Floats]
) -> tuple[list[list[str]], dict[str, Any]]:
    """Groups of copies among the images of a dataset by ``SHARD/KEY``, and what was found.

    Vectors are not compared where the groups that they make are so large that too few images can be held out. Raises
    UserError if equal images alone leave too few.
    """
    names, found = _digests_of(data)
    first: dict[int, int] = {}  # row by digest
    equal = np.array([row if of is None else first.setdefault(of, row) for row, of in enumerate(found)], np.int64)
    if _number_that_fits(equal, held_out) < held_out:
        raise UserError(
            f"{data.store.url}: its {len(names):,} images are copies of {len(np.unique(equal)):,} different ones, too "
            f"few to hold out {held_out:,} and to train on others. Add other images."
        )
    groups, why = equal, f"there are more than {_MOST_COMPARED:,} images"
    if len(names) <= _MOST_COMPARED:
        groups, why = _join_near(equal, encode(), threshold), ""
        if _number_that_fits(groups, held_out) < 2 * held_out:
            groups, why = (
                equal,
                f"most vectors of the released model are nearly equal (cosines from {threshold:g})",
            )
    in_equal, in_any = _sizes(equal) > 1, _sizes(groups) > 1
    facts = {
        "images": len(names), "equal": int(in_equal.sum()), "near": int((in_any & ~in_equal).sum()),
        "compared": not why, "why": why,
    }  # fmt: skip
    together: dict[int, list[str]] = {}
    for row in np.flatnonzero(in_any).tolist():
        together.setdefault(int(groups[row]), []).append(names[row])
    return [*together.values()], facts


def encode_images(config: AdaptConfig, count: int) -> Floats:
    """The vectors of the released model for all images of the dataset [count, D]; zero where it cannot read one."""
    spec = ModelSpec(model=config.released.model, pretrained=config.released.pretrained)
    limits, url = config.general.limits, adapt_config.dataset_of(config)
    threads = available_cores()
    models = load_models({RELEASED: spec}, "auto", "fp32", config.general.batch, threads)

    def examples() -> Iterator[LabelledImage | Refusal]:
        source = read_samples(url, input_of(limits, config.general.images_from, [], Table()), RELEASED)
        for number, item in enumerate(source):
            yield item if isinstance(item, Refusal) else LabelledImage(item.key, partial(bytes, item.image), number)

    vectors, numbers = models.encode_all(ImageBatches(examples, count, limits))
    found = np.zeros((count, vectors[RELEASED].shape[1] if numbers else 1), np.float32)
    if numbers:
        found[numbers] = vectors[RELEASED].nan_to_num(0, 0, 0).numpy()
    return found


def _digests_of(data: Dataset) -> tuple[list[str], list[int | None]]:
    """``SHARD/KEY`` of each image, and its digest."""
    fingerprints, columns = {SAMPLES: data.fingerprints[SAMPLES]}, schemas.image_columns(data.manifest["images"])
    layers = AlignedLayers(data.store, fingerprints, {SAMPLES: ("key", columns[-1])})
    names: list[str] = []
    found: list[int | None] = []
    for shard in data.shards:
        with layers.open(shard) as opened:
            for number in range(opened.row_groups):
                samples = opened.row_group(number).samples
                names += [f"{shard}/{key}" for key in samples["key"].to_pylist()]
                values, valid = digests(samples)
                found += [value if known else None for value, known in zip(values.tolist(), valid, strict=True)]
    return names, found


def _join_near(groups: Numbers, vectors: Floats, threshold: float) -> Numbers:
    """The groups of rows, joined where vectors [rows, D] of two are near; a group has the number of its first row."""
    joined = groups.copy()
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    every, known = vectors / np.where(norms > 0, norms, 1), norms[:, 0] > 0
    for start in range(0, len(every), _BLOCK):
        near = every[start : start + _BLOCK] @ every.T >= min(threshold, 1 - _ROUNDING)
        near &= known[start : start + _BLOCK, None] & known
        for row in np.flatnonzero(near.sum(axis=1) > 1):
            numbers = np.unique(joined[near[row]])
            if len(numbers) > 1:
                joined[np.isin(joined, numbers)] = numbers[0]
    return joined


def _sizes(groups: Numbers) -> Numbers:
    """Images of the group of each image."""
    _, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return counts[place]


def _number_that_fits(groups: Numbers, held_out: int) -> int:
    """The images that can be held out: single ones, and those of groups that are no more than half of that part."""
    sizes = _sizes(groups)
    return int(((sizes == 1) | (2 * sizes <= held_out)).sum())
