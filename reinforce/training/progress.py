"""How fast a training goes, in numbers for its log and in a line for people."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from reinforce.terminal import format_duration


class Meter:
    """Pace between two rows of the log; evaluations and checkpoints are not part of it."""

    def __init__(self) -> None:
        self._seconds = self._idle = 0.0
        self._steps = 0

    def add(self, seconds: float, idle: float) -> None:
        """A step of ``seconds``, for ``idle`` of which the device had nothing to do but wait for data."""
        self._seconds += seconds
        self._idle += idle
        self._steps += 1

    def take(self, batch: int) -> dict[str, float]:
        """Samples a second of all ranks and the share of the time that was waited for data; begins anew."""
        pace = {"samples_per_second": self._steps * batch / self._seconds, "waiting": self._idle / self._seconds}
        self._seconds, self._idle, self._steps = 0.0, 0.0, 0
        return pace


class Eta:
    """Seconds to go at the pace of this start so far, evaluations included."""

    def __init__(self, start: int, steps: int) -> None:
        self._begun, self._start, self._steps = time.monotonic(), start, steps

    def __call__(self, step: int) -> float:
        return (time.monotonic() - self._begun) / (step - self._start) * (self._steps - step)


def line(row: Mapping[str, Any], steps: int, eta: float) -> str:
    """A row of the log for people."""
    parts = [
        f"step {row['step']:,} of {steps:,}",
        f"epoch {row['epoch']:.2f}",
        f"loss {row['loss']:.4f}",
        f"{row['samples_per_second']:,.0f} samples/s",
        f"waiting for data {row['waiting']:.0%}",
        f"ETA {format_duration(eta)}",
    ]
    if row["skipped"]:
        parts.append(f"{row['skipped']:,} steps skipped")
    return "  ".join(parts)
