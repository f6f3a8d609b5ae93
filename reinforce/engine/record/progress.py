"""Progress of a run: a live line on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from reinforce.terminal import Screen, format_duration, plural

_WINDOW_SECONDS = 60.0
_NAMED_HOSTS = 3


@dataclass(frozen=True)
class Snapshot:
    """Totals at one moment. ``busy`` is in accelerator-seconds, ``alive`` in worker-seconds. ``samples`` includes those
    of unfinished shards, ``samples_done`` does not. ``silent`` has the number of shards that wait for a host which does
    not answer, by its name."""

    shards_done: int
    shards: int
    samples: int
    samples_done: int
    busy: float
    alive: float
    workers: int  # that have started
    quarantined_shards: int
    refused_rows: int
    silent: Mapping[str, int] = field(default_factory=dict)
    starting: int = 0  # workers that start or load their models


@dataclass(frozen=True)
class Rates:
    """Rates over the snapshots of the last minute; None if they are not known. ``eta`` is in seconds."""

    samples_per_second: float | None = None
    busy_share: float | None = None
    eta: float | None = None


class Progress(Screen):
    """Prints snapshots. ``show`` can be called at any rate. ``expected`` samples are those of all shards by an estimate
    before the run, by which the remaining time is computed until a shard is finished."""

    def __init__(self, expected: float | None = None) -> None:
        super().__init__()
        self._history: deque[tuple[float, Snapshot]] = deque()
        self._start = self._begun = self._worked = time.monotonic()
        self._expected = expected
        self._counted = self._begun, 0  # when the number of samples has changed last, and to what

    def show(self, now: Snapshot) -> None:
        time_now = time.monotonic()
        if not now.workers and not now.samples:
            self._begun = time_now  # the rate is that of workers that have loaded their models
        if now.workers:
            self._worked = time_now
        self._history.append((time_now, now))
        while time_now - self._history[0][0] > _WINDOW_SECONDS and len(self._history) > 2:
            self._history.popleft()
        expected = self._expected_samples(now)
        self.draw(self.line(now), now.samples if expected else 0, expected or 1)

    def rates(self, now: Snapshot) -> Rates:
        """Rates over the last minute, and the remaining time at the average rate of this run."""
        then_time, then = self._history[0] if self._history else (self._start, now)
        span = time.monotonic() - then_time
        speed = (now.samples - then.samples) / span if span > 0 and now.samples > then.samples else None
        busy = None
        if now.busy > 0 and now.alive > then.alive:
            busy = min(1.0, (now.busy - then.busy) / (now.alive - then.alive))
        return Rates(speed, busy, self._eta(now))

    def line(self, now: Snapshot) -> str:
        rates = self.rates(now)
        parts = [f"{now.shards_done:,} of {plural(now.shards, 'shard')}"]
        if rates.eta is not None:
            parts.append(f"ETA {format_duration(rates.eta)}")
        if not now.workers and now.starting:
            parts.append(f"{plural(now.starting, 'worker')} loading models for {time.monotonic() - self._worked:.0f} s")
        parts.append(plural(now.samples, "sample"))
        if rates.samples_per_second is not None:
            parts.append(f"{rates.samples_per_second:,.0f} samples/s")
        if rates.busy_share is not None:
            parts.append(f"models busy {rates.busy_share:.0%}")
        if now.workers or not now.starting:
            parts.append(plural(now.workers, "worker") + (f", {now.starting:,} starting" if now.starting else ""))
        if now.quarantined_shards or now.refused_rows:
            parts.append(f"quarantine: {plural(now.quarantined_shards, 'shard')}, {plural(now.refused_rows, 'row')}")
        if now.silent:
            parts.append(_describe_silent(now.silent))
        return "  ".join(parts)

    def _eta(self, now: Snapshot) -> float | None:
        expected = self._expected_samples(now)
        if expected is None or not now.samples or not now.workers:
            return None
        if now.samples != self._counted[1]:
            self._counted = time.monotonic(), now.samples
        at, samples = self._counted
        left = (at - self._begun) / samples * (expected - samples)
        return max(0.0, left - (time.monotonic() - at))  # workers count in steps

    def _expected_samples(self, now: Snapshot) -> float | None:
        """Samples of all shards, from the mean of the finished ones, or else by the estimate; None without either."""
        if now.samples_done and now.shards_done:  # a postponed shard has samples and is not finished
            return max(now.samples, now.samples_done / now.shards_done * now.shards)
        return None if self._expected is None else max(now.samples, self._expected)


def _describe_silent(silent: Mapping[str, int]) -> str:
    """Shards that wait for silent hosts."""
    hosts, shards = sorted(silent), sum(silent.values())
    names = ", ".join(hosts[:_NAMED_HOSTS]) + (f" and {len(hosts) - _NAMED_HOSTS} more" * (len(hosts) > _NAMED_HOSTS))
    verb, ending = "waits" if shards == 1 else "wait", "s" * (len(hosts) > 1)
    return f"{plural(shards, 'shard')} {verb} for silent host{ending} {names}"
