"""The order of samples, as arithmetic on row counts: the only state of a reader is the number of its step.

A dataset has G row groups of n_g rows, N = sum_g n_g in total. In every epoch the row groups are shuffled and
concatenated into one sequence of N rows, which is cut into S equal *spans*, one for each of the S *streams*. Stream s
reads its span of epoch 0, then its span of epoch 1, and so on. Inside a span, rows are shuffled in windows of whole row
groups, of about ``window`` rows. An epoch has M samples: the whole batches of all ranks that N rows give, so that no
batch has rows of two epochs, and of each span the last rows after the shuffle are left out; M = N if batches are not
known. The number of samples of stream s before epoch e is

    before(s, e) = floor((M * e + s) / S)

so any position of any stream is found with a few additions, without reading what comes before it. In every step each
stream contributes the same number of samples (up to one), and a rank reads S / ranks of the streams. Where S divides
the batch, the samples of a step depend on the number of streams, not on the number of ranks or loader processes.

A rank's batch has the samples of its streams one after the other, whichever processes read them, see ``places``.

All shuffles are permutations seeded from (seed, dataset, purpose, epoch, stream), see ``schemas.seeds``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from schemas.seeds import Ints, permutation

#: Samples of a stream among which every dataset of a mixture has exactly its share.
BLOCK = 10_000


def share(total: int, parts: int, part: int) -> int:
    """floor((total + part) / parts): how many of ``total`` items ``part`` gets when ``parts`` divide them.

    Over all parts they add up to ``total`` (Hermite's identity), and no two parts differ by more than one.
    """
    return (total + part) // parts


def places(batch: int, step: int, streams: int, processes: int) -> Ints | None:
    """Places [batch] in a rank's batch of the rows that its loader processes read, one process after the other.

    Process p of n reads streams p, p + n, ... of a rank's ``streams``. The batch has the rows of the streams by the
    number of the stream. None if the rows are read in this order.
    """
    numbers = np.arange(streams)
    read = np.argsort(numbers % processes, kind="stable")
    if np.array_equal(read, numbers):
        return None
    rows = (batch * (step + 1) + numbers) // streams - (batch * step + numbers) // streams
    rows, starts = rows[read], (np.cumsum(rows) - rows)[read]
    return np.repeat(starts - (np.cumsum(rows) - rows), rows) + np.arange(batch)


@dataclass(frozen=True)
class GroupChunk:
    """Rows ``first`` to ``stop`` (exclusive) of row group ``group``: the intersection of the group and a span."""

    group: int
    first: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True)
class Window:
    """Consecutive chunks of a span, after ``start`` rows of it, whose rows are shuffled together.

    ``order`` [rows] is a permutation of the rows of the concatenated chunks. The first ``skip`` entries come before the
    requested position, and those from ``stop`` on are left out in this epoch.
    """

    epoch: int
    chunks: tuple[GroupChunk, ...]
    order: Ints
    skip: int
    stop: int
    start: int


class Order:
    """The order of one dataset's samples: a pure function of (seed, name, row counts, streams, window, batch)."""

    def __init__(
        self, rows: Sequence[int] | Ints, seed: int, name: str, streams: int, window: int, batch: int = 1
    ) -> None:
        """``rows`` [groups] are the row counts of the row groups, ``window`` about how many rows are shuffled together,
        ``batch`` the samples of a step, which all are of this dataset.

        Raises ValueError if there is no row.
        """
        self.rows = np.asarray(rows, np.int64)
        self.total = int(self.rows.sum())
        if not self.total:
            raise ValueError("an order needs at least one row")
        self.samples = self.total // batch * batch or self.total  # of an epoch
        self.seed, self.name, self.streams, self.window = seed, name, streams, window
        self._sequence = functools.lru_cache(maxsize=2)(self._shuffled_groups)

    def windows(self, stream: int, position: int = 0) -> Iterator[Window]:
        """Endless windows of a stream, beginning with the one that holds its sample number ``position``."""
        epoch = ((position + 1) * self.streams - stream - 1) // self.samples
        skip = position - self.before(stream, epoch)
        while True:
            start, stop = 0, self.before(stream, epoch + 1) - self.before(stream, epoch)
            # Chunks are grouped by where they begin, in intervals of `window` rows: no window depends on those before.
            for _, members in itertools.groupby(self._chunks(stream, epoch), key=lambda begin: begin[0] // self.window):
                chunks = tuple(chunk for _, chunk in members)
                length = sum(chunk.rows for chunk in chunks)
                if start < stop and skip < start + length:
                    order = permutation(length, self.seed, f"{self.name} window {stream} {epoch}", start)
                    yield Window(epoch, chunks, order, max(0, skip - start), min(length, stop - start), start)
                start += length
            epoch, skip = epoch + 1, 0

    def before(self, stream: int, epoch: int) -> int:
        """Number of samples of a stream before an epoch: floor((M * epoch + stream) / streams)."""
        return share(self.samples * epoch, self.streams, stream)

    def span(self, stream: int, epoch: int) -> tuple[int, int]:
        """First row and end (exclusive) of a stream's span in the sequence of an epoch."""
        left_out = self.total - self.samples
        lengths = [
            self.before(s, epoch + 1) - self.before(s, epoch) + share(left_out, self.streams, s)
            for s in range(stream + 1)
        ]
        return sum(lengths[:-1]), sum(lengths)

    def _chunks(self, stream: int, epoch: int) -> Iterator[tuple[int, GroupChunk]]:
        """The chunks of a span, each with the number of rows of the span before it."""
        first, stop = self.span(stream, epoch)
        groups, starts = self._sequence(epoch)
        for place in range(int(np.searchsorted(starts, first, side="right")) - 1, len(groups)):
            start, end = int(starts[place]), int(starts[place + 1])
            if start >= stop:
                break
            begin = max(start, first)
            yield begin - first, GroupChunk(int(groups[place]), begin - start, min(end, stop) - start)

    def _shuffled_groups(self, epoch: int) -> tuple[Ints, Ints]:
        """Non-empty row groups [g] in the order of an epoch, and the first row of each in its sequence [g + 1]."""
        groups = permutation(len(self.rows), self.seed, f"{self.name} groups", epoch)
        groups = groups[self.rows[groups] > 0]
        return groups, np.concatenate([np.zeros(1, np.int64), np.cumsum(self.rows[groups])])


class Mixture:
    """Dataset of each sample of a stream, by weight.

    Every block of 10,000 samples has a fixed quota of each dataset (its rounded share, at least one) in a seeded order,
    so the number of samples of each dataset before any position is known without drawing.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """``weights`` [datasets] are relative. ``quota`` [datasets] are the samples of each dataset in a block."""
        exact = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
        quota = np.maximum(1, np.floor(exact)).astype(np.int64)
        rest = BLOCK - int(quota.sum())
        for dataset in np.argsort(quota - exact, kind="stable")[: max(0, rest)]:
            quota[dataset] += 1
        quota[int(np.argmax(quota))] += min(0, rest)  # minus what datasets with a share below one sample got
        self.quota = quota
        self.seed = seed

    def before(self, stream: int, position: int) -> list[int]:
        """Counts of the first ``position`` samples of a stream by dataset."""
        block, inside = divmod(position, BLOCK)
        part = np.bincount(self._block(stream, block)[:inside], minlength=len(self.quota)) if inside else 0
        return [int(count) for count in self.quota * block + part]

    def draws(self, stream: int, position: int) -> Iterator[int]:
        """Endless dataset numbers of a stream, beginning with its sample number ``position``."""
        block, inside = divmod(position, BLOCK)
        while True:
            yield from self._block(stream, block)[inside:].tolist()
            block, inside = block + 1, 0

    def _block(self, stream: int, block: int) -> Ints:
        """Dataset numbers [10,000] of one block of a stream."""
        datasets = np.repeat(np.arange(len(self.quota)), self.quota)
        return datasets[permutation(BLOCK, self.seed, f"mixture {stream}", block)]
