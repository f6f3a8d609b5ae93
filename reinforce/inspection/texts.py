"""Statistics of the text of captions: length, diversity, duplicates, and how they end."""

from __future__ import annotations

import re
import sys
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
    return {
        "rows": len(rows),
        "captions": total,
        "null": _ratio(len(rows) - len(images), len(rows)),
        "words": _ratio(sum(length * count for length, count in lengths.items()), total),
        "distinct": {n: of_all for n, (of_all, _) in distinct.items()},
        "distinct_within_image": {n: within for n, (_, within) in distinct.items()},
        "self_bleu": _self_bleu(images) if self_bleu else None,
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


def _self_bleu(images: Sequence[Sequence[str]]) -> float | None:
    """BLEU-4 of captions against the others of their image; None if no image has two captions."""
    several = [texts for texts in images if len(texts) > 1]
    others = [[*texts[:i], *texts[i + 1 :]] for texts in several for i in range(len(texts))]
    return bleu([text for texts in several for text in texts], others) if several else None


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
