"""Finished datasets with changed bytes and values: read in every way, they give samples or a UserError.

Parquet files as sources with changed bytes give samples or refusals, in bounded memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

import reinforce
from reinforce.dataset.status import read_status
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.errors import UserError
from reinforce.source import parquet_file as checked_file
from reinforce.source.config import Input, Limits
from reinforce.source.formats.base import Shard, read_samples
from reinforce.source.samples import RawSample, Refusal
from reinforce.student.config import Data
from reinforce.student.data.feed import StudentFeed
from schemas import Reason
from tests.helpers.in_loaders import letters
from tests.helpers.reinforced import small_dataset

ROWS = 8
INDEX = "index"
LAYERS = ["samples", "captions/namer", "embeddings/red/images", "embeddings/blue/caption", "quarantine/samples", INDEX]
SUMMARY = {"run": "r", "shards": 1, "seconds": 1.0, "message": "done", "cleaned": {"namer": {"dropped": 1}}}


@functools.cache
def dataset() -> Path:
    """A good dataset of one shard, which is deleted at the end.

    It has neither checksums nor an index, as nobody would write them who forges a dataset: they would end most cases
    before anything is decoded.
    """
    folder = Path(_temporary().name)
    writer = pq.ParquetWriter
    with mock.patch.object(pq, "ParquetWriter", lambda *a, **k: writer(*a, **{**k, "write_page_checksum": False})):
        made = Path(small_dataset(folder, (ROWS,)))
    (made / INDEX).rename(folder / INDEX)
    (made / INDEX).mkdir()
    shard = next((made / "samples").iterdir()).stem
    Store(str(made)).quarantine("samples", shard, [("k", Reason.NO_IMAGE, "none"), (None, Reason.SHARD_DAMAGED, "cut")])
    (made / "runs" / "r").mkdir(parents=True)
    (made / "runs" / "r" / "summary.json").write_text(json.dumps(SUMMARY))
    shutil.rmtree(folder / "source")
    return made


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="reinforce-fuzz-")


def layer_file(layer: str) -> Path:
    return min((dataset().parent / layer if layer == INDEX else dataset() / layer).iterdir())


@functools.cache
def places(layer: str) -> list[int]:
    """Where the pages and the footer of a layer's file begin."""
    path = layer_file(layer)
    data, footer = path.read_bytes(), pq.read_metadata(path)
    found = [len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data) - 8]
    for group in range(footer.num_row_groups):
        for column in map(footer.row_group(group).column, range(footer.num_columns)):
            found.append(column.data_page_offset)
            found += [column.dictionary_page_offset] if column.has_dictionary_page else []
    return found


#: Where bytes change: anywhere, or at most 40 bytes after the beginning of a page or the footer; with the new bytes.
CHANGES = st.lists(
    st.tuples(
        st.one_of(
            st.tuples(st.just(-1), st.floats(0, 1, exclude_max=True)),
            st.tuples(st.integers(0, 60), st.floats(0, 1, exclude_max=True)),
        ),
        st.one_of(
            st.binary(min_size=1, max_size=6),
            st.sampled_from([b"\xff" * 5 + b"\x07", b"\x00" * 4, b"\xff\xff\xff\x7f", b"\x80" * 9]),
        ),
        st.booleans(),  # whether they are inserted
    ),
    min_size=1,
    max_size=3,
)


def json_values(*others: Any) -> st.SearchStrategy[Any]:
    """Values of JSON, and of strategies for others."""
    return st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), *others),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
        max_leaves=8,
    )


NAMES = st.sampled_from(["reference", "embed", "float32", "int8", "samples", "captions", "../x", "\x1b[2J", 10**13])


def changed(good: bytes, starts: Sequence[int], changes: list[tuple[tuple[int, float], bytes, bool]]) -> bytes:
    """A file with changes of ``CHANGES``; ``starts`` are where its pages and its footer begin."""
    data = bytearray(good)
    for (number, share), value, inserted in changes:
        at = int(share * len(good)) if number < 0 else starts[number % len(starts)] + int(share * 40)
        data[at : at if inserted else at + len(value)] = value
    return bytes(data)


