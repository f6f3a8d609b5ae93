"""Row counts of a dataset: from the index of its samples layer, else from the Parquet footers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from reinforce.dataset.files.index import read_index
from reinforce.dataset.files.layer_file import check_rows
from reinforce.dataset.files.store import Store, check_footer
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reading.aligned import layer_errors
from reinforce.dataset.view import View
from reinforce.errors import UserError
from reinforce.parquet.footers import TAIL_BYTES, read_footer
from reinforce.source.whole_reads import read_range

_BATCH = 1024  # files per request to the file system; object stores answer them concurrently


def row_group_table(store: Store, fingerprint: str, shards: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """Array [row groups, 3] of shard number, row group number within the file, and rows.

    ``shards`` maps each shard to the bytes of its samples file. One request, and one for each shard that the index
    lacks, many at a time. Raises UserError if such a file is damaged or has another fingerprint.
    """
    counts: dict[str, Sequence[int] | npt.NDArray[np.int32]] = {}
    if shards:
        counts.update(read_index(store, SAMPLES, fingerprint).groups(shards))
    if missing := {shard: size for shard, size in shards.items() if shard not in counts}:
        counts.update(_footer_counts(store, fingerprint, missing))
    lengths = np.array([len(counts[shard]) for shard in shards], np.int64)
    table = np.empty((int(lengths.sum()), 3), np.int64)
    table[:, 0] = np.repeat(np.arange(len(shards)), lengths)
    table[:, 1] = np.arange(len(table)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    table[:, 2] = np.concatenate([np.empty(0, np.int64), *(np.asarray(counts[shard], np.int64) for shard in shards)])
    return table


def kept_rows(groups: npt.NDArray[np.int64], shards: Sequence[str], view: View) -> npt.NDArray[np.int64]:
    """The row groups [n, 3] with the numbers of their rows that a view keeps, without those of which it keeps none.

    Raises UserError if the view has another number of row groups.
    """
    kept = [view.kept[shard] for shard in shards]
    if [len(one) for one in kept] != np.bincount(groups[:, 0], minlength=len(shards)).tolist():
        raise UserError(f"view {view.name} is of other samples. Make it again with reinforce select.")
    groups = groups.copy()
    groups[:, 2] = [count for one in kept for count in one]
    return groups[groups[:, 2] > 0]


def rows_of_shards(groups: npt.NDArray[np.int64], shards: int) -> list[int]:
    """Rows of each of so many shards, by the table of ``row_group_table``."""
    return [int(rows) for rows in np.bincount(groups[:, 0], groups[:, 2], shards)]


def _footer_counts(store: Store, fingerprint: str, shards: Mapping[str, int]) -> Iterator[tuple[str, list[int]]]:
    """Each shard with the rows of its row groups."""
    names = list(shards)
    for start in range(0, len(names), _BATCH):
        batch = names[start : start + _BATCH]
        paths = [store.layer_path(SAMPLES, shard) for shard in batch]
        sizes = [shards[shard] for shard in batch]
        tails = store.fs.cat_ranges(paths, [max(0, size - TAIL_BYTES) for size in sizes], sizes, on_error="return")
        for shard, path, tail in zip(batch, paths, tails, strict=True):
            with layer_errors(store, SAMPLES, shard):
                if isinstance(tail, Exception):
                    raise tail
                size = shards[shard]
                whole = len(tail) == min(size, TAIL_BYTES)
                end = tail if whole else read_range(store.fs, path, max(0, size - TAIL_BYTES), size)
                metadata = read_footer(end, size)
                if metadata is None:  # the footer is longer than the tail
                    with store.open_layer(SAMPLES, shard, whole=False) as file:
                        metadata = file.metadata
                check_footer(path, metadata, fingerprint)
                groups = range(metadata.num_row_groups)
                counts = [check_rows(metadata.row_group(group).num_rows) for group in groups]
            yield shard, counts
