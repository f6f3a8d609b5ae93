"""The decode processes of a worker: chunks of encoded images in, records out, pixels in memory that they share.

Each row has a cell of that memory, and a batch is a set of cells. A process decodes, augments and fits the image of a
row into its cell.

A process that crashes, or takes too long for one image, is replaced. The image it was working on begins again in the
new process, and is refused if that happens ``attempts`` times. All others are decoded again. So neither the worker
and its models nor the shard are lost. The images of the oldest lease come first, so that two shards that begin together
do not end together.

``serve`` is the process, and ``ProcessHandle`` what its parent has of it. This module imports neither torch nor Ray, so
that the processes start fast and stay small.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import heapq
import itertools
import math
import mmap
import os
import pickle
import queue
import select
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL.Image import Image
from PIL.Image import new as new_image

from reinforce.config import Config
from reinforce.engine.pulse import LeaseWatch
from reinforce.images import policy as image
from reinforce.images.backends import Replayer, load_backend, sample_augmentation
from reinforce.images.policy import ImageRefused, decode, image_policy
from reinforce.images.records import Augmentation, Crop, from_records, to_records
from reinforce.labels.members import LabelValue, MemberReader, RowLabels, Unreadable
from reinforce.processes.children import (
    ProcessEnded,
    SharedMemory,
    connect_to_parent,
    describe_exit,
    start_process,
)
from reinforce.source.references import LostImage
from reinforce.source.samples import RawSample, Refusal, json_error, metadata_of
from schemas import Reason
from teachers.fit import fit
from teachers.protocols import ImageSpec

#: A row group is full at the first of these limits: rows, bytes of encoded images, and bytes of vectors at a nominal
#: width. Small enough to shuffle and to stream.
GROUP_ROWS = 1024
GROUP_BYTES = 32 * 2**20

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PixelCells:
    """Pixels by cell: ``crops`` uint8 [cells, K, S, S, 3] and, for each captioner's preprocessing, whole images uint8
    [cells, h, w, 3]."""

    crops: Bytes | None
    whole: Mapping[ImageSpec, Bytes] = field(default_factory=dict)

    @property
    def needed(self) -> bool:
        """Whether rows have pixels at all."""
        return self.crops is not None or bool(self.whole)

    def write(self, cell: int, image: Image, augmentations: Sequence[Augmentation], replay: Replayer) -> None:
        """Write the pixels of one RGB image, with the crops by ``replay``.

        Raises ValueError if an augmentation does not fit the image.
        """
        if self.crops is not None:
            for k, augmentation in enumerate(augmentations):
                self.crops[cell, k] = replay(image, augmentation)
        for spec, whole in self.whole.items():
            whole[cell] = fit(image, spec)


@dataclass(frozen=True)
class PixelLayout:
    """What the models of a lease need of each image: ``crops`` is (number, side in pixels) of the augmented images, or
    None, and ``whole`` are the preprocessings of whole images."""

    crops: tuple[int, int] | None
    whole: tuple[ImageSpec, ...] = ()

    @property
    def cell_bytes(self) -> int:
        return sum(map(math.prod, self._shapes()))

    def cells(self, memory: Bytes) -> PixelCells:
        """Arrays of as many cells as ``memory`` [bytes] holds, sharing it."""
        count = len(memory) // self.cell_bytes if self.cell_bytes else 0
        arrays, start = [], 0
        for shape in self._shapes():
            end = start + count * math.prod(shape)
            arrays.append(memory[start:end].reshape(count, *shape))
            start = end
        crops = None if self.crops is None else arrays.pop(0)
        return PixelCells(crops, dict(zip(self.whole, arrays, strict=True)))

    def _shapes(self) -> list[tuple[int, ...]]:
        crops = [] if self.crops is None else [(self.crops[0], self.crops[1], self.crops[1], 3)]
        return [*crops, *((spec.height, spec.width, 3) for spec in self.whole)]


class FreeCells:
    """The numbers of unused cells; the lowest are taken first, so that the rows of a batch are neighbours."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))  # a heap

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return heapq.heappop(self._free)

    def release(self, cells: Iterable[int]) -> None:
        for cell in cells:
            heapq.heappush(self._free, cell)


