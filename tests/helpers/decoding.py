"""Decode processes that the tests of one process share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from reinforce.config import Config
from reinforce.engine.decode.cells import PixelLayout
from reinforce.engine.decode.decode_pool import CellLease, DecodePool
from reinforce.engine.decode.row import DecodeSpec, Row


@functools.cache
def decode_pool() -> DecodePool:
    """Two processes, which end with this one."""
    return DecodePool(2)


@contextmanager
def lease(config: Config, layout: PixelLayout, cells: int = 64) -> Iterator[CellLease]:
    """Pixel cells for rows with the pixels of ``layout``."""
    with decode_pool().lease(DecodeSpec(config, layout), cells) as taken:
        yield taken


def cell_of(row: Row) -> int:
    """The cell of a row that has pixels."""
    assert row.cell is not None
    return row.cell
