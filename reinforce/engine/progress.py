"""What a person sees while a run goes on: a live line on a terminal, a plain line now and then in a job's log."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from reinforce.terminal import Screen, format_duration

_WINDOW_SECONDS = 60.0


@dataclass(frozen=True)
class Snapshot:
    """Totals at one moment; ``busy`` is in accelerator-seconds, ``alive`` in worker-seconds. ``samples`` counts those
    of unfinished shards too, ``samples_done`` does not."""

    shards_done: int
    shards: int
    samples: int
    samples_done: int
    busy: float
    alive: float
    workers: int
    quarantined_shards: int
    refused_rows: int


class Progress(Screen):
    """Call ``show`` as often as you like; it decides when there is something to print."""

    def __init__(self) -> None:
        super().__init__()
        self._history: deque[tuple[float, Snapshot]] = deque()
        self._start = time.monotonic()

    def show(self, now: Snapshot) -> None:
        moment = time.monotonic()
        self._history.append((moment, now))
        while moment - self._history[0][0] > _WINDOW_SECONDS and len(self._history) > 2:
            self._history.popleft()
        self.draw(self.line(now), now.samples if now.samples_done else 0, _expected(now) or 1)

    def line(self, now: Snapshot) -> str:
        then_moment, then = self._history[0] if self._history else (self._start, now)
        span = time.monotonic() - then_moment
        parts = [f"{now.shards_done:,} of {now.shards:,} shards", f"{now.samples:,} samples"]
        if span > 0 and now.samples > then.samples:
            parts.append(f"{(now.samples - then.samples) / span:,.0f} samples/s")
        if now.busy > 0 and now.alive > then.alive:
            parts.append(f"accelerator busy {min(1.0, (now.busy - then.busy) / (now.alive - then.alive)):.0%}")
        parts.append(f"{now.workers} worker{'s' * (now.workers != 1)}")
        eta = self._eta(now)
        if eta is not None:
            parts.append(f"ETA {format_duration(eta)}")
        if now.quarantined_shards or now.refused_rows:
            parts.append(f"quarantine: {now.quarantined_shards} shards, {now.refused_rows:,} rows")
        return "  ".join(parts)

    def _eta(self, now: Snapshot) -> float | None:
        """Seconds to go at the pace of this run so far."""
        expected = _expected(now)
        if expected is None:
            return None
        return (time.monotonic() - self._start) / now.samples * (expected - now.samples)


def _expected(now: Snapshot) -> float | None:
    """Samples of all shards, if the others are as long as the finished ones."""
    if now.samples_done == 0:
        return None
    return max(now.samples, now.samples_done / now.shards_done * now.shards)
