"""The work of loader processes: examples in streams, read ahead in windows, and their pixels and tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset, get_worker_info

from reinforce.dataset.aligned import AlignedShard, RowGroup
from reinforce.dataset.index import drop_shard_command
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layer_file import row_errors
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reading import AlignedLayers
from reinforce.dataset.sample import ImagePolicies, KeptGroups
from reinforce.errors import UserError
from reinforce.images.backends import load_backend
from reinforce.images.device_records import CELL, CellRecord, fill_cell
from reinforce.images.policy import ImageRefused, decode
from reinforce.processes.children import SharedMemory
from reinforce.source.references import ChangedImages, ImageRoots
from reinforce.student.data.examples import (
    NO_CAPTION,
    Example,
    ExampleSpec,
    ReadLayer,
    ReplayedExamples,
    SampleFile,
    find_stored,
    make_examples,
)
from reinforce.terminal import plural
from reinforce.training.order import GroupChunk, Mixture, Order, Window, share
from schemas import Reason, image_columns
from schemas.seeds import Ints

_LOG = logging.getLogger(__name__)
_ALIGNMENT = 64  # bytes
#: Broken images in a row after which a training run fails.
_MOST_BROKEN = 100
#: Rows that are searched for a usable one before the training run fails.
_MAX_UNUSABLE_ROWS = 100_000
_SCANNERS = 16  # threads that look for null rows
#: Row groups that a process reads at a time: enough to hide the latency of an object store; each is in memory.
_READERS = 2

#: n texts -> int64 [n, context].
Tokenize = Callable[[Sequence[str]], torch.Tensor]
#: The example in place of one of a part, by its number and the number of the attempt.
Spare = Callable[[int, int], Example]
_Layout: TypeAlias = "tuple[str, tuple[int, ...]]"  # dtype and shape
_Pixels: TypeAlias = "list[tuple[np.ndarray, int]]"  # images [n, side, side, 3] and side in pixels


@dataclass(frozen=True)
class PartBuffers:
    """Memory for the large tensors of a part of n examples or, with leading dimensions, of many parts."""

    image: torch.Tensor  # uint8 [..., n, size, size, 3]
    crop: torch.Tensor  # uint8 [..., n, crop, crop, 3]; [..., n, 0, 0, 3] if there is none or it equals the image
    targets: tuple[torch.Tensor, ...]  # [..., n, *shape] of each target
    memory: SharedMemory | None = None  # that holds all of them; a process that is started with them maps it, too

    def select(self, *index: int | slice) -> PartBuffers:
        """The buffers at an index into the leading dimensions, sharing memory."""
        return PartBuffers(self.image[index], self.crop[index], tuple(target[index] for target in self.targets))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.memory is None:
            return PartBuffers, (self.image, self.crop, self.targets)
        arrays = [tensor.numpy() for tensor in (self.image, self.crop, *self.targets)]
        return _map_buffers, (self.memory, [(array.dtype.str, array.shape) for array in arrays])


def _map_buffers(memory: SharedMemory, layout: Sequence[_Layout]) -> PartBuffers:
    """Buffers of these dtypes and shapes in shared memory."""
    content, start, tensors = memory.array(), 0, []
    for (dtype, shape), size in zip(layout, _aligned_sizes(layout), strict=True):
        array = np.frombuffer(content, dtype, count=math.prod(shape), offset=start).reshape(shape)
        tensors.append(torch.from_numpy(array))
        start += size
    image, crop, *targets = tensors
    return PartBuffers(image, crop, tuple(targets), memory)


def _aligned_sizes(layout: Sequence[_Layout]) -> list[int]:
    """Bytes of each array, rounded up so that the next one is aligned."""
    return [-(-np.dtype(dtype).itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT for dtype, shape in layout]


class BatchPart(NamedTuple):
    """Some examples of a batch."""

    keys: list[str]
    buffers: PartBuffers | None  # None when it comes from a loader process, which has filled shared memory
    tokens: list[torch.Tensor]  # int64 [n, context] of each kind of text
    texts: list[tuple[str, ...]]  # for online teachers
    unusable: Counter[str]  # unusable rows since the last part, by reason
    records: Sequence[CellRecord] = ()  # of images that the device augments
    replaced: Sequence[str] = ()  # a line about each image that could not be decoded


@dataclass(frozen=True)
class PartMaker:
    """Makes parts with images of ``size`` x ``size`` pixels and the ``targets`` of each example.

    ``crop`` is the side in pixels of the images for online teachers, None if there are none. Translations of the
    student's images are scaled with their size, unless not ``scaled``. With ``replaces``, another example stands in
    for one whose image cannot be decoded, which is an error otherwise: a run has decoded each image of a dataset.
    With ``device``, images are cells for the augmentation backend ``device-1``.
    """

    size: int
    targets: tuple[TargetShape, ...]
    tokenize: Tokenize
    crop: int | None = None
    scaled: bool = True
    replaces: bool = False
    device: bool = False

    @property
    def sides(self) -> list[int]:
        """Sides of image and crop in pixels, 0 for what is not needed."""
        return [self.size * (CELL if self.device else 1), 0 if self.crop in (None, self.size) else self.crop or 0]

    def allocate(self, *rows: int, shared: bool = False) -> PartBuffers:
        """Buffers with leading dimensions ``rows``, the last of which is n.

        Pages of ``shared`` memory are reused instead of allocated anew.
        """
        layout: list[_Layout] = [("uint8", (*rows, side, side, 3)) for side in self.sides]
        layout += [(target.dtype, (*rows, *target.shape)) for target in self.targets]
        if shared:
            return _map_buffers(SharedMemory(sum(_aligned_sizes(layout))), layout)
        image, crop, *targets = [torch.from_numpy(np.empty(shape, dtype)) for dtype, shape in layout]
        return PartBuffers(image, crop, tuple(targets))

    def make(
        self, examples: list[Example], buffers: PartBuffers, unusable: Counter[str], spare: Spare | None = None
    ) -> BatchPart:
        """Make a part in ``buffers`` for at least as many examples.

        Raises UserError if an image cannot be decoded or does not fit its augmentation record.
        """
        buffers = buffers.select(slice(len(examples)))
        pixels = [(buffers.image.numpy(), self.size), (buffers.crop.numpy(), self.sides[1])]
        records: list[CellRecord] = []
        replaced: list[str] = []
        for i, example in enumerate(examples):
            try:
                if (record := self._draw(example, i, pixels)) is not None:
                    records.append(record)
            except (ImageRefused, ValueError, TypeError, OverflowError) as error:
                if self.replaces and spare is not None and isinstance(error, ImageRefused):
                    unusable[error.reason.value] += 1
                    replaced.append(f"{example.file.path}, key {example.key} is replaced by another example: {error}")
                    examples[i] = self._replace(i, pixels, partial(spare, i))
                    continue
                if isinstance(error, ImageRefused) and error.reason is Reason.IMAGE_PIXELS:
                    raise UserError(
                        f"{example.file.path}, key {example.key}: {error.detail}. If you trust the dataset, allow more "
                        "pixels: data.limits.pixels in a config, limits={'pixels': ...} in reinforce.open."
                    ) from error
                raise UserError(
                    f"{example.file.path}, key {example.key}: this is not the image that was augmented ({error}). "
                    "If images are stored by reference, restore the tar that was changed. Otherwise the file is "
                    "damaged: drop it (`reinforce drop DATASET samples --shard NAME --yes`) and run again."
                ) from error
        for number, target in enumerate(buffers.targets):
            np.stack([example.targets[number] for example in examples], out=target.numpy())
        texts = [example.texts for example in examples]
        tokens = [self.tokenize(of_kind) for of_kind in zip(*texts, strict=True)]
        keys = [example.key for example in examples]
        return BatchPart(keys, buffers, tokens, texts if self.crop else [], unusable, records, replaced)

    def _draw(self, example: Example, i: int, pixels: _Pixels) -> CellRecord | None:
        """Decode and augment the image of example ``i``, or return what the device is to do with it.

        Raises ImageRefused and what the replay raises.
        """
        record = example.augmentation
        if record is None:  # texts alone
            return None
        image = decode(example.image, example.file.limits, policy=example.file.policy)
        if callable(record):
            record = record(*image.size)
        if self.device:
            own = record if self.scaled else dataclasses.replace(record, size=self.size)
            return fill_cell(image, own, self.size, pixels[0][0][i])
        replay = load_backend(example.file.backend)
        for images, side in pixels:
            if side:
                own = record if self.scaled or images is not pixels[0][0] else dataclasses.replace(record, size=side)
                images[i] = replay(image, own, side)
        return None

    def _replace(self, i: int, pixels: _Pixels, spare: Callable[[int], Example]) -> Example:
        """Draw another example in place of number ``i``; those that cannot be decoded count when it is their turn."""
        for attempt in range(_MOST_BROKEN):
            example = spare(attempt)
            try:
                self._draw(example, i, pixels)
                return example
            except ImageRefused as refused:
                error = refused
        raise UserError(
            f"data: {_MOST_BROKEN} images in a row cannot be decoded, the last: {example.file.path}, key "
            f"{example.key}: {error}. Check the shards."
        ) from error


class TargetShape(NamedTuple):
    """A target of an example: ``batch["targets"][model][name]`` is its tensor [B, *shape]."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    below: int | None = None  # its values are indices below this number


