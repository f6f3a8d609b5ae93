"""Expressions of SQL over the rows of a shard, checked by their parsed statement and computed by duckdb.

An aggregate, a window or ``unnest`` computes a value from several rows, or several rows from one. A function such as
``random`` or ``now`` gives another value each time, ``hash`` and ``version`` with each version of duckdb. None of them
can decide whether a view keeps a sample.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.kinds.scores import Scores
from reinforce.dataset.layers import SAMPLES, matches
from reinforce.errors import UserError
from reinforce.processes.imports import require

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
#: Types of NumPy that have the numbers of a type exactly, where float64 is larger or does not.
_EXACT = dict.fromkeys(("FLOAT", "TINYINT", "SMALLINT", "UTINYINT", "USMALLINT"), "float32")
_EXACT |= {"BIGINT": "int64", "UBIGINT": "uint64"}
#: Folders of layers that an expression may name, as ``FOLDER.NAME``, and names of the columns with their values.
_FOLDERS = ("scores", "captions")
_NOT_A_QUERY = "must be one expression, without SELECT, FROM and subqueries"
#: Classes of nodes whose value depends on their children alone. ``FUNCTION`` and ``LAMBDA`` are checked by themselves.
_BY_ROW = {"BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "OPERATOR"}
_BY_ROW |= {"TYPE"}
_OPERATORS_OF_ROWS = {"GROUPING_FUNCTION"}
_CURRENT = {("age", 1)}  # functions that depend on the present time with so many arguments
#: Functions of hashes, plans and encodings inside duckdb, which differ between its versions.
_BY_VERSION = {"hash", "version", "create_sort_key", "icu_sort_key", "index_key", "can_cast_implicitly"}
_BY_VERSION |= {"json_serialize_plan", "json_serialize_sql", "json_deserialize_sql", "parse_duckdb_log_message"}
_BY_VERSION |= {"to_aggregate_state", "combine", "finalize"}
_INTERNAL = "__internal"  # begins the names of functions of duckdb's optimiser
#: Functions that apply an aggregate by its name to a list, and beginnings of names of those that estimate by hashes or
#: take samples.
_OF_LISTS = {"list_aggregate", "list_aggr", "array_aggregate", "array_aggr", "aggregate"}
_ESTIMATES = ("approx_", "reservoir_")
_MAX_DEPTH = 8  # of macros in macros


def connect() -> DuckDBPyConnection:
    """A database in memory, of one thread and in UTC, that reads no files. Raises UserError.

    It starts no threads: a forked process, such as a worker of a DataLoader, closes the databases of its
    parent's other threads, and crashes where it has to join threads, which do not exist in it.
    """
    require("select", "reinforce select", "duckdb")
    import duckdb

    config: dict[str, Any] = {"threads": 1, "enable_external_access": "false", "allow_community_extensions": "false"}
    database = duckdb.connect(":memory:", config=config)
    for setting in ("lambda_syntax = 'ENABLE_SINGLE_ARROW'", "async_threads = 0", "TimeZone = 'UTC'"):
        with contextlib.suppress(duckdb.Error):  # earlier versions have this syntax alone, and no such threads
            database.execute(f"SET {setting}")
    return database


@dataclass(frozen=True)
class Expression:
    """An expression that was checked against a dataset: its text, and the columns that it names.

    ``dtype`` is the type of NumPy in which its values are compared, if they are numbers.
    """

    text: str
    columns: tuple[tuple[str, ...], ...]
    dtype: str = "float64"

    @property
    def layers(self) -> set[str]:
        """The layers that it is computed from, besides the samples."""
        return {f"{path[0]}/{path[1]}" for path in self.columns if path[0] in _FOLDERS}

    @property
    def sample_columns(self) -> set[str]:
        return {path[0] for path in self.columns if path[0] not in _FOLDERS}


def check(text: str, manifest: Mapping[str, Any], where: str, kind: Kind) -> Expression:
    """Check an expression before anything is read: its syntax, its columns and its type.

    A value of any type (``group``) becomes its text. ``where`` names it in messages. Raises UserError.
    """
    with connect() as database:
        parsed = _parse(database, text)
        if parsed["error"]:
            raise UserError(f"{where}: {text!r} is not an expression of SQL: {parsed['error_message']}")
        nodes = [statement["node"] for statement in parsed["statements"]]
        plain = len(nodes) == 1 and nodes[0]["type"] == "SELECT_NODE" and len(nodes[0]["select_list"]) == 1
        if not plain or nodes[0]["from_table"]["type"] != "EMPTY":
            raise UserError(f"{where}: {text!r} {_NOT_A_QUERY}")
        if not _listed:
            _listed.update({name: _Function(*facts) for name, *facts in database.execute(_FUNCTIONS).fetchall()})
        try:
            columns = dict.fromkeys(_Walk(_listed, database).columns(nodes[0]["select_list"], frozenset()))
        except _Refused as error:
            raise UserError(f"{where}: {text!r} {error}") from None
        if not columns:
            raise UserError(f"{where}: {text!r} names no column. It may name {_known(manifest)}.")
        found = Expression(text, tuple(_known_column(path, manifest, where) for path in columns))
        tables = {SAMPLES: pa.schema([*_SAMPLES.items()]).empty_table()}
        for name in found.layers:
            schema = stored_layer(name, manifest["layers"][name]).schema(manifest["images"])
            tables[name] = schema.empty_table()
        rows = join_rows([found], tables)
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
    return Expression(text, found.columns, _EXACT.get(name, "float64"))


def evaluate(database: DuckDBPyConnection, texts: Sequence[str], rows: pa.Table) -> list[pa.Array]:
    """The value of checked expressions [rows]; ``rows`` are those of ``join_rows``.

    Raises UserError for a row on which one fails.
    """
    values = ", ".join(f"({text}) AS value_{n}" for n, text in enumerate(texts))
    # Rows that duckdb divides among vectors keep their order, since there is one thread.
    try:
        found = database.from_arrow(rows).project(values).to_arrow_table()
    except Exception as error:  # as above
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"an expression fails on a sample: {reason}. Use try_cast, or try().") from error
    if len(found) != len(rows):
        named = ", ".join(map(repr, texts))
        raise UserError(f"{named}: {len(found):,} values of {len(rows):,} rows. An expression gives one value a row.")
    return [column.combine_chunks() for column in found.columns]


def _known(manifest: Mapping[str, Any]) -> str:
    """The columns that an expression may name."""
    names = [*_SAMPLES]
    for name, entry in manifest["layers"].items():
        layer = stored_layer(name, entry)
        for folder in _FOLDERS:
            own = name.removeprefix(f"{folder}/")
            if own != name:
                column = f"{folder}.{own}" if own.isidentifier() else f'{folder}."{own}"'
                names += [f"{column}.{score}" for score in layer.names] or [column]
    return ", ".join(names)


def _known_column(path: tuple[str, ...], manifest: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The part of a path that names a column, or a score of a layer. Raises UserError."""
    if path[0] in _SAMPLES:
        return path[:1]
    layer = "/".join(path[:2])
    entry = manifest["layers"].get(layer) if path[0] in _FOLDERS and len(path) > 1 else None
    names = stored_layer(layer, entry).names if entry else ()
    if entry is None or (names and len(path) > 2 and path[2] not in names):
        message = f"{where}: there is no column {'.'.join(path)}. It may name {_known(manifest)}."
        if entry is None and path[0] in _FOLDERS:
            message += f" An entry of `{path[0]}:` in the config of `reinforce run` adds one."
        elif not any(matches(name, Scores.pattern) for name in manifest["layers"]):
            message += " It has no scores: entries of `scores:` in the config of `reinforce run` add them."
        raise UserError(message)
    return path[:2]


