"""The samples of a dataset by number, as a sequence that a torch DataLoader takes as a map-style dataset."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, overload

import numpy as np
import pyarrow as pa

from reinforce.dataset.files.store import Store
from reinforce.dataset.reading.kept_groups import KeptGroups
from reinforce.dataset.reading.sample import Sample
from reinforce.seeds import Ints


class _Rows(Protocol):
    """The part of ``Dataset`` that is used here."""

    store: Store
    shards: list[str]

    def row_group(self, shard: str, group: int) -> dict[str, pa.Table]: ...
    def samples_of(self, shard: str, tables: Mapping[str, pa.Table], places: Sequence[int]) -> list[Sample]: ...


class RowPlaces:
    """Row groups [groups, 3], as ``row_group_table`` gives them, of which rows are found by their number."""

    def __init__(self, groups: Ints) -> None:
        self.groups = groups
        self._ends = np.cumsum(groups[:, 2])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def find(self, number: int) -> tuple[int, int]:
        """The row group of a row, by its place in the table, and the row's place in the group.

        Raises IndexError. A negative number counts from the end.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} is out of range: there are {len(self):,}")
        number %= len(self)
        group = int(np.searchsorted(self._ends, number, side="right"))
        return group, number - int(self._ends[group] - self.groups[group, 2])


class Samples(Sequence[Sample]):
    """The samples of a dataset in their order; ``Dataset.samples``.

    ``samples[3]`` is a sample, ``samples[:5]`` a list of samples. A row group is read as a whole: those that were read
    last stay in memory, up to 128 MiB. A process that a DataLoader forks opens the files again.
    """

    def __init__(self, data: _Rows, groups: Ints) -> None:
        self._data, self._places, self._kept, self._process = data, RowPlaces(groups), KeptGroups(), os.getpid()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        [sample] = self.__getitems__([index])
        return sample

    def __getitems__(self, numbers: Iterable[int]) -> list[Sample]:
        """Some samples, as a DataLoader asks for those of a batch."""
        if self._process != os.getpid():  # clients of object stores are not fork-safe
            self._data, self._kept, self._process = copy.copy(self._data), KeptGroups(), os.getpid()
            self._data.store = copy.deepcopy(self._data.store)
        return [self._read(*self._places.find(number)) for number in numbers]

    def _read(self, group: int, place: int) -> Sample:
        number, in_file, _ = self._places.groups[group].tolist()
        shard = self._data.shards[number]
        tables = self._kept.get((shard, in_file), lambda: self._data.row_group(shard, in_file))
        [sample] = self._data.samples_of(shard, tables, [place])
        return sample
