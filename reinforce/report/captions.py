"""The report on a dataset's captions: lengths, diversity, duplicates, and similarity to their images.

It is shown as a table for the terminal, and as a folder of JSON and plots. It reads keys, captions and vectors of rows
that are spread evenly over the shards. Nothing is random: the same files give the same report.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from reinforce import plots
from reinforce.dataset import vectors
from reinforce.dataset.kinds.samples import true_captions
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, captions_layer, embeddings_layer
from reinforce.dataset.reading.aligned import AlignedLayers, layer_errors
from reinforce.dataset.reading.dataset import Dataset
from reinforce.errors import UserError
from reinforce.processes.imports import require
from reinforce.report.texts import DEFINITIONS, TextStatistics
from reinforce.storage import write_json
from schemas import TRUE_CAPTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHARDS = 64  # opened at least, if there are so many; more only while these have fewer rows than the limit
_BINS = 200  # of the histogram of cosines

_NAMES = {TRUE_CAPTION: "true captions"}
_TRUE_COLOUR = "#adb5bd"
#: Label of a row of the table, key of the statistic (or key and n), and format.
_ROWS = (
    ("captions", "captions", "{:,}"),
    ("rows without captions", "null", "{:.1%}"),
    ("words", "words", "{:.1f}"),
    ("distinct-1", ("distinct", "1"), "{:.2g}"),
    ("distinct-2", ("distinct", "2"), "{:.2g}"),
    ("distinct-3", ("distinct", "3"), "{:.2g}"),
    ("self-BLEU-4", "self_bleu", "{:.3f}"),
    ("duplicates in an image", "duplicates_within_image", "{:.1%}"),
    ("duplicates across images", "duplicates_across_images", "{:.1%}"),
    ("no end mark", "no_end_mark", "{:.1%}"),
    ("ends mid-sentence", "ends_midway", "{:.1%}"),
)

_SIMILARITY = (
    "cosine between a caption's stored embedding and those of its image's augmentations, mean over the augmentations; "
    "of several true captions, each counts once"
)


@dataclass
class SimilarityStatistics:
    """Cosines of texts and images: mean, standard deviation, and a histogram from -1 to 1."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    total: float = 0.0
    squares: float = 0.0

    def add(self, texts: np.ndarray, images: np.ndarray, own: np.ndarray | None = None) -> None:
        """Add texts [rows, N, D], or only ``own`` ones [rows, N], and images [rows, K, D].

        Rows with NaN, which are null in a layer, are skipped.
        """
        cosines = vectors.mean_cosines(texts, images)
        counted = np.isfinite(cosines).all(axis=1, keepdims=True) & (True if own is None else own)
        valid = cosines[np.broadcast_to(counted, cosines.shape)].astype(np.float64)
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
    data = Dataset(url, {"teachers": teachers, "captioners": captioners}, view=view)
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
                    texts_of = vectors.decode(tables[embeddings_layer(teacher, name)])
                    counted = vectors.own_slots(tables[SAMPLES], texts_of.shape[1]) if name == TRUE_CAPTION else None
                    similarity.add(texts_of, images, counted)
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