class Streamed(Protocol):
    """What streams read: rows in groups. ``groups`` int64 [groups, n] have the rows of each as their last column."""

    @property
    def url(self) -> str: ...
    @property
    def weight(self) -> float: ...
    def hint(self, unusable: Collection[str]) -> str:
        """For messages: what to do where no row can be used, for these reasons."""

    @property
    def groups(self) -> npt.NDArray[np.int64]: ...

    def load(self, chunk: GroupChunk, epoch: int, keep: bool = False) -> ReplayedExamples:
        """Read a chunk's examples of one epoch; with ``keep``, its group may be kept for other chunks of it."""


@dataclass(frozen=True)
class StreamedDataset:
    """One dataset of a training run.

    ``policies`` decode its images and replay its augmentations, ``size`` is the side in pixels at which augmentations
    were recorded. ``groups`` int64 [row groups, 3] are the number of the shard, the place in its file and the rows.
    ``files`` is a hash of the names and sizes of the files of the samples. If ``layers`` are read through a view, row
    groups have only the rows that it keeps, and only those in ``masks``, which map a row group to bool [rows].
    """

    url: str
    weight: float
    layers: AlignedLayers
    spec: ExampleSpec
    targets: tuple[TargetShape, ...]
    policies: ImagePolicies
    size: int
    shards: tuple[str, ...]
    groups: npt.NDArray[np.int64]
    roots: ImageRoots = field(default_factory=ImageRoots)
    files: str = ""
    masks: Mapping[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    kept: KeptGroups = field(default_factory=KeptGroups, compare=False, repr=False)

    def hint(self, unusable: Collection[str]) -> str:
        if {*unusable} == {NO_CAPTION}:
            return (
                "Set data.captions to none to train the image tower by targets of images alone, with loss.lambda above "
                "0; or run a captioner on the dataset."
            )
        return (
            "Choose other models under `data`, or `captions: none` for images alone; `reinforce status` shows why rows "
            "are null."
        )

    @property
    def rows(self) -> int:
        return int(self.groups[:, 2].sum())

    def without_images(self) -> StreamedDataset:
        """The same examples with empty images, which are not read."""
        stored = {*image_columns("embed"), *image_columns("reference")}
        samples = tuple(name for name in self.layers.columns[SAMPLES] if name not in stored)
        layers = replace(self.layers, columns={**self.layers.columns, SAMPLES: samples})
        return replace(self, layers=layers, spec=replace(self.spec, pixels=False), kept=KeptGroups())

    def load(self, chunk: GroupChunk, epoch: int, keep: bool = False) -> ReplayedExamples:
        """Read a chunk's examples of one epoch; with ``keep``, its row group is kept for other chunks of it.

        Raises UserError if files or images are missing or damaged.
        """
        shard, place = self.shards[int(self.groups[chunk.group, 0])], int(self.groups[chunk.group, 1])

        def read_whole() -> dict[str, pa.Table]:
            with self.layers.open(shard, whole=False) as files:
                group = self._checked(files, chunk.group)
                return {layer: group.read(layer) for layer in self.layers.fingerprints}

        if keep and chunk.rows < self.groups[chunk.group, 2]:
            tables = self.kept.get((shard, place), read_whole)
            return self._make_examples(shard, tables[SAMPLES], tables.__getitem__, chunk, epoch)
        with self.layers.open(shard, whole=False) as files:
            group = self._checked(files, chunk.group)
            return self._make_examples(shard, group.samples, group.read, chunk, epoch)

    def leave_out_unusable(self) -> StreamedDataset:
        """The same dataset without the rows that lack what an example takes, of which a warning states the reasons.

        Raises UserError as ``find_stored``, and if no row is left.
        """
        usable, unusable = self.find_stored()
        if not unusable:
            return self
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in unusable.most_common())
        samples = plural(len(usable), "sample")
        if not usable.any():
            raise UserError(f"{self.url}: none of {samples} can be used ({reasons}). {self.hint(unusable)}")
        _LOG.warning(
            "%s: %s of %s cannot be used and are left out: %s", self.url, f"{(~usable).sum():,}", samples, reasons
        )
        of_groups = np.split(usable, np.cumsum(self.groups[:-1, 2]))
        masks = {number: mask for number, mask in enumerate(of_groups) if not mask.all()}
        groups = self.groups.copy()
        groups[:, 2] = [mask.sum() for mask in of_groups]
        files = hashlib.sha256(self.files.encode() + np.packbits(usable).tobytes()).hexdigest()[:16]
        return replace(self, groups=groups, masks=masks, files=files, kept=KeptGroups())

    def find_stored(self) -> tuple[npt.NDArray[np.bool_], Counter[str]]:
        """The rows [rows] that have all that an example takes, and counts of the others by reason.

        Texts are read, and of other layers the footers, and values where some are null. Raises UserError as ``load``.
        """
        spec = replace(self.spec, images=False)
        layers = replace(self.layers, columns=spec.columns("embed"))
        ends = np.searchsorted(self.groups[:, 0], np.arange(len(self.shards) + 1))

        def of_shard(number: int) -> list[tuple[npt.NDArray[np.bool_], dict[str, int]]]:
            found, shard = [], self.shards[number]
            with layers.open(shard, whole=False) as files, row_errors(f"{self.url}: shard {shard}"):
                for one in range(ends[number], ends[number + 1]):
                    group = self._checked(files, one)

                    def stored(layer: str, group: RowGroup = group) -> npt.NDArray[np.bool_]:
                        return group.stored(layer, str(kind_of(layer).values))

                    found.append(find_stored(group.samples, group.read, stored, spec, self.policies.limits))
            return found

        with ThreadPoolExecutor(_SCANNERS, "scanner") as pool:
            numbers = np.flatnonzero(np.diff(ends)).tolist()
            found = [one for of_groups in pool.map(of_shard, numbers) for one in of_groups]
        unusable = Counter[str]()
        for _, reasons in found:
            unusable.update(reasons)
        return np.concatenate([usable for usable, _ in found]), unusable

    def _checked(self, layers: AlignedShard, number: int) -> RowGroup:
        group = layers.row_group(int(self.groups[number, 1]))
        if group.samples.num_rows != len(self.masks.get(number, range(self.groups[number, 2]))):
            raise UserError(
                f"{self.url}: samples/{layers.shard}.parquet changed after the training started. Start it again."
            )
        return group

    def _make_examples(
        self, shard: str, samples: pa.Table, read: ReadLayer, chunk: GroupChunk, epoch: int
    ) -> ReplayedExamples:
        path, policies = self.layers.store.layer_path(SAMPLES, shard), self.policies
        file = SampleFile(path, policies.limits, policies.image, policies.augmentation, self.roots)
        rows: slice | Ints = slice(chunk.first, chunk.stop)
        if (mask := self.masks.get(chunk.group)) is not None:
            rows = np.flatnonzero(mask)[rows]
        try:
            with row_errors(path):
                found = make_examples(samples, read, rows, file, self.spec, epoch)
        except ChangedImages as error:
            drop = drop_shard_command(self.layers.store.url, [SAMPLES], shard)
            raise UserError(error.describe(drop)) from error
        shapes = [target.shape for target in self.targets]
        first = next(filter(None, found.rows), None)  # rows of one row group have the same shapes
        if first is not None and [array.shape for array in first.targets] != shapes:
            raise UserError(f"{path}: targets of the shard do not have the shapes in dataset.json. Restore it.")
        for place, target in enumerate(self.targets):
            if target.below is not None:
                values = [row.targets[place] for row in found.rows if row is not None]
                if values and not 0 <= np.min(values) <= np.max(values) < target.below:
                    raise UserError(
                        f"{self.url}: shard {shard} has {target.name} of {target.model} that are not from 0 to "
                        f"{target.below - 1:,}, as dataset.json states. `reinforce validate {self.url}` finds the file."
                    )
        return found


