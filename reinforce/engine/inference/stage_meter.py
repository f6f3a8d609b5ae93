"""Time of a shard's models on the clock of the device, and its memory."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from reinforce.engine.inference.models import Counters
from reinforce.engine.record.rates import Cost, Stages
from teachers.runtime.accelerator import Accelerator, TimeMark

_counting = threading.Lock()


class StageMeter:
    """Measures the stages of a shard, from where the device reaches the start of their work to its end.

    Their seconds are busy time of ``counters``. What the host does before and after them is not; gaps in them, where
    the host queues work more slowly than the device does it, are. ``costs`` are those of layers, where they are known.
    """

    def __init__(self, accelerator: Accelerator, costs: Mapping[str, Cost], *counters: Counters) -> None:
        self._accelerator, self._costs, self._counters = accelerator, costs, counters
        self._pending: deque[tuple[str, int, TimeMark, TimeMark]] = deque()
        self._stages: Stages = {}

    @contextlib.contextmanager
    def stage(self, layer: str, inputs: int) -> Iterator[None]:
        """Work for ``inputs`` of a layer; it is not counted if it raises."""
        start = self._accelerator.mark()
        yield
        self._pending.append((layer, inputs, start, self._accelerator.mark()))

    def add_tokens(self, layer: str, tokens: int) -> None:
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
        for counter in self._counters:
            counter.busy += seconds
        stage: Any = self._stages.setdefault(layer, Counter())
        stage.update(inputs=inputs, seconds=seconds)
        if layer in self._costs:
            cost = self._costs[layer]
            stage.update(flops=inputs * cost.flops, peak_flops=seconds * cost.peak)


def device_report(accelerator: Accelerator) -> dict[str, Any]:
    """Name of a CUDA device, its memory in bytes, and the most that tensors of this process have used; else nothing."""
    if accelerator.device.type != "cuda":
        return {}
    return {
        "name": torch.cuda.get_device_name(accelerator.device),
        "memory_peak": accelerator.peak_memory(),
        "memory_total": int(torch.cuda.get_device_properties(accelerator.device).total_memory),
    }