def runs(array: Bytes, cells: Sequence[int]) -> list[Bytes]:
    """Views of ``array`` [cells, ...] that together are its rows ``cells``, in order: one per run of neighbours."""
    breaks = [i for i in range(1, len(cells)) if cells[i] != cells[i - 1] + 1]
    bounds = [0, *breaks, len(cells)]
    return [array[cells[a] : cells[b - 1] + 1] for a, b in itertools.pairwise(bounds) if b > a]


_PLACEHOLDER_CROP = Crop(0, 0, 8, 8)


@dataclass(frozen=True)
class DecodeSpec:
    """How the images of a lease are decoded. The bytes from ``start`` to ``stop`` of the pixel memory are its cells;
    ``reader`` reads values of labels that are packed."""

    config: Config
    layout: PixelLayout
    start: int = 0
    stop: int = 0
    reader: MemberReader | None = None


@dataclass(frozen=True)
class StoredImage:
    """The encoded image of a row of the samples layer, or why it is lost, and its augmentations as dicts."""

    image: bytes | LostImage
    records: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Decoded:
    """What a decode process returns of a row; ``values`` are those of labels that it has read, by layer.

    ``records``, ``caption`` with ``more`` of them, ``metadata`` and the size in pixels are set for a sample of the
    source only; ``left_out`` lists its parts that are missing. ``joined`` is what joined its augmentations with labels,
    and ``unlabelled`` why labels are of another image, by their name. ``unreadable`` is set only for a row of the
    samples layer: why its referenced image can no longer be read; its pixels are black then.
    """

    values: Mapping[str, LabelValue] = field(default_factory=dict)
    caption: str | None = None
    metadata: str | None = None
    width: int = 0
    height: int = 0
    records: Sequence[Mapping[str, Any]] = ()
    left_out: tuple[Refusal, ...] = ()
    unreadable: Refusal | None = None
    more: Sequence[str] = ()
    joined: str | None = None
    unlabelled: Mapping[str, Refusal] = field(default_factory=dict)


#: What a decode process returns for a row; a text is that of an unexpected exception.
Outcome: TypeAlias = "Decoded | Refusal | str"
_NOTHING = Decoded()


@dataclass(eq=False)
class Row:
    """One row on its way from its encoded image through the models to the tables.

    ``sample`` is what is decoded: a sample of the source, which stays without its sidecars, or the image of a row of
    the samples layer. The pixels are in the ``cell`` of the lease, None where none are needed, and ``group`` numbers
    the row group. ``more`` are true captions besides ``caption``. ``labels`` are those of a sample of the source, or
    packed ones, and ``values`` what labels have of layers.
    """

    key: str
    caption: str | None = None
    cell: int | None = None
    group: int = 0
    sample: RawSample | StoredImage | None = None
    decoded: Decoded = _NOTHING
    more: Sequence[str] = ()
    labels: Sequence[RowLabels] = ()
    values: Mapping[str, LabelValue] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "values": {}}  # no decode process needs them

    @property
    def captions(self) -> list[str]:
        return [self.caption, *self.more] if self.caption else []

    @property
    def size(self) -> int:
        """Encoded bytes."""
        if self.sample is None:
            return 0
        sidecars = self.sample.sidecars.values() if isinstance(self.sample, RawSample) else ()
        return (0 if isinstance(self.sample.image, LostImage) else len(self.sample.image)) + sum(map(len, sidecars))

    @property
    def unreadable(self) -> Refusal | None:
        return self.decoded.unreadable

    def finish(self, decoded: Decoded) -> None:
        """Take what was decoded. What no table needs is released: memory is bounded by the images of a row group."""
        self.decoded = decoded
        if isinstance(self.sample, RawSample):
            self.caption, self.more = decoded.caption, decoded.more
            self.sample = replace(self.sample, sidecars={}, of_image={})
        else:
            self.sample = None
        for one in self.labels:
            values, why = {**one.values, **decoded.values}, decoded.unlabelled.get(one.name)
            found = one.values_of(self.key, self.captions, values) if why is None else dict.fromkeys(values, why)
            self.values = {**self.values, **found}
        self.labels = [RowLabels(one.name, joined=one.joined) for one in self.labels]


