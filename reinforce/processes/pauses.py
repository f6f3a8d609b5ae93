"""Pauses between attempts at something that may pass later."""

from __future__ import annotations

import random

_MAX_PAUSE_SECONDS = 60.0


def pause_seconds(attempt: int) -> float:
    """Exponential back-off with jitter after ``attempt`` failures: 2^(attempt - 1) s, at most 60 s, times a random
    factor between 0.5 and 1."""
    return min(_MAX_PAUSE_SECONDS, 2.0 ** min(attempt - 1, 10)) * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
