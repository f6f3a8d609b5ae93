"""Batches for the training loop: loader processes read streams, and their parts are assembled to batches.

A batch is in the format that the student's task reads. It is a plain mapping, so loaders can pin, slice and move it
without knowing its content. With B samples of a rank:

=================  ===========================  ==============================================================
``key``            list[str]                    sample keys
``image``          uint8 [B, size, size, 3]     one augmentation, replayed at the student's image size, RGB;
                   ..                           absent with ``images: none``
``records``        list[CellRecord]             with the backend ``device-1``, whose cells then are in ``image``
``caption``        int64 [B, context]           tokens of the true caption (with ``mixed``: of the picked one)
``synthetic``      int64 [B, context]           tokens of a synthetic caption; absent with ``mixed`` or no captioner
``targets``        {model: {name: [B, ...]}}    what is stored of each model: of a teacher, unit-norm vectors float32
                   ..                           [B, D] of ``image``, ``caption`` and ``synthetic``, as far as it has
                   ..                           them; see ``target_tensors`` of a kind of layers
``crops``          {teacher: uint8 [B, h, w, 3]}  the same augmentation at the recorded size; online teachers only
``texts``          {what: list[str]}            captions as text; online teachers only
=================  ===========================  ==============================================================
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import multiprocessing
import os
import weakref
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layers import model_of
from reinforce.errors import UserError
from reinforce.images.device_records import DEVICE_BACKEND
from reinforce.processes.attempts import prefetch
from reinforce.processes.children import exit_with_parent
from reinforce.processes.imports import without_main_module
from reinforce.settings import flatten
from reinforce.student.config import Data
from reinforce.student.data.datasets import Models, open_datasets
from reinforce.student.data.stream import (
    BatchPart,
    PartBuffers,
    PartMaker,
    RankStream,
    Streamed,
    StreamPlan,
    TargetShape,
    Tokenize,
)
from reinforce.training.order import places
from reinforce.training.ranks import share_from_first
from reinforce.training.task import Batch, Reading
from schemas.seeds import Ints
from teachers.redact import redact

T = TypeVar("T")
_Assembled: TypeAlias = "tuple[Batch, Counter[str]]"  # a batch, and the unusable rows since the last one, by reason
_LOG = logging.getLogger(__name__)
_MOST_NAMED = 10  # rows of a rank that were replaced


class BufferPool:
    """Arrays that are reused once nothing references them.

    Allocating new pages for a batch costs the kernel more time than copying the batch.
    """

    def __init__(self) -> None:
        self._arrays: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an uint8 array of the shape; tensors that share its memory keep it in use."""
        for number, (array, view_in_use) in enumerate(self._arrays):
            if view_in_use() is None and array.shape == shape:
                del self._arrays[number]
                break
        else:
            array = np.empty(shape, np.uint8)
        view = array.view()
        self._arrays.append((array, weakref.ref(view)))
        return view


