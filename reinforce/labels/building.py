"""Building the index of identities: two passes over parts, on Ray or in this process, with finished files kept.

1. A part of the shards: the hashes of their identities, for a shuffle by the first bits of the hash.
2. A partition: its entries of all parts, merged and sorted, one Parquet file a kind.

Memory is bounded by the entries of a part or a partition, some 2**20 rows. ``index.json`` is written last.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa

import schemas
from reinforce.dataset.aligned import layer_errors, row_group_table
from reinforce.dataset.layer_file import RefusedFile
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.shuffle import Ranges, Shuffle
from reinforce.dataset.store import Store
from reinforce.errors import StorageError, UserError
from reinforce.labels.index import (
    DESCRIPTION,
    FOLDER,
    FORMAT,
    INDEXED,
    KEY,
    MAX_BITS,
    SHARDS,
    VERSION,
    Hashes,
    IdentityIndex,
    columns_of_identities,
    damaged,
    find_index,
    hash_identities,
    identities,
    index_fingerprint,
    lone_keys,
    partition_of,
)
from reinforce.processes.parallel import MapWorkers, open_workers
from reinforce.storage import as_seen_by_workers

PART_ROWS = 2**20  # of the shards of a part, and about of a partition
_GROUP_ROWS = 2**14  # of a row group of a partition
_PARTS = "shuffled"
_ENTRY = np.dtype([("hash", "<u8"), ("shard", "<i4"), ("row", "<i4"), ("kind", "u1")])


@dataclass(frozen=True)
class Build:
    """What to index: a dataset, where, the fingerprint of its samples and of the index, and the shards of each part.

    ``images`` are read for digests that are not stored.
    """

    url: str
    output: str
    samples: str
    fingerprint: str
    bits: int
    parts: tuple[tuple[int, tuple[str, ...]], ...]  # number of the first shard, and names
    images: bool = True

    def path(self, *names: str) -> tuple[str, ...]:
        return (FOLDER, self.fingerprint, *names)

    @property
    def entries(self) -> Shuffle:
        return Shuffle(self.output, self.path(_PARTS), _ENTRY, 2**self.bits)


def build_index(
    url: str, output: str | None = None, *, images: bool = True, use_ray: bool = True, address: str | None = None
) -> IdentityIndex:
    """Index the identities of a dataset in its folder, or another one; nothing is written if it is there.

    Without ``images``, digests are indexed only where they are stored. Raises UserError.
    """
    store = Store(url if output is None else output)
    dataset = Store(url)  # as it is now
    samples = read_manifest(dataset)["layers"][SAMPLES]["fingerprint"]
    listing = dataset.shards(SAMPLES)
    row_groups = row_group_table(dataset, samples, dict(listing.items()))
    groups: list[list[int]] = [[] for _ in listing]
    for shard, _, rows in row_groups.tolist():
        groups[shard].append(rows)
    bits = min(MAX_BITS, max(0, math.ceil(math.log2(max(1, row_groups[:, 2].sum() / PART_ROWS)))))
    sizes = pa.array(listing.sizes, pa.int64())
    columns = [listing.names, sizes, pa.array(map(sum, groups), pa.int64()), pa.array(groups, pa.list_(pa.int32()))]
    table = pa.table(columns, schema=schemas.INDEX_SCHEMA)
    planned = IdentityIndex(store, index_fingerprint(samples, bits, table), samples, bits, {}, [*listing], groups, {})
    with contextlib.suppress(UserError):  # also of a damaged index
        if (found := find_index(store)) is not None and found.fingerprint == planned.fingerprint:
            return found
    parts = _parts(planned.shards, planned.groups)
    source, target = as_seen_by_workers(url), as_seen_by_workers(url if output is None else output)
    build = Build(source, target, planned.samples, planned.fingerprint, planned.bits, parts, images)
    with open_workers(address, use_ray) as workers:
        counts = _build(store, build, workers)
    kinds, repeated = (
        {kind: counts[what, kind] for kind in INDEXED if counts[what, kind]} for what in ("kinds", "repeated")
    )
    store.write_table(table, *build.path(f"{SHARDS}.parquet"), row_group_size=4096)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": planned.fingerprint,
        "samples": planned.samples,
        "bits": planned.bits,
        "kinds": kinds,
        "repeated": repeated,
        "shards": len(planned.shards),
        "rows": sum(map(sum, planned.groups)),
    }
    store.write_json(description, FOLDER, DESCRIPTION)
    # Remove the parts, kinds without entries, and indexes of other states of the dataset.
    others = {*store.names(FOLDER)} - {DESCRIPTION, build.fingerprint}
    unused = [build.path(name) for name in store.names(*build.path()) if name not in (f"{SHARDS}.parquet", *kinds)]
    for path in [*unused, *((FOLDER, name) for name in others)]:
        with contextlib.suppress(FileNotFoundError, StorageError), store.storage_errors("removed", *path):
            store.fs.rm(store.path(*path), recursive=True)
    return replace(planned, kinds=kinds, repeated=repeated)


def _parts(shards: Sequence[str], groups: Sequence[Sequence[int]]) -> tuple[tuple[int, tuple[str, ...]], ...]:
    parts: list[tuple[int, list[str]]] = []
    rows = PART_ROWS
    for number, (shard, of_groups) in enumerate(zip(shards, groups, strict=True)):
        if rows + sum(of_groups) > PART_ROWS:
            parts.append((number, []))
            rows = 0
        parts[-1][1].append(shard)
        rows += sum(of_groups)
    return tuple((first, tuple(names)) for first, names in parts)


#: ``kinds`` are the entries of each kind, and ``repeated`` those of them whose hash another entry has too.
Counts: TypeAlias = "Counter[tuple[str, str]]"


def _count(kind: str, hashes: Hashes) -> Counts:
    """The counts of the hashes of a partition."""
    _, counts = np.unique(hashes, return_counts=True)
    return Counter({("kinds", kind): len(hashes), ("repeated", kind): int(counts[counts > 1].sum())})


def _build(store: Store, build: Build, workers: MapWorkers) -> Counts:
    """Write what is missing of the parts and partitions; count the entries of all partitions."""
    names = [f"{number:05d}" for number in range(2**build.bits)]
    kept = {*store.shards("/".join(build.path(INDEXED[-1])))}
    counts: Counts = Counter()
    if len(kept) < len(names):
        missing = sorted({*range(len(build.parts))} - build.entries.written())
        for _ in workers.map(functools.partial(write_part, build), missing, unit="part", name="part {}".format):
            pass
        ranges = build.entries.ranges(len(build.parts))
        partitions = [pair for pair in zip(names, ranges, strict=True) if pair[0] not in kept]
        merge = functools.partial(merge_partition, build)
        merged = workers.map(merge, partitions, unit="partition", name=lambda pair: f"partition {pair[0]}")
        for _, found in merged:
            counts.update(found)
    for _, found in workers.map(functools.partial(count_partition, build), sorted(kept), unit="partition"):
        counts.update(found)
    return counts


def count_partition(build: Build, number: str) -> Counts:
    """The counts of a partition that was written before. Raises UserError."""
    store, counts = Store(build.output), Counter[tuple[str, str]]()
    for kind in INDEXED:
        layer = "/".join(build.path(kind))
        try:
            with store.open_layer(layer, number) as file:
                counts.update(_count(kind, file.read(["hash"])["hash"].to_numpy()))
        except FileNotFoundError:
            continue  # a kind without entries
        except RefusedFile as error:
            fix = f"Delete {store.path(FOLDER)}, and repeat the command."
            raise damaged(store.layer_path(layer, number), error, fix) from error
    return counts


def write_part(build: Build, number: int) -> None:
    """Write the entries of a part from the samples of its shards. Raises UserError."""
    store = Store(build.url)
    first, names = build.parts[number]
    found = [np.empty(0, _ENTRY)]
    for shard, name in enumerate(names, first):
        start = 0
        for rows, values in _row_groups(store, build, name):
            for kind in INDEXED:
                if kind in values:
                    hashes, places = hash_identities(kind, values[kind])
                    found.append(np.empty(len(hashes), _ENTRY))
                    columns = {"hash": hashes, "shard": shard, "row": start + places, "kind": INDEXED.index(kind)}
                    for column, of_entries in columns.items():
                        found[-1][column] = of_entries
            start += rows
    entries = np.concatenate(found)
    entries = entries.take(np.argsort(entries["hash"], kind="stable"))
    build.entries.write(number, partition_of(entries["hash"], build.bits), [entries])


def _row_groups(store: Store, build: Build, shard: str) -> Iterator[tuple[int, dict[str, pa.Array]]]:
    """The number of rows of each row group of a shard, and their identities."""
    with layer_errors(store, SAMPLES, shard), store.open_layer(SAMPLES, shard, build.samples, whole=False) as file:
        columns = columns_of_identities(file.metadata.schema.to_arrow_schema().names, build.images)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, ["key", *columns])
            found = identities(table)
            yield table.num_rows, {**found, KEY: lone_keys(table, found)}


def merge_partition(build: Build, partition: tuple[str, Ranges]) -> Counts:
    """Write the files of a partition, given with its ranges of the parts. Raises UserError."""
    store, counts = Store(build.output), Counter[tuple[str, str]]()
    number, ranges = partition
    entries = build.entries.read(ranges)
    for place, kind in enumerate(INDEXED):
        of_kind = entries[entries["kind"] == place]
        # Of equal hashes, those of earlier shards are first. `take` copies a record at once, an index its fields.
        of_kind = of_kind.take(np.argsort(of_kind["hash"], kind="stable"))
        table = pa.table([of_kind["hash"], of_kind["shard"], of_kind["row"]], schema=schemas.IDENTITIES_SCHEMA)
        store.write_table(
            table,
            *build.path(kind, f"{number}.parquet"),
            row_group_size=_GROUP_ROWS,
            use_dictionary=False,
            column_encoding={"hash": "DELTA_BINARY_PACKED"},
            write_statistics=["hash"],
        )
        counts.update(_count(kind, of_kind["hash"]))
    return counts
