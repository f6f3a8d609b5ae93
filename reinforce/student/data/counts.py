"""How many rows every row group of a dataset has, by the footers of its samples layer."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reader import read_errors
from reinforce.dataset.store import Store, check_footer
from teachers.weights import cache_folder, locked

_LOG = logging.getLogger(__name__)
_TAIL = 64 * 2**10  # bytes at the end of a file that are asked for: a footer with its row groups
_AT_A_TIME = 1024  # files
#: From this many shards on, counts are kept in the cache of the node: footers of 190,000 shards are minutes.
_MANY = 1024

_SCHEMA = pa.schema([("shard", pa.string()), ("bytes", pa.int64()), ("rows", pa.list_(pa.int64()))])


def row_groups(store: Store, fingerprint: str, shards: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """[row groups, 3]: number of the shard, place in its file, rows. ``shards`` have the bytes of their files.

    One request a shard, many at a time. Raises UserError where a file is damaged or of another recipe.
    """
    count = _kept if len(shards) >= _MANY else _footers
    counts = dict(count(store, fingerprint, shards))
    table = [(number, place, rows) for number, s in enumerate(shards) for place, rows in enumerate(counts[s])]
    return np.array(table, np.int64).reshape(-1, 3)


def _kept(store: Store, fingerprint: str, shards: Mapping[str, int]) -> dict[str, list[int]]:
    """Counts from the node's cache, and those that it lacks from the footers: one process of a node asks for them."""
    name = hashlib.sha256(f"{store.url}\0{fingerprint}".encode()).hexdigest()[:16]
    path = cache_folder() / "rows" / f"{name}.parquet"
    with locked(str(path)):
        known = {shard: rows for shard, size, rows in _read(path) if shards.get(shard) == size}
        fresh = {shard: size for shard, size in shards.items() if shard not in known}
        if fresh:
            start = time.perf_counter()
            known.update(_footers(store, fingerprint, fresh))
            _write(path, [(shard, size, known[shard]) for shard, size in shards.items()])
            seconds = time.perf_counter() - start
            _LOG.info(
                "%s: read the row counts of %d shards in %.0f s, kept in %s", store.url, len(fresh), seconds, path
            )
    return known


def _footers(store: Store, fingerprint: str, shards: Mapping[str, int]) -> Iterator[tuple[str, list[int]]]:
    names = list(shards)
    for start in range(0, len(names), _AT_A_TIME):
        some = names[start : start + _AT_A_TIME]
        paths = [store.layer_path(SAMPLES, shard) for shard in some]
        sizes = [shards[shard] for shard in some]
        tails = store.fs.cat_ranges(paths, [max(0, size - _TAIL) for size in sizes], sizes, on_error="return")
        for shard, path, tail in zip(some, paths, tails, strict=True):
            with read_errors(path):
                if isinstance(tail, Exception):
                    raise tail
                try:
                    metadata = pq.read_metadata(pa.BufferReader(tail))
                except pa.ArrowInvalid:  # a longer footer, or none
                    with store.open_layer(SAMPLES, shard, whole=False) as file:
                        metadata = file.metadata
                check_footer(path, metadata, fingerprint)
            yield shard, [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _read(path: Path) -> list[tuple[str, int, list[int]]]:
    try:
        table = pq.read_table(path, schema=_SCHEMA)
    except (OSError, pa.ArrowInvalid):  # not there, or half written when a disk was full: it only saves time
        return []
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def _write(path: Path, rows: list[tuple[str, int, list[int]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), _SCHEMA, strict=True)]
    pq.write_table(pa.table(columns, schema=_SCHEMA), new, compression="zstd")
    new.replace(path)
