"""What an expression of SQL consists of, by its parsed statement: the columns it names, and that a row decides alone.

An aggregate, a window or ``unnest`` computes a value from several rows, or several rows from one. A function such as
``random`` or ``now`` gives another value each time. Neither can decide whether a view keeps a sample.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reinforce.errors import UserError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_NOT_A_QUERY = "must be one expression, without SELECT, FROM and subqueries"
#: Classes of nodes whose value depends on their children alone. ``FUNCTION`` and ``LAMBDA`` are checked by themselves.
_BY_ROW = {"BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "OPERATOR"}
_BY_ROW |= {"TYPE"}
_OPERATORS_OF_ROWS = {"GROUPING_FUNCTION"}
_CURRENT = {("age", 1)}  # functions that depend on the present time with so many arguments
_MAX_DEPTH = 8  # of macros in macros


@dataclass(frozen=True)
class _Function:
    """Functions of one name. ``kinds`` are duckdb's, ``pure`` is whether one of them depends on its arguments alone."""

    kinds: frozenset[str]
    pure: bool
    takes_lambda: bool
    macros: tuple[tuple[tuple[str, ...], str], ...]  # parameters and definition


def columns_of(database: DuckDBPyConnection, text: str, where: str) -> list[tuple[str, ...]]:
    """The path of each column that an expression names. ``where`` is its place for messages.

    Raises UserError if ``text`` is not one expression that computes a value of each row from this row alone.
    """
    parsed = _parse(database, text)
    if parsed["error"]:
        raise UserError(f"{where}: {text!r} is not an expression of SQL: {parsed['error_message']}")
    nodes = [statement["node"] for statement in parsed["statements"]]
    plain = len(nodes) == 1 and nodes[0]["type"] == "SELECT_NODE" and len(nodes[0]["select_list"]) == 1
    if not plain or nodes[0]["from_table"]["type"] != "EMPTY":
        raise UserError(f"{where}: {text!r} {_NOT_A_QUERY}")
    walk = _Walk(_functions(database), database)
    try:
        return list(dict.fromkeys(walk.columns(nodes[0]["select_list"], frozenset())))
    except _Refused as error:
        raise UserError(f"{where}: {text!r} {error}") from None


def _parse(database: DuckDBPyConnection, text: str) -> dict[str, Any]:
    [[serialized]] = database.execute("SELECT json_serialize_sql(?)", [f"SELECT {text}"]).fetchall()
    parsed: dict[str, Any] = json.loads(serialized)
    return parsed


_known: dict[str, _Function] = {}


def _functions(database: DuckDBPyConnection) -> Mapping[str, _Function]:
    """The functions of duckdb by name, which are listed once a process."""
    if not _known:
        query = "SELECT function_name, function_type, stability, parameter_types, parameters, macro_definition "
        rows: dict[str, list[tuple[Any, ...]]] = {}
        for name, *row in database.execute(f"{query} FROM duckdb_functions()").fetchall():
            rows.setdefault(name.lower(), []).append(tuple(row))
        for name, found in rows.items():
            _known[name] = _Function(
                frozenset(kind for kind, *_ in found),
                any(kind == "scalar" and stability == "CONSISTENT" for kind, stability, *_ in found),
                any("LAMBDA" in map(str, types or ()) for _, _, types, *_ in found),
                tuple((tuple(names), text) for kind, _, _, names, text in found if kind == "macro" and text),
            )
    return _known


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
            self._check_function(name, len(node.get("arguments") or node.get("children") or ()))
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
        if not found.kinds & {"scalar", "macro"}:
            raise _Refused(f"has {name}, which does not make one value of one row. Use functions of lists.")
        for parameters, definition in found.macros if "scalar" not in found.kinds else ():
            self._check_macro(name, parameters, definition)

    def _check_macro(self, name: str, parameters: Collection[str], definition: str) -> None:
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
