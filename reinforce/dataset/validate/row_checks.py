"""Checks of the rows of a layer's file: vectors, captions, augmentation records, and null rows against the quarantine.

A vector has norm 1 within 0.01 when it is stored; the storage type adds its own error. A row that a layer could not
serve is null and has a reason in the layer's quarantine, and no other row has one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reinforce.dataset.kinds.registry import stored_layer
from reinforce.terminal import first_names, plural


class RowChecks:
    """What is wrong with the rows of one file of ``layer``, in any number of row groups.

    ``entry`` is the layer's in dataset.json, ``records`` the number of augmentation records of a sample there.
    """

    def __init__(self, layer: str, entry: Mapping[str, Any], records: int | None) -> None:
        self._layer, self._records = stored_layer(layer, entry), records
        self._wrong: dict[str, list[str]] = {}  # keys of rows by what is wrong with them
        self._null: set[str] = set()
        self._present: set[str] = set()

    def add(self, table: pa.Table) -> None:
        """Check a row group with all columns of the layer."""
        kind = self._layer.kind
        if kind.values is not None:
            valid = table[kind.values].is_valid()
            self._null.update(table["key"].filter(pc.invert(valid)).to_pylist())
            self._present.update(table["key"].filter(valid).to_pylist())
        for what, wrong in kind.wrong_rows(self._layer, table, self._records):
            self._add(what, table, wrong)

    def _add(self, what: str, table: pa.Table, wrong: Any) -> None:
        if wrong.any():
            self._wrong.setdefault(what, []).extend(table["key"].filter(pa.array(wrong)).to_pylist())

    def problems(self, quarantined: Collection[str] | None) -> list[str]:
        """One phrase for each kind of problem; ``quarantined`` are the keys in the layer's quarantine of the shard, or
        None if they are not known."""
        lines = [_describe(keys, what) for what, keys in self._wrong.items()]
        if quarantined is None:
            return lines
        if unexplained := self._null.difference(quarantined):
            lines.append(_describe(unexplained, "are null without a reason in the quarantine"))
        if present := self._present.intersection(quarantined):
            lines.append(_describe(present, "are in the quarantine although they have values"))
        return lines


def _describe(keys: Collection[str], what: str) -> str:
    return f"{plural(len(keys), 'row')} {what} ({first_names(sorted(keys))})"
