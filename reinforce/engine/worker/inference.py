"""Batches of rows through all models that see their images, one batch at a time, and what the models of one shard
share: their turn at the accelerator, its memory, and the record of their time.

A shard has two batches in work, one that runs and one that waits for its turn at the accelerator. A shard that came
back only after its batch has ended would find the accelerator taken by the younger shard. So two shards of one worker
would proceed alternately and end together, and the accelerator would wait for the first images of the next two.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from reinforce.config import Config
from reinforce.dataset.layers import Layer
from reinforce.engine.messages import raising_layer_failure
from reinforce.engine.pulse import PREPARING, WAITING, LeaseWatch
from reinforce.engine.rates import Cost, Stages
from reinforce.engine.worker.decode import PixelCells, PixelLayout, Row, runs
from reinforce.engine.worker.models import COPYING, Counters, Demand, LoadedModels, OutOfMemory, attempt, rows_per_batch
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator, TimeMark

_T = TypeVar("_T")
_counting = threading.Lock()
#: Batches of a shard in work.
IN_WORK = 2
#: Outputs of a batch by layer: an array whose first axis is that of the rows, or a list.
Outputs: TypeAlias = "dict[str, Any]"


class Session:
    """The models for one shard. ``counters`` receives the busy time of this shard, ``watch`` its steps."""

    def __init__(
        self, config: Config, models: LoadedModels, counters: Counters | None = None, watch: LeaseWatch | None = None
    ) -> None:
        self.config, self.models = config, models
        self.watch = watch or LeaseWatch()
        self.meter = StageMeter(models.accelerator, models.costs, models.counters, counters or Counters())
        self._order = next(models.lock.orders)

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
                layer, inputs, start, end = self._pending.popleft()
                seconds = self._accelerator.seconds_between(start, end)
                for counter in self._counters:
                    counter.busy += seconds
                stage: Any = self._stages.setdefault(layer, Counter())
                stage.update(inputs=inputs, seconds=seconds)
                if layer in self._costs:
                    cost = self._costs[layer]
                    stage.update(flops=inputs * cost.flops, peak_flops=seconds * cost.peak)

    def collect(self) -> Stages:
        """The sums so far, after all work is done."""
        for *_, end in [*self._pending]:  # of models whose outputs were not waited for
            self._accelerator.wait_until(end)
        self.update()
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


def rows_ahead(config: Config) -> int:
    """Rows of a shard that are decoded ahead of its batches in work."""
    return max(rows_per_batch(config), 2 * config.workers.cores)


def cells_per_shard(config: Config) -> int:
    """Pixel cells that a shard needs: for the rows ahead, the next one, and the batches in work."""
    return rows_ahead(config) + 1 + IN_WORK * rows_per_batch(config)


@dataclass(frozen=True)
class Batch:
    """Rows whose pixels are on the device.

    ``crops`` are the augmented images [rows * K, S, S, 3], ``whole`` the whole images by preprocessing [rows, H, W, 3].
    ``what`` describes the rows.
    """

    rows: Sequence[Row]
    what: str
    crops: torch.Tensor | None
    whole: Mapping[ImageSpec, torch.Tensor]


class LayerEncoder(ABC):
    """Runs the models of some layers on batches of rows. The defaults are those of models that see no image."""

    #: Whether it sees the augmented images, and the preprocessing of the whole images that it sees.
    crops: bool = False
    whole: Sequence[ImageSpec] = ()

    def __init__(self, layers: Iterable[Layer], session: Session) -> None:
        self.layers, self.session = [*layers], session
        self.computed = [layer for layer in self.layers if not layer.published]

    def prepare(self, rows: Sequence[Row]) -> Any:
        """What ``encode`` needs besides the pixels; called while others use the accelerator."""
        return None

    def encode(self, batch: Batch, prepared: Any) -> Callable[[], Outputs]:
        """Run the models on the accelerator -> a function that returns the outputs and needs no accelerator.

        Raises LayerFailure.
        """
        raise NotImplementedError

    def encode_group(self, rows: Sequence[Row]) -> Outputs:
        """Run models on what a row group needs no pixels for, beside its last batch. Raises LayerFailure."""
        return {}

    def fill(self) -> None:  # noqa: B027 - most see pixels only
        """Run the largest batches of what needs no pixels. Raises LayerFailure."""

    @abstractmethod
    def demand(self, layer: Layer, rows: int) -> Demand:
        """Settings to lower if ``rows`` rows of a layer do not fit in the memory of the device."""


class Inference:
    """Runs the models of ``encoders``, which share the pixels of each batch."""

    def __init__(self, session: Session, encoders: Iterable[LayerEncoder]) -> None:
        self._session, self.encoders = session, [*encoders]
        # Teachers come before captioners: their large forward passes show first whether the memory suffices.
        self._seeing = [one for one in reversed(self.encoders) if one.crops or one.whole]
        whole = tuple(sorted({spec for encoder in self._seeing for spec in encoder.whole}, key=repr))
        crops, policy = any(encoder.crops for encoder in self._seeing), session.config.augmentations
        #: The pixels of one row: the augmented images if a model sees them, and whole ones by their preprocessing.
        self.layout = PixelLayout((policy.count, policy.size) if crops else None, whole)

    @property
    def rows_per_batch(self) -> int:
        """Rows of the next batch."""
        return self._session.models.batches.fitting("rows", rows_per_batch(self._session.config))

    def run(self, rows: Sequence[Row], pixels: PixelCells) -> Outputs:
        """The outputs of the models that see images, for one batch.

        ``pixels`` hold the cells of the rows. A batch that does not fit in the memory of the device is run in parts.
        Raises LayerFailure, and UserError if a single row does not fit.
        """
        if not self._seeing:
            return {}
        parts: list[Outputs] = []
        rest = rows
        while rest:
            part = rest[: self._session.models.batches.fitting("rows", len(rest))]
            what = f"{len(part)} rows, keys {part[0].key!r} to {part[-1].key!r}"
            finishes, shared = self._session.attempt(partial(self._encode, part, pixels, what))
            if isinstance(finishes, OutOfMemory):
                found = ((one, layer) for one in self._seeing for layer in one.layers if layer.name == finishes.layer)
                demand = next((one.demand(layer, len(part)) for one, layer in found), COPYING)
                self._session.halve(finishes, demand, len(part), shared)
            else:
                parts.append({name: output for finish in finishes for name, output in finish().items()})
                rest = rest[len(part) :]
        if len(parts) == 1:
            return parts[0]
        of_layers = {name: [part[name] for part in parts] for name in parts[0]}
        return {
            name: np.concatenate(of_parts) if isinstance(of_parts[0], np.ndarray) else [*itertools.chain(*of_parts)]
            for name, of_parts in of_layers.items()
        }

    def finish_group(self, rows: Sequence[Row]) -> Outputs:
        """The outputs of the models that see no images, for the rows of a row group."""
        return {name: output for one in self.encoders for name, output in one.encode_group(rows).items()}

    def _encode(self, rows: Sequence[Row], pixels: PixelCells, what: str, shared: bool) -> list[Callable[[], Outputs]]:
        """Start the outputs of rows that must fit."""
        prepared = [encoder.prepare(rows) for encoder in self._seeing]
        # The copies come first, on a stream of their own, while the other shard uses the accelerator.
        copied = self._put(rows, pixels, what) if shared else None
        with self._session.use_accelerator():
            batch, end = copied or self._put(rows, pixels, what)
            tensors = [*batch.whole.values(), *([] if batch.crops is None else [batch.crops])]
            self._session.models.accelerator.wait_for_copies(tensors)
            finishes = []
            for encoder, given in zip(self._seeing, prepared, strict=True):  # a comprehension would keep a failed batch
                finishes.append(encoder.encode(batch, given))
            return [*finishes, partial(self._wait_until_read, end, what)]

    def _wait_until_read(self, end: TimeMark, what: str) -> Outputs:
        """Wait for the copies of pixels, whose cells are written again afterwards; outputs may be waited for later."""
        with self._session.watch.stage(PREPARING, what):
            self._session.models.accelerator.wait_until(end)
        return {}

    def _put(self, rows: Sequence[Row], pixels: PixelCells, what: str) -> tuple[Batch, TimeMark]:
        """Copy the pixels of rows to the device, where they are after ``wait_for_copies`` -> also when all are read."""
        accelerator = self._session.models.accelerator
        cells = [row.cell for row in rows if row.cell is not None]
        crops = None
        with self._session.watch.stage(PREPARING, what), accelerator.copy_stream():
            if self.layout.crops is not None:
                assert pixels.crops is not None
                crops = accelerator.put_parts(runs(pixels.crops, cells)).flatten(0, 1)
            whole = {spec: accelerator.put_parts(runs(pixels.whole[spec], cells)) for spec in self.layout.whole}
            return Batch(rows, what, crops, whole), accelerator.mark()


def run_batches(
    threads: ThreadPoolExecutor,
    size: Callable[[], int],
    watch: LeaseWatch,
    rows: Iterable[Row],
    run: Callable[[list[Row]], _T],
    at_end: Callable[[list[Row]], _T],
) -> Iterator[tuple[list[Row], _T]]:
    """Yield each batch and what ``run`` returned for it, in order; at last no rows and what ``at_end`` returned.

    ``size`` returns the rows of the next batch, and ``watch`` receives when the shard waits for one. ``at_end``
    receives all rows and runs beside the last batch. While the consumer has one batch, at most one other is in work.
    """
    rows, seen, ended = iter(rows), list[Row](), False
    in_work: deque[tuple[list[Row], Future[_T]]] = deque()
    while not ended or in_work:
        if not ended:
            batch = list(itertools.islice(rows, size()))
            ended = not batch
            seen += batch
            in_work.append((batch, threads.submit(at_end, seen) if ended else threads.submit(run, batch)))
        if ended or len(in_work) == IN_WORK:
            batch, future = in_work.popleft()
            with watch.stage(WAITING):
                result = future.result()
            yield batch, result