def changed_bytes(layer: str, changes: list[tuple[tuple[int, float], bytes, bool]]) -> None:
    """A Parquet file with bytes replaced or inserted in its pages, their headers and its footer."""
    path = layer_file(layer)
    good = path.read_bytes()
    data = changed(good, places(layer), changes)
    if layer == INDEX:
        try:
            (dataset() / INDEX / path.name).write_bytes(data)
            read_every_way()
        finally:
            (dataset() / INDEX / path.name).unlink()
        return
    with replaced(path, good, data):
        read_every_way()


def changed_values(name: str, path: list[int], value: Any, removed: bool) -> None:
    """A JSON file in which one value, at any depth, is another one or missing."""
    file = dataset() / name
    good = file.read_bytes()
    document = part = json.loads(good)
    for number, step in enumerate(path):
        keys: list[Any] = [*part] if isinstance(part, dict) else [*range(len(part))]
        if not keys:
            break
        key = keys[step % len(keys)]
        if number == len(path) - 1 or not isinstance(part[key], (dict, list)):
            if removed:
                del part[key]
            else:
                part[key] = value
            break
        part = part[key]
    with replaced(file, good, json.dumps(document).encode("utf-8", "surrogatepass")):
        read_every_way()


@contextlib.contextmanager
def replaced(path: Path, good: bytes, bad: bytes) -> Any:
    path.write_bytes(bad)
    try:
        yield
    finally:
        path.write_bytes(good)


def read_every_way() -> None:
    """Inspect and validate the dataset, iterate it, and read it as a training does."""
    url = str(dataset())
    with contextlib.suppress(UserError):
        read_status(url)
    with contextlib.suppress(UserError):
        validate(url)
    with contextlib.suppress(UserError):
        data = reinforce.open(url)
        repr(data)
        for sample in data:
            assert isinstance(sample.image, bytes)
            with contextlib.suppress(UserError):
                sample.augmented(0)
    with contextlib.suppress(UserError):
        feed = StudentFeed(Data.model_validate({"datasets": url, "workers": 0}), 0, 16, letters)
        for number, _ in enumerate(feed.batches(0, 1, 4, 0)):
            if number == 2:
                break


TABLE_ROWS = 300
TEXTS = ("DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN")
FILES = list(itertools.product(TEXTS, ("1.0", "2.0"), ("none", "zstd")))


@functools.cache
def written(file: tuple[str, str, str]) -> tuple[bytes, list[int]]:
    """A good file, and where its pages and its footer begin."""
    encoding, version, compression = file
    columns = {
        "image": [bytes([n % 256]) * (n % 50) for n in range(TABLE_ROWS)],
        "key": [f"prefix/{n:05d}" for n in range(TABLE_ROWS)],
        "text": [None if n % 5 == 0 else f"caption {n}" for n in range(TABLE_ROWS)],
        "tags": [["a", f"b{n}"] for n in range(TABLE_ROWS)],
        "number": [*range(TABLE_ROWS)],
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
        for item in read_samples(read, Input(limits=Limits(shard_samples=2 * TABLE_ROWS))):
            assert isinstance(item, RawSample | Refusal)
    assert pa.default_memory_pool().bytes_allocated() < 2**28


TARGETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "table": (changed_table, {"file": st.sampled_from(FILES), "changes": CHANGES}),
    "dataset": (changed_bytes, {"layer": st.sampled_from(LAYERS), "changes": CHANGES}),
    "manifest": (
        changed_values,
        {
            "name": st.sampled_from(["dataset.json", "dataset.json", "runs/r/summary.json"]),
            "path": st.lists(st.integers(0, 20), min_size=1, max_size=5),
            "value": json_values(NAMES),
            "removed": st.booleans(),
        },
    ),
}
