"""The examples of one stream of one dataset, read ahead in windows."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter, deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.dataset.files.damage import drop_shard_command
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reading.aligned import AlignedShard, RowGroup, row_errors
from reinforce.dataset.reading.dataset import AlignedLayers
from reinforce.dataset.reading.sample import ImagePolicies
from reinforce.dataset.reading.samples import KeptGroups
from reinforce.errors import UserError
from reinforce.source.references import ChangedImages, ImageRoots
from reinforce.student.data.examples import (
    NO_CAPTION,
    Example,
    Examples,
    ExampleSpec,
    ReadLayer,
    SampleFile,
    find_stored,
    make_examples,
)
from reinforce.training.order import GroupChunk, Order, Window
from schemas import image_columns

#: Rows that are searched for a usable one before the training run fails.
_MAX_UNUSABLE_ROWS = 100_000
_SCANNERS = 16  # threads that look for null rows


class Target(NamedTuple):
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

    def load(self, chunk: GroupChunk, epoch: int, keep: bool = False) -> Examples:
        """Read a chunk's examples of one epoch; with ``keep``, its group may be kept for other chunks of it."""


@dataclass(frozen=True)
class StreamedDataset:
    """One dataset of a training run.

    ``policies`` decode its images and replay its augmentations, ``size`` is the side in pixels at which augmentations
    were recorded. ``groups`` int64 [row groups, 3] are the number of the shard, the place in its file and the rows.
    ``files`` is a hash of the names and sizes of the files of the samples. If ``layers`` are read through a view, row
    groups have only the rows that it keeps.
    """

    url: str
    weight: float
    layers: AlignedLayers
    spec: ExampleSpec
    targets: tuple[Target, ...]
    policies: ImagePolicies
    size: int
    shards: tuple[str, ...]
    groups: npt.NDArray[np.int64]
    roots: ImageRoots = field(default_factory=ImageRoots)
    files: str = ""
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

    def load(self, chunk: GroupChunk, epoch: int, keep: bool = False) -> Examples:
        """Read a chunk's examples of one epoch; with ``keep``, its row group is kept for other chunks of it.

        Raises UserError if files or images are missing or damaged.
        """
        number, place, rows = self.groups[chunk.group].tolist()
        shard = self.shards[number]

        def read_whole() -> dict[str, pa.Table]:
            with self._open(shard, place, rows) as group:
                return {layer: group.read(layer) for layer in self.layers.fingerprints}

        if keep and chunk.rows < rows:
            tables = self.kept.get((shard, place), read_whole)
            return self._make_examples(shard, tables[SAMPLES], tables.__getitem__, chunk, epoch)
        with self._open(shard, place, rows) as group:
            return self._make_examples(shard, group.samples, group.read, chunk, epoch)

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
                for _, place, rows in self.groups[ends[number] : ends[number + 1]].tolist():
                    group = self._checked(files, place, rows)

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

    @contextlib.contextmanager
    def _open(self, shard: str, place: int, rows: int) -> Iterator[RowGroup]:
        with self.layers.open(shard, whole=False) as layers:
            yield self._checked(layers, place, rows)

    def _checked(self, layers: AlignedShard, place: int, rows: int) -> RowGroup:
        group = layers.row_group(place)
        if group.samples.num_rows != rows:
            raise UserError(
                f"{self.url}: samples/{layers.shard}.parquet changed after the training started. Start it again."
            )
        return group

    def _make_examples(self, shard: str, samples: pa.Table, read: ReadLayer, chunk: GroupChunk, epoch: int) -> Examples:
        path, policies = self.layers.store.layer_path(SAMPLES, shard), self.policies
        file = SampleFile(path, policies.limits, policies.image, policies.augmentation, self.roots)
        try:
            with row_errors(path):
                found = make_examples(samples, read, chunk.first, chunk.stop, file, self.spec, epoch)
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
    later epochs. With ``apart`` None, an unusable row is replaced by the one half a window away, which is version 1 of
    the order.
    """

    def __init__(
        self,
        dataset: Streamed,
        order: Order,
        stream: int,
        position: int,
        pool: ThreadPoolExecutor,
        apart: int | None = 1,
    ) -> None:
        self.unusable: Counter[str] = Counter()  # unusable rows so far, by reason
        self._dataset, self._order, self._stream, self._pool, self._apart = dataset, order, stream, pool, apart
        self._chunks = ((window, chunk) for window in order.windows(stream, position) for chunk in window.chunks)
        self._pending: deque[tuple[Window, Future[Examples]]] = deque()
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
            waiting = self._replace_unusable([rows[row] for row in window.order.tolist()], window)[window.skip :]
            del rows
            self._rows_held -= window.skip
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

    def _replace_unusable(self, rows: list[Example | None], window: Window) -> list[Example]:
        usable = [row for row in rows if row is not None]
        if len(usable) == len(rows):
            return usable
        if self._apart is not None:
            if len(usable) < min(len(rows), self._apart):
                usable = self._with_later_ones(usable, window, window.start, self._apart)[: len(rows)]
            return list(itertools.islice(itertools.cycle(usable), len(rows)))
        usable = usable or self._with_later_ones([], window, 0, 1)[:1]
        before = np.cumsum([row is not None for row in rows]).tolist()
        return [row or usable[(b + len(usable) // 2) % len(usable)] for row, b in zip(rows, before, strict=True)]

    def _with_later_ones(self, usable: list[Example], window: Window, start: int, count: int) -> list[Example]:
        """``count`` or more distinct usable rows: those of a window, and of the stream from row ``start`` of its next
        epoch on. Fewer if eight windows do not have so many. Raises UserError if there seems to be none.
        """
        found = {(row.file.path, row.key): row for row in usable}
        searched, unusable = 0, Counter[str]()
        for later in self._order.windows(self._stream, self._order.before(self._stream, window.epoch + 1) + start):
            for chunk in later.chunks:
                examples = self._dataset.load(chunk, later.epoch, self._keep)
                for row in filter(None, examples.rows):
                    found.setdefault((row.file.path, row.key), row)
                searched += chunk.rows
                unusable.update(examples.unusable)
                if len(found) >= count or (found and searched >= 8 * len(window.order)):
                    return list(found.values())
            if searched >= min(_MAX_UNUSABLE_ROWS, 2 * self._order.total):
                break
        if found:  # fewer than a batch has
            return list(found.values())
        raise UserError(
            f"{self._dataset.url}: none of {searched:,} rows can be used ({', '.join(unusable)}). "
            f"{self._dataset.hint(unusable)}"
        )