def join_rows(expressions: Sequence[Expression], tables: Mapping[str, pa.Table]) -> pa.Table:
    """One table of all that expressions name: columns of samples, and structs of layers by name."""
    columns: dict[str, Any] = {}
    for one in expressions:
        columns |= {name: tables[SAMPLES][name] for name in one.sample_columns}
    for folder in _FOLDERS:
        paths = sorted({path for one in expressions for path in one.columns if path[0] == folder})
        if paths:
            arrays = [tables[f"{folder}/{path[1]}"][folder].combine_chunks() for path in paths]
            columns[folder] = pa.StructArray.from_arrays(arrays, names=[path[1] for path in paths])
    return pa.table(columns)


def numbers(values: pa.Array, text: str) -> npt.NDArray[np.float64]:
    """Values of the expression ``text`` as float64 [rows]; NaN where they are null.

    Raises UserError if one is not exact: above 2^53 several integers are one number of float64, and so are
    some numbers of DECIMAL.
    """
    try:
        found = values.cast(pa.float64())
        same = not pa.types.is_decimal(values.type) or found.cast(values.type).equals(values)
    except pa.ArrowInvalid:
        same = False
    if not same:
        raise UserError(
            f"{text!r} gives numbers of {values.type} that float64 does not have, such as integers above 2^53. Cast "
            "it to DOUBLE to round them, or to BIGINT in `keep`, which is exact."
        )
    floats: npt.NDArray[np.float64] = found.fill_null(np.nan).to_numpy(zero_copy_only=False)
    return floats


