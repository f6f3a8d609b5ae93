"""Views of a dataset: which samples rules keep, and why each of the others is left out.

``views/<name>/view.json`` states the rules and what they were applied to, with the fingerprint of both. Of each shard,
``views/<name>/rows-<fingerprint>/<shard>.parquet`` has a row for each sample in their order, and ``shards.parquet``
counts rows. A view that is made again with other rules replaces the earlier one when ``view.json`` is written.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

import schemas
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import compute_fingerprint
from reinforce.errors import UserError

FOLDER = "views"
_DESCRIPTION, _SHARDS = "view.json", "shards.parquet"
_FORMAT = "reinforced-view"
_VERSION = 1
_MAX_BYTES = 2**30


@dataclass(frozen=True)
class View:
    """A view that was made: ``rules`` with their ``seed``, the fingerprints of its ``inputs``, and what it keeps.

    ``rows`` and ``kept`` are by shard. ``report`` has the counts of each rule.
    """

    name: str
    rules: Sequence[Mapping[str, Any]]
    seed: int
    inputs: Mapping[str, str]
    rows: Mapping[str, int]
    kept: Mapping[str, int]
    report: Sequence[Mapping[str, Any]]

    @property
    def fingerprint(self) -> str:
        """Hash of what it was made from."""
        return view_fingerprint(self.rules, self.seed, self.inputs, self.rows)

    def check(self, url: str, manifest: Mapping[str, Any]) -> None:
        """Raise UserError if a layer that it was made from is another one now."""
        now = {name: entry.get("fingerprint") for name, entry in manifest["layers"].items()}
        changed = [name for name, fingerprint in self.inputs.items() if now.get(name) != fingerprint]
        if changed:
            verb = "have" if changed[1:] else "has"
            raise UserError(
                f"{url}: {', '.join(changed)} {verb} changed since view {self.name} was made. Make it again with "
                "reinforce select."
            )


def view_fingerprint(
    rules: Sequence[Mapping[str, Any]], seed: int, inputs: Mapping[str, str], shards: Iterable[str]
) -> str:
    """Hash of rules, their seed, the fingerprints of the layers that they read, and the names of shards."""
    recipe = {"rules": [*rules], "seed": seed, "inputs": dict(inputs), "shards": sorted(shards)}
    return compute_fingerprint({"view": recipe})


def write_rows(
    store: Store, view: str, fingerprint: str, shard: str, groups: Sequence[tuple[pa.Array, pa.Array]]
) -> None:
    """Write why each row of a shard is left out, null where it is kept.

    ``fingerprint`` is that of the view, ``groups`` are keys and reasons by row group.
    """
    buffer = io.BytesIO()
    schema = schemas.view_schema()
    with pq.ParquetWriter(buffer, schema, compression="zstd", use_dictionary=["left_out"]) as writer:
        for keys, reasons in groups:
            writer.write_table(pa.table([keys, reasons], schema=schema))
    store.write_bytes(buffer.getvalue(), FOLDER, view, _rows(fingerprint), f"{shard}.parquet")


def write_view(store: Store, view: View) -> None:
    """Write the description of a view, after its rows, and remove the rows of an earlier view of its name."""
    try:
        before = read_view(store, view.name)
    except UserError:  # there is none, or it is damaged
        before = None
    shards = sorted(view.rows)
    columns = {"shard": shards, "rows": [view.rows[one] for one in shards], "kept": [view.kept[one] for one in shards]}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schemas.view_shards_schema()), buffer, compression="zstd")
    store.write_bytes(buffer.getvalue(), FOLDER, view.name, _SHARDS)
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
        for shard in before.rows:
            store.remove(FOLDER, view.name, _rows(before.fingerprint), f"{shard}.parquet")


def list_views(store: Store) -> list[str]:
    """Names of the views of a dataset."""
    try:
        with store.storage_errors("listed", FOLDER):
            entries = store.fs.ls(store.path(FOLDER), detail=True, refresh=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(str(one["name"]).rstrip("/").rpartition("/")[2] for one in entries if one["type"] == "directory")


def read_view(store: Store, name: str) -> View:
    """Read the description of a view. Raises UserError if there is none, it is damaged, or a newer version wrote it."""
    description = store.read_json(FOLDER, name, _DESCRIPTION)
    if description is None:
        known = ", ".join(list_views(store)) or "none"
        raise UserError(f"{store.url} has no view {name!r}; it has: {known}. `reinforce select` makes one.")
    path = store.path(FOLDER, name, _DESCRIPTION)
    if description.get("format") != _FORMAT or not isinstance(description.get("version"), int):
        raise UserError(f"{path} does not describe a view. Make it again with reinforce select.")
    if description["version"] > _VERSION:
        raise UserError(f"{path} was written by a newer version of this program. Upgrade to read it.")
    try:
        table = _read(store, schemas.view_shards_schema(), FOLDER, name, _SHARDS)
        shards, rows, kept = (table[column].to_pylist() for column in ("shard", "rows", "kept"))
        view = View(
            name,
            description["rules"],
            description["seed"],
            {str(layer): str(fingerprint) for layer, fingerprint in description["inputs"].items()},
            dict(zip(shards, rows, strict=True)),
            dict(zip(shards, kept, strict=True)),
            description["report"],
        )
        same = view.fingerprint == description["fingerprint"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}). Make the view again with reinforce select.") from error
    if not same:
        raise UserError(f"{path} does not have its fingerprint: it was changed. Make it again with reinforce select.")
    return view


def read_rows(store: Store, view: View, shard: str) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """Keys of the rows of a shard, and which of them a view keeps [rows]. Raises UserError."""
    try:
        table = _read(store, schemas.view_schema(), FOLDER, view.name, _rows(view.fingerprint), f"{shard}.parquet")
    except FileNotFoundError as error:
        raise UserError(f"{store.url}: view {view.name} has no rows of {shard}. Make it again.") from error
    return table["key"].combine_chunks(), np.asarray(table["left_out"].is_null())


def _rows(fingerprint: str) -> str:
    """The folder of the rows of a view."""
    return f"rows-{fingerprint}"


def _read(store: Store, schema: pa.Schema, *parts: str) -> pa.Table:
    data = store.read_bytes(*parts, limit=_MAX_BYTES)
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{store.path(*parts)} cannot be read ({error}). Make the view again.") from error
    if table.schema.names != schema.names or table.schema.types != schema.types:
        raise UserError(f"{store.path(*parts)} has other columns than a view. Make the view again.")
    return table
