"""Batches of rows: how large they are, and two of a shard in work at a time.

A shard has two batches in work, one that runs and one that waits for its turn at the accelerator. A shard that came
back only after its batch has ended would find the accelerator taken by the younger shard. So two shards of one worker
would proceed alternately and end together, and the accelerator would wait for the first images of the next two.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from reinforce.config import Config
from reinforce.engine.decode.row import Row
from reinforce.engine.inference.batch_sizes import rows_per_batch
from reinforce.engine.messages.pulse import WAITING, LeaseWatch

IN_WORK = 2

_Result = TypeVar("_Result")


def rows_ahead(config: Config) -> int:
    """Rows of a shard that are decoded ahead of its batches in work."""
    return max(rows_per_batch(config), 2 * config.workers.cores)


def cells_per_shard(config: Config) -> int:
    """Pixel cells that a shard needs: for the rows ahead, the next one, and the batches in work."""
    return rows_ahead(config) + 1 + IN_WORK * rows_per_batch(config)


class Batches:
    """Runs batches of rows of one shard, in threads that end with the context.

    ``size`` returns the rows of the next batch, and ``watch`` receives when the shard waits for one.
    """

    def __init__(self, size: Callable[[], int], watch: LeaseWatch) -> None:
        self._size, self._watch = size, watch
        self._threads = ThreadPoolExecutor(IN_WORK, f"batches of {watch.shard}")

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def run(
        self, rows: Iterable[Row], run: Callable[[list[Row]], _Result], at_end: Callable[[list[Row]], _Result]
    ) -> Iterator[tuple[list[Row], _Result]]:
        """Yield each batch and what ``run`` returned for it, in order; at last no rows and what ``at_end`` returned.

        ``at_end`` receives all rows and runs beside the last batch. While the consumer has one batch, at most one
        other is in work.
        """
        rows, seen = iter(rows), list[Row]()
        in_work: deque[tuple[list[Row], Future[_Result]]] = deque()
        while batch := list(itertools.islice(rows, self._size())):
            seen += batch
            in_work.append((batch, self._threads.submit(run, batch)))
            if len(in_work) == IN_WORK:
                yield self._oldest(in_work)
        in_work.append(([], self._threads.submit(at_end, seen)))
        while in_work:
            yield self._oldest(in_work)

    def _oldest(self, in_work: deque[tuple[list[Row], Future[_Result]]]) -> tuple[list[Row], _Result]:
        batch, future = in_work.popleft()
        with self._watch.stage(WAITING):
            return batch, future.result()
