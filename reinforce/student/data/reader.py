"""The examples of one stream of one dataset, read ahead in windows."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from reinforce.config import Limits
from reinforce.dataset.aligned import AlignedLayers
from reinforce.dataset.layers import SAMPLES
from reinforce.errors import UserError
from reinforce.student.data.examples import Choice, Example, Examples, Origin, examples_of
from reinforce.training.order import Chunk, Order, Window

#: Rows that are looked at for a usable one before a dataset is given up.
_PATIENCE = 100_000

#: (teacher, ``image`` or kind of text) and dimension of every vector of an example, in their order.
Targets: TypeAlias = tuple[tuple[tuple[str, str], int], ...]


@dataclass(frozen=True)
class Corpus:
    """One dataset as it is streamed.

    ``policy`` is the one by which images become RGB, ``size`` the side in pixels that augmentations were recorded at.
    ``groups`` [row groups, 3] are the number of the shard, the place in its file and the rows.
    """

    url: str
    weight: float
    zip: AlignedLayers
    choice: Choice
    targets: Targets
    limits: Limits
    policy: str
    size: int
    shards: tuple[str, ...]
    groups: npt.NDArray[np.int64]

    @property
    def rows(self) -> int:
        return int(self.groups[:, 2].sum())

    def load(self, chunk: Chunk, epoch: int) -> Examples:
        """Read a chunk's examples of one pass. Raises UserError where files or images are missing or damaged."""
        number, place, rows = self.groups[chunk.group].tolist()
        shard = self.shards[number]
        with self.zip.open(shard, whole=False) as layers:
            group = layers.row_group(place)
            if group.samples.num_rows != rows:
                raise UserError(
                    f"{self.url}: samples/{shard}.parquet changed after the training began. Start it again."
                )
            origin = Origin(self.zip.store.layer_path(SAMPLES, shard), self.limits, self.policy)
            return examples_of(group.samples, group.read, chunk.first, chunk.stop, origin, self.choice, epoch)


class Reader:
    """Examples without an end, from a position of a stream on.

    Rows are read ahead in threads while fewer than a window of them are held: at most a window and a row group are in
    memory, each as its encoded image and its vectors in float32 (of 50 KB and 2 x 3 x 768 numbers, 4,096 rows are
    280 MB). A row that is not usable leaves its place to a usable one, half a window away.
    """

    def __init__(self, corpus: Corpus, order: Order, stream: int, position: int, pool: ThreadPoolExecutor) -> None:
        self.unusable: Counter[str] = Counter()  # rows passed over so far, by reason
        self._corpus, self._order, self._stream, self._pool = corpus, order, stream, pool
        self._coming = ((window, chunk) for window in order.windows(stream, position) for chunk in window.chunks)
        self._ahead: deque[tuple[Window, Future[Examples]]] = deque()
        self._held = 0
        self._fill()

    def __iter__(self) -> Iterator[Example]:
        while True:
            # All of the next window was submitted: its chunks before the last are fewer rows than may be held.
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
        """The first usable row of the passes that follow."""
        looked, unusable = 0, Counter[str]()
        for later in self._order.windows(self._stream, self._order.before(self._stream, window.epoch + 1)):
            for chunk in later.chunks:
                examples = self._corpus.load(chunk, later.epoch)
                found = next((row for row in examples.rows if row is not None), None)
                if found is not None:
                    return found
                looked += chunk.rows
                unusable.update(examples.unusable)
            if looked >= min(_PATIENCE, 2 * self._order.total):
                break
        raise UserError(
            f"{self._corpus.url}: of {looked:,} rows none can be used ({', '.join(unusable)}). Choose other `teachers` "
            "or `captioners` under `data`; `reinforce status` tells why rows are null."
        )
