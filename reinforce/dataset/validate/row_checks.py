"""Checks of the rows of a layer's file: vectors, captions, augmentation records, and null rows against the quarantine.

A vector has norm 1 within 0.01 when it is stored; the storage type adds its own error. A row that a layer could not
serve is null and has a reason in the layer's quarantine, and no other row has one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reinforce.dataset import vectors
from reinforce.dataset.layers import SAMPLES

_FLOAT_ERROR = 2e-3  # of the norm of a vector that is stored in float16
_NAMED = 3


class RowChecks:
    """What is wrong with the rows of one file of ``layer``, in any number of row groups.

    ``entry`` is the layer's in dataset.json, ``records`` the number of augmentation records of a sample there.
    """

    def __init__(self, layer: str, entry: Mapping[str, Any], records: int | None) -> None:
        self._layer, self._entry, self._records = layer, entry, records
        self._wrong: dict[str, list[str]] = {}  # keys of rows by what is wrong with them
        self._null: set[str] = set()
        self._present: set[str] = set()

    def add(self, table: pa.Table) -> None:
        """Check a row group with all columns of the layer."""
        kind = self._layer.partition("/")[0]
        if kind == SAMPLES:
            if self._records is not None:
                lengths = pc.list_value_length(table["augmentations"])
                wrong = pc.fill_null(pc.not_equal(lengths, self._records), True)
                self._add(f"do not have {self._records} augmentation records", table, wrong.to_numpy())
            return
        column = table["captions" if kind == "captions" else "embeddings"]
        valid = column.is_valid()
        self._null.update(table["key"].filter(pc.invert(valid)).to_pylist())
        self._present.update(table["key"].filter(valid).to_pylist())
        if kind == "captions":
            self._add_captions(table, column)
        else:
            self._add_vectors(table, column)

    def _add_captions(self, table: pa.Table, column: pa.ChunkedArray) -> None:
        count = self._entry.get("count")
        wrong = pc.fill_null(pc.not_equal(pc.list_value_length(column), count), False)
        self._add(f"do not have {count} captions", table, wrong.to_numpy())

    def _add_vectors(self, table: pa.Table, column: pa.ChunkedArray) -> None:
        count, dim, dtype = (self._entry.get(key) for key in ("count", "dim", "dtype"))
        shape, stored = [*column.type.shape], {"halffloat": "float16", "float": "float32"}
        found = stored.get(str(column.type.value_type), str(column.type.value_type))
        if shape != [count, dim or shape[1]] or found != dtype:
            every = np.ones(table.num_rows, np.bool_)
            self._add(
                f"have {found} vectors of shape {shape}, dataset.json states {dtype} {[count, dim]}", table, every
            )
            return
        values = vectors.decode(table)
        norms = np.sqrt(np.einsum("rcd,rcd->rc", values, values))
        valid = np.asarray(column.is_valid())
        wrong = ~(np.abs(norms - 1) <= _norm_tolerance(table, shape)).all(axis=1)
        self._add("have a vector whose norm is not 1", table, wrong & valid)

    def _add(self, what: str, table: pa.Table, wrong: npt.NDArray[np.bool_]) -> None:
        if wrong.any():
            self._wrong.setdefault(what, []).extend(table["key"].filter(pa.array(wrong)).to_pylist())

    def problems(self, quarantined: Collection[str]) -> list[str]:
        """One phrase for each kind of problem; ``quarantined`` are the keys in the layer's quarantine of the shard."""
        lines = [_describe(keys, what) for what, keys in self._wrong.items()]
        if unexplained := self._null.difference(quarantined):
            lines.append(_describe(unexplained, "are null without a reason in the quarantine"))
        if present := self._present.intersection(quarantined):
            lines.append(_describe(present, "are in the quarantine although they have values"))
        return lines


def _norm_tolerance(table: pa.Table, shape: list[int]) -> Any:
    """How far the norm of a stored vector may be from 1; for int8 [rows, count], from the step of each vector."""
    if "scales" not in table.column_names:
        return vectors.NORM_TOLERANCE + _FLOAT_ERROR
    scales = vectors.from_scales(table["scales"])
    return vectors.NORM_TOLERANCE + scales * (0.5 * np.sqrt(shape[1]))


def _describe(keys: Collection[str], what: str) -> str:
    named = ", ".join([*sorted(keys)[:_NAMED], *["..."] * (len(keys) > _NAMED)])
    return f"{len(keys):,} {'row' if len(keys) == 1 else 'rows'} {what} ({named})"
