"""A reinforced dataset as a torch IterableDataset. Imports torch, so only ``Dataset.to_torch`` imports this."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import distributed
from torch.utils.data import IterableDataset, get_worker_info

if TYPE_CHECKING:
    from reinforce.dataset.sample import Sample


class TorchSamples(IterableDataset[Any]):
    """Samples of a dataset, with shards split over ranks and DataLoader workers; see ``Dataset.to_torch``."""

    def __init__(self, data: Any, transform: Callable[[Sample], Any] | None = None) -> None:
        self.data = data  # a Dataset
        self.transform = transform
        self._rank, self._ranks = 0, 1

    def __iter__(self) -> Iterator[Any]:
        rank, ranks = self._current_rank()
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        data = self.data[rank * workers + number :: ranks * workers]
        if worker:
            data.store = copy.deepcopy(data.store)  # a new connection: object store clients are not fork-safe
        for sample in data:
            yield sample if self.transform is None else self.transform(sample)

    def _current_rank(self) -> tuple[int, int]:
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return self._rank, self._ranks

    def __getstate__(self) -> dict[str, Any]:
        # torch.distributed is not initialised in a spawned DataLoader worker: it gets the rank of its parent.
        rank, ranks = self._current_rank()
        return {**self.__dict__, "_rank": rank, "_ranks": ranks}
