"""How near captions come to people's: BLEU-4 and CIDEr-D over a corpus."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0

#: The n-grams of a text with their counts, for n = 1 .. 4.
Grams = list[Counter[tuple[str, ...]]]


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 of one caption an image against one or more references each, within 0 and 1.

    By sacrebleu (signature ``case:lc|tok:13a|smooth:exp``); multiply by 100 for what papers write.
    """
    from sacrebleu.metrics import BLEU

    # sacrebleu wants the first references of all images, then the second ones, None where an image has fewer
    most = max(len(texts) for texts in references)
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    score = BLEU(lowercase=True).corpus_score(list(captions), streams)  # type: ignore[arg-type]
    return float(score.score) / 100


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (arXiv 1411.5726) of one caption an image against one or more references each, within 0 and 10.

    Inverse document frequencies come from the references given, so numbers of different sets do not compare, and one
    image alone scores 0. Papers write it times 100. Equals pycocoevalcap's for the same words; these are sacrebleu's
    ``13a`` in lower case without punctuation, near to those of COCO's tokenizer, which needs Java.
    """
    candidates = [_grams(text) for text in captions]
    sets = [[_grams(text) for text in texts] for texts in references]
    images_with: Counter[tuple[str, ...]] = Counter()
    for texts_of in sets:
        images_with.update({gram for reference in texts_of for counts in reference for gram in counts})
    log_images = math.log(len(sets))

    def weighted(grams: Grams) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: count * (log_images - math.log(max(1, images_with[gram]))) for gram, count in counts.items()}
            for counts in grams
        ]

    scores = []
    for grams, against in zip(candidates, sets, strict=True):
        mine = weighted(grams)
        scores.append(np.mean([_similarity(mine, weighted(other), _words(grams) - _words(other)) for other in against]))
    return 10 * float(np.mean(scores))


def _similarity(
    mine: list[dict[tuple[str, ...], float]], theirs: list[dict[tuple[str, ...], float]], excess: int
) -> float:
    """Mean over n of the clipped cosine, less for captions of another length."""
    cosines = []
    for a, b in zip(mine, theirs, strict=True):
        norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        dot = sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
        cosines.append(dot / norms if norms else 0.0)
    return float(np.mean(cosines)) * math.exp(-(excess**2) / (2 * _SIGMA**2))


def _grams(text: str) -> Grams:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    words = [word for word in Tokenizer13a()(text.lower()).split() if any(c.isalnum() for c in word)]
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, _LONGEST + 1)]


def _words(grams: Grams) -> int:
    return sum(grams[0].values())
