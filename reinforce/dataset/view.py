"""Views of a dataset: which samples rules keep, and why each of the others is left out.

``views/<name>/view.json`` states the rules and what they were applied to, with the fingerprint of both. Of each shard,
``views/<name>/rows-<fingerprint>/<shard>.parquet`` has a row for each sample in their order, and ``shards.parquet``
counts rows. A view that is made again with other rules replaces the earlier one when ``view.json`` is written.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import schemas
from reinforce.dataset.files.key_hashes import digest_keys
from reinforce.dataset.files.layer_file import LayerFile, RefusedFile
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import compute_fingerprint
from reinforce.errors import StorageError, UserError
from reinforce.source.views import FOLDER, rows_path

_DESCRIPTION, _SHARDS = "view.json", "shards.parquet"
_FORMAT = "reinforced-view"
_VERSION = 1
_MAX_BYTES = 2**30


@dataclass(frozen=True)
class ViewRows:
    """The files that say of each row of a shard whether a view keeps it."""

    name: str
    fingerprint: str

    def write(self, store: Store, shard: str, groups: Sequence[tuple[pa.Array, pa.Array]]) -> None:
        """Write why each row of a shard is left out, null where it is kept; ``groups`` are keys and reasons by row
        group."""
        buffer = io.BytesIO()
        schema = schemas.view_schema()
        options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
        with pq.ParquetWriter(buffer, schema, use_dictionary=["left_out"], **options) as writer:
            for keys, reasons in groups:
                writer.write_table(pa.table([keys, reasons], schema=schema))
        store.write_bytes(buffer.getvalue(), *self._path(shard))

    def read(self, store: Store, shard: str) -> list[pa.Table]:
        """Key and ``left_out`` of each row of a shard, by row group. Raises UserError."""

        def parse(content: bytes) -> list[pa.Table]:
            file = LayerFile(pa.BufferReader(content), len(content), file=(f"{FOLDER}/{self.name}", shard))
            return [file.read_row_group(group, names, use_threads=False) for group in range(file.num_row_groups)]

        names = schemas.view_schema().names
        try:
            return store.read_parsed(parse, *self._path(shard), limit=_MAX_BYTES)
        except FileNotFoundError as error:
            raise UserError(f"{store.url}: view {self.name} has no rows of {shard}. Make it again.") from error
        except RefusedFile as error:
            path = store.path(*self._path(shard))
            raise UserError(f"{path} cannot be read ({error}). Make the view again.") from error

    def remove(self, store: Store, shards: Iterable[str]) -> None:
        for shard in shards:
            store.remove(*self._path(shard))

    @property
    def folder(self) -> str:
        """The folder of the files in the dataset."""
        return "/".join(self._path("")[:-1])

    def _path(self, shard: str) -> tuple[str, ...]:
        return rows_path(self.name, self.fingerprint, shard)


@dataclass(frozen=True)
class ShardRows:
    """Which rows of a shard a view keeps, by row group, and digests of their keys: some bits a row."""

    masks: tuple[pa.BooleanArray, ...]
    digests: tuple[bytes, ...]
    error: str

    def kept(self, group: int, keys: pa.ChunkedArray) -> pa.BooleanArray:
        """Which rows of a row group are kept [rows]. Raises UserError unless they have the ``keys``."""
        if group >= len(self.masks) or self.digests[group] != digest_keys(keys):
            raise UserError(self.error)
        return self.masks[group]


@functools.lru_cache(maxsize=4096)
def shard_rows(view: ViewRows, store: Store, shard: str) -> ShardRows:
    """Which rows of a shard a view keeps, of which the file is read once. Raises UserError."""
    tables = view.read(store, shard)
    kept = tuple(table["left_out"].combine_chunks().is_null() for table in tables)
    error = f"{store.url}: view {view.name} is of other samples of {shard}. Make it again."
    return ShardRows(kept, tuple(digest_keys(table["key"]) for table in tables), error)


@dataclass(frozen=True)
class View:
    """A view that was made: ``rules`` with their ``seed``, the fingerprints of its ``inputs``, and what it keeps.

    ``fingerprint`` is that of ``view_fingerprint``. ``counts`` has the rows of each shard, ``kept`` the number of those
    that are kept in each of its row groups. ``report`` has the counts of each rule.
    """

    name: str
    fingerprint: str
    rules: Sequence[Mapping[str, Any]]
    seed: int
    inputs: Mapping[str, str]
    counts: Mapping[str, int]
    kept: Mapping[str, Sequence[int]]
    report: Sequence[Mapping[str, Any]]

    @property
    def rows(self) -> ViewRows:
        return ViewRows(self.name, self.fingerprint)

    def __len__(self) -> int:
        """Number of samples that are kept."""
        return sum(map(sum, self.kept.values()))

    def changes(self, manifest: Mapping[str, Any]) -> list[str]:
        """What differs from when it was made: layers that were dropped, and those that are others now."""
        now = {name: entry.get("fingerprint") for name, entry in manifest["layers"].items()}
        changed = {name: before for name, before in self.inputs.items() if now.get(name) != before}
        since = f"since view {self.name} was made"
        return [
            f"{name} has changed {since} ({before} then, {now[name]} now)"
            if name in now
            else f"{name} was dropped {since}"
            for name, before in changed.items()
        ]


def view_fingerprint(
    rules: Sequence[Mapping[str, Any]], seed: int, inputs: Mapping[str, str], shards: Iterable[str]
) -> str:
    """Hash of rules, their seed, the fingerprints of the layers that they read, and the names of shards."""
    recipe = {"rules": [*rules], "seed": seed, "inputs": dict(inputs), "shards": sorted(shards)}
    return compute_fingerprint({"view": recipe})


def write_view(store: Store, view: View) -> None:
    """Write the description of a view, after its rows, and remove the rows of an earlier view of its name."""
    try:
        before = read_view(store, view.name)
    except UserError:  # there is none, or it is damaged
        before = None
    shards = sorted(view.counts)
    columns = {
        "shard": shards,
        "rows": [view.counts[one] for one in shards],
        "kept": [[*view.kept[one]] for one in shards],
    }
    table = pa.table(columns, schema=schemas.view_shards_schema())
    store.write_table(table, FOLDER, view.name, _SHARDS, write_page_checksum=False)
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        "fingerprint": view.fingerprint,
        "rules": [*view.rules],
        "seed": view.seed,
        "inputs": dict(view.inputs),
        "report": [*view.report],
    }
    store.write_json(description, FOLDER, view.name, _DESCRIPTION)
    if before is not None and before.fingerprint != view.fingerprint:
        before.rows.remove(store, before.counts)


def list_views(store: Store) -> list[str]:
    """Names of the views of a dataset."""
    return [name for name in view_folders(store) if store.fs.exists(store.path(FOLDER, name, _DESCRIPTION))]


def view_folders(store: Store) -> list[str]:
    """Names of the views of a dataset, and of those that a stopped selection or an interrupted drop has left."""
    return store.names(FOLDER, folders=True)


@dataclass(frozen=True)
class ViewState:
    """A view as ``status`` shows it: the samples that it keeps of some, and why it cannot be read, one line each.

    ``newer`` counts shards that it does not have. ``kept`` and ``samples`` are None if it is damaged.
    """

    name: str
    fingerprint: str | None
    kept: int | None
    samples: int | None
    newer: int
    problems: tuple[str, ...]

    def line(self) -> str:
        newer = f"; {self.newer:,} shards are newer and not read" if self.newer else ""
        kept = "" if self.kept is None else f"{self.kept:,} of {self.samples:,} samples, "
        state = f"not current: {'; '.join(self.problems)}" if self.problems else "current"
        return f"views/{self.name}: {kept}{state}{newer}"


def view_states(store: Store, manifest: Mapping[str, Any], shards: Collection[str]) -> Iterator[ViewState]:
    """The state of each view of a dataset whose samples have some ``shards``."""
    for name, view in read_views(store):
        if isinstance(view, UserError):
            yield ViewState(name, None, None, None, 0, (str(view),))
        else:
            newer = sum(shard not in view.counts for shard in shards)
            counts = len(view), sum(view.counts.values())
            yield ViewState(name, view.fingerprint, *counts, newer, tuple(view.changes(manifest)))


def remove_view(store: Store, name: str) -> None:
    """Delete a view, first its description, and whatever a selection has left of it."""
    store.remove(FOLDER, name, _DESCRIPTION)
    with store.storage_errors("removed", FOLDER, name):
        store.fs.rm(store.path(FOLDER, name), recursive=True)


def open_view(store: Store, manifest: Mapping[str, Any], name: str) -> View:
    """Read a view of the dataset as it is now. Raises UserError as ``read_view``, and if its inputs have changed."""
    view = read_view(store, name)
    if changes := view.changes(manifest):
        raise UserError(f"{store.url}: {'; '.join(changes)}. Make it again with reinforce select.")
    return view


def read_views(store: Store) -> Iterator[tuple[str, View | UserError]]:
    """The name of each view of a dataset, with the view or the error of ``read_view``. Raises StorageError."""
    for name in list_views(store):
        try:
            yield name, read_view(store, name)
        except StorageError:
            raise
        except UserError as error:
            yield name, error


def read_view(store: Store, name: str) -> View:
    """Read the description of a view. Raises UserError if there is none, it is damaged, or a newer version wrote it."""
    description = store.read_json(FOLDER, name, _DESCRIPTION)
    if description is None:
        others = [one for one in list_views(store) if one != name]  # a selection that was stopped leaves a folder
        known = ", ".join(others) or "none"
        raise UserError(f"{store.url} has no view {name!r}; it has: {known}. `reinforce select` makes one.")
    path = store.path(FOLDER, name, _DESCRIPTION)
    if description.get("format") != _FORMAT or not isinstance(description.get("version"), int):
        raise UserError(f"{path} does not describe a view. Make it again with reinforce select.")
    if description["version"] > _VERSION:
        raise UserError(f"{path} was written by a newer version of this program. Upgrade to read it.")
    try:
        table = _read_shards(store, name)
        shards, rows, kept = (table[column].to_pylist() for column in ("shard", "rows", "kept"))
        view = View(
            name,
            description["fingerprint"],
            description["rules"],
            description["seed"],
            {str(layer): str(fingerprint) for layer, fingerprint in description["inputs"].items()},
            dict(zip(shards, rows, strict=True)),
            dict(zip(shards, kept, strict=True)),
            description["report"],
        )
        same = view.fingerprint == view_fingerprint(view.rules, view.seed, view.inputs, view.counts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}). Make the view again with reinforce select.") from error
    if not same:
        raise UserError(f"{path} does not have its fingerprint: it was changed. Make it again with reinforce select.")
    return view


def _read_shards(store: Store, name: str) -> pa.Table:
    """Read how many rows of each shard a view keeps."""
    path, schema = store.path(FOLDER, name, _SHARDS), schemas.view_shards_schema()
    try:
        table = pq.read_table(pa.BufferReader(store.read_bytes(FOLDER, name, _SHARDS, limit=_MAX_BYTES)))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. Make the view again.") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}). Make the view again.") from error
    if table.schema.names != schema.names or table.schema.types != schema.types:
        raise UserError(f"{path} has other columns than a view. Make the view again.")
    return table
