"""What the models of one shard share: their turn at the accelerator, its memory, and the record of their time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from reinforce.config import Config
from reinforce.engine.inference.batch_sizes import Demand
from reinforce.engine.inference.models import Counters, Models
from reinforce.engine.inference.out_of_memory import OutOfMemory, attempt
from reinforce.engine.inference.stage_meter import StageMeter
from reinforce.engine.messages.pulse import WAITING, LeaseWatch
from reinforce.engine.messages.results import raising_layer_failure

_T = TypeVar("_T")


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