def decode_row(spec: DecodeSpec, cells: PixelCells, row: Row) -> Outcome:
    """Decode one row and write its pixels. A sample of the source that cannot be used gives its Refusal."""
    try:
        if isinstance(row.sample, RawSample):
            return _decode_new(spec, cells, row, row.sample)
        # Decode a row of the samples layer again. An image that cannot be used any more gives black pixels.
        config, values = spec.config, _unpacked(spec, row)
        if row.sample is None:
            return Decoded(values)
        augmentations: Sequence[Augmentation] = from_records(row.sample.records)
        unreadable = None
        try:
            if isinstance(row.sample.image, LostImage):
                raise ImageRefused(row.sample.image.reason, row.sample.image.detail)
            image = decode(row.sample.image, config.input.limits, policy=image_policy(config))
        except ImageRefused as refused:  # only a referenced image can change after it was accepted
            unreadable = Refusal(row.key, refused.reason, refused.detail)
            image = new_image("RGB", (config.augmentations.size,) * 2)
            augmentations = [replace(augmentation, crop=_PLACEHOLDER_CROP) for augmentation in augmentations]
        assert row.cell is not None
        cells.write(row.cell, image, augmentations, load_backend(config.augmentations.backend))
        return Decoded(values, unreadable=unreadable)
    except Exception as error:  # the parent raises it where the row's turn is
        return f"{type(error).__name__}: {error}"


def _decode_new(spec: DecodeSpec, cells: PixelCells, row: Row, raw: RawSample) -> Decoded | Refusal:
    """Decode a sample of the source, and draw its augmentations or take the published ones."""
    config, key = spec.config, row.key
    limits, policy = config.input.limits, config.augmentations
    try:
        image = decode(raw.image, limits, strict=True, policy=image_policy(config))
        width, height = image.size
        joined, records, unlabelled = _fit_labels(spec, row, width, height)
        augmentations = records or [
            sample_augmentation(policy, config.seed, key, k, width, height) for k in range(policy.count)
        ]
    except ImageRefused as refused:
        return Refusal(raw.key, refused.reason, refused.detail)
    except Unreadable as error:
        return Refusal(key, Reason.REINFORCEMENT_BROKEN, str(error))
    assert row.cell is not None
    cells.write(row.cell, image, augmentations, load_backend(policy.backend))
    fields = config.input.caption_fields
    metadata = metadata_of(raw.all_sidecars, config.input.metadata)
    captions = raw.captions(config.input)
    left_out = [*_left_out(config, raw, metadata)]
    if not captions and fields and min(len(raw.members), len(raw.columns or raw.members)) > 1:  # than an image
        left_out.append(Refusal(raw.key, Reason.NO_TEXT, raw.why_no_caption(fields)))
    return Decoded(
        _unpacked(spec, row),
        next(iter(captions), None),
        metadata,
        width,
        height,
        to_records(augmentations),
        tuple(left_out),
        more=captions[1:],
        joined=joined,
        unlabelled=unlabelled,
    )


def _fit_labels(
    spec: DecodeSpec, row: Row, width: int, height: int
) -> tuple[str | None, Sequence[Augmentation], Mapping[str, Refusal]]:
    """The identity that matched a sample to labels with augmentation records, these records for its image, and by name
    of labels why they are of another image. Raises Unreadable for labels without which it is no row."""
    joined: str | None = None
    records: Sequence[Augmentation] = ()
    unlabelled = {}
    for one in row.labels:
        try:
            if found := one.crops(spec.reader, width, height):
                records, joined = found, one.note(width, height)
        except Unreadable as error:
            if one.key is not None:
                raise
            unlabelled[one.name] = Refusal(row.key, Reason.NOT_REINFORCED, f"labels: {error}")
    return joined, records, unlabelled


def _unpacked(spec: DecodeSpec, row: Row) -> dict[str, LabelValue]:
    """The values of labels that are read here."""
    return {name: value for one in row.labels for name, value in one.unpacked(spec.reader, row.key).items()}


