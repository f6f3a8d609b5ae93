"""What a worker reports to the driver while its shards run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pulse:
    """A worker's counts so far. ``key`` is the sample that a decode process has worked on for the longest time."""

    samples: int = 0
    busy: float = 0.0
    prepared: int = 0
    key: str | None = None
