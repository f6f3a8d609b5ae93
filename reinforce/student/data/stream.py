"""The examples of one rank as an endless torch IterableDataset."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from reinforce.student.data.examples import Example
from reinforce.student.data.parts import Part, PartBuffers, PartMaker
from reinforce.student.data.reader import DatasetReader, Streamed
from reinforce.training.order import ORDER, Mixture, Order, share

#: Row groups that a process reads at a time: enough to hide the latency of an object store; each is in memory.
_READERS = 2


@dataclass(frozen=True)
class StreamPlan:
    """What is streamed, the same on every rank. ``streams`` and ``window`` are those of the config.

    ``order`` is the version of the order of samples, see ``reinforce.training.order``.
    """

    datasets: Sequence[Streamed]
    maker: PartMaker
    seed: int
    streams: int
    window: int
    order: int = ORDER


class RankStream(IterableDataset[Part]):
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

    def __iter__(self) -> Iterator[Part]:
        info = get_worker_info()
        process, processes = (info.id, info.num_workers) if info else (0, 1)
        local = self.plan.streams // self.ranks
        orders = make_orders(self.plan.datasets, self.plan.seed, self.plan.streams, self.plan.window)
        pool = ThreadPoolExecutor(_READERS, "reader")
        apart = -(-self.batch // local) if self.plan.order > 1 else None
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


def make_orders(datasets: Sequence[Streamed], seed: int, streams: int, window: int) -> list[Order]:
    """The order of each dataset's samples; ``window`` is divided among the datasets by weight."""
    weights = [dataset.weight for dataset in datasets]
    windows = [max(1, round(window * weight / sum(weights))) for weight in weights]
    return [
        Order(dataset.groups[:, -1], seed, f"dataset {number}", streams, own_window)
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
        apart: int | None = 1,
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