@dataclass(frozen=True)
class Assembler:
    """Concatenates parts to batches, as described above. It copies, since part buffers are reused.

    ``kinds`` are the kinds of text, ``targets`` those of an example, ``online`` the online teachers. With ``pin``,
    batches are in pinned memory, from which a CUDA device copies asynchronously.
    """

    kinds: tuple[str, ...]
    targets: tuple[TargetShape, ...]
    online: tuple[str, ...]
    pin: bool
    _pool: BufferPool = field(default_factory=BufferPool)

    def assemble(self, parts: Sequence[BatchPart], buffers: Sequence[PartBuffers], places: Ints | None = None) -> Batch:
        """Concatenate the parts of a batch; ``buffers`` hold their images and targets and have the parts' lengths.

        ``places`` [B] are those in the batch of the concatenated rows, if they are in another order.
        """
        batch: dict[str, Any] = {"key": _chain([part.keys for part in parts], places)}
        if buffers[0].image.numel():
            batch["image"] = self._concatenate_images([of_part.image for of_part in buffers], places)
        if parts[0].records:
            batch["records"] = _chain([part.records for part in parts], places)
        for number, kind in enumerate(self.kinds):
            batch[kind] = self._concatenate([part.tokens[number] for part in parts], places)
        targets: dict[str, dict[str, torch.Tensor]] = {}
        for number, target in enumerate(self.targets):
            values = [of_part.targets[number] for of_part in buffers]
            targets.setdefault(target.model, {})[target.name] = self._concatenate(values, places)
        batch["targets"] = targets
        if self.online:
            crops, crop = [of_part.crop for of_part in buffers], batch["image"]
            if crops[0].numel():
                crop = self._concatenate_images(crops, places)
            batch["crops"] = dict.fromkeys(self.online, crop)
            texts = _chain([part.texts for part in parts], places)
            batch["texts"] = {kind: [row[number] for row in texts] for number, kind in enumerate(self.kinds)}
        return batch

    def _concatenate_images(self, images: Sequence[torch.Tensor], places: Ints | None) -> torch.Tensor:
        if self.pin:
            return self._concatenate(images, places)
        out = self._pool.array((sum(map(len, images)), *images[0].shape[1:]))
        if places is None:
            np.concatenate([image.numpy() for image in images], out=out)
            return torch.from_numpy(out)
        return _scatter(images, places, torch.from_numpy(out))

    def _concatenate(self, tensors: Sequence[torch.Tensor], places: Ints | None) -> torch.Tensor:
        shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
        out = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=self.pin)
        return torch.cat(list(tensors), out=out) if places is None else _scatter(tensors, places, out)


def _scatter(tensors: Sequence[torch.Tensor], places: Ints, out: torch.Tensor) -> torch.Tensor:
    """Copy the rows of tensors to their places in ``out``. NumPy does it at the speed of ``torch.cat``."""
    start, rows = 0, out.numpy()
    for tensor in tensors:
        rows[places[start : start + len(tensor)]] = tensor.numpy()
        start += len(tensor)
    return out


def _chain(lists: Iterable[Sequence[T]], places: Ints | None) -> list[T]:
    """The items of lists, each at its place."""
    items = [*itertools.chain.from_iterable(lists)]
    return items if places is None else [items[row] for row in np.argsort(places).tolist()]


class Streams(NamedTuple):
    """How a config reads in streams; see ``data`` of a student's config."""

    window: int = 4096
    streams: int | None = None
    workers: int | None = None
    prefetch: int = 4


