"""Decode processes that the tests of one process share, and rows that they decode."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from reinforce.config import Config
from reinforce.engine.worker.decode import CellLease, DecodePool, DecodeSpec, PixelLayout, Row
from reinforce.engine.worker.shard import GROUP_ROWS, rows_from_source
from reinforce.labels.members import LabelReader
from reinforce.source.formats.base import Shard
from reinforce.source.samples import Refusal
from teachers.protocols import ImageSpec


@functools.cache
def decode_pool() -> DecodePool:
    """Two processes, which end with this one."""
    return DecodePool(2)


@contextmanager
def lease(config: Config, layout: PixelLayout, cells: int = 64) -> Iterator[CellLease]:
    """Pixel cells for rows with the pixels of ``layout``."""
    with decode_pool().lease(DecodeSpec(config, layout), cells) as taken:
        yield taken


@dataclass(frozen=True)
class RowPixels:
    """A row, and copies of its crops [K, S, S, 3] and of the whole images."""

    row: Row
    crops: np.ndarray
    whole: dict[ImageSpec, np.ndarray]

    @property
    def key(self) -> str:
        return self.row.key


def copied(rows: Iterable[Row | Refusal], lease: CellLease) -> list[RowPixels | Refusal]:
    """The rows with copies of their pixels, after which their cells are free again."""
    found = list[RowPixels | Refusal]()
    for row in rows:
        if isinstance(row, Refusal):
            found.append(row)
            continue
        crops = np.empty(0) if lease.cells.crops is None else lease.cells.crops[row.cell].copy()
        found.append(RowPixels(row, crops, {spec: array[row.cell].copy() for spec, array in lease.cells.whole.items()}))
        lease.free.release([] if row.cell is None else [row.cell])
    return found


def read_source(
    config: Config, url: str, layout: PixelLayout, group_rows: int = GROUP_ROWS
) -> list[RowPixels | Refusal]:
    """Read a shard to rows with their pixels."""
    with lease(config, layout) as taken:
        return copied(rows_from_source(config, Shard(url), LabelReader(), taken, 4, group_rows), taken)
