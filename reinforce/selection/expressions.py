"""Expressions of SQL over the rows of a shard, computed by duckdb."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.layers import SAMPLES, captions_layer, scores_layer
from reinforce.errors import UserError
from reinforce.processes.imports import require
from reinforce.selection.syntax import columns_of

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Kind = Literal["boolean", "number", "group"]
#: Columns of the samples that an expression may name, and their types.
_SAMPLES = {
    **dict.fromkeys(("key", "caption", "metadata"), pa.string()),
    **dict.fromkeys(("width", "height"), pa.int32()),
}
_NUMBERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL"}
_NUMBERS |= {f"U{name}" for name in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")}
_SINGLE = {"FLOAT", "TINYINT", "SMALLINT", "UTINYINT", "USMALLINT"}  # numbers that float32 has exactly
#: Folders of layers that an expression may name, as ``FOLDER.NAME``, with the column that has their values.
_FOLDERS = {"scores": (scores_layer, "scores"), "captions": (captions_layer, "captions")}


def connect() -> DuckDBPyConnection:
    """A database in memory, of one thread, that reads no files. Raises UserError."""
    require("select", "reinforce select", "duckdb")
    import duckdb

    config: dict[str, Any] = {"threads": 1, "enable_external_access": "false", "allow_community_extensions": "false"}
    database = duckdb.connect(":memory:", config=config)
    with contextlib.suppress(duckdb.Error):  # earlier versions have no other syntax of lambdas than this one
        database.execute("SET lambda_syntax = 'ENABLE_SINGLE_ARROW'")
    return database


@dataclass(frozen=True)
class Expression:
    """An expression that was checked against a dataset: its text, and the columns that it names.

    ``single`` is whether its values are numbers that float32 has exactly.
    """

    text: str
    columns: tuple[tuple[str, ...], ...]
    single: bool = False

    @property
    def layers(self) -> set[str]:
        """The layers that it is computed from, besides the samples."""
        return {_layer_of(path) for path in self.columns if path[0] in _FOLDERS}

    @property
    def sample_columns(self) -> set[str]:
        return {path[0] for path in self.columns if path[0] not in _FOLDERS}


def check(text: str, manifest: Mapping[str, Any], where: str, kind: Kind) -> Expression:
    """Check an expression before anything is read: its syntax, its columns and its type.

    A value of any type (``group``) becomes its text. ``where`` names it in messages. Raises UserError.
    """
    with connect() as database:
        columns = columns_of(database, text, where)
        if not columns:
            raise UserError(f"{where}: {text!r} names no column. It may name {_known(manifest)}.")
        found = Expression(text, tuple(_known_column(path, manifest, where) for path in columns))
        rows = _schema(found, manifest).empty_table()
        try:
            [found_type] = database.from_arrow(rows).project(f"({text}) AS value").types
        except Exception as error:  # duckdb has many, without a common base that is public
            raise UserError(f"{where}: {text!r}: {str(error).splitlines()[0]}") from error
    if kind == "group":
        return Expression(f"CAST(({text}) AS VARCHAR)", found.columns)
    name = str(found_type).partition("(")[0]
    if name not in (_NUMBERS if kind == "number" else {"BOOLEAN"}):
        wanted = "a number" if kind == "number" else "true or false"
        raise UserError(f"{where}: {text!r} is {found_type}, and must be {wanted}")
    return Expression(text, found.columns, name in _SINGLE)


def evaluate(database: DuckDBPyConnection, texts: Sequence[str], rows: pa.Table) -> list[pa.Array]:
    """The value of checked expressions [rows]; ``rows`` are those of ``join_rows``.

    Raises UserError for a row on which one fails.
    """
    values = ", ".join(f"({text}) AS value_{n}" for n, text in enumerate(texts))
    # Rows that duckdb divides among vectors keep their order, since there is one thread.
    try:
        found = database.from_arrow(rows).project(values).to_arrow_table()
    except Exception as error:  # as above
        raise UserError(
            f"an expression fails on a sample: {str(error).splitlines()[0]} Use try_cast, or try()."
        ) from error
    if len(found) != len(rows):
        named = ", ".join(map(repr, texts))
        raise UserError(f"{named}: {len(found):,} values of {len(rows):,} rows. An expression gives one value a row.")
    return [column.combine_chunks() for column in found.columns]


def _layer_of(path: Sequence[str]) -> str:
    return _FOLDERS[path[0]][0](path[1])


def _known(manifest: Mapping[str, Any]) -> str:
    """The columns that an expression may name."""
    names = [*_SAMPLES]
    for name, entry in manifest["layers"].items():
        layer = stored_layer(name, entry)
        for folder, (layer_name, _) in _FOLDERS.items():
            own = name.removeprefix(layer_name(""))
            if own != name:
                names += [f"{folder}.{own}.{score}" for score in layer.names] or [f"{folder}.{own}"]
    return ", ".join(names)


def _known_column(path: tuple[str, ...], manifest: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The part of a path that names a column, or a score of a layer. Raises UserError."""
    if path[0] in _SAMPLES:
        return path[:1]
    entry = manifest["layers"].get(_layer_of(path)) if path[0] in _FOLDERS and len(path) > 1 else None
    names = stored_layer(_layer_of(path), entry).names if entry else ()
    if entry is None or (names and len(path) > 2 and path[2] not in names):
        message = f"{where}: there is no column {'.'.join(path)}. It may name {_known(manifest)}."
        if entry is None and path[0] in _FOLDERS:
            message += f" An entry of `{path[0]}:` in the config of `reinforce run` adds one."
        elif not any(name.startswith(scores_layer("")) for name in manifest["layers"]):
            message += " It has no scores: entries of `scores:` in the config of `reinforce run` add them."
        raise UserError(message)
    return path[:2]


def _schema(expression: Expression, manifest: Mapping[str, Any]) -> pa.Schema:
    """The columns that an expression names, with their types."""
    tables = {SAMPLES: pa.schema([*_SAMPLES.items()]).empty_table()}
    for name in expression.layers:
        schema = stored_layer(name, manifest["layers"][name]).schema(manifest["images"])
        tables[name] = schema.empty_table()
    return join_rows([expression], tables).schema


def join_rows(expressions: Sequence[Expression], tables: Mapping[str, pa.Table]) -> pa.Table:
    """One table of all that expressions name: columns of samples, and structs of layers by name."""
    columns: dict[str, Any] = {}
    for one in expressions:
        columns |= {name: tables[SAMPLES][name] for name in one.sample_columns}
    for folder, (_, column) in _FOLDERS.items():
        paths = sorted({path for one in expressions for path in one.columns if path[0] == folder})
        if paths:
            arrays = [tables[_layer_of(path)][column].combine_chunks() for path in paths]
            columns[folder] = pa.StructArray.from_arrays(arrays, names=[path[1] for path in paths])
    return pa.table(columns)


def numbers(values: pa.Array) -> npt.NDArray[np.float64]:
    """Values of an expression as float64 [rows]; NaN where they are null."""
    found: npt.NDArray[np.float64] = values.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(False)
    return found
