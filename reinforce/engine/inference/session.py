"""What the models of one shard share: their turn at the accelerator, its memory, and the record of their time."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from reinforce.config import Config
from reinforce.engine.inference.batch_sizes import Demand, OutOfMemory, attempt
from reinforce.engine.inference.models import Counters, Models
from reinforce.engine.messages.pulse import WAITING, LeaseWatch
from reinforce.engine.messages.results import raising_layer_failure
from reinforce.engine.record.rates import Cost, Stages
from teachers.runtime.accelerator import Accelerator, TimeMark

_T = TypeVar("_T")
_counting = threading.Lock()


class Session:
    """The models for one shard. ``counters`` receives the busy time of this shard, ``watch`` its steps."""

    def __init__(
        self, config: Config, models: Models, counters: Counters | None = None, watch: LeaseWatch | None = None
    ) -> None:
        self.config, self.models = config, models
        self.watch = watch or LeaseWatch()
        self.meter = StageMeter(models.accelerator, models.costs, models.counters, counters or Counters())
        self._order = models.lock.next_order()

    @contextlib.contextmanager
    def stage(self, layer: str, what: str, inputs: int = 0) -> Iterator[None]:
        """Run a layer's model on ``what``; the time for ``inputs`` is measured. Raises LayerFailure."""
        measured = self.meter.stage(layer, inputs) if inputs else contextlib.nullcontext()
        with self.watch.stage(layer, what), raising_layer_failure(layer), measured:
            yield

    @contextlib.contextmanager
    def use_accelerator(self) -> Iterator[None]:
        """Exclusive use of the accelerator; the oldest shard that waits gets it first."""
        with self.models.use_accelerator(self._order):
            yield
            self.meter.update()

    def attempt(self, work: Callable[[bool], _T]) -> tuple[_T | OutOfMemory, bool]:
        """The result of ``work``, which holds tensors on the device, and its argument: whether others may, too."""
        with self.watch.stage(WAITING), self.models.batches.on_device() as shared:
            return attempt(partial(work, shared)), shared

    def halve(self, shortage: OutOfMemory, demand: Demand, size: int, shared: bool) -> None:
        """Halve the batches after one of ``size`` inputs did not fit. Raises UserError if they cannot be smaller."""
        self.models.batches.halve(shortage, demand, size, self.config, shared)
        with self.models.lock.take(self._order):
            self.models.release_memory()


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
