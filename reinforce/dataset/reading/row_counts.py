"""Row counts of a dataset: from the index of its samples layer, else from the Parquet footers."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from reinforce.dataset.files.index import read_index
from reinforce.dataset.files.layer_file import check_rows
from reinforce.dataset.files.store import Store, check_footer
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reading.aligned import layer_errors
from reinforce.parquet.footers import TAIL_BYTES, read_footer
from reinforce.source.whole_reads import read_range
from teachers.weights import cache_folder, locked

_LOG = logging.getLogger(__name__)
_BATCH = 1024  # files per request to the file system; object stores answer them concurrently
#: Datasets of at least this many shards keep their counts in the node's cache: reading 190,000 footers takes minutes.
_CACHE_FROM = 1024

_SCHEMA = pa.schema([("shard", pa.string()), ("bytes", pa.int64()), ("rows", pa.list_(pa.int64()))])


def row_group_table(store: Store, fingerprint: str, shards: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """Array [row groups, 3] of shard number, row group number within the file, and rows.

    ``shards`` maps each shard to the bytes of its samples file. One request, and one for each shard that the index
    lacks, many at a time. Raises UserError if such a file is damaged or has another fingerprint.
    """
    counts: dict[str, Sequence[int] | npt.NDArray[np.int32]] = {}
    if shards:
        counts.update(read_index(store, SAMPLES, fingerprint).groups(shards))
    if missing := {shard: size for shard, size in shards.items() if shard not in counts}:
        read = _cached_counts if len(missing) >= _CACHE_FROM else _footer_counts
        counts.update(read(store, fingerprint, missing))
    lengths = np.array([len(counts[shard]) for shard in shards], np.int64)
    table = np.empty((int(lengths.sum()), 3), np.int64)
    table[:, 0] = np.repeat(np.arange(len(shards)), lengths)
    table[:, 1] = np.arange(len(table)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    table[:, 2] = np.concatenate([np.empty(0, np.int64), *(np.asarray(counts[shard], np.int64) for shard in shards)])
    return table


def _cached_counts(store: Store, fingerprint: str, shards: Mapping[str, int]) -> dict[str, list[int]]:
    """Counts from the node's cache; a lock lets one process per node read the footers that are not in it."""
    name = hashlib.sha256(f"{store.url}\0{fingerprint}".encode()).hexdigest()[:16]
    path = cache_folder() / "rows" / f"{name}.parquet"
    with locked(str(path)):
        counts = {shard: rows for shard, size, rows in _read_cache(path) if shards.get(shard) == size}
        missing = {shard: size for shard, size in shards.items() if shard not in counts}
        if missing:
            start = time.perf_counter()
            counts.update(_footer_counts(store, fingerprint, missing))
            _write_cache(path, [(shard, size, counts[shard]) for shard, size in shards.items()])
            seconds = time.perf_counter() - start
            _LOG.info(
                "%s: read the row counts of %d shards in %.0f s, cached in %s", store.url, len(missing), seconds, path
            )
    return counts


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


def _read_cache(path: Path) -> list[tuple[str, int, list[int]]]:
    try:
        table = pq.read_table(path, schema=_SCHEMA)
    except (OSError, pa.ArrowInvalid):  # missing, or cut short by a full disk: the footers have the same counts
        return []
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def _write_cache(path: Path, rows: list[tuple[str, int, list[int]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), _SCHEMA, strict=True)]
    pq.write_table(pa.table(columns, schema=_SCHEMA), new, compression="zstd")
    new.replace(path)
