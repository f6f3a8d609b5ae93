"""The examples of a rank as an endless torch IterableDataset: read ahead in windows, made into parts of batches."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from reinforce.augment import replay
from reinforce.config import Limits
from reinforce.dataset import Zip
from reinforce.errors import UserError
from reinforce.image import ImageRefused, decode
from reinforce.layers import SAMPLES
from reinforce.student.examples import Choice, Example, Examples, examples_of
from reinforce.student.order import Chunk, Mixture, Order, Window, share

#: Row groups that a process reads at a time: an object store answers late, but many at once.
_READERS = 4
#: Rows that are looked at for a usable one before a dataset is given up.
_PATIENCE = 100_000

Tokenize = Callable[[Sequence[str]], torch.Tensor]


@dataclass(frozen=True)
class Corpus:
    """One dataset as it is streamed. ``groups`` [row groups, 3]: number of the shard, place in its file, rows."""

    url: str
    zip: Zip
    choice: Choice
    limits: Limits
    shards: tuple[str, ...]
    groups: npt.NDArray[np.int64]
    weight: float
    size: int  # side in pixels that augmentations were recorded at
    targets: tuple[tuple[tuple[str, str], int], ...]  # ``Choice.targets`` with their dimensions

    def load(self, chunk: Chunk, epoch: int) -> Examples:
        """Read a chunk's examples of one pass. Raises UserError, and what the storage raises."""
        number, place, rows = self.groups[chunk.group].tolist()
        shard = self.shards[number]
        with self.zip.open(shard) as layers:
            tables = layers.read(place)
        if tables[SAMPLES].num_rows != rows:
            raise UserError(f"{self.url}: {SAMPLES}/{shard}.parquet changed after the training began. Start it again.")
        return examples_of(tables, chunk.first, chunk.stop, shard, self.choice, epoch)


