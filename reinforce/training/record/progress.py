"""The speed of a training run: numbers for its log and a line for its screen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from reinforce.terminal import format_duration, plural


class Throughput:
    """Speed of the steps between two rows of the log, without evaluations and checkpoints, and the time left.

    A training run of ``steps`` steps begins or resumes at step ``start``. ``flops`` are those of the model for a
    sample, 0 if unknown, and ``peak`` the FLOP/s of all ranks' cards, if known.
    """

    def __init__(self, start: int, steps: int, flops: float = 0.0, peak: float | None = None) -> None:
        self._begun, self._start, self._end = time.monotonic(), start, steps
        self._flops, self._peak = flops, peak
        self._seconds = self._idle = 0.0
        self._steps = 0

    def add_step(self, seconds: float, idle: float) -> None:
        """Count a step of ``seconds``, in which the device waited ``idle`` seconds for data."""
        self._seconds += seconds
        self._idle += idle
        self._steps += 1

    def measure(self, batch: int) -> dict[str, float]:
        """Return samples per second over all ranks and the share of time spent waiting for data, then reset.

        ``batch`` is the global batch size. Where they are known, the model's FLOP/s over all ranks and their share of
        the cards' peak (``mfu``) are returned, too.
        """
        speed = {"samples_per_second": self._steps * batch / self._seconds, "waiting": self._idle / self._seconds}
        if self._flops:
            speed["flops_per_second"] = self._flops * speed["samples_per_second"]
            if self._peak is not None:
                speed["mfu"] = speed["flops_per_second"] / self._peak
        self._seconds, self._idle, self._steps = 0.0, 0.0, 0
        return speed

    def seconds_left(self, step: int) -> float:
        """An estimate by the average speed since the start, evaluations included."""
        return (time.monotonic() - self._begun) / (step - self._start) * (self._end - step)


def format_row(row: Mapping[str, Any], steps: int, seconds_left: float) -> str:
    """A row of the log as one line of text."""
    parts = [
        f"step {row['step']:,} of {steps:,}",
        f"ETA {format_duration(seconds_left)}",
        f"epoch {row['epoch']:.2f}",
        f"loss {row['loss']:.4f}",
        f"{row['samples_per_second']:,.0f} samples/s",
        *([f"MFU {row['mfu']:.0%}"] if "mfu" in row else []),
        f"waiting for data {row['waiting']:.0%}",
    ]
    if row["skipped"]:
        parts.append(f"{plural(row['skipped'], 'step')} skipped")
    return "  ".join(parts)
