"""Time of a shard's models on the clock of the device, and its memory."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from reinforce.engine.rates import Cost, Stages
from teachers.device import Accelerator, TimeMark

_MAX_PENDING = 256


class StageMeter:
    """Measures the stages of a shard; ``costs`` are those of its layers, where they are known."""

    def __init__(self, accelerator: Accelerator, costs: Mapping[str, Cost]) -> None:
        self._accelerator, self._costs = accelerator, costs
        self._pending: list[tuple[str, int, TimeMark, TimeMark]] = []
        self._stages: Stages = {}

    @contextlib.contextmanager
    def stage(self, layer: str, inputs: int) -> Iterator[None]:
        """Work for ``inputs`` of a layer; it is not counted if it raises."""
        start = self._accelerator.mark()
        yield
        self._pending.append((layer, inputs, start, self._accelerator.mark()))
        if len(self._pending) >= _MAX_PENDING:
            self.collect()

    def collect(self) -> Stages:
        """The sums so far, after all work is done."""
        if self._pending:
            self._accelerator.synchronize()
        for layer, inputs, start, end in self._pending:
            seconds = self._accelerator.seconds_between(start, end)
            stage: Any = self._stages.setdefault(layer, Counter())
            stage.update(inputs=inputs, seconds=seconds)
            if layer in self._costs:
                cost = self._costs[layer]
                stage.update(flops=inputs * cost.flops, peak_flops=seconds * cost.peak)
        self._pending.clear()
        return self._stages


def device_report(accelerator: Accelerator) -> dict[str, Any]:
    """Name of a CUDA device, its memory in bytes, and the most that tensors of this process have used; else nothing."""
    if accelerator.device.type != "cuda":
        return {}
    return {
        "name": torch.cuda.get_device_name(accelerator.device),
        "memory_peak": accelerator.peak_memory(),
        "memory_total": int(torch.cuda.get_device_properties(accelerator.device).total_memory),
    }
