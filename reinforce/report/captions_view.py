"""Presentation of a captions report: a table for the terminal, and a folder of JSON and plots."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from reinforce import plots
from reinforce.dataset.layers import TRUE_CAPTION
from reinforce.storage import write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    """Write ``report.json`` and the plots to a folder or fsspec URL, replacing earlier ones -> their paths.

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
