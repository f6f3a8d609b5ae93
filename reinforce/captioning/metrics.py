"""Similarity of generated captions to reference captions: CIDEr-D."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

_MAX_N = 4
_SIGMA = 6.0

#: Counts of the n-grams of a text, for n = 1 .. 4.
NGrams = list[Counter[tuple[str, ...]]]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (arXiv 1411.5726) of one caption per image against one or more references each, between 0 and 10.

    Inverse document frequencies come from the given references, so values of different sets do not compare, and a
    single image scores 0. Papers report it times 100. It equals pycocoevalcap's value for the same words; the words
    are those of sacrebleu's ``13a`` in lower case without punctuation, close to COCO's tokenizer, which needs Java.
    """
    candidates = [_ngrams(text) for text in captions]
    reference_sets = [[_ngrams(text) for text in texts] for texts in references]
    document_counts: Counter[tuple[str, ...]] = Counter()
    for texts in reference_sets:
        document_counts.update({gram for reference in texts for counts in reference for gram in counts})
    log_images = math.log(len(reference_sets))

    def tf_idf(grams: NGrams) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: count * (log_images - math.log(max(1, document_counts[gram]))) for gram, count in counts.items()}
            for counts in grams
        ]

    scores = []
    for grams, texts in zip(candidates, reference_sets, strict=True):
        vector = tf_idf(grams)
        words = _word_count(grams)
        scores.append(np.mean([_similarity(vector, tf_idf(text), words - _word_count(text)) for text in texts]))
    return 10 * float(np.mean(scores))


def _similarity(
    candidate: list[dict[tuple[str, ...], float]], reference: list[dict[tuple[str, ...], float]], excess: int
) -> float:
    """Mean over n of the clipped cosine, with a penalty for ``excess`` words."""
    cosines = []
    for a, b in zip(candidate, reference, strict=True):
        norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        dot = sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
        cosines.append(dot / norms if norms else 0.0)
    return float(np.mean(cosines)) * math.exp(-(excess**2) / (2 * _SIGMA**2))


def _ngrams(text: str) -> NGrams:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    words = [word for word in Tokenizer13a()(text.lower()).split() if any(c.isalnum() for c in word)]
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, _MAX_N + 1)]


def _word_count(grams: NGrams) -> int:
    return sum(grams[0].values())