class StreamFeed:
    """Batches from datasets that are read in streams; see ``reinforce.training.order``.

    ``config`` states how they are read, ``samples`` counts those of an epoch, ``files`` describes the files that are
    read. Subclasses add ``data``, and may change batches.
    """

    data: dict[str, Any]

    def __init__(
        self,
        config: Streams,
        seed: int,
        datasets: Sequence[Streamed],
        maker: PartMaker,
        assembler: Assembler,
        samples: int,
        files: str,
    ) -> None:
        self._config, self._seed, self._datasets = config, seed, datasets
        self._maker, self._assembler, self._files = maker, assembler, files
        self.samples = samples
        self._reading: Reading | None = None
        self._named: set[str] = set()

    def set_up(self, ranks: int, batch: int, loaders: int, streams: int | None = None) -> Reading:
        """See ``reinforce.training.task.Feed`` and ``plan_reading``."""
        reading = plan_reading(self._config, ranks, batch, loaders, streams)
        rows = sum(int(dataset.groups[:, -1].sum()) for dataset in self._datasets)
        if rows < ranks * batch:
            few = f"a batch of {ranks * batch:,} has samples more than once: {rows:,} can be used. Lower train.batch."
            reading = replace(reading, notes=(*reading.notes, few))
        self._reading = replace(reading, files=self._files)
        return self._reading

    def batches(self, rank: int, ranks: int, batch: int, start: int) -> Generator[Batch]:
        """See ``reinforce.training.task.Feed``. Raises UserError for damaged data and for numbers that do not fit.

        The number of the step is all the state there is, so a plain DataLoader resumes exactly.
        """
        reading = self._reading or plan_reading(self._config, ranks, batch, 1)
        processes, streams = max(1, reading.loaders), reading.streams
        assert streams is not None
        if streams % (ranks * processes):
            raise UserError(
                f"data.streams ({streams}) must be a multiple of ranks x data.workers ({ranks} x {processes})."
            )
        if batch < processes:
            raise UserError(f"data.workers ({processes}) must be at most the batch of a rank ({batch}).")
        plan = StreamPlan(self._datasets, self._maker, self._seed, streams, self._config.window)
        stream = RankStream(plan, rank, ranks, batch, start)
        batches = self._read_here(stream)
        if reading.loaders:
            batches = _made_in_thread(self._read_in_workers(stream, processes))
        unusable, samples = Counter[str](), start * batch * ranks
        with contextlib.closing(batches):
            for assembled, new_unusable in batches:
                unusable.update(new_unusable)
                epoch, samples = samples // self.samples, samples + batch * ranks
                if unusable and samples // self.samples > epoch:
                    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in unusable.most_common())
                    _LOG.warning("epoch %d, rank %d: unusable rows that were replaced: %s", epoch + 1, rank, reasons)
                    unusable.clear()
                yield assembled

    def _read_here(self, stream: RankStream) -> Generator[_Assembled]:
        """Read in this process."""
        stream.buffers = self._maker.allocate(1, 1, stream.batch)
        for part in stream:
            assert part.buffers is not None
            yield self._assemble([part], [part.buffers])

    def _read_in_workers(self, stream: RankStream, processes: int) -> Generator[_Assembled]:
        """Read in loader processes, which make their parts in shared memory."""
        start = stream.step
        # While the parts of one step are assembled, a process is at most `prefetch` steps ahead of them.
        depth, rows = self._config.prefetch + 1, -(-stream.batch // processes)
        buffers = stream.buffers = self._maker.allocate(processes, depth, rows, shared=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["reinforce.student.data.preloaded"])
        loader: DataLoader[BatchPart | UserError] = DataLoader(
            _WorkerStream(stream),
            batch_size=None,
            collate_fn=_identity,
            num_workers=processes,
            prefetch_factor=self._config.prefetch,
            # A fork of this process would copy locks of threads that do not exist in it (Ray's, s3fs's).
            multiprocessing_context=context,
            worker_init_fn=partial(_init_worker, dict(os.environ)),
        )
        with without_main_module():
            received = iter(loader)  # starts the processes
        for step in itertools.count(start):
            parts = []
            for _ in range(processes):
                part = next(received)
                if isinstance(part, UserError):
                    raise part
                parts.append(part)
            filled = [buffers.select(p, step % depth, slice(len(part.keys))) for p, part in enumerate(parts)]
            of_rows = places(stream.batch, step, stream.plan.streams // stream.ranks, processes)
            yield self._assemble(parts, filled, of_rows)

    def _assemble(
        self, parts: Sequence[BatchPart], buffers: Sequence[PartBuffers], rows: Ints | None = None
    ) -> _Assembled:
        """Make a batch of the parts of all processes, and name the first rows that were replaced."""
        for line in itertools.chain.from_iterable(part.replaced for part in parts):
            if len(self._named) < _MOST_NAMED and line not in self._named:
                self._named.add(line)
                _LOG.warning("%s", line)
        return self._assembler.assemble(parts, buffers, rows), sum((part.unusable for part in parts), Counter())


class StudentFeed(StreamFeed):
    """Batches from reinforced datasets, in the format of ``reinforce.student.data.feed``.

    ``size`` is the side of the student's images in pixels. ``models`` are those whose stored targets are read, by
    their section in dataset.json, by default ``data.teachers``; for the teachers in ``online``, batches have ``crops``
    and ``texts``. ``pin`` puts batches into pinned memory. ``rows`` counts the samples of the datasets, ``samples``
    those of an epoch; ``data`` has the models, the captioners with their weights, and the fingerprints of the layers
    that are read. Raises UserError if a dataset is incomplete, damaged, or does not fit the others.
    """

    def __init__(
        self,
        data: Data,
        seed: int,
        size: int,
        tokenize: Tokenize,
        models: Models | None = None,
        online: Sequence[str] = (),
        pin: bool = False,
    ) -> None:
        # Listing 190,000 shards in eight layers takes 1,500 requests: one rank makes them for all.
        datasets = share_from_first(lambda: open_datasets(data, seed, models, leave_out=True))
        spec, targets = datasets[0].spec, datasets[0].targets
        crop = max(dataset.size for dataset in datasets) if online else None
        self.rows: int = sum(dataset.rows for dataset in datasets)
        size = size if spec.images else 0
        scaled, device = data.translations != "stored", data.backend == DEVICE_BACKEND
        super().__init__(
            Streams(data.window, data.streams, data.workers, data.prefetch),
            seed,
            datasets,
            PartMaker(size, targets, tokenize, crop, scaled, device=device),
            Assembler(spec.kinds, targets, tuple(online), pin),
            data.samples or self.rows,
            files=" ".join(dataset.files for dataset in datasets),
        )
        read: dict[str, Any] = {}
        for layer, _ in spec.targets:
            read.setdefault(kind_of(layer).section or "", {})[model_of(layer)] = None
        read = {"teachers": [], **{section: [*names] for section, names in read.items()}}
        read["captioners"] = {name: w for dataset in datasets for name, w in dataset.spec.captioners.items()}
        self.data = dict(flatten(read, "data."))
        for dataset in datasets:
            self.data |= flatten(dataset.layers.fingerprints, f"{redact(dataset.url)}: ")
            if (chosen := dataset.layers.view) is not None:
                self.data[f"{redact(dataset.url)}: view {chosen.name}"] = chosen.fingerprint


class _WorkerStream(IterableDataset[Any]):
    """A stream as a loader process sends it: parts without their buffers, and a UserError as the last item.

    A DataLoader would wrap a raised error into its own traceback.
    """

    def __init__(self, stream: RankStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[BatchPart | UserError]:
        try:
            for part in self._stream:
                yield part._replace(buffers=None)
        except UserError as error:
            yield error


def _identity(item: T) -> T:
    return item


def _init_worker(environment: Mapping[str, str], _: int) -> None:
    """Set up a loader process."""
    os.environ.update(environment)  # a fork server has the environment of its own start
    gc.freeze()  # garbage collections skip all imported modules
    exit_with_parent()  # torch only watches the process that forked this one, the fork server


def _made_in_thread(items: Generator[T]) -> Generator[T]:
    """Yield endless items; a thread makes the next one while the consumer uses the last."""
    with contextlib.closing(items), ThreadPoolExecutor(1, "batches") as pool:
        yield from prefetch(pool, lambda _: next(items), itertools.count(), 1)


def plan_reading(data: Streams, ranks: int, batch: int, loaders: int, recorded: int | None = None) -> Reading:
    """Choose loader processes and streams for ranks with ``batch`` samples per step each.

    Set values of ``data.workers`` and ``data.streams`` are used unchanged. Otherwise ``loaders`` suits the machine, and
    a stream is read by one process. The order of samples depends on the streams: a training run that resumes keeps
    those that its checkpoint ``recorded``.
    """
    if data.workers is not None:
        workers, parts = data.workers, ranks * max(1, data.workers)
        streams = data.streams or (recorded if recorded and recorded % parts == 0 else parts)
    else:
        wanted = min(batch, loaders)
        streams = data.streams or recorded or ranks * wanted
        local = streams // ranks  # of a rank, which its workers divide
        workers = (
            next(n for n in range(min(local, wanted), 0, -1) if local % n == 0) if streams % ranks == 0 else wanted
        )
        if data.streams is None and streams % ranks:
            streams = ranks * workers
    text = f"{workers} loader process{'es' * (workers > 1)}" if workers else "no loader process"
    notes: tuple[str, ...] = ()
    if recorded not in (None, streams):
        notes = (
            f"the order of samples changes at this step: the checkpoint's {recorded} streams cannot be shared by "
            f"{ranks} x {max(1, workers)} loader processes. To continue exactly, set train.compute.ranks x "
            f"data.workers to a divisor of {recorded}.",
        )
    return Reading(workers, text, streams, notes)
