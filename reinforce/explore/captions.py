"""Statistics of the text of captions: length, diversity, duplicates, how they end, and their similarity to images."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reinforce.dataset.layers import TRUE_CAPTION
from reinforce.explore.plots import (
    BINS,
    TRUE_COLOUR,
    TRUE_LABEL,
    Chart,
    distribution,
    histograms,
    line_style,
)
from reinforce.explore.rows import SampledRows
from reinforce.processes.imports import installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Definition of each statistic, as written into report.json. A word is a run of letters and digits, in lower case.
DEFINITIONS = {
    "null": "share of rows without captions",
    "words": "mean number of words per caption",
    "distinct": "distinct n-grams / all n-grams of the rows read, n = 1, 2, 3; decreases with more rows",
    "distinct_within_image": "the same for the first 1, 2, ... captions of an image, mean over images",
    "self_bleu": "corpus BLEU-4 of each caption against the other captions of its image, by sacrebleu "
    "(case:lc|tok:13a|smooth:exp), from 0 to 1; 1 if all captions of an image are the same",
    "duplicates_within_image": "share of captions equal to an earlier caption of their image, ignoring case and "
    "punctuation; includes those that `clean` repeats in place of dropped captions",
    "duplicates_across_images": "share of captions equal to a caption of another image, ignoring case and punctuation",
    "no_end_mark": "share of captions that do not end in . ! or ?, which some captioners never write",
    "ends_midway": "share of captions whose last word cannot end an English sentence (a, the, of, and, ...): most "
    "likely cut at max_length",
    "lengths": "number of captions by number of words",
}
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_END_MARK = re.compile(r"[.!?。！？…][\"'”’)\]」』]*$")
_NOT_LAST = {  # words that cannot end a sentence
    "a", "an", "the", "and", "or", "but", "of", "with", "from", "into", "than", "as", "is", "are", "was", "were",
    "its", "his", "her", "their", "my", "your", "our",
}  # fmt: skip


def text_statistics(rows: Sequence[Sequence[str] | None], self_bleu: bool = True) -> dict[str, Any]:
    """``rows``, ``captions`` and the statistics of ``DEFINITIONS`` of the captions of images, a list of texts or None.

    Those that are undefined are None, and that of BLEU without ``self_bleu``. Memory grows with the number of words.
    """
    images = [texts for texts in rows if texts is not None]
    words = [[tuple(map(sys.intern, WORD.findall(text.lower()))) for text in texts] for texts in images]
    captions = Counter(caption for of_image in words for caption in of_image)
    images_with = Counter(caption for of_image in words for caption in {*of_image})
    lengths = Counter(map(len, captions.elements()))
    distinct = {str(n): _distinct(words, n) for n in (1, 2, 3)}
    total = captions.total()
    several = [texts for texts in images if len(texts) > 1]
    others = [[*texts[:i], *texts[i + 1 :]] for texts in several for i in range(len(texts))]
    return {
        "rows": len(rows),
        "captions": total,
        "null": _ratio(len(rows) - len(images), len(rows)),
        "words": _ratio(sum(length * count for length, count in lengths.items()), total),
        "distinct": {n: of_all for n, (of_all, _) in distinct.items()},
        "distinct_within_image": {n: within for n, (_, within) in distinct.items()},
        "self_bleu": bleu([text for texts in several for text in texts], others) if self_bleu and several else None,
        "duplicates_within_image": _ratio(total - images_with.total(), total),
        "duplicates_across_images": _ratio(sum(captions[c] for c, count in images_with.items() if count > 1), total),
        "no_end_mark": _ratio(sum(_END_MARK.search(text) is None for texts in images for text in texts), total),
        "ends_midway": _ratio(sum(caption[-1] in _NOT_LAST for caption in captions.elements() if caption), total),
        "lengths": {str(length): lengths[length] for length in sorted(lengths)},
    }


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 of one caption per image against one or more references each, between 0 and 1.

    Computed by sacrebleu (signature ``case:lc|tok:13a|smooth:exp``). Papers report it times 100.
    """
    from sacrebleu.metrics import BLEU

    # sacrebleu takes the first references of all images, then the second ones, None where an image has fewer
    most = max(len(texts) for texts in references)
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    score = BLEU(lowercase=True, force=True).corpus_score(list(captions), streams)  # type: ignore[arg-type]
    return float(score.score) / 100


def _distinct(images: Sequence[Sequence[tuple[str, ...]]], n: int) -> tuple[float | None, list[float | None]]:
    """Distinct / all n-grams of words: of all captions, and of the first 1, 2, ... of an image, mean over images."""
    every, count = set[tuple[str, ...]](), 0
    shares: list[list[float]] = [[] for _ in range(max([1, *map(len, images)]))]
    for captions in images:
        own, of_image = set[tuple[str, ...]](), 0
        for words, found in zip(captions, shares, strict=False):
            own.update(zip(*(words[start:] for start in range(n)), strict=False))
            of_image += max(0, len(words) - n + 1)
            if of_image:
                found.append(len(own) / of_image)
        every |= own
        count += of_image
    return _ratio(len(every), count), [_ratio(sum(found), len(found)) for found in shares]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


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


def text_figures(rows: SampledRows) -> dict[str, TextFigures]:
    """Figures of the texts of ``caption``, the true captions, and of each captioner. Self-BLEU needs sacrebleu."""
    texts: dict[str, list[list[str] | None]] = {
        TRUE_CAPTION: [texts or None for texts in rows.captions],
        **rows.synthetic,
    }
    found = {}
    for name, rows_of in texts.items():
        clean = [None if of is None else [text for text in of if text is not None] for of in rows_of]
        grams: Counter[tuple[str, ...]] = Counter()
        for text in (text for of in clean for text in of or ()):
            words = WORD.findall(text.lower())
            grams.update(zip(*(words[n:] for n in range(_WORDS)), strict=False))
        frequent = sorted(grams.items(), key=lambda gram: (-gram[1], gram[0]))[:_FREQUENT]
        summary = text_statistics(clean, self_bleu=installed("sacrebleu"))
        found[name] = TextFigures(summary, tuple((" ".join(gram), count) for gram, count in frequent if count > 1))
    return found


def similarities(rows: SampledRows) -> dict[str, dict[str, np.ndarray]]:
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


def correlations(rows: SampledRows) -> tuple[list[str], list[list[float | None]]]:
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