def _left_out(config: Config, raw: RawSample, metadata: str | None) -> Iterator[Refusal]:
    """The sidecars that the config reads and that this sample has, but that cannot be used."""
    fields = [field.partition(":") for field in config.input.caption_fields]
    of_metadata = set() if config.input.metadata == "none" else {"json"}
    for extension in sorted(of_metadata | {extension for extension, _, _ in fields}):
        if extension in raw.left_out:
            yield raw.left_out[extension]
    for extension in sorted(of_metadata | {extension for extension, is_json, _ in fields if is_json}):
        data = raw.all_sidecars.get(extension)
        if data is None or (extension == "json" and metadata is not None):
            continue
        fault = json_error(data)
        if fault is None and extension == "json" and config.input.metadata == "all":
            fault = "JSON that is nested too deeply to be written"
        if fault is not None:
            yield Refusal(raw.key, Reason.SIDECAR_BROKEN, f".{extension}: {fault}")


_READY = b"ready"

_KEPT_SPECS = 8
#: Chunks that a process has at a time: it begins the second without waiting for its parent.
DEPTH = 2
_START_SECONDS = 120.0
_KEPT_BYTES = 8 * 2**20  # of a message's memory; it grows with large images
#: What a process receives: the numbers of a chunk and of its lease, the pickled DecodeSpec of the lease, which is None
#: if the process has received it before, and the rows to be decoded.
_Message: TypeAlias = "tuple[int, int, bytes | None, Sequence[Row]]"


class StatusBoard:
    """Current work of each process, in shared memory: the chunk, 0 if it is idle, the number of its row among those
    sent, and since when.

    The parent reads it when a process has died or takes too long.
    """

    ENTRY_BYTES = 3 * 8

    def __init__(self, memory: SharedMemory) -> None:
        self._entries = memory.array().view(np.float64).reshape(-1, 3)

    def set(self, process: int, chunk: int, row: int) -> None:
        self._entries[process] = (chunk, row, time.monotonic())

    def get(self, process: int) -> tuple[int, int, float] | None:
        """Chunk, row and seconds of a process, or None if it is idle."""
        chunk, row, began = self._entries[process].tolist()
        return (int(chunk), int(row), time.monotonic() - began) if chunk else None


def serve(socket: int, parent: int, number: int, status: int, pixels: int, *messages: int) -> None:
    """Work until the parent is gone. ``number`` is the process's entry on the board; the rest are descriptors."""
    connection = connect_to_parent(socket, parent)
    warnings.filterwarnings("ignore", module="PIL")  # one line per image with odd metadata; refusals are recorded
    image.large_image_lock = _FileLock(pixels)
    board = StatusBoard(SharedMemory(descriptor=status))
    inbox = [SharedMemory(descriptor=descriptor) for descriptor in messages]
    memory = SharedMemory(descriptor=pixels)
    cells_of: dict[int, tuple[DecodeSpec, PixelCells]] = {}  # by lease, of the recent ones
    array = memory.array()
    gc.freeze()  # garbage collections skip all imported modules
    try:
        connection.send_bytes(_READY)
        while True:
            slot, length = np.frombuffer(connection.recv_bytes(), np.int64).tolist()
            message: _Message = pickle.loads(inbox[slot].read(length))  # noqa: S301 - from the parent
            chunk, lease, pickled, rows = message
            if pickled is not None:
                new: DecodeSpec = pickle.loads(pickled)  # noqa: S301 - from the parent
                if new.stop > len(array):
                    array = memory.array()
                cells_of[lease] = new, new.layout.cells(array[new.start : new.stop])
                for old in list(cells_of)[:-_KEPT_SPECS]:
                    del cells_of[old]
            spec, cells = cells_of[lease]
            outcomes = []
            for row_number, row in enumerate(rows):
                board.set(number, chunk, row_number)
                outcomes.append(decode_row(spec, cells, row))
            board.set(number, 0, 0)
            connection.send_bytes(pickle.dumps(outcomes, pickle.HIGHEST_PROTOCOL))
    except (EOFError, OSError):  # the parent is gone
        sys.exit(0)


