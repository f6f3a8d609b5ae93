"""Time of a shard's models on the clock of the device, and its memory."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from reinforce.engine.record.rates import Cost, Stages
from teachers.device.accelerator import Accelerator, TimeMark

_ANCHOR_SECONDS = 60.0
#: Intervals are added in the order of their ends, apart from those that a shard counts later.
_KEPT_SECONDS = 120.0
_counting = threading.Lock()


class Busy(Protocol):
    """What counts the seconds in which the device works."""

    busy: float


class StageMeter:
    """Measures the stages of a shard, from where the device reaches the start of their work to its end.

    Their seconds are busy time of ``counters``. What the host does before and after them is not; gaps in them, where
    the host queues work more slowly than the device does it, are. ``costs`` are those of layers, where they are known.
    With ``device_time``, stages that overlap with those of other threads are busy time once.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        costs: Mapping[str, Cost],
        *counters: Busy,
        device_time: DeviceTime | None = None,
    ) -> None:
        self._accelerator, self._costs, self._counters = accelerator, costs, counters
        self._device_time = device_time
        self._pending: deque[tuple[str, int, TimeMark, TimeMark]] = deque()
        self._stages: Stages = {}

    @contextlib.contextmanager
    def stage(self, layer: str, inputs: int) -> Iterator[None]:
        """Work for ``inputs`` of a layer; it is not counted if it raises."""
        start = self._accelerator.mark()
        yield
        self._pending.append((layer, inputs, start, self._accelerator.mark()))

    def add_tokens(self, layer: str, tokens: int) -> None:
        """Count tokens that a captioner has generated."""
        if tokens:
            with _counting:
                stage: Any = self._stages.setdefault(layer, Counter())
                stage.update(tokens=tokens)

    def update(self) -> None:
        """Count the stages that the device has finished."""
        with _counting:
            while self._pending and self._accelerator.has_passed(self._pending[0][3]):
                self._count(*self._pending.popleft())

    def collect(self) -> Stages:
        """The sums so far, after all work is done."""
        for *_, end in [*self._pending]:  # of models whose outputs were not waited for
            self._accelerator.wait_until(end)
        self.update()
        return self._stages

    def _count(self, layer: str, inputs: int, start: TimeMark, end: TimeMark) -> None:
        seconds = self._accelerator.seconds_between(start, end)
        busy = seconds if self._device_time is None else self._device_time.add(start, end)
        for counter in self._counters:
            counter.busy += busy
        stage: Any = self._stages.setdefault(layer, Counter())
        stage.update(inputs=inputs, seconds=seconds)
        if layer in self._costs:
            cost = self._costs[layer]
            stage.update(flops=inputs * cost.flops, peak_flops=seconds * cost.peak)


class DeviceTime:
    """Seconds in which an accelerator works for any lane: those of intervals that overlap count once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._anchor: Any = accelerator.mark()
        self._anchor_seconds = 0.0
        self._covered: list[tuple[float, float]] = []  # disjoint, in order

    def add(self, start: Any, end: Any) -> float:
        """Seconds between two passed marks that no earlier interval covers. One thread at a time may call it."""
        first, last = self._seconds(start), self._seconds(end)
        if last - self._anchor_seconds > _ANCHOR_SECONDS:  # the clock of CUDA has 24 bits of milliseconds
            self._anchor, self._anchor_seconds = end, last
        apart = [one for one in self._covered if one[1] < first or one[0] > last]
        touching = [one for one in self._covered if not (one[1] < first or one[0] > last)]
        new = last - first - sum(min(one[1], last) - max(one[0], first) for one in touching)
        whole = min([first, *(one[0] for one in touching)]), max([last, *(one[1] for one in touching)])
        self._covered = sorted([*(one for one in apart if one[1] > last - _KEPT_SECONDS), whole])
        return max(0.0, new)

    def _seconds(self, mark: Any) -> float:
        return self._anchor_seconds + self._accelerator.seconds_between(self._anchor, mark)


def device_report(accelerator: Accelerator) -> dict[str, Any]:
    """Name of a CUDA device, its memory in bytes, and the most that tensors of this process have used; else nothing."""
    if accelerator.device.type != "cuda":
        return {}
    return {
        "name": torch.cuda.get_device_name(accelerator.device),
        "memory_peak": accelerator.peak_memory(),
        "memory_total": int(torch.cuda.get_device_properties(accelerator.device).total_memory),
    }
