"""What can be told of captions from their text alone: length, diversity, duplicates, and how they end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

#: What the figures mean, as report.json explains them. A word is a run of letters and digits, in lower case.
DEFINITIONS = {
    "null": "share of rows without captions",
    "words": "mean number of words of a caption",
    "distinct": "distinct n-grams over all n-grams of the sample, n = 1, 2, 3; falls as the sample grows",
    "distinct_within_image": "the same among the first 1, 2, ... captions of an image, mean over images",
    "self_bleu": "corpus BLEU-4 of each caption against the other captions of its image, by sacrebleu "
    "(case:lc|tok:13a|smooth:exp), within 0 and 1: at 1 all captions of an image are the same",
    "duplicates_within_image": "share of captions that an earlier one of their image equals but for case and "
    "punctuation; so do those that `clean` put into the slots of dropped captions",
    "duplicates_across_images": "share of captions that one of another image in the sample equals likewise",
    "no_end_mark": "share of captions that do not end in . ! or ?, which some captioners never write",
    "ends_midway": "share of captions whose last word ends no English sentence (a, the, of, and, ...), so that they "
    "were most likely cut at max_length",
    "lengths": "captions by number of words",
}
_LONGEST = 3  # words of an n-gram
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_END_MARK = re.compile(r"[.!?。！？…][\"'”’)\]」』]*$")
_MIDWAY = {
    "a", "an", "the", "and", "or", "but", "of", "with", "from", "into", "than", "as", "is", "are", "was", "were",
    "its", "his", "her", "their", "my", "your", "our",
}  # fmt: skip
_WORD_BITS = 24


class Texts:
    """Figures of the captions of a sample of images, a row group at a time.

    Memory grows with the sample's distinct n-grams and texts.
    """

    def __init__(self, count: int) -> None:
        """``count`` captions an image."""
        self._rows = self._null = self._unended = self._midway = self._again = 0
        self._lengths: Counter[int] = Counter()
        self._ids: dict[str, int] = {}
        self._times: Counter[tuple[str, ...]] = Counter()  # of a text, among all captions
        self._images: Counter[tuple[str, ...]] = Counter()  # that have a text
        self._met: list[set[int]] = [set() for _ in range(_LONGEST)]
        self._grams = [0] * _LONGEST
        # By n and number of captions: the sum of images' shares of distinct n-grams, and the images that have any.
        self._shares = [[[0.0, 0] for _ in range(count)] for _ in range(_LONGEST)]
        self._bleu = _SelfBleu()

    def add(self, rows: Sequence[Sequence[str] | None]) -> None:
        """The captions of some images, None where there are none."""
        told = [texts for texts in rows if texts is not None]
        self._rows += len(rows)
        self._null += len(rows) - len(told)
        for texts in told:
            words = [tuple(_WORD.findall(text.lower())) for text in texts]
            self._count(texts, words)
            self._count_grams(words)
        self._bleu.add(told)

    def _count(self, texts: Sequence[str], words: Sequence[tuple[str, ...]]) -> None:
        self._lengths.update(map(len, words))
        self._unended += sum(_END_MARK.search(text) is None for text in texts)
        self._midway += sum(of[-1] in _MIDWAY for of in words if of)
        self._again += len(words) - len(set(words))
        self._times.update(words)
        self._images.update(set(words))

    def _count_grams(self, words: Sequence[tuple[str, ...]]) -> None:
        met: list[set[int]] = [set() for _ in range(_LONGEST)]
        total = [0] * _LONGEST
        for slot, caption in enumerate(words):
            ids = [self._ids.setdefault(word, len(self._ids)) for word in caption]
            grams = [0] * len(ids)
            for n in range(_LONGEST):
                grams = [(gram << _WORD_BITS) | word for gram, word in zip(grams, ids[n:], strict=False)]
                met[n].update(grams)
                total[n] += len(grams)
                if total[n]:
                    self._shares[n][slot][0] += len(met[n]) / total[n]
                    self._shares[n][slot][1] += 1
        for n in range(_LONGEST):
            self._met[n] |= met[n]
            self._grams[n] += total[n]

    def figures(self) -> dict[str, Any]:
        """By the names of ``DEFINITIONS``; None where there is nothing to tell of."""
        captions = self._lengths.total()
        elsewhere = sum(self._times[text] for text, images in self._images.items() if images > 1)
        return {
            "rows": self._rows,
            "captions": captions,
            "null": _share(self._null, self._rows),
            "words": _share(sum(length * count for length, count in self._lengths.items()), captions),
            "distinct": {str(n + 1): _share(len(self._met[n]), self._grams[n]) for n in range(_LONGEST)},
            "distinct_within_image": {
                str(n + 1): [_share(total, images) for total, images in self._shares[n]] for n in range(_LONGEST)
            },
            "self_bleu": self._bleu.score(),
            "duplicates_within_image": _share(self._again, captions),
            "duplicates_across_images": _share(elsewhere, captions),
            "no_end_mark": _share(self._unended, captions),
            "ends_midway": _share(self._midway, captions),
            "lengths": {str(length): self._lengths[length] for length in sorted(self._lengths)},
        }


class _SelfBleu:
    """BLEU-4 of captions against the others of their image: a corpus's counts are the sums of its parts'."""

    def __init__(self) -> None:
        self._correct, self._total = [0] * 4, [0] * 4
        self._length = self._reference = 0

    def add(self, images: Sequence[Sequence[str]]) -> None:
        """As many captions for each image."""
        from sacrebleu.metrics import BLEU

        count = len(images[0]) if images else 0
        if count < 2:
            return
        captions = [text for texts in images for text in texts]
        others = [[texts[(i + k) % count] for texts in images for i in range(count)] for k in range(1, count)]
        found = BLEU(lowercase=True, force=True).corpus_score(captions, others)
        self._correct = [a + b for a, b in zip(self._correct, found.counts, strict=True)]
        self._total = [a + b for a, b in zip(self._total, found.totals, strict=True)]
        self._length, self._reference = self._length + found.sys_len, self._reference + found.ref_len

    def score(self) -> float | None:
        """Within 0 and 1; None where no image has two captions."""
        from sacrebleu.metrics import BLEU

        if not self._length:
            return None
        found = BLEU.compute_bleu(self._correct, self._total, self._length, self._reference, smooth_method="exp")
        return float(found.score) / 100


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
