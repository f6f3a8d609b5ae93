"""The examples of one rank as a torch IterableDataset without an end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from reinforce.student.data.examples import Example
from reinforce.student.data.parts import Maker, Part, Room
from reinforce.student.data.reader import Corpus, Reader
from reinforce.training.order import Mixture, Order, share

#: Row groups that a process reads at a time: enough to hide how late an object store answers, and each is in memory.
_READERS = 2


@dataclass(frozen=True)
class Plan:
    """What is streamed, the same on every rank. ``streams`` and ``window`` are the config's."""

    corpora: Sequence[Corpus]
    maker: Maker
    seed: int
    streams: int
    window: int


class Stream(IterableDataset[Part]):
    """Parts of one rank's batches of ``batch`` samples, from a step on.

    A loader process reads every n-th stream of the rank and makes one part a step, so that n parts in a row, one of
    each process, are a batch. All the state there is is the number of the next step; a loader that saves it per
    process, such as torchdata's StatefulDataLoader, goes on exactly.

    With ``rooms`` [processes, depth, n], process p makes its part of step s in room (p, s mod depth).
    """

    def __init__(self, plan: Plan, rank: int, ranks: int, batch: int, step: int = 0, rooms: Room | None = None) -> None:
        self.plan, self.rank, self.ranks, self.batch, self.step, self.rooms = plan, rank, ranks, batch, step, rooms

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def __iter__(self) -> Iterator[Part]:
        info = get_worker_info()
        process, processes = (info.id, info.num_workers) if info else (0, 1)
        local = self.plan.streams // self.ranks
        orders = orders_of(self.plan.corpora, self.plan.seed, self.plan.streams, self.plan.window)
        pool = ThreadPoolExecutor(_READERS, "reader")
        try:
            lanes: dict[int, Lane] = {}
            for number in range(process, local, processes):
                stream, position = self.rank * local + number, share(self.batch * self.step, local, number)
                lanes[number] = Lane(self.plan.corpora, orders, self.plan.seed, stream, position, pool)
            while True:
                examples: list[Example] = []
                for number, lane in lanes.items():
                    done, due = (share(self.batch * step, local, number) for step in (self.step, self.step + 1))
                    examples += [next(lane) for _ in range(due - done)]
                if self.rooms is None:
                    room = self.plan.maker.room(len(examples))
                else:
                    room = self.rooms.at(process, self.step % self.rooms.image.shape[1])
                unusable = sum((lane.unusable() for lane in lanes.values()), Counter[str]())
                self.step += 1
                yield self.plan.maker.part(examples, room, unusable)
        finally:
            pool.shutdown(cancel_futures=True)


def orders_of(corpora: Sequence[Corpus], seed: int, streams: int, window: int) -> list[Order]:
    """The order of each dataset's samples; a window is shared by their weights."""
    weights = [corpus.weight for corpus in corpora]
    windows = [max(1, round(window * weight / sum(weights))) for weight in weights]
    return [
        Order(corpus.groups[:, 2], seed, f"dataset {number}", streams, share_of)
        for number, (corpus, share_of) in enumerate(zip(corpora, windows, strict=True))
    ]


class Lane:
    """The examples of one stream, drawn from all datasets, from a position on."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        orders: Sequence[Order],
        seed: int,
        stream: int,
        position: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        mixture = Mixture([corpus.weight for corpus in corpora], seed)
        self._draws = mixture.draws(stream, position)
        self._readers = [
            Reader(corpus, order, stream, start, pool)
            for corpus, order, start in zip(corpora, orders, mixture.before(stream, position), strict=True)
        ]
        self._examples = [iter(reader) for reader in self._readers]

    def __next__(self) -> Example:
        return next(self._examples[next(self._draws)])

    def unusable(self) -> Counter[str]:
        """Rows that were passed over since this was asked last, by reason."""
        counts = Counter[str]()
        for reader in self._readers:
            counts.update(reader.unusable)
            reader.unusable.clear()
        return counts