class Reader:
    """The examples of one stream of one dataset from a position on, without an end.

    Rows are read ahead in threads while fewer than a window of them are held: at most a window and a row group are
    in memory. A row that is not usable leaves its place to a usable one, half a window away.
    """

    def __init__(self, corpus: Corpus, order: Order, stream: int, position: int, pool: ThreadPoolExecutor) -> None:
        self.unusable: Counter[str] = Counter()
        self._corpus, self._order, self._stream, self._pool = corpus, order, stream, pool
        self._coming = ((window, chunk) for window in order.windows(stream, position) for chunk in window.chunks)
        self._ahead: deque[tuple[Window, Future[Examples]]] = deque()
        self._held = 0
        self._fill()

    def __iter__(self) -> Iterator[Example]:
        while True:
            window = self._ahead[0][0]
            rows: list[Example | None] = []
            for _ in window.chunks:
                examples = self._ahead.popleft()[1].result()
                rows += examples.rows
                self.unusable.update(examples.unusable)
            waiting = self._completed([rows[row] for row in window.order.tolist()], window)[window.skip :]
            del rows
            self._held -= window.skip
            waiting.reverse()
            while waiting:
                self._fill()
                self._held -= 1
                yield waiting.pop()  # and forget it: its image is most of what is held
            self._fill()

    def _fill(self) -> None:
        while self._held < self._order.window:
            window, chunk = next(self._coming)
            self._ahead.append((window, self._pool.submit(self._corpus.load, chunk, window.epoch)))
            self._held += chunk.rows

    def _completed(self, rows: list[Example | None], window: Window) -> list[Example]:
        usable = [row for row in rows if row is not None] or [self._elsewhere(window)]
        if len(usable) == len(rows):
            return usable
        before = np.cumsum([row is not None for row in rows]).tolist()
        return [row or usable[(b + len(usable) // 2) % len(usable)] for row, b in zip(rows, before, strict=True)]

    def _elsewhere(self, window: Window) -> Example:
        """The first usable row of later passes."""
        looked, unusable = 0, Counter[str]()
        for later in self._order.windows(self._stream, self._order.before(self._stream, window.epoch + 1)):
            for chunk in later.chunks:
                examples = self._corpus.load(chunk, later.epoch)
                for row in examples.rows:
                    if row is not None:
                        return row
                looked += chunk.rows
                unusable.update(examples.unusable)
            if looked >= min(_PATIENCE, 2 * self._order.total):
                break
        raise UserError(
            f"{self._corpus.url}: none of {looked} rows can be used ({', '.join(unusable)}). Choose other `teachers` "
            "or `captioners` under `data`, or look into the dataset's quarantine."
        )


class Part(NamedTuple):
    """Examples of a batch as one loader process makes them: few, large tensors."""

    keys: list[str]
    image: torch.Tensor  # uint8 [n, size, size, 3]
    view: torch.Tensor | None  # uint8 [n, h, w, 3], as teachers saw it
    tokens: torch.Tensor  # int64 [kinds of text, n, context]
    vectors: torch.Tensor  # float32 [n, sum of dimensions]
    texts: list[tuple[str, ...]]
    unusable: dict[str, int]  # rows passed over on the way, by reason


@dataclass(frozen=True)
class Maker:
    """Makes pixels and tokens of examples. ``view``: side of what teachers see, None where none is in the loop."""

    size: int
    tokenize: Tokenize
    view: int | None = None

    def part(self, examples: Sequence[Example], limits: Sequence[Limits], unusable: dict[str, int]) -> Part:
        """Raises UserError where an image cannot be decoded, or is not the one that was augmented."""
        sizes = [self.size] if self.view in (None, self.size) else [self.size, self.view]
        images = [np.empty((len(examples), size, size, 3), np.uint8) for size in sizes]
        for i, (example, limit) in enumerate(zip(examples, limits, strict=True)):
            try:
                whole = decode(example.image, limit)
                for image, size in zip(images, sizes, strict=True):
                    image[i] = np.asarray(replay(whole, example.augmentation, size))
            except (ImageRefused, ValueError) as error:
                raise UserError(
                    f"{SAMPLES}/{example.shard}.parquet, key {example.key!r}: its image is not the one that was "
                    f"augmented ({error}). If it is kept by reference, the source tar has changed: restore it."
                ) from error
        pixels = [torch.from_numpy(image) for image in images]
        return Part(
            [example.key for example in examples],
            pixels[0],
            pixels[-1] if self.view else None,
            torch.stack([self.tokenize(texts) for texts in zip(*(e.texts for e in examples), strict=True)]),
            torch.from_numpy(np.stack([example.vectors for example in examples])),
            [example.texts for example in examples] if self.view else [],
            unusable,
        )


class Stream(IterableDataset[Part]):
    """One rank's parts of batches, endless; its state is the number of the next step.

    A loader process takes every n-th of the rank's streams, so n consecutive parts, one of each process, are a batch.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        maker: Maker,
        seed: int,
        streams: int,
        window: int,
        rank: int,
        ranks: int,
        batch: int,
        step: int = 0,
    ) -> None:
        self.corpora, self.maker, self.seed, self.window = corpora, maker, seed, window
        self.streams, self.rank, self.ranks, self.batch = streams, rank, ranks, batch
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def __iter__(self) -> Iterator[Part]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        local = self.streams // self.ranks
        weights = [corpus.weight for corpus in self.corpora]
        total = sum(weights)
        orders = [
            Order(
                c.groups[:, 2], self.seed, f"dataset {i}", self.streams, max(1, round(self.window * c.weight / total))
            )
            for i, c in enumerate(self.corpora)
        ]
        mixture = Mixture(weights, self.seed)
        with ThreadPoolExecutor(_READERS, "reader") as pool:
            readers: list[Reader] = []

            def lane(stream: int, position: int) -> Iterator[tuple[Example, Limits]]:
                before = mixture.before(stream, position)
                own = [
                    Reader(corpus, order, stream, start, pool)
                    for corpus, order, start in zip(self.corpora, orders, before, strict=True)
                ]
                readers.extend(own)
                examples = [iter(reader) for reader in own]
                return ((next(examples[d]), self.corpora[d].limits) for d in mixture.draws(stream, position))

            mine = range(worker, local, workers)
            lanes = {j: lane(self.rank * local + j, share(self.batch * self.step, local, j)) for j in mine}
            while True:
                step = self.step
                rows = [
                    next(lanes[j])
                    for j in mine
                    for _ in range(share(self.batch * (step + 1), local, j) - share(self.batch * step, local, j))
                ]
                unusable = Counter[str]()
                for reader in readers:
                    unusable.update(reader.unusable)
                    reader.unusable.clear()
                self.step += 1
                yield self.maker.part([example for example, _ in rows], [limit for _, limit in rows], dict(unusable))
