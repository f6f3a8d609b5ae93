"""The row groups of a report: a seeded sample, of seeded shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from reinforce.dataset.files.index import read_index
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reading.aligned import layer_errors
from reinforce.dataset.reading.dataset import Dataset
from reinforce.dataset.view import View
from reinforce.errors import UserError
from reinforce.seeds import permutation

_SHARDS = 64  # opened at least, if there are so many; more only while these have fewer rows than the limit
_GROUPS = 256  # row groups at most: each takes a request for every layer


@dataclass(frozen=True, order=True)
class Group:
    """A row group, and how many of its rows are looked at, from the first; with a view, of those that it keeps."""

    shard: str
    number: int
    rows: int


#: Where a sample is: its row group, and the row in it.
Place: TypeAlias = tuple[Group, int]


@dataclass(frozen=True)
class Selection:
    """The row groups that are looked at, in the order of the shards.

    ``samples`` is the number of samples of the dataset, estimated from the opened shards unless it is ``exact``.
    """

    groups: tuple[Group, ...]
    samples: int
    exact: bool
    problems: tuple[str, ...]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    def by_shard(self) -> dict[str, list[Group]]:
        found: dict[str, list[Group]] = {}
        for group in self.groups:
            found.setdefault(group.shard, []).append(group)
        return found


def select(data: Dataset, limit: int, seed: int, view: View | None = None) -> Selection:
    """Select row groups with at most ``limit`` rows together, the last of them cut; of a ``view`` its rows.

    Reads the index and the footers of the shards that it opens; a shard whose footer is damaged is a problem. A view
    has the rows of all shards.
    """
    if view is not None:
        kept = {shard: [*view.kept[shard]] for shard in data.shards if any(view.kept.get(shard, ()))}
        return Selection(_in_order(data, _cut(kept, limit, seed)), sum(map(sum, kept.values())), True, ())
    opened: dict[str, list[int]] = {}
    problems = []
    total = 0
    for shard in (data.shards[place] for place in permutation(len(data.shards), seed, "inspected shards").tolist()):
        if len(opened) >= min(_SHARDS, limit) and total >= limit:
            break
        try:
            opened[shard] = _rows_of_groups(data, shard)
        except UserError as error:
            problems.append(str(error))
            continue
        total += sum(opened[shard])
    groups = _in_order(data, _cut(opened, limit, seed))
    samples, exact = _count_samples(data, {shard: sum(rows) for shard, rows in opened.items()})
    return Selection(groups, samples, exact, tuple(problems))


def _in_order(data: Dataset, groups: list[Group]) -> tuple[Group, ...]:
    places = {shard: place for place, shard in enumerate(data.shards)}
    return tuple(sorted(groups, key=lambda group: (places[group.shard], group.number)))


def _rows_of_groups(data: Dataset, shard: str) -> list[int]:
    store, fingerprint = data.store, data.fingerprints[SAMPLES]
    with layer_errors(store, SAMPLES, shard), store.open_layer(SAMPLES, shard, fingerprint, whole=False) as file:
        return [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]


def _cut(opened: dict[str, list[int]], limit: int, seed: int) -> list[Group]:
    groups = [Group(shard, n, rows) for shard, counts in opened.items() for n, rows in enumerate(counts) if rows > 0]
    chosen: list[Group] = []
    for place in permutation(len(groups), seed, "inspected row groups").tolist():
        if limit <= 0 or len(chosen) == _GROUPS:
            break
        group = groups[place]
        chosen.append(Group(group.shard, group.number, min(group.rows, limit)))
        limit -= group.rows
    return chosen


def _count_samples(data: Dataset, opened: dict[str, int]) -> tuple[int, bool]:
    """The number of samples of the dataset, and whether it is exact."""
    if len(opened) == len(data.shards):
        return sum(opened.values()), True
    index = read_index(data.store, SAMPLES, data.fingerprints[SAMPLES]).table
    known = index.filter(pc.is_in(index["shard"], value_set=pa.array(data.shards, pa.string())))
    rows = pc.sum(known["rows"]).as_py() or 0
    if len(known) == len(data.shards):
        return rows, True
    mean = (rows + sum(opened.values())) / max(1, len(known) + len(opened))
    return round(mean * len(data.shards)), False
