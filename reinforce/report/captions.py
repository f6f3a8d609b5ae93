"""The report on a dataset's captions: how long, how different, how often repeated, and how near to their images.

Reads a sample of the rows that is spread evenly over the dataset's shards, of each row group only keys, texts and
vectors. Nothing is random: a report of the same files is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from reinforce.dataset import vectors
from reinforce.dataset.aligned import AlignedLayers
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, captions_layer, embeddings_layer
from reinforce.dataset.reader import Dataset
from reinforce.errors import UserError
from reinforce.report.texts import DEFINITIONS, Texts

#: Shards that a sample is taken from at most, where it is smaller than the dataset.
_SHARDS = 64
_BINS = 200

_SIMILARITY = (
    "cosine of a caption's stored embedding and those of its image's augmentations, mean over the augmentations"
)


@dataclass
class Similarities:
    """Cosines of texts and images: mean, standard deviation, and a histogram over -1 to 1."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    total: float = 0.0
    squares: float = 0.0

    def add(self, texts: np.ndarray, images: np.ndarray) -> None:
        """[rows, N, D] and [rows, K, D]; rows with NaN, which a layer could not serve, are left out."""
        cosines = np.einsum("rnd,rd->rn", _unit(texts), _unit(images).mean(axis=1))
        found = cosines[np.isfinite(cosines).all(axis=1)].astype(np.float64)
        self.counts += np.histogram(found.clip(-1, 1), _BINS, (-1, 1))[0]
        self.total += float(found.sum())
        self.squares += float((found**2).sum())

    def figures(self) -> dict[str, Any]:
        """``histogram`` counts bins of equal width from -1 to 1."""
        count = int(self.counts.sum())
        mean = self.total / count if count else None
        deviation = math.sqrt(max(0.0, self.squares / count - mean**2)) if mean is not None else None
        return {"captions": count, "mean": mean, "std": deviation, "histogram": self.counts.tolist()}


def captions_report(
    url: str, captioners: Sequence[str] | None = None, teachers: Sequence[str] | None = None, limit: int = 10_000
) -> dict[str, Any]:
    """Figures of the captions of at most ``limit`` images, by captioner and with the true captions' beside them.

    ``texts`` holds figures of ``Texts`` and ``similarity`` those of ``Similarities`` by teacher, each by captioner or
    ``caption`` for the true ones. Default: all captioners and teachers. Raises UserError where one is missing.
    """
    data = Dataset(url, teachers, captioners)
    layers = data.manifest["layers"]
    if not data.captioners:
        raise UserError(f"{url} has no captioner's captions. Add one to `captioners` and run `reinforce run`.")
    counts = {name: int(layers[captions_layer(name)]["count"]) for name in data.captioners}
    texts = {name: Texts(count) for name, count in {**counts, TRUE_CAPTION: 1}.items()}
    similarities: dict[str, dict[str, Similarities]] = {
        teacher: {what: Similarities() for what in texts if _comparable(layers, teacher, what)}
        for teacher in data.teachers
    }
    rows = 0
    for tables in _sampled(data, limit):
        rows += tables[SAMPLES].num_rows
        texts[TRUE_CAPTION].add([None if text is None else [text] for text in tables[SAMPLES]["caption"].to_pylist()])
        for name in data.captioners:
            texts[name].add(tables[captions_layer(name)]["captions"].to_pylist())
        for teacher, by_text in similarities.items():
            if by_text:
                images = vectors.decode(tables[embeddings_layer(teacher, "images")])
                for what, similarity in by_text.items():
                    similarity.add(vectors.decode(tables[embeddings_layer(teacher, what)]), images)
    return {
        "dataset": data.store.url,
        "rows": rows,
        "limit": limit,
        "definitions": {**DEFINITIONS, "similarity": _SIMILARITY},
        "texts": {name: found.figures() for name, found in texts.items()},
        "similarity": {
            teacher: {what: found.figures() for what, found in by_text.items()}
            for teacher, by_text in similarities.items()
        },
    }


def _comparable(layers: Mapping[str, Any], teacher: str, what: str) -> bool:
    """Whether a teacher has seen both sides: some have images or texts alone."""
    return embeddings_layer(teacher, "images") in layers and embeddings_layer(teacher, what) in layers


def _sampled(data: Dataset, limit: int) -> Iterator[dict[str, pa.Table]]:
    """Row groups of every layer, the last of a shard cut, with at most ``limit`` rows in all."""
    fingerprints = {name: data.manifest["layers"][name]["fingerprint"] for name in data.layers}
    zipped = AlignedLayers(data.store, fingerprints, {SAMPLES: ["key", "caption"]})
    for shard, share in _shares(data, limit):
        with zipped.open(shard) as layers:
            left, groups = share, iter(range(layers.row_groups))
            while left > 0:
                tables = {name: table.slice(0, left) for name, table in layers.read(next(groups)).items()}
                left -= tables[SAMPLES].num_rows
                yield tables


def _shares(data: Dataset, limit: int) -> Iterator[tuple[str, int]]:
    """Shards that lie evenly in the dataset, and how many rows to take of each: all, or as many as of the others."""
    sizes: dict[str, int] = {}
    found = 0
    for shard in _evenly(data.shards):
        if len(sizes) >= _SHARDS and found >= limit:
            break
        with data.store.open_layer(SAMPLES, shard) as file:
            sizes[shard] = file.metadata.num_rows
        found += sizes[shard]
    for place, shard in enumerate(sorted(sizes, key=lambda shard: sizes[shard])):
        rows = min(sizes[shard], math.ceil(limit / (len(sizes) - place)))
        limit -= rows
        if rows:
            yield shard, rows


def _evenly(items: Sequence[str]) -> dict[str, None]:
    """All items in an order whose beginning is spread over them: every 2^k-th, then those halfway between, ..."""
    steps = (2**k for k in range(len(items).bit_length(), -1, -1))
    return dict.fromkeys(item for step in steps for item in items[::step])


def _unit(values: np.ndarray) -> np.ndarray:
    # Storage in 16 or 8 bits moves a vector's length a little.
    norms: np.ndarray = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.maximum(norms, 1e-12)