class _FileLock:
    """A lock of all processes that have the descriptor. The kernel releases it when its holder dies."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1)

    def __exit__(self, *_: Any) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1)


class ProcessHandle:
    """A running decode process. ``number`` is its entry on the board in ``status``.

    Raises ProcessEnded if it does not start. Threads may share a handle only for ``kill``.
    """

    def __init__(self, number: int, status: SharedMemory, pixels: SharedMemory) -> None:
        self._messages = [SharedMemory() for _ in range(DEPTH)]
        self._sent = 0
        shared = [memory.descriptor for memory in (status, pixels, *self._messages)]
        self._process, self._connection = start_process(__name__, os.getpid(), number, *shared, descriptors=shared)
        self._poll = select.poll()
        self._poll.register(self._connection.fileno(), select.POLLIN)
        if not self._poll.poll(_START_SECONDS * 1000):
            self.kill()
        if self._receive() != _READY:
            raise ProcessEnded("it sent something unexpected at its start")

    def send(self, message: _Message) -> None:
        """Send a message; at most ``DEPTH`` may be without outcomes. ``receive`` reports a process that has died."""
        pickled = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        slot = self._sent % DEPTH
        self._sent += 1
        memory = self._messages[slot]
        if memory.size > max(_KEPT_BYTES, len(pickled)):
            memory.resize(0)
        memory.write(pickled)
        with contextlib.suppress(OSError):
            self._connection.send_bytes(np.array([slot, len(pickled)], np.int64).tobytes())

    def receive(self, seconds: float) -> list[Outcome] | None:
        """The outcomes of the oldest chunk, or None if there are none after ``seconds``. Raises ProcessEnded."""
        if not self._poll.poll(seconds * 1000):
            return None
        outcomes: list[Outcome] = pickle.loads(self._receive())  # noqa: S301 - from this project's process
        return outcomes

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Kill the process and release what it used."""
        self.kill()
        self._process.wait()
        self._connection.close()
        for memory in self._messages:
            memory.close()

    def _receive(self) -> bytes:
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            self.kill()
            status = self._process.wait()
            self.close()
            raise ProcessEnded(describe_exit(status)) from None


_MAX_LOOK_SECONDS = 1.0  # between two looks at what a busy process works on
STOPPED = "the decode processes were stopped"
_MAX_LOST_STARTS = 3  # deaths in a row of processes that had not begun an image


@dataclass(eq=False)
class RowChunk:
    """Rows of one lease that a decode process receives together; ``future`` has one outcome for each of them.

    After a process has died at a row, that row is sent again alone and first, and then all others without an outcome.
    """

    lease: CellLease
    rows: list[Row] = field(default_factory=list)
    number: int = field(default_factory=itertools.count(1).__next__)
    future: Future[list[Outcome]] = field(default_factory=Future)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)  # of processes that worked on a row
    sent: Sequence[int] = ()  # the rows that a process has now

    def send(self) -> list[Row]:
        """The rows that a process receives now."""
        left = [row for row in range(len(self.rows)) if row not in self.outcomes]
        self.sent = next(([row] for row in left if row in self.deaths), left)
        return [self.rows[row] for row in self.sent]

    def receive(self, outcomes: Iterable[Outcome]) -> bool:
        """Record the outcomes of the rows that were sent; returns whether all rows have one now."""
        self.outcomes.update(zip(self.sent, outcomes, strict=True))
        if len(self.outcomes) < len(self.rows):
            return False
        self.future.set_result([self.outcomes[row] for row in range(len(self.rows))])
        return True

    def fail(self, error: str | None = None) -> None:
        """End with a RuntimeError."""
        if not self.future.done():
            self.future.set_exception(RuntimeError(error or STOPPED))


@dataclass(eq=False)
class CellLease:
    """The pixel cells that one shard uses; ``spec`` is the pickled DecodeSpec of its rows."""

    number: int
    spec: bytes
    cells: PixelCells
    free: FreeCells
    pool: DecodePool
    watch: LeaseWatch


