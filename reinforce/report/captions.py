"""The report on a dataset's captions: lengths, diversity, duplicates, and similarity to their images.

It reads keys, captions and vectors of rows that are spread evenly over the shards. Nothing is random: the same files
give the same report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from reinforce.dataset import vectors
from reinforce.dataset.kinds.samples import true_captions
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, captions_layer, embeddings_layer
from reinforce.dataset.reading.aligned import AlignedLayers, layer_errors
from reinforce.dataset.reading.dataset import Dataset
from reinforce.errors import UserError
from reinforce.processes.imports import require
from reinforce.report.texts import DEFINITIONS, TextStatistics
from schemas import TRUE_CAPTIONS

_SHARDS = 64  # opened at least, if there are so many; more only while these have fewer rows than the limit
_BINS = 200  # of the histogram of cosines

_SIMILARITY = (
    "cosine between a caption's stored embedding and those of its image's augmentations, mean over the augmentations"
)


@dataclass
class SimilarityStatistics:
    """Cosines of texts and images: mean, standard deviation, and a histogram from -1 to 1."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    total: float = 0.0
    squares: float = 0.0

    def add(self, texts: np.ndarray, images: np.ndarray) -> None:
        """Add texts [rows, N, D] and images [rows, K, D]. Rows with NaN, which are null in a layer, are skipped."""
        cosines = vectors.mean_cosines(texts, images)
        valid = cosines[np.isfinite(cosines).all(axis=1)].astype(np.float64)
        self.counts += np.histogram(valid.clip(-1, 1), _BINS, (-1, 1))[0]
        self.total += float(valid.sum())
        self.squares += float((valid**2).sum())

    def summary(self) -> dict[str, Any]:
        """``captions``, ``mean``, ``std``, and ``histogram``: counts in bins of equal width from -1 to 1."""
        count = int(self.counts.sum())
        mean = self.total / count if count else None
        deviation = math.sqrt(max(0.0, self.squares / count - mean**2)) if mean is not None else None
        return {"captions": count, "mean": mean, "std": deviation, "histogram": self.counts.tolist()}


def captions_report(
    url: str,
    captioners: Sequence[str] | None = None,
    teachers: Sequence[str] | None = None,
    limit: int = 10_000,
    view: str | None = None,
) -> dict[str, Any]:
    """Report on the captions of at most ``limit`` images, for each captioner and for the true captions.

    With ``view``, only of the samples that a view keeps.
    ``texts`` maps each captioner, and ``caption`` for the true captions, to the summary of its ``TextStatistics``;
    ``similarity`` maps each teacher to summaries of ``SimilarityStatistics`` by the same names.
    Default: all captioners and teachers. Raises UserError if one is missing, or sacrebleu is not installed.
    """
    require("report", "captions-report", "sacrebleu")
    data = Dataset(url, teachers, captioners, view=view)
    layers = data.manifest["layers"]
    if not data.captioners:
        raise UserError(f"{url} has no synthetic captions. Add a captioner to `captioners` and run `reinforce run`.")
    counts = {name: int(layers[captions_layer(name)]["count"]) for name in data.captioners}
    own = int(layers[SAMPLES].get("count") or 1)
    texts = {name: TextStatistics(count) for name, count in {**counts, TRUE_CAPTION: own}.items()}
    similarities: dict[str, dict[str, SimilarityStatistics]] = {
        teacher: {name: SimilarityStatistics() for name in texts if _comparable(layers, teacher, name)}
        for teacher in data.teachers
    }
    rows = 0
    for tables in _sample_tables(data, limit):
        rows += tables[SAMPLES].num_rows
        texts[TRUE_CAPTION].add([found or None for found in true_captions(tables[SAMPLES])])
        for name in data.captioners:
            texts[name].add(tables[captions_layer(name)]["captions"].to_pylist())
        for teacher, by_text in similarities.items():
            if by_text:
                images = vectors.decode(tables[embeddings_layer(teacher, "images")])
                for name, similarity in by_text.items():
                    similarity.add(vectors.decode(tables[embeddings_layer(teacher, name)]), images)
    return {
        "dataset": data.store.url,
        "rows": rows,
        "limit": limit,
        "definitions": {**DEFINITIONS, "similarity": _SIMILARITY},
        "texts": {name: statistics.summary() for name, statistics in texts.items()},
        "similarity": {
            teacher: {name: statistics.summary() for name, statistics in by_text.items()}
            for teacher, by_text in similarities.items()
        },
    }


def _comparable(layers: Mapping[str, Any], teacher: str, texts: str) -> bool:
    """Whether a teacher has embeddings of both images and texts: some have only one side."""
    return embeddings_layer(teacher, "images") in layers and embeddings_layer(teacher, texts) in layers


def _sample_tables(data: Dataset, limit: int) -> Iterator[dict[str, pa.Table]]:
    """Yield row groups of every layer with at most ``limit`` rows in total; the last of a shard can be cut."""
    fingerprints = {name: data.manifest["layers"][name]["fingerprint"] for name in data.layers}
    view = None if data.view is None else data.view.rows
    layers = AlignedLayers(data.store, fingerprints, {SAMPLES: ["key", "caption", TRUE_CAPTIONS]}, view=view)
    for shard, rows in _rows_per_shard(data, limit):
        with layers.open(shard) as files:
            remaining, groups = rows, iter(range(files.row_groups))
            while remaining > 0:
                tables = {name: table.slice(0, remaining) for name, table in files.read(next(groups)).items()}
                remaining -= tables[SAMPLES].num_rows
                yield tables


def _rows_per_shard(data: Dataset, limit: int) -> Iterator[tuple[str, int]]:
    """Shards spread evenly over the dataset, each with the rows to read of it: the same number, or all it has."""
    sizes: dict[str, int] = {}
    total = 0
    for shard in _evenly_spread(data.shards):
        if len(sizes) >= _SHARDS and total >= limit:
            break
        with layer_errors(data.store, SAMPLES, shard), data.store.open_layer(SAMPLES, shard) as file:
            sizes[shard] = file.metadata.num_rows if data.view is None else sum(data.view.kept[shard])
        total += sizes[shard]
    for done, shard in enumerate(sorted(sizes, key=lambda shard: sizes[shard])):
        rows = min(sizes[shard], math.ceil(limit / (len(sizes) - done)))
        limit -= rows
        if rows:
            yield shard, rows


def _evenly_spread(items: Sequence[str]) -> dict[str, None]:
    """All items, ordered so that every prefix is spread over them: each 2^k-th, then those halfway between, ..."""
    steps = (2**k for k in range(len(items).bit_length(), -1, -1))
    return dict.fromkeys(item for step in steps for item in items[::step])
