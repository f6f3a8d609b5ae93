"""Views of a dataset: which samples rules keep, and why each of the others is left out.

``views/<name>/view.json`` states the rules and what they were applied to, with the fingerprint of both. Of each shard,
``views/<name>/rows-<fingerprint>/<shard>.parquet`` has a row for each sample in their order, and
``views/<name>/shards-<fingerprint>.parquet`` counts rows, with a digest of that file. ``view.json`` states the digest
of the latter: writing it is the commit of the whole view, which replaces an earlier one of its name.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import schemas
from reinforce.dataset.index import digest_keys, find_content, states_of
from reinforce.dataset.layer_file import LayerFile, RefusedFile
from reinforce.dataset.layers import compute_fingerprint
from reinforce.dataset.store import SHARD_NAME, Store
from reinforce.errors import StorageError, UserError
from reinforce.processes.attempts import prefetch
from reinforce.source.parquet_file import read_table
from reinforce.source.urls import FOLDER, RowDigests, digest_of, rows_path, shards_path
from reinforce.terminal import first_names, plural

DESCRIPTION = "view.json"
_FORMAT = "reinforced-view"
_VERSION = 2
_MAX_BYTES = 2**30
_SHARDS_GROUP = 2**14  # rows of a row group
_COMPARED_AT_ONCE = 8  # shards


@dataclass(frozen=True)
class ViewRows:
    """The files that say of each row of a shard whether a view keeps it."""

    name: str
    fingerprint: str

    def write(self, store: Store, shard: str, groups: Sequence[tuple[pa.Array, pa.Array, pa.Array]]) -> int:
        """Write why each row of a shard is left out, null where it is kept; ``groups`` are keys, reasons and lists of
        values by row group. Returns the digest of the file."""
        buffer = io.BytesIO()
        schema = schemas.VIEW_SCHEMA
        options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
        with pq.ParquetWriter(buffer, schema, use_dictionary=["left_out"], **options) as writer:
            for columns in groups:
                writer.write_table(pa.table([*columns], schema=schema))
        store.write_bytes(buffer.getvalue(), *rows_path(self.name, self.fingerprint, shard))
        return digest_of(buffer.getvalue())

    def read(self, store: Store, shard: str, values: bool = False) -> list[pa.Table]:
        """Key and ``left_out`` of each row of a shard, and ``values`` on request, by row group. Raises UserError."""

        def parse(content: bytes) -> list[pa.Table]:
            if not _row_digests(self, store).check(shard, content):
                raise RefusedFile("it does not have the digest that the view states")
            file = LayerFile(pa.BufferReader(content), len(content), file=(f"{FOLDER}/{self.name}", shard))
            return [file.read_row_group(group, names) for group in range(file.num_row_groups)]

        names = schemas.VIEW_SCHEMA.names if values else ["key", "left_out"]
        path = rows_path(self.name, self.fingerprint, shard)
        try:
            return store.read_parsed(parse, *path, limit=_MAX_BYTES)
        except FileNotFoundError as error:
            raise UserError(f"{store.url}: view {self.name} has no rows of {shard}. Make it again.") from error
        except RefusedFile as error:
            raise UserError(f"{store.path(*path)} cannot be read ({error}). Make the view again.") from error

    @property
    def folder(self) -> str:
        return "/".join(rows_path(self.name, self.fingerprint, "")[:-1])


@dataclass(frozen=True)
class ShardRows:
    """Which rows of a shard a view keeps, by row group, and digests of their keys: some bits a row."""

    masks: tuple[pa.BooleanArray, ...]
    digests: tuple[bytes, ...]
    error: str

    def kept(self, group: int, keys: pa.ChunkedArray) -> pa.BooleanArray:
        """Mask of the kept rows of a row group [rows]. Raises UserError unless they have the ``keys``."""
        if group >= len(self.masks) or self.digests[group] != digest_keys(keys):
            raise UserError(self.error)
        return self.masks[group]


@functools.lru_cache(maxsize=8)
def _row_digests(view: ViewRows, store: Store) -> RowDigests:
    """The digests of the rows of a view, which are read once. Raises UserError."""
    path = shards_path(view.name, view.fingerprint)
    try:
        return RowDigests.parse(store.read_bytes(*path, limit=_MAX_BYTES))
    except FileNotFoundError as error:
        raise UserError(f"{store.path(*path)} does not exist. Make the view again.") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{store.path(*path)} cannot be read ({error}). Make the view again.") from error


@functools.lru_cache(maxsize=4096)
def shard_rows(view: ViewRows, store: Store, shard: str) -> ShardRows:
    """Which rows of a shard a view keeps, of which the file is read once. Raises UserError."""
    tables = view.read(store, shard)
    kept = tuple(table["left_out"].combine_chunks().is_null() for table in tables)
    error = f"{store.url}: view {view.name} is of other samples of {shard}. Make it again."
    return ShardRows(kept, tuple(digest_keys(table["key"]) for table in tables), error)


@dataclass(frozen=True)
class ViewFiles:
    """Inputs and files of a view, for each shard in ascending order.

    Attributes:
        columns: the columns that the rules read, of layers of which they read only some.
        contents: digest of the columns of all layers that the rules read.
        states: hash of the size and the time of the files of these layers, 0 where it is unknown.
        digests: digest of the file with the rows of the view.
    """

    columns: Mapping[str, Sequence[str]]
    contents: array[int]
    states: array[int]
    digests: array[int]


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
    files: ViewFiles

    @property
    def rows(self) -> ViewRows:
        return ViewRows(self.name, self.fingerprint)

    def __len__(self) -> int:
        return sum(map(sum, self.kept.values()))

    def changes(self, store: Store, manifest: Mapping[str, Any]) -> list[str]:
        """Differences since the view was made: layers that were dropped or replaced, or shards with other content.

        The content of a shard is compared where the size or the time of a file differs.
        """
        now = {name: entry.get("fingerprint") for name, entry in manifest["layers"].items()}
        changed = {name: before for name, before in self.inputs.items() if now.get(name) != before}
        since = f"since view {self.name} was made"
        lines = [
            f"{name} has changed {since} ({before} then, {now[name]} now)"
            if name in now
            else f"{name} was dropped {since}"
            for name, before in changed.items()
        ]
        if lines:
            return lines
        shards = sorted(self.counts)
        states = states_of(store, self.inputs, shards)
        doubtful = [n for n, state in enumerate(states) if not state or state != self.files.states[n]]
        layers = {name: self.files.columns.get(name) for name in self.inputs}
        with ThreadPoolExecutor(_COMPARED_AT_ONCE) as pool:
            found = prefetch(pool, lambda n: find_content(store, layers, shards[n]), doubtful, 2 * _COMPARED_AT_ONCE)
            others = [
                shards[n] for n, content in zip(doubtful, found, strict=True) if content != self.files.contents[n]
            ]
        if not others:
            return []
        return [
            f"{plural(len(others), 'shard')} {'have' if others[1:] else 'has'} other content, or no file, in "
            f"{', '.join(self.inputs)} {since} ({first_names(others)})"
        ]


def view_fingerprint(
    rules: Sequence[Mapping[str, Any]],
    seed: int,
    inputs: Mapping[str, str],
    shards: Iterable[str],
    files: ViewFiles,
) -> str:
    """Hash of rules, their seed, the fingerprints of the layers that they read, and shards with their content."""
    recipe: dict[str, Any] = {"rules": [*rules], "seed": seed, "inputs": dict(inputs), "shards": sorted(shards)}
    recipe |= {"columns": dict(files.columns), "contents": [*files.contents]}
    return compute_fingerprint({"view": recipe})


def write_view(store: Store, view: View) -> None:
    """Write the description of a view, after its rows, and remove the files of earlier views of its name."""
    shards = sorted(view.counts)
    columns = {
        "shard": shards,
        "rows": [view.counts[one] for one in shards],
        "kept": [[*view.kept[one]] for one in shards],
        "content": view.files.contents,
        "state": view.files.states,
        "digest": view.files.digests,
    }
    table, path = pa.table(columns, schema=schemas.VIEW_SHARDS_SCHEMA), shards_path(view.name, view.fingerprint)
    content = store.write_table(table, *path, row_group_size=_SHARDS_GROUP)
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        "fingerprint": view.fingerprint,
        "rules": [*view.rules],
        "seed": view.seed,
        "inputs": dict(view.inputs),
        "report": [*view.report],
        "columns": {name: [*names] for name, names in view.files.columns.items()},
        "shards": f"{digest_of(content):016x}",
    }
    store.write_json(description, FOLDER, view.name, DESCRIPTION)
    remove_leftovers(store, view.name, view.fingerprint)


def remove_leftovers(store: Store, name: str, fingerprint: str | None) -> None:
    """Remove the files of a view that are not of the state with this fingerprint, such as those of earlier ones."""
    for found in store.names(FOLDER, name):
        kind, _, of = found.removesuffix(".parquet").partition("-")
        if (kind == "rows" and of != fingerprint) or (kind == "shards" and of != fingerprint):
            with store.storage_errors("removed", FOLDER, name, found), contextlib.suppress(FileNotFoundError):
                store.fs.rm(store.path(FOLDER, name, found), recursive=True)


def list_views(store: Store) -> list[str]:
    """Names of the views of a dataset; a selection that was stopped, or an interrupted drop, leaves a folder alone."""
    folders = store.names(FOLDER, folders=True)
    return [name for name in folders if store.fs.exists(store.path(FOLDER, name, DESCRIPTION))]


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
            yield ViewState(name, view.fingerprint, *counts, newer, tuple(view.changes(store, manifest)))


def open_view(store: Store, manifest: Mapping[str, Any], name: str) -> View:
    """Read a view of the dataset as it is now. Raises UserError as ``read_view``, and if its inputs have changed."""
    view = read_view(store, name)
    if changes := view.changes(store, manifest):
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
    description = store.read_json(FOLDER, name, DESCRIPTION)
    if description is None:
        others = [one for one in list_views(store) if one != name]  # a selection that was stopped leaves a folder
        known = ", ".join(others) or "none"
        raise UserError(f"{store.url} has no view {name!r}; it has: {known}. `reinforce select` makes one.")
    path = store.path(FOLDER, name, DESCRIPTION)
    version = description.get("version")
    if description.get("format") != _FORMAT or not isinstance(version, int) or version < _VERSION:
        raise UserError(f"{path} does not describe a view. Make it again with reinforce select.")
    if version > _VERSION:
        raise UserError(f"{path} was written by a newer version of this program. Upgrade to read it.")
    try:
        fingerprint = description["fingerprint"]
        if not re.fullmatch(r"[0-9a-f]{16}", fingerprint):
            raise ValueError("its fingerprint is none")
        try:
            table = _read_shards(store, name, fingerprint, description["shards"])
        except FileNotFoundError as error:
            now = store.read_json(FOLDER, name, DESCRIPTION)
            if now is not None and now.get("fingerprint") != fingerprint:  # a selection has replaced it meanwhile
                return read_view(store, name)
            raise UserError(f"{path} has no file of shards any more. Make the view again.") from error
        columns = {column: table[column].to_pylist() for column in ("shard", "rows", "kept")}
        contents, states, digests = (table[name].to_numpy().tobytes() for name in ("content", "state", "digest"))
        read = {str(layer): [str(one) for one in names] for layer, names in description["columns"].items()}
        view = View(
            name,
            fingerprint,
            description["rules"],
            description["seed"],
            {str(layer): str(of_layer) for layer, of_layer in description["inputs"].items()},
            dict(zip(columns["shard"], columns["rows"], strict=True)),
            dict(zip(columns["shard"], columns["kept"], strict=True)),
            description["report"],
            ViewFiles(read, array("Q", contents), array("q", states), array("Q", digests)),
        )
        same = fingerprint == view_fingerprint(view.rules, view.seed, view.inputs, view.counts, view.files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}). Make the view again with reinforce select.") from error
    if not same:
        raise UserError(f"{path} does not have its fingerprint: it was changed. Make it again with reinforce select.")
    return view


def _read_shards(store: Store, name: str, fingerprint: str, digest: str) -> pa.Table:
    """Read how many rows of each shard a view keeps, from the file with the ``digest``. Raises FileNotFoundError."""
    parts = shards_path(name, fingerprint)
    path, schema = store.path(*parts), schemas.VIEW_SHARDS_SCHEMA
    try:
        content = store.read_bytes(*parts, limit=_MAX_BYTES)
        if digest != f"{digest_of(content):016x}":
            raise UserError(f"{path} does not have the digest that {DESCRIPTION} states. Make the view again.")
        table = read_table(pa.BufferReader(content))
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}). Make the view again.") from error
    if [(field.name, field.type) for field in table.schema] != [(field.name, field.type) for field in schema]:
        raise UserError(f"{path} has other columns than a view. Make the view again.")
    if not pc.all(pc.match_substring_regex(table["shard"], f"^{SHARD_NAME.pattern}$"), min_count=0).as_py():
        raise UserError(f"{path} names shards that do not exist. Make the view again.")
    return table
