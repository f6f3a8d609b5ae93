"""Figures and charts of captions: lengths, diversity, duplicates, and similarity to their images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reinforce.dataset.layers import TRUE_CAPTION
from reinforce.inspection.plots import BINS, TRUE_COLOUR, TRUE_LABEL, Chart, distribution, histograms, line_style
from reinforce.inspection.rows import Rows
from reinforce.inspection.texts import DEFINITIONS, WORD, text_statistics
from reinforce.processes.imports import installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST = 0.995  # of the captions are in the chart of lengths; the rest would stretch it
_WORDS = 3  # of a frequent n-gram
_FREQUENT = 12  # n-grams that are shown
_SIMILARITY = (
    "cosine between a caption's stored embedding and those of its image's augmentations, mean over the augmentations; "
    "of several true captions, each counts once"
)


@dataclass(frozen=True)
class TextFigures:
    """``summary`` has ``text_statistics``; ``frequent`` are n-grams of three words with their number."""

    summary: Mapping[str, Any]
    frequent: tuple[tuple[str, int], ...]


def text_figures(rows: Rows) -> dict[str, TextFigures]:
    """Figures of the texts of ``caption``, the true captions, and of each captioner. Self-BLEU needs sacrebleu."""
    texts: dict[str, list[list[str] | None]] = {
        TRUE_CAPTION: [texts or None for texts in rows.captions],
        **rows.synthetic,
    }
    return {name: _figures(found) for name, found in texts.items()}


def _figures(rows: list[list[str] | None]) -> TextFigures:
    clean = [None if texts is None else [text for text in texts if text is not None] for texts in rows]
    grams: Counter[tuple[str, ...]] = Counter()
    for text in (text for texts in clean for text in texts or ()):
        words = WORD.findall(text.lower())
        grams.update(zip(*(words[n:] for n in range(_WORDS)), strict=False))
    frequent = sorted(grams.items(), key=lambda gram: (-gram[1], gram[0]))[:_FREQUENT]
    summary = text_statistics(clean, self_bleu=installed("sacrebleu"))
    return TextFigures(summary, tuple((" ".join(gram), count) for gram, count in frequent if count > 1))


def similarities(rows: Rows) -> dict[str, dict[str, np.ndarray]]:
    """Cosines of all captions that have one [C], by teacher and by ``caption`` or captioner; none without vectors."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for teacher in rows.teachers:
        values = {name: rows.similarities(teacher, name) for name in (TRUE_CAPTION, *rows.captioners)}
        finite = {name: every[np.isfinite(every)] for name, every in values.items()}
        found[teacher] = {name: every for name, every in finite.items() if len(every)}
    return found


def captions_summary(texts: Mapping[str, TextFigures], cosines: Mapping[str, Mapping[str, np.ndarray]]) -> Any:
    """The figures with their definitions, for report.json."""
    return {
        "definitions": {**DEFINITIONS, "similarity": _SIMILARITY},
        "texts": {name: figures.summary for name, figures in texts.items()},
        "similarity": {
            teacher: {
                name: {"captions": len(values), "mean": float(np.mean(values, dtype=float)), "std": float(values.std())}
                for name, values in by_text.items()
            }
            for teacher, by_text in cosines.items()
        },
    }


def similarity_charts(cosines: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[Chart]:
    """For each teacher, the similarities of true and of synthetic captions to their images."""
    for teacher, by_text in cosines.items():
        if by_text:
            named = {_label(name): values for name, values in by_text.items()}
            text = "Cosine of each caption's vector with those of its image, mean over the augmentations."
            yield distribution(teacher, text, "similarity to the image", "captions", named)


def correlations(rows: Rows) -> tuple[list[str], list[list[float | None]]]:
    """The teachers, and the rank correlations of their similarities of true captions."""
    values = {teacher: rows.true_similarity(teacher) for teacher in rows.targets.scales}
    valid = np.logical_and.reduce([np.isfinite(v) for v in values.values()]) if values else np.zeros(0, bool)
    if valid.sum() < 3:
        return [], []
    ranks = [np.argsort(np.argsort(found[valid], kind="stable"), kind="stable") for found in values.values()]
    return [*values], np.atleast_2d(np.corrcoef(ranks)).tolist()


def length_chart(texts: Mapping[str, TextFigures]) -> Chart | None:
    """The lengths of captions in words."""
    found = {
        _label(name): np.repeat(
            np.array([*map(int, figures.summary["lengths"])], np.int64), [*figures.summary["lengths"].values()]
        )
        for name, figures in texts.items()
        if figures.summary["captions"]
    }
    if not found:
        return None
    longest = max(int(np.quantile(values, _LONGEST)) for values in found.values()) + 1
    width = max(1, -(-longest // BINS))
    edges = np.arange(0, longest + width + 1, width) - 0.5
    return histograms(
        "Lengths",
        "Words of a caption, without the longest 0.5 %.",
        "words",
        "captions",
        found,
        edges,
        ["captions", "number", "mean", "median", "longest"],
        [[n, f"{len(v):,}", f"{v.mean():.1f}", f"{np.median(v):.0f}", f"{v.max()}"] for n, v in found.items()],
    )


def distinct_charts(texts: Mapping[str, TextFigures]) -> Iterator[Chart]:
    """For n-grams of one to three words, how many are new in each further caption of an image."""
    captioners = [name for name in texts if name != TRUE_CAPTION]
    for n in ("1", "2", "3"):
        every = {_label(name): figures.summary["distinct_within_image"][n] for name, figures in texts.items()}
        found = {name: shares for name, shares in every.items() if len(shares) > 1 and shares[0] is not None}
        if not found:
            continue
        counts = range(1, max(map(len, found.values())) + 1)

        def draw(axes: Axes, found: Mapping[str, list[float]] = found) -> None:
            for name, shares in found.items():
                style = {"color": TRUE_COLOUR} if name == TRUE_LABEL else line_style(captioners.index(name))
                axes.plot(range(1, len(shares) + 1), shares, label=name, marker="o", markersize=4, **style)
            axes.set_ylim(0, 1.02)
            axes.locator_params(axis="x", integer=True)

        yield Chart(
            f"Distinct {n}-grams of an image",
            "Distinct n-grams / all n-grams of its first 1, 2, ... captions, mean over images.",
            "captions of the image",
            "distinct / all",
            ["captions", *map(str, counts)],
            [[name, *(f"{share:.3f}" for share in shares)] for name, shares in found.items()],
            draw,
        )


def _label(name: str) -> str:
    return TRUE_LABEL if name == TRUE_CAPTION else name