def comparable(values: pa.Array, expression: Expression) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Numbers in the ``dtype`` of their expression [rows], and which rows have one [rows]: neither null nor NaN.

    Raises UserError as ``numbers``.
    """
    if np.dtype(expression.dtype).kind in "iu":
        return values.fill_null(0).to_numpy(zero_copy_only=False), np.asarray(values.is_valid())
    found = numbers(values, expression.text).astype(expression.dtype)
    return found, ~np.isnan(found)


@dataclass(frozen=True)
class _Function:
    """Functions of one name. ``kinds`` are duckdb's, ``pure`` is whether one of them depends on its arguments alone."""

    kinds: Collection[str]
    pure: bool
    takes_lambda: bool
    macros: Sequence[tuple[Sequence[str], str]]  # parameters and definition


_FUNCTIONS = """
SELECT lower(function_name), list(DISTINCT function_type),
    coalesce(bool_or(function_type = 'scalar' AND stability = 'CONSISTENT'), false),
    coalesce(bool_or(list_contains(parameter_types, 'LAMBDA')), false),
    coalesce(
        list(row(parameters, macro_definition)) FILTER (WHERE function_type = 'macro' AND macro_definition != ''), []
    )
FROM duckdb_functions() GROUP BY ALL
"""


def _parse(database: DuckDBPyConnection, text: str) -> dict[str, Any]:
    [[serialized]] = database.execute("SELECT json_serialize_sql(?)", [f"SELECT {text}"]).fetchall()
    parsed: dict[str, Any] = json.loads(serialized)
    return parsed


_listed: dict[str, _Function] = {}  # of duckdb by name, once a process


class _Refused(Exception):
    """The part of an expression that is not computed from one row."""


