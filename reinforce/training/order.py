"""Which samples come when, as arithmetic on row counts: the state of a training's reading is the number of its step.

The row groups of a dataset, shuffled anew in every pass, make one long sequence of rows. It is cut into as many spans
of equal length as there are *streams*. A stream runs through its span of pass 0, of pass 1 and so on; inside a span,
rows are shuffled in windows of whole row groups. So of every stream any position is found by a few additions, without
having read what came before. A step takes equally many samples of every stream, and a rank reads its share of the
streams: the samples of a step depend on the number of streams, never on that of ranks or loader processes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from reinforce.seeds import Ints, permutation

#: Samples of a stream among which every dataset comes exactly by its weight.
TURNS = 10_000


def share(total: int, parts: int, part: int) -> int:
    """How many of the first ``total`` things go to ``part`` when ``parts`` take them by turns, the last one first.

    Over all parts they add up to ``total`` (Hermite's identity), and no two parts are more than one apart.
    """
    return (total + part) // parts


@dataclass(frozen=True)
class Chunk:
    """Rows ``first`` to ``stop`` of one row group: what of it lies in a span."""

    group: int
    first: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True)
class Window:
    """Some chunks of a span, and the order in which their rows come, counted through the chunks laid end to end."""

    epoch: int
    chunks: tuple[Chunk, ...]
    order: Ints
    skip: int  # rows of ``order`` that lie before the position that was asked for


class Order:
    """The order of one dataset's samples: a pure function of (seed, name, row counts, streams, window)."""

    def __init__(self, rows: Sequence[int] | Ints, seed: int, name: str, streams: int, window: int) -> None:
        """``rows`` [groups] are the rows of every row group, ``window`` about how many rows are shuffled together."""
        self.rows = np.asarray(rows, np.int64)
        self.total = int(self.rows.sum())
        if not self.total:
            raise ValueError("an order needs at least one row")
        self.seed, self.name, self.streams, self.window = seed, name, streams, window
        self._sequence = functools.lru_cache(maxsize=2)(self._shuffled)

    def windows(self, stream: int, position: int = 0) -> Iterator[Window]:
        """The endless windows of a stream from its ``position`` on, counted in samples."""
        epoch = ((position + 1) * self.streams - stream - 1) // self.total
        skip = position - self.before(stream, epoch)
        while True:
            yield from self._span(stream, epoch, skip)
            epoch, skip = epoch + 1, 0

    def before(self, stream: int, epoch: int) -> int:
        """Samples of a stream in the passes before this one."""
        return share(self.total * epoch, self.streams, stream)

    def span(self, stream: int, epoch: int) -> tuple[int, int]:
        """First row of a stream's span in the sequence of a pass, and the row behind its last."""
        lengths = [self.before(s, epoch + 1) - self.before(s, epoch) for s in range(stream + 1)]
        return sum(lengths[:-1]), sum(lengths)

    def _span(self, stream: int, epoch: int, skip: int) -> Iterator[Window]:
        """The windows of a span, without those that end before ``skip`` samples of it."""
        start = 0
        # Chunks that begin in the same stretch of `window` rows are a window, so no window depends on those before.
        for _, members in itertools.groupby(self._chunks(stream, epoch), key=lambda begin: begin[0] // self.window):
            chunks = tuple(chunk for _, chunk in members)
            length = sum(chunk.rows for chunk in chunks)
            if skip < start + length:
                order = permutation(length, self.seed, f"{self.name} window {stream} {epoch}", start)
                yield Window(epoch, chunks, order, max(0, skip - start))
            start += length

    def _chunks(self, stream: int, epoch: int) -> Iterator[tuple[int, Chunk]]:
        """The chunks of a span, each with the number of the span's rows before it."""
        first, stop = self.span(stream, epoch)
        groups, starts = self._sequence(epoch)
        for place in range(int(np.searchsorted(starts, first, side="right")) - 1, len(groups)):
            start, end = int(starts[place]), int(starts[place + 1])
            if start >= stop:
                break
            begin = max(start, first)
            yield begin - first, Chunk(int(groups[place]), begin - start, min(end, stop) - start)

    def _shuffled(self, epoch: int) -> tuple[Ints, Ints]:
        """Row groups in the order of a pass, without empty ones, and the first row of each [groups + 1]."""
        groups = permutation(len(self.rows), self.seed, f"{self.name} groups", epoch)
        groups = groups[self.rows[groups] > 0]
        return groups, np.concatenate([np.zeros(1, np.int64), np.cumsum(self.rows[groups])])


class Mixture:
    """Which dataset each sample of a stream comes from.

    Of every 10,000 samples each dataset gives its share, at least one, in a seeded order: so how many of each came
    before any position is known without drawing.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        exact = np.asarray(weights, np.float64) / np.sum(weights) * TURNS
        quota = np.maximum(1, np.floor(exact)).astype(np.int64)
        rest = TURNS - int(quota.sum())
        for dataset in np.argsort(quota - exact, kind="stable")[: max(0, rest)]:
            quota[dataset] += 1
        quota[int(np.argmax(quota))] += min(0, rest)  # what shares below one sample were given
        self.quota = quota
        self.seed = seed

    def before(self, stream: int, position: int) -> list[int]:
        """How many of the first ``position`` samples of a stream come from each dataset."""
        block, inside = divmod(position, TURNS)
        part = np.bincount(self._turns(stream, block)[:inside], minlength=len(self.quota)) if inside else 0
        return [int(count) for count in self.quota * block + part]

    def draws(self, stream: int, position: int) -> Iterator[int]:
        """The endless datasets of a stream from ``position`` on."""
        block, inside = divmod(position, TURNS)
        while True:
            yield from self._turns(stream, block)[inside:].tolist()
            block, inside = block + 1, 0

    def _turns(self, stream: int, block: int) -> Ints:
        turns = np.repeat(np.arange(len(self.quota)), self.quota)
        return turns[permutation(TURNS, self.seed, f"mixture {stream}", block)]
