"""Figures of the captions that were looked at: lengths, duplicates, and the most frequent n-grams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reinforce.dataset.layers import TRUE_CAPTION
from reinforce.inspection.rows import Rows
from reinforce.report.texts import WORD, TextStatistics

_WORDS = 3  # of an n-gram
_SHOWN = 12


@dataclass(frozen=True)
class TextFigures:
    """``summary`` is that of ``TextStatistics``; ``frequent`` are n-grams of three words with their number."""

    summary: Mapping[str, Any]
    frequent: tuple[tuple[str, int], ...]


def text_figures(rows: Rows) -> dict[str, TextFigures]:
    """Figures by captioner, and of ``caption``, the true captions, which come first."""
    texts: dict[str, list[list[str] | None]] = {
        TRUE_CAPTION: [texts or None for texts in rows.captions],
        **rows.synthetic,
    }
    return {name: _figures(found) for name, found in texts.items()}


def _figures(rows: list[list[str] | None]) -> TextFigures:
    clean = [None if texts is None else [text for text in texts if text is not None] for texts in rows]
    statistics = TextStatistics(max((len(texts) for texts in clean if texts), default=1), bleu=False)
    statistics.add(clean)
    grams: Counter[tuple[str, ...]] = Counter()
    for text in (text for texts in clean for text in texts or ()):
        words = WORD.findall(text.lower())
        grams.update(zip(*(words[n:] for n in range(_WORDS)), strict=False))
    frequent = sorted(grams.items(), key=lambda gram: (-gram[1], gram[0]))[:_SHOWN]
    return TextFigures(statistics.summary(), tuple((" ".join(gram), count) for gram, count in frequent if count > 1))