@dataclass(frozen=True)
class _Walk:
    """Walks through the nodes of a parsed expression."""

    functions: Mapping[str, _Function]
    database: DuckDBPyConnection
    depth: int = 0

    def columns(self, node: Any, names: Collection[str], lambdas: bool = False) -> Iterator[tuple[str, ...]]:
        """The path of each column below a node; ``names`` are parameters of lambdas, which are no columns.

        ``lambdas`` is whether the node is an argument of a function that takes lambdas; elsewhere the same syntax is
        the arrow of JSON.
        """
        if isinstance(node, list):
            for one in node:
                yield from self.columns(one, names, lambdas)
            return
        if not isinstance(node, dict):
            return
        kind, below = node.get("class"), lambdas
        if kind is not None:
            below = self._check(node, kind)
            if kind == "COLUMN_REF":
                if node["column_names"][0] not in names:
                    yield tuple(node["column_names"])
                return
            if kind == "LAMBDA" and lambdas:
                own = {str(path[0]) for path in self.columns(node["lhs"], frozenset())}
                yield from self.columns(node["expr"], {*names, *own})
                return
        for value in node.values():
            yield from self.columns(value, names, below)

    def _check(self, node: Mapping[str, Any], kind: str) -> bool:
        """Raise _Refused for a node that needs other rows; returns whether its arguments may be lambdas."""
        if kind == "FUNCTION":
            name = str(node["function_name"]).lower()
            arguments = node.get("arguments") or node.get("children") or ()
            self._check_function(name, len(arguments))
            if name in _OF_LISTS:  # the name of the aggregate must be stated, and its value exact
                nodes = [one.get("expression", one) for one in arguments[1:2]]  # in duckdb 2 an argument has a name
                if any(node["class"] != "CONSTANT" for node in nodes):
                    raise _Refused(f"has {name} of an aggregate whose name is no constant")
                if any(f'"{one}' in json.dumps(nodes).lower() for one in _ESTIMATES):
                    raise _Refused(f"has {name} of an estimate, whose value depends on the version of duckdb")
            return name in self.functions and self.functions[name].takes_lambda
        if kind in ("SUBQUERY", "STAR"):
            raise _Refused(_NOT_A_QUERY)
        if kind == "WINDOW":
            raise _Refused("has a window over several rows. An expression is computed from the sample's own row.")
        if kind not in _BY_ROW | {"LAMBDA"} or node.get("type") in _OPERATORS_OF_ROWS:
            what = str(node.get("type", kind)).lower().replace("_", " ")
            raise _Refused(f"has a {what}, which is not computed from the sample's own row")
        return False

    def _check_function(self, name: str, arguments: int) -> None:
        found = self.functions.get(name)
        if found is None:  # the binder of duckdb reports it, with names that are similar
            return
        if "aggregate" in found.kinds and "scalar" not in found.kinds:
            of_lists = f"list_{name}" if f"list_{name}" in self.functions else "list_aggregate"
            raise _Refused(
                f"has {name}, an aggregate of several rows. An expression is computed from the sample's own row; "
                f"{of_lists} is for the values of a list."
            )
        if "scalar" in found.kinds and (not found.pure or (name, arguments) in _CURRENT):
            raise _Refused(f"has {name}, whose value does not depend on the sample's own row alone")
        if name in _BY_VERSION or name.startswith(_INTERNAL):
            fix = ". Use md5_number_lower." if name == "hash" else ""
            raise _Refused(f"has {name}, whose value depends on the version of duckdb{fix}")
        if {"scalar", "macro"}.isdisjoint(found.kinds):
            raise _Refused(f"has {name}, which does not make one value of one row. Use functions of lists.")
        for parameters, definition in found.macros if "scalar" not in found.kinds else ():
            parsed: dict[str, Any] = _parse(self.database, definition) if self.depth < _MAX_DEPTH else {"error": True}
            if parsed["error"]:
                raise _Refused(f"has {name}, which cannot be checked. Write what it stands for.")
            inside = _Walk(self.functions, self.database, self.depth + 1)
            nodes = [statement["node"]["select_list"] for statement in parsed["statements"]]
            try:
                others = [*inside.columns(nodes, frozenset())]
            except _Refused as error:
                raise _Refused(f"has {name}, which {error}") from None
            if unknown := {path[0].lower() for path in others} - {one.lower() for one in parameters}:
                raise _Refused(f"has {name}, which depends on {', '.join(sorted(unknown))}")