class DatasetReader:
    """Endless examples of one stream of a dataset, beginning at a position.

    Rows are read ahead in threads, the first window of every stream before others, while fewer are in memory than a
    window has and than the stream reads in an epoch. So at most as many and a row group are, each as its encoded image
    and its targets (with 50 KB and 2 x 3 x 768 numbers, 4,096 rows take 280 MB). Streams that read less than a
    window in an epoch read parts of the same row groups at about the same time: a process keeps these.

    In place of unusable rows, the usable ones of a window follow one another again, so copies are as far apart as they
    can be. A window with fewer than ``apart`` usable rows, those of the stream that are in one batch, takes more from
    later epochs.
    """

    def __init__(
        self,
        dataset: Streamed,
        order: Order,
        stream: int,
        position: int,
        pool: ThreadPoolExecutor,
        apart: int = 1,
    ) -> None:
        self.unusable: Counter[str] = Counter()  # unusable rows so far, by reason
        self._dataset, self._order, self._stream, self._pool, self._apart = dataset, order, stream, pool, apart
        self._chunks = ((window, chunk) for window in order.windows(stream, position) for chunk in window.chunks)
        self._pending: deque[tuple[Window, Future[ReplayedExamples]]] = deque()
        self._rows_held = 0
        epoch = -(-order.total // order.streams)  # rows of the stream
        self._most_rows, self._keep = min(order.window, epoch), epoch <= order.window
        self._read_ahead(len(next(order.windows(stream, position)).order))

    def __iter__(self) -> Iterator[Example]:
        while True:
            # All chunks of the next window are submitted: those before its last one have fewer rows than a window.
            window = self._pending[0][0]
            rows: list[Example | None] = []
            for _ in window.chunks:
                examples = self._pending.popleft()[1].result()
                rows += examples.rows
                self.unusable.update(examples.unusable)
            usable = [row for place in window.order.tolist() if (row := rows[place]) is not None]
            if len(usable) < min(window.stop, self._apart):
                usable = self._with_later_ones(usable, window)[: window.stop]
            waiting = list(itertools.islice(itertools.cycle(usable), window.stop))[window.skip :]
            self._rows_held -= len(rows) - len(waiting)
            del rows, usable
            waiting.reverse()
            while waiting:
                self._read_ahead(self._most_rows)
                self._rows_held -= 1
                yield waiting.pop()  # drops the reference: images take most of the memory
            self._read_ahead(self._most_rows)

    def _read_ahead(self, rows: int) -> None:
        while self._rows_held < rows:
            window, chunk = next(self._chunks)
            self._pending.append((window, self._pool.submit(self._dataset.load, chunk, window.epoch, self._keep)))
            self._rows_held += chunk.rows

    def _with_later_ones(self, usable: list[Example], window: Window) -> list[Example]:
        """``apart`` or more distinct usable rows: those of a window, and of the stream from its place in the next epoch
        on. Fewer if eight windows do not have so many; of other streams if it has none. Raises UserError if there seems
        to be none.
        """
        found = {(row.file.path, row.key): row for row in usable}
        order, searched, unusable = self._order, 0, Counter[str]()
        own = order.windows(self._stream, order.before(self._stream, window.epoch + 1) + window.start)
        others = (
            itertools.takewhile(
                lambda one: one.epoch == window.epoch, order.windows(other, order.before(other, window.epoch))
            )
            for other in range(order.streams)
            if other != self._stream
        )
        for windows in itertools.chain([own], others):
            searched += self._search(windows, found, unusable, 8 * len(window.order))
            if found:  # fewer than a batch has, perhaps
                return list(found.values())
            if searched >= _MAX_UNUSABLE_ROWS:
                break
        raise UserError(
            f"{self._dataset.url}: none of {min(searched, order.total):,} rows can be used ({', '.join(unusable)}). "
            f"{self._dataset.hint(unusable)}"
        )

    def _search(
        self, windows: Iterable[Window], found: dict[tuple[str, str], Example], unusable: Counter[str], few: int
    ) -> int:
        """Add the usable rows of windows to those that are ``found``, until these are ``apart``, or some after ``few``
        rows. Returns the number of rows that were searched.
        """
        rows, most = 0, min(_MAX_UNUSABLE_ROWS, 2 * self._order.total)
        for window in windows:
            for chunk in window.chunks:
                examples = self._dataset.load(chunk, window.epoch, self._keep)
                for row in filter(None, examples.rows):
                    found.setdefault((row.file.path, row.key), row)
                rows += chunk.rows
                unusable.update(examples.unusable)
                if len(found) >= self._apart or (found and rows >= few):
                    return rows
            if rows >= most:
                break
        return rows


@dataclass(frozen=True)
class StreamPlan:
    """What is streamed, the same on every rank. ``streams`` and ``window`` are those of the config."""

    datasets: Sequence[Streamed]
    maker: PartMaker
    seed: int
    streams: int
    window: int


class RankStream(IterableDataset[BatchPart]):
    """Parts of one rank's batches of ``batch`` samples, beginning with a step.

    Each of n loader processes reads every n-th stream of the rank and makes one part per step, so n consecutive parts,
    one from each process, are a batch; ``reinforce.training.order.places`` gives the order of its rows. The only state
    is the number of the next step; a loader that saves the state of its processes, such as torchdata's
    StatefulDataLoader, resumes exactly.

    With ``buffers`` [processes, depth, n], process p makes its part of step s in buffers (p, s mod depth).
    """

    def __init__(
        self, plan: StreamPlan, rank: int, ranks: int, batch: int, step: int = 0, buffers: PartBuffers | None = None
    ) -> None:
        self.plan, self.rank, self.ranks, self.batch, self.step = plan, rank, ranks, batch, step
        self.buffers = buffers

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def __iter__(self) -> Iterator[BatchPart]:
        info = get_worker_info()
        process, processes = (info.id, info.num_workers) if info else (0, 1)
        local = self.plan.streams // self.ranks
        batch = self.batch * self.ranks
        orders = make_orders(self.plan.datasets, self.plan.seed, self.plan.streams, self.plan.window, batch)
        pool = ThreadPoolExecutor(_READERS, "reader")
        apart = -(-self.batch // local)
        try:
            readers: dict[int, StreamReader] = {}
            for number in range(process, local, processes):
                stream, position = self.rank * local + number, share(self.batch * self.step, local, number)
                readers[number] = StreamReader(
                    self.plan.datasets, orders, self.plan.seed, stream, position, pool, apart
                )
            while True:
                examples: list[Example] = []
                drawn: list[tuple[StreamReader, int]] = []
                for number, reader in readers.items():
                    done, due = (share(self.batch * step, local, number) for step in (self.step, self.step + 1))
                    examples += [next(reader) for _ in range(due - done)]
                    drawn.append((reader, due - done))
                if self.buffers is None:
                    buffers = self.plan.maker.allocate(len(examples))
                else:
                    buffers = self.buffers.select(process, self.step % self.buffers.image.shape[1])
                unusable = sum((reader.take_unusable() for reader in readers.values()), Counter[str]())
                self.step += 1
                yield self.plan.maker.make(examples, buffers, unusable, partial(_spare, drawn))
        finally:
            pool.shutdown(cancel_futures=True)


def _spare(drawn: Sequence[tuple[StreamReader, int]], index: int, attempt: int) -> Example:
    """The example in place of number ``index`` of those drawn: of a later step, so that a batch has none twice."""
    for reader, count in drawn:
        if index < count:
            return reader.ahead(attempt * count + index)
        index -= count
    raise IndexError(index)


def make_orders(datasets: Sequence[Streamed], seed: int, streams: int, window: int, batch: int = 1) -> list[Order]:
    """The order of each dataset's samples; ``window`` is divided among the datasets by weight.

    An epoch of a lone dataset has whole batches of ``batch`` samples.
    """
    weights = [dataset.weight for dataset in datasets]
    windows = [max(1, round(window * weight / sum(weights))) for weight in weights]
    return [
        Order(dataset.groups[:, -1], seed, f"dataset {number}", streams, own_window, batch if len(datasets) == 1 else 1)
        for number, (dataset, own_window) in enumerate(zip(datasets, windows, strict=True))
    ]


class StreamReader:
    """Endless examples of one stream, drawn from all datasets by weight, beginning at a position.

    ``apart`` is that of ``DatasetReader``.
    """

    def __init__(
        self,
        datasets: Sequence[Streamed],
        orders: Sequence[Order],
        seed: int,
        stream: int,
        position: int,
        pool: ThreadPoolExecutor,
        apart: int = 1,
    ) -> None:
        mixture = Mixture([dataset.weight for dataset in datasets], seed)
        self._draws = mixture.draws(stream, position)
        self._readers = [
            DatasetReader(dataset, order, stream, start, pool, apart)
            for dataset, order, start in zip(datasets, orders, mixture.before(stream, position), strict=True)
        ]
        self._examples = [iter(reader) for reader in self._readers]
        self._ahead: deque[Example] = deque()

    def __next__(self) -> Example:
        return self._ahead.popleft() if self._ahead else next(self._examples[next(self._draws)])

    def ahead(self, distance: int) -> Example:
        """The example ``distance`` after the next one, which stays where it is."""
        while len(self._ahead) <= distance:
            self._ahead.append(next(self._examples[next(self._draws)]))
        return self._ahead[distance]

    def take_unusable(self) -> Counter[str]:
        """Unusable rows since the last call, by reason."""
        counts = Counter[str]()
        for reader in self._readers:
            counts.update(reader.unusable)
            reader.unusable.clear()
        return counts
