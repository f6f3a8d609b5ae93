"""Statistics of the text of captions: length, diversity, duplicates, and how they end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

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
_MAX_N = 3  # words of the longest n-grams
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_END_MARK = re.compile(r"[.!?。！？…][\"'”’)\]」』]*$")
_NOT_LAST = {  # words that cannot end a sentence
    "a", "an", "the", "and", "or", "but", "of", "with", "from", "into", "than", "as", "is", "are", "was", "were",
    "its", "his", "her", "their", "my", "your", "our",
}  # fmt: skip
_WORD_BITS = 24  # of a word's number in an n-gram


class TextStatistics:
    """Statistics of captions with ``count`` per image, added a row group at a time; self-BLEU only with ``bleu``.

    Memory grows with the number of distinct n-grams and captions.
    """

    def __init__(self, count: int, bleu: bool = True) -> None:
        self._rows = self._null = self._no_end_mark = self._ends_midway = self._repeated = 0
        self._lengths: Counter[int] = Counter()
        self._word_ids: dict[str, int] = {}
        self._captions: Counter[tuple[str, ...]] = Counter()  # captions with a text, by its words
        self._images: Counter[tuple[str, ...]] = Counter()  # images with a text, by its words
        self._distinct: list[set[int]] = [set() for _ in range(_MAX_N)]
        self._ngrams = [0] * _MAX_N
        # By n and number of captions: the sum over images of distinct / all n-grams, and the images that have any.
        self._ratios = [[[0.0, 0] for _ in range(count)] for _ in range(_MAX_N)]
        self._bleu = _SelfBleu() if bleu else None

    def add(self, rows: Sequence[Sequence[str] | None]) -> None:
        """Add the captions of some images, each a list of texts or None."""
        images = [texts for texts in rows if texts is not None]
        self._rows += len(rows)
        self._null += len(rows) - len(images)
        for texts in images:
            words = [tuple(WORD.findall(text.lower())) for text in texts]
            self._count_captions(texts, words)
            self._count_ngrams(words)
        if self._bleu is not None:
            for count in sorted({*map(len, images)}):  # true captions may be more of one image than of another
                self._bleu.add([texts for texts in images if len(texts) == count])

    def _count_captions(self, texts: Sequence[str], words: Sequence[tuple[str, ...]]) -> None:
        self._lengths.update(map(len, words))
        self._no_end_mark += sum(_END_MARK.search(text) is None for text in texts)
        self._ends_midway += sum(caption[-1] in _NOT_LAST for caption in words if caption)
        self._repeated += len(words) - len(set(words))
        self._captions.update(words)
        self._images.update(set(words))

    def _count_ngrams(self, words: Sequence[tuple[str, ...]]) -> None:
        distinct: list[set[int]] = [set() for _ in range(_MAX_N)]
        total = [0] * _MAX_N
        for number, caption in enumerate(words):
            ids = [self._word_ids.setdefault(word, len(self._word_ids)) for word in caption]
            ngrams = [0] * len(ids)
            for n in range(_MAX_N):
                ngrams = [(ngram << _WORD_BITS) | word for ngram, word in zip(ngrams, ids[n:], strict=False)]
                distinct[n].update(ngrams)
                total[n] += len(ngrams)
                if total[n]:
                    self._ratios[n][number][0] += len(distinct[n]) / total[n]
                    self._ratios[n][number][1] += 1
        for n in range(_MAX_N):
            self._distinct[n] |= distinct[n]
            self._ngrams[n] += total[n]

    def summary(self) -> dict[str, Any]:
        """``rows``, ``captions`` and the statistics of ``DEFINITIONS``, None if they are undefined."""
        captions = self._lengths.total()
        across_images = sum(self._captions[words] for words, images in self._images.items() if images > 1)
        return {
            "rows": self._rows,
            "captions": captions,
            "null": _ratio(self._null, self._rows),
            "words": _ratio(sum(length * count for length, count in self._lengths.items()), captions),
            "distinct": {str(n + 1): _ratio(len(self._distinct[n]), self._ngrams[n]) for n in range(_MAX_N)},
            "distinct_within_image": {
                str(n + 1): [_ratio(total, images) for total, images in self._ratios[n]] for n in range(_MAX_N)
            },
            "self_bleu": self._bleu.score() if self._bleu is not None else None,
            "duplicates_within_image": _ratio(self._repeated, captions),
            "duplicates_across_images": _ratio(across_images, captions),
            "no_end_mark": _ratio(self._no_end_mark, captions),
            "ends_midway": _ratio(self._ends_midway, captions),
            "lengths": {str(length): self._lengths[length] for length in sorted(self._lengths)},
        }


class _SelfBleu:
    """BLEU-4 of captions against the others of their image. Counts of a corpus are the sums of its parts' counts."""

    def __init__(self) -> None:
        self._correct, self._total = [0] * 4, [0] * 4
        self._length = self._reference_length = 0

    def add(self, images: Sequence[Sequence[str]]) -> None:
        """Add the captions of some images, the same number of each."""
        from sacrebleu.metrics import BLEU

        count = len(images[0]) if images else 0
        if count < 2:
            return
        captions = [text for texts in images for text in texts]
        others = [[texts[(i + k) % count] for texts in images for i in range(count)] for k in range(1, count)]
        part = BLEU(lowercase=True, force=True).corpus_score(captions, others)
        self._correct = [a + b for a, b in zip(self._correct, part.counts, strict=True)]
        self._total = [a + b for a, b in zip(self._total, part.totals, strict=True)]
        self._length += part.sys_len
        self._reference_length += part.ref_len

    def score(self) -> float | None:
        """Score from 0 to 1; None if no image has two captions."""
        from sacrebleu.metrics import BLEU

        if not self._length:
            return None
        bleu = BLEU.compute_bleu(self._correct, self._total, self._length, self._reference_length, smooth_method="exp")
        return float(bleu.score) / 100


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
