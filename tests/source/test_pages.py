"""Parquet files: every encoding of the common writers, bounded memory for any bytes, and footers that are accepted."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforce.source import parquet_file as checked_file
from reinforce.source import parquet_file as footers
from reinforce.source.config import Limits
from reinforce.source.parquet_file import (
    FooterCheck,
    RefusedFile,
    check_together,
    footer_bytes,
    read_footer,
)
from reinforce.source.samples import RawSample
from tests.helpers.data import picture
from tests.helpers.tables import read_lazily, read_table, write_columns
from tests.hostile.bombs import BOMBS
from tests.hostile.parquet import (
    DELTA_BYTE_ARRAY,
    DELTA_LENGTH_BYTE_ARRAY,
    OPTIONAL,
    REQUIRED,
    RLE_DICTIONARY,
    Column,
    File,
    Page,
    i64,
    levels,
    run,
    text,
    varint,
    zigzag,
)

#: Rows that the tools write; texts that share beginnings, and nulls.
ROWS_OF_TOOLS: dict[str, list[Any]] = {
    "image": [picture(number, 8, 8) for number in range(200)],
    "key": [f"key/prefix/{number:06d}" for number in range(200)],
    "text": [None if number % 7 == 0 else f"a caption of number {number}" for number in range(200)],
    "tags": [["a", f"b{number}"] if number % 3 else None for number in range(200)],
    "number": [*range(200)],
    "real": [number / 3 for number in range(200)],
    "yes": [number % 2 == 0 for number in range(200)],
}


def test_a_row_group_is_never_decoded_as_a_whole(tmp_path: Path) -> None:
    image = bytes(2**20)
    rows = pa.table({"image": pa.array([image[:-1] + bytes([n]) for n in range(64)], pa.binary())})
    pages = {"compression": "none", "use_dictionary": False, "write_batch_size": 1}
    pq.write_table(rows, tmp_path / "x.parquet", **pages)
    del rows
    assert pq.read_metadata(tmp_path / "x.parquet").num_row_groups == 1
    before = pa.total_allocated_bytes()
    for number, item in enumerate(read_lazily(tmp_path / "x.parquet")):
        assert item.image[-1] == number
        assert pa.total_allocated_bytes() - before < 40 * 2**20
    assert number == 63


@pytest.mark.parametrize("bomb", [bomb for bomb in BOMBS if bomb.layer == "samples"], ids=lambda bomb: bomb.defect)
def test_files_of_kilobytes_do_not_need_gigabytes(tmp_path: Path, bomb: Any) -> None:
    (tmp_path / "x.parquet").write_bytes(bomb.write({}))
    spec = {"image": "caption", "limits": Limits(shard_samples=20)}
    for item in read_lazily(tmp_path / "x.parquet", **spec):
        assert pa.total_allocated_bytes() < 400 * 2**20
        assert item.key is not None or item.reason.value.startswith("shard_")


ENCODINGS = ("PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY")


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_texts_of_every_encoding_of_pyarrow_are_read(tmp_path: Path, version: str, compression: str) -> None:
    columns = dict(ROWS_OF_TOOLS)
    for encoding in ENCODINGS:
        encodings = dict.fromkeys(("image", "key", "text", "tags.list.element"), encoding)
        encodings |= {"number": "DELTA_BINARY_PACKED", "real": "BYTE_STREAM_SPLIT", "yes": "RLE"}
        options = {"data_page_version": version, "data_page_size": 3_000, "compression": compression}
        path = write_columns(
            tmp_path / "x.parquet",
            columns,
            use_dictionary=False,
            column_encoding=encodings,
            row_group_size=70,
            **options,
        )
        found = pq.read_metadata(path).row_group(0)
        assert all(encoding in found.column(i).encodings for i in range(3))
        check_rows_of_tools(path)


def test_files_of_duckdb_and_polars_are_read(tmp_path: Path) -> None:
    rows, path = pa.table(dict(ROWS_OF_TOOLS)), tmp_path / "x.parquet"
    for version, compression in itertools.product(("V1", "V2"), ("snappy", "zstd", "uncompressed")):
        with duckdb.connect() as connection:
            connection.register("rows", rows)
            # Versions of DuckDB differ in when they write a dictionary; without one, all have the expected encodings.
            options = f"format parquet, parquet_version {version}, compression {compression}, dictionary_size_limit 1"
            connection.execute(f"copy (select * from rows) to '{path}' ({options})")
        expected = "DELTA_LENGTH_BYTE_ARRAY" if version == "V2" else "PLAIN"
        assert pq.read_metadata(path).row_group(0).column(0).encodings == (expected,)
        check_rows_of_tools(path)
    for compression in ("zstd", "snappy", "uncompressed", "lz4"):
        polars.DataFrame(dict(ROWS_OF_TOOLS)).write_parquet(path, compression=compression)  # type: ignore[arg-type]
        check_rows_of_tools(path)


def check_rows_of_tools(path: Path) -> None:
    found = read_table(path)
    assert [item.key for item in found] == ROWS_OF_TOOLS["key"]
    assert [getattr(item, "image", item) for item in found] == ROWS_OF_TOOLS["image"]
    captions = [item.sidecars.get("txt", b"").decode() or None for item in found if isinstance(item, RawSample)]
    assert captions == ROWS_OF_TOOLS["text"]
    metadata = json.loads(found[8].sidecars["json"])  # type: ignore[union-attr]
    assert {name: metadata[name] for name in ("tags", "number", "real", "yes")} == {
        name: ROWS_OF_TOOLS[name][8] for name in ("tags", "number", "real", "yes")
    }


def packed(count: int, first: int, block: int = 2**30, minis: int = 1, deltas: bytes = b"\0\0") -> bytes:
    """``count`` integers in DELTA_BINARY_PACKED, of which all but the first differ by 0."""
    return varint(block) + varint(minis) + varint(count) + zigzag(first) + deltas


@pytest.mark.parametrize(
    ("encoding", "values", "body", "message"),
    [
        (DELTA_LENGTH_BYTE_ARRAY, 1, packed(2**29, 0), "a page of 1 values has 536,870,912 lengths"),
        (DELTA_BYTE_ARRAY, 1, packed(2**29, 0), "a page of 1 values has 536,870,912 lengths"),
        (DELTA_BYTE_ARRAY, 1, packed(1, 0)[:-2] + packed(2**29, 0), "a page of 1 values has 536,870,912 lengths"),
        (DELTA_LENGTH_BYTE_ARRAY, 2**29, packed(2**29, 0), "a page of 536,870,912 delta-encoded values"),
        (DELTA_BYTE_ARRAY, 900, packed(900, 2**24) + packed(900, 0), "a page of texts of 15,0"),
        (DELTA_BYTE_ARRAY, 2, packed(2, -5) + packed(2, 0), "a page has a length below 0"),
        (DELTA_BYTE_ARRAY, 2, packed(2, 5, deltas=b"\x13\0") + packed(2, 0), "a page has a length below 0"),
        (DELTA_LENGTH_BYTE_ARRAY, 2, packed(2, 0, block=128, minis=3), "in blocks that cannot be"),
        (DELTA_BYTE_ARRAY, 2, packed(2, 0)[:-1], "cut off"),
        (DELTA_BYTE_ARRAY, 2, packed(2, 0, block=128, minis=1, deltas=b"\0\x09"), "cut off"),
    ],
)
def test_delta_encoded_pages_are_bounded_by_what_their_bodies_say(
    tmp_path: Path, encoding: int, values: int, body: bytes, message: str
) -> None:
    file = File([Column([("image", REQUIRED)], [Page(body, values, encoding)])], values)
    (tmp_path / "x.parquet").write_bytes(file.encoded())
    before = pa.total_allocated_bytes()
    [(refusal, after)] = [(item, pa.total_allocated_bytes()) for item in read_lazily(tmp_path / "x.parquet")]
    assert refusal.reason.value == "shard_damaged"
    assert message in refusal.detail
    assert after - before < 2**20


def test_pages_are_bounded_by_their_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_file, "MAX_PAGE_BYTES", 10_000)
    for dictionary in (True, False):
        path = write_columns(tmp_path / "x.parquet", {"image": [bytes(20_000)]}, use_dictionary=dictionary)
        [refusal] = read_table(path)
        assert refusal.detail.endswith("; at most 10,000 are read")  # type: ignore[union-attr]


def test_rows_of_a_long_dictionary_entry_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_file, "MAX_BATCH_BYTES", 16_000_000)
    rows, image = 200, base64.b64encode(bytes(300_000))
    pages = [
        Page(text(image), 1, dictionary=True),
        Page(levels(rows, 1) + b"\x01" + run(rows, 0), rows, RLE_DICTIONARY),
    ]
    keys = [Page(b"".join(text(b"%03d" % n) for n in range(rows)), rows)]
    columns = [Column([("image", OPTIONAL)], pages), Column([("key", REQUIRED)], keys)]
    (tmp_path / "x.parquet").write_bytes(File(columns, rows).encoded())
    before = pa.total_allocated_bytes()
    for number, item in enumerate(read_lazily(tmp_path / "x.parquet")):
        assert (item.key, len(item.image)) == (f"{number:03d}", 300_000)
        assert pa.total_allocated_bytes() - before < 4_000_000
    assert number == rows - 1


NAMES = ["key"]


@pytest.fixture(autouse=True)
def _nothing_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footers, "_accepted", set())


def footer_of(data: bytes) -> tuple[pq.FileMetaData, list[str], bytes]:
    footer = read_footer(data, len(data))
    assert footer is not None
    return footer, NAMES, footer_bytes(data)


def one_key(key: bytes, offset: int | None = None) -> bytes:
    extra = {} if offset is None else {9: i64(offset)}
    return File([Column([("key", REQUIRED)], [Page(text(key), 1)], extra=extra)], 1).encoded()


def accepted_before(found: tuple[pq.FileMetaData, list[str], bytes], monkeypatch: pytest.MonkeyPatch) -> bool:
    with monkeypatch.context() as context:
        context.setattr(FooterCheck, "_begin", lambda *_: (_ for _ in ()).throw(RefusedFile("it is checked")))
        return FooterCheck(*found).accepted


def test_footers_of_equal_columns_are_checked_once_and_others_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, sink = footer_of(one_key(b"b", offset=-5)), pa.BufferOutputStream()
    with pytest.raises(RefusedFile, match="its footer cannot be used"):
        FooterCheck(*bad).check(0)
    pq.write_table(pa.table({"key": [1]}), sink)
    good = [footer_of(one_key(bytes([letter]))) for letter in b"abc"]
    for other in (bad, footer_of(sink.getvalue().to_pybytes())):  # that Arrow rejects, and of another schema
        found = [good[0], other, good[2]]
        check_together(found)
        assert not any(accepted_before(one, monkeypatch) for one in found)
    check_together(good)
    assert all(accepted_before(one, monkeypatch) for one in good)
    assert not FooterCheck(*bad).accepted


def test_a_check_keeps_no_memory() -> None:
    footer, names, _ = footer_of(one_key(b"a"))
    FooterCheck(footer, names)
    before = _resident()
    for _ in range(500):
        assert FooterCheck(footer, names).accepted
    assert _resident() - before < 2**20, "Arrow kept 5 KB for each exception in a file of Python"


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