class DecodePool:
    """``processes`` decode processes. ``sample_seconds`` is the longest time for one image, ``attempts`` the number of
    deaths of its process after which an image is refused. ``finished`` counts the rows so far."""

    def __init__(self, processes: int, sample_seconds: float = 300.0, attempts: int = 2) -> None:
        self.sample_seconds, self.attempts = sample_seconds, attempts
        self.finished = 0  # approximate under threads; only its changes matter
        self.idle = 0
        self.closed = False
        self.chunks: queue.PriorityQueue[tuple[float, int, RowChunk | None]] = queue.PriorityQueue()
        self.status = SharedMemory(processes * StatusBoard.ENTRY_BYTES)
        self.pixels = SharedMemory(1)  # the byte that processes lock
        self._regions: list[tuple[int, Bytes]] = []  # start and memory of each region that no shard uses
        self._changing = threading.Lock()
        self._lease_numbers = itertools.count(1)
        self._servers = [_Server(self, number) for number in range(processes)]
        for server in self._servers:
            server.start()

    @property
    def processes(self) -> int:
        return len(self._servers)

    def wait_until_ready(self) -> None:
        """Wait until all processes run. Raises RuntimeError if one does not start."""
        for server in self._servers:
            server.ready.wait()
            if server.start_error is not None:
                raise RuntimeError(server.start_error)

    def allocate(self, size: int) -> Bytes:
        """Add a region of pixel memory of ``size`` bytes, which one shard at a time uses, and return it."""
        with self._changing:
            start = -(-self.pixels.size // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages can be locked for a device
            self.pixels.resize(start + size)
            region = self.pixels.array()[start:]
            self._regions.append((start, region))
            return region

    @contextlib.contextmanager
    def lease(self, spec: DecodeSpec, cells: int, watch: LeaseWatch | None = None) -> Iterator[CellLease]:
        """Cells for one shard, whose steps ``watch`` receives. No process uses them when the context ends."""
        size = cells * spec.layout.cell_bytes
        found: tuple[int, Bytes] | None = None
        while found is None:
            with self._changing:
                for number, (_, region) in enumerate(self._regions):
                    if len(region) >= size:
                        found = self._regions.pop(number)
                        break
            if found is None:
                self.allocate(size)
        start, region = found
        memory = region[:size]
        placed = replace(spec, start=start, stop=start + size)
        lease = CellLease(
            next(self._lease_numbers),
            pickle.dumps(placed, pickle.HIGHEST_PROTOCOL),
            spec.layout.cells(memory),
            FreeCells(cells),
            self,
            watch or LeaseWatch(),
        )
        try:
            yield lease
        finally:
            with self._changing:
                self._regions.append((start, region))

    def submit(self, chunk: RowChunk) -> Future[list[Outcome]]:
        with self._changing:
            if self.closed:
                raise RuntimeError(STOPPED)
            self.chunks.put((chunk.lease.number, chunk.number, chunk))
        return chunk.future

    def longest(self) -> str | None:
        """Key of the row that a process has worked on for the longest time, or None if none is in work."""
        working: list[tuple[float, str]] = []
        for server in self._servers:
            if (at := server.board.get(server.number)) is not None:
                number, row, seconds = at
                chunk = next((chunk for chunk in list(server.sent) if chunk.number == number), None)
                if chunk is not None and row < len(chunk.sent):  # it may have been sent again since
                    working.append((seconds, chunk.rows[chunk.sent[row]].key))
        return max(working, key=lambda one: one[0])[1] if working else None

    def next_chunk(self, wait: bool) -> RowChunk | None:
        """The next chunk. Without ``wait``, None if other processes have nothing to do and can take what there is."""
        while wait or self.chunks.qsize() > self.idle:
            with self._changing:
                self.idle += wait
            try:
                _, _, chunk = self.chunks.get(block=wait)
            except queue.Empty:
                return None
            finally:
                with self._changing:
                    self.idle -= wait
            if chunk is None or chunk.future.set_running_or_notify_cancel():
                return chunk
        return None

    def close(self) -> None:
        """Kill the processes. Futures that are not done get a RuntimeError."""
        with self._changing:
            self.closed = True
        for _ in self._servers:
            self.chunks.put((math.inf, 0, None))
        for server in self._servers:
            if (handle := server.handle) is not None:
                handle.kill()
            server.join()
        with contextlib.suppress(queue.Empty):
            while True:
                if (chunk := self.chunks.get_nowait()[2]) is not None:
                    chunk.fail()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(threading.Thread):
    """The thread that serves one process: starts and replaces it, sends it chunks and receives their outcomes.

    The kernel kills the process when this thread ends.
    """

    def __init__(self, pool: DecodePool, number: int) -> None:
        super().__init__(name=f"decode-{number}", daemon=True)
        self.pool, self.number = pool, number
        self.board = StatusBoard(pool.status)
        self.ready = threading.Event()
        self.start_error: str | None = None
        self.handle: ProcessHandle | None = None
        self._lost_starts = 0
        self._known: set[int] = set()  # leases whose spec the process has
        self._todo: deque[RowChunk] = deque()  # begun in a process that died
        self.sent: deque[RowChunk] = deque()
        self._hung: tuple[int, int] | None = None  # chunk and row at which the process was killed

    def run(self) -> None:
        self._start()
        self.ready.set()
        while not self.pool.closed:
            # Send chunks until the process has enough of them; wait for one if it has none.
            while len(self.sent) < DEPTH:
                chunk = self._todo.popleft() if self._todo else self.pool.next_chunk(wait=not self.sent)
                if chunk is None:
                    break
                self._send(chunk)
            if self.sent:
                self._receive()
        for chunk in [*self.sent, *self._todo]:
            chunk.fail()
        if self.handle is not None:
            self.handle.close()

    def _start(self) -> None:
        """Start the process; one that dies before it is ready, such as for lack of memory, is started again."""
        for _ in range(_MAX_LOST_STARTS):
            try:
                self.handle = ProcessHandle(self.number, self.pool.status, self.pool.pixels)
            except (ProcessEnded, OSError) as error:
                self.start_error = f"a decode process does not start: {error}"
            else:
                self.start_error = None
                return

    def _send(self, chunk: RowChunk) -> None:
        """Send a chunk to the process, which is started if there is none."""
        if self.handle is None:
            self._start()
        if self.handle is None:
            chunk.fail(self.start_error)
            return
        lease = chunk.lease
        spec = None if lease.number in self._known else lease.spec
        self._known.add(lease.number)
        self.sent.append(chunk)
        self.handle.send((chunk.number, lease.number, spec, chunk.send()))

    def _receive(self) -> None:
        assert self.handle is not None
        limit = self.pool.sample_seconds
        try:
            outcomes = self.handle.receive(min(_MAX_LOOK_SECONDS, limit / 4))
        except ProcessEnded as error:
            self._handle_death(str(error))
            return
        if outcomes is not None:
            chunk = self.sent.popleft()
            if not chunk.receive(outcomes):
                self._todo.appendleft(chunk)
            self.pool.finished += len(outcomes)
            self._lost_starts = 0
        elif (at := self.board.get(self.number)) is not None and at[2] > limit and self._hung is None:
            self._hung = at[:2]
            self.handle.kill()

    def _handle_death(self, ending: str) -> None:
        """Put what the process had not finished in front of the queue; another process is started for it."""
        at, hung = self.board.get(self.number), self._hung
        self.board.set(self.number, 0, 0)
        self._todo.extendleft(reversed(self.sent))
        guilty = next((chunk for chunk in self.sent if at is not None and chunk.number == at[0]), None)
        self.handle, self._hung = None, None
        self.sent.clear()
        self._known.clear()
        self.pool.finished += 1
        if at is None or guilty is None:
            self._lost_starts += 1
            if self._lost_starts >= _MAX_LOST_STARTS and self._todo:
                self._todo.popleft().fail(f"decode processes die before they begin an image: {ending}")
            return
        row = guilty.sent[at[1]]
        guilty.deaths[row] += 1
        if guilty.deaths[row] >= self.pool.attempts:
            guilty.sent = [row]
            reason, detail = Reason.IMAGE_CRASHED, f"the process that decoded it ended with {ending}"
            if hung == at[:2]:
                limit = f"failures.sample_seconds = {self.pool.sample_seconds:g}"
                reason, detail = Reason.IMAGE_HUNG, f"decoding took longer than {limit}"
            one = guilty.rows[row]
            key = one.sample.key if isinstance(one.sample, RawSample) else one.key  # the key in the source
            if guilty.receive([Refusal(key, reason, f"{detail}, {self.pool.attempts} times")]):
                self._todo.remove(guilty)
