"""The scorers by the key of a config that chooses them."""

from __future__ import annotations

from reinforce.config import Score
from reinforce.dataset.scoring.base import Scorer
from reinforce.dataset.scoring.facts import Facts
from reinforce.dataset.scoring.head import Head
from reinforce.dataset.scoring.similarity import Similarity

SCORERS: dict[str, type[Scorer]] = {scorer.key: scorer for scorer in (Similarity, Head, Facts)}


def make_scorer(spec: Score) -> Scorer:
    """The scorer of an entry of ``scores``. Raises ValueError or OSError that names the fix."""
    return next(scorer(spec) for key, scorer in SCORERS.items() if getattr(spec, key) is not None)