def captions_table(report: Mapping[str, Any]) -> Table:
    """Format a report as a table with a column for each captioner and for the true captions.

    The report's ``definitions`` define the rows. Similarities are mean ± standard deviation.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in report["texts"]:
        table.add_column(_NAMES.get(name, name), justify="right", overflow="fold")
    for label, statistic, format_ in _ROWS:
        key, n = (statistic, None) if isinstance(statistic, str) else statistic
        values = [texts[key] if n is None else texts[key][n] for texts in report["texts"].values()]
        if key == "duplicates_within_image":
            values[-1] = None  # an image has one true caption
        table.add_row(label, *("-" if value is None else format_.format(value) for value in values))
    for teacher, by_text in report["similarity"].items():
        cells = []
        for name in report["texts"]:
            mean, deviation = (by_text[name][key] if name in by_text else None for key in ("mean", "std"))
            cells.append("-" if mean is None else f"{mean:.3f}±{deviation:.3f}")
        table.add_row(f"similarity, {teacher}", *cells)
    return table


def write_report(report: Mapping[str, Any], folder: str) -> list[str]:
    """Write ``report.json`` and the plots to a folder or fsspec URI, replacing earlier ones -> their paths.

    Without matplotlib there are no plots.
    """
    paths = {name: posixpath.join(folder, name) for name in ("report.json", "lengths.png", "distinct.png")}
    write_json(report, paths["report.json"])
    if not plots.drawable(f"{paths['lengths.png']} and others are"):
        return [paths["report.json"]]
    _draw_lengths(report, paths["lengths.png"])
    _draw_distinct(report, paths["distinct.png"])
    if any(report["similarity"].values()):
        paths["similarity.png"] = posixpath.join(folder, "similarity.png")
        _draw_similarities(report, paths["similarity.png"])
    return list(paths.values())


def _draw_lengths(report: Mapping[str, Any], url: str) -> None:
    figure, (axes,) = plots.figure()
    longest = 1
    for index, (name, texts) in enumerate(report["texts"].items()):
        if not texts["captions"]:
            continue
        shares = np.zeros(max(map(int, texts["lengths"])) + 1)
        for length, count in texts["lengths"].items():
            shares[int(length)] = count / texts["captions"]
        longest = max(longest, int(np.searchsorted(shares.cumsum(), 0.995)) + 1)
        _draw_histogram(axes, name, index, shares, np.arange(len(shares) + 1) - 0.5)
    axes.set_xlim(-0.5, longest + 0.5)  # without the longest 0.5 %, which would stretch the axis
    plots.label(axes, "Caption lengths", "words", "share of captions")
    _finish(axes)
    plots.save(figure, url)


def _draw_similarities(report: Mapping[str, Any], url: str) -> None:
    panels = {teacher: by_text for teacher, by_text in report["similarity"].items() if by_text}
    figure, all_axes = plots.figure(len(panels), width=max(8.0, 5.0 * len(panels)))
    for axes, (teacher, by_text) in zip(all_axes, panels.items(), strict=True):
        filled: list[int] = []
        for index, name in enumerate(report["texts"]):
            if name not in by_text or not by_text[name]["captions"]:
                continue
            counts = np.array(by_text[name]["histogram"])
            filled += np.flatnonzero(counts).tolist()
            edges = np.linspace(-1, 1, len(counts) + 1)
            _draw_histogram(axes, name, index, counts / counts.sum(), edges)
        if filled:
            axes.set_xlim(edges[max(0, min(filled) - 2)], edges[min(len(counts), max(filled) + 3)])
        plots.label(axes, teacher, "cosine between caption and image", "share of captions")
        _finish(axes)
    plots.save(figure, url)


def _draw_distinct(report: Mapping[str, Any], url: str) -> None:
    figure, all_axes = plots.figure(3, width=11.0, height=3.8)
    for n, axes in enumerate(all_axes, start=1):
        for index, (name, texts) in enumerate(report["texts"].items()):
            shares = texts["distinct_within_image"][str(n)]
            if name != TRUE_CAPTION and shares[0] is not None:
                axes.plot(
                    range(1, len(shares) + 1), shares, color=plots.colour(index), label=name, marker="o", markersize=4
                )
        axes.set_ylim(0, 1.02)
        axes.locator_params(axis="x", integer=True)
        plots.label(axes, f"distinct-{n} within an image", "captions of the image", "distinct / all" if n == 1 else "")
    plots.legend(all_axes[0])
    plots.save(figure, url)


def _draw_histogram(axes: Axes, name: str, index: int, shares: np.ndarray, edges: np.ndarray) -> None:
    """Draw the range of non-zero shares: true captions as a filled area behind, captioners as outlines."""
    present = np.flatnonzero(shares)
    shares, edges = shares[present[0] : present[-1] + 1], edges[present[0] : present[-1] + 2]
    if name == TRUE_CAPTION:
        axes.stairs(shares, edges, fill=True, color=_TRUE_COLOUR, alpha=0.6, label=_NAMES[TRUE_CAPTION], zorder=1)
    else:
        axes.stairs(shares, edges, color=plots.colour(index), linewidth=1.8, label=name, zorder=2)


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])  # room for the legend
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    plots.legend(axes)
