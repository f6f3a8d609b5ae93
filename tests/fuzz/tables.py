"""Parquet files as sources with changed bytes: they give samples or refusals, in bounded memory."""

from __future__ import annotations

import functools
import itertools
from typing import Any
from unittest import mock

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from reinforce.input_config import Input, Limits
from reinforce.parquet import checked_file
from reinforce.source.formats.base import Shard
from reinforce.source.reading import read_samples
from reinforce.source.samples import RawSample, Refusal
from tests.fuzz.datasets import CHANGES, changed

ROWS = 300
TEXTS = ("DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN")
FILES = list(itertools.product(TEXTS, ("1.0", "2.0"), ("none", "zstd")))


@functools.cache
def written(file: tuple[str, str, str]) -> tuple[bytes, list[int]]:
    """A good file, and where its pages and its footer begin."""
    encoding, version, compression = file
    columns = {
        "image": [bytes([n % 256]) * (n % 50) for n in range(ROWS)],
        "key": [f"prefix/{n:05d}" for n in range(ROWS)],
        "text": [None if n % 5 == 0 else f"caption {n}" for n in range(ROWS)],
        "tags": [["a", f"b{n}"] for n in range(ROWS)],
        "number": [*range(ROWS)],
    }
    encodings = dict.fromkeys(("image", "key", "text", "tags.list.element"), encoding)
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(columns),
        sink,
        use_dictionary=False,
        column_encoding={**encodings, "number": "DELTA_BINARY_PACKED"},
        data_page_version=version,
        compression=compression,
        data_page_size=2_000,
        write_batch_size=64,
    )
    data, footer = sink.getvalue().to_pybytes(), pq.read_metadata(pa.BufferReader(sink.getvalue()))
    group = footer.row_group(0)
    places = [group.column(i).data_page_offset for i in range(group.num_columns)]
    return data, [*places, len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data) - 8]


def changed_table(file: tuple[str, str, str], changes: list[tuple[tuple[int, float], bytes, bool]]) -> None:
    """A Parquet file with bytes replaced or inserted in its pages, their headers and its footer."""
    fsspec.filesystem("memory").pipe("/fuzz/x.parquet", changed(*written(file), changes))
    bounds = {"MAX_PAGE_BYTES": 2**24, "MAX_BATCH_BYTES": 2**26, "MAX_LIST_VALUES": 2**20}
    with mock.patch.multiple(checked_file, **bounds):
        read = Shard("memory://fuzz/x.parquet", "x", "parquet")
        for item in read_samples(read, Input(limits=Limits(shard_samples=2 * ROWS))):
            assert isinstance(item, RawSample | Refusal)
    assert pa.default_memory_pool().bytes_allocated() < 2**28


TARGETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "table": (changed_table, {"file": st.sampled_from(FILES), "changes": CHANGES}),
}
