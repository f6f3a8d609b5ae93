"""Parquet files as sources: those of img2dataset and Hugging Face's datasets, odd ones, damaged and hostile ones."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforce.config import Input, Limits
from reinforce.source.formats import parquet
from reinforce.source.formats.base import Shard
from reinforce.source.reading import read_samples
from reinforce.source.samples import RawSample, Refusal
from tests.helpers.data import picture
from tests.helpers.tables import IMG2DATASET, outcomes, read_table, write_huggingface
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
    levels,
    run,
    text,
    varint,
    zigzag,
)

IMAGES = [picture(number) for number in range(4)]
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


def written(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def read_lazily(path: Path | str, **spec: Any) -> Iterator[Any]:
    return read_samples(Shard(str(path), "shard", "parquet"), Input(**spec))


def test_files_of_img2dataset_are_read_with_their_keys_captions_and_metadata() -> None:
    first, second = map(read_table, IMG2DATASET)
    assert outcomes(first) == {f"{number:06d}": f"thing {number}" for number in range(6)}
    sample = first[0]
    assert isinstance(sample, RawSample)
    assert json.loads(sample.sidecars["json"])["original_width"] == 50
    assert sample.image.startswith(b"\xff\xd8")
    assert outcomes(second)["000014"] == "no_image: column jpg is null"
    assert len(outcomes(second)) == 5


def test_files_of_hugging_face_are_read_with_row_numbers_as_keys(tmp_path: Path) -> None:
    columns = {"text": ["a", "b", " ", "d"], "label": [1, 2, 3, 4]}
    path = write_huggingface(tmp_path / "x.parquet", [*IMAGES[:3], None], columns)
    found = read_table(path)
    assert outcomes(found) == {
        "shard-00000000": "a",
        "shard-00000001": "b",
        "shard-00000002": "None",
        "shard-00000003": "no_image: column image is null",
    }
    samples = [item for item in found if isinstance(item, RawSample)]
    assert [item.image for item in samples] == IMAGES[:3]
    assert samples[0].sidecars == {"txt": b"a", "json": b'{"text": "a", "label": 1}'}
    why = "no caption: looked for text in the columns txt, caption; the row has image, text, label"
    assert samples[2].why_no_caption(["txt", "json:caption"]) == why


def test_columns_are_named_by_the_config(tmp_path: Path) -> None:
    path = written(
        tmp_path / "x.parquet",
        {
            "photo": IMAGES[:3],
            "image": ["not", "these", "ones"],
            "id": [7, None, 7],
            "titles": [["", "one", "two"], [], None],
            "taken": [datetime(2020, 1, 2)] * 3,
            "other": [b"binary"] * 3,
        },
    )
    named = {"image": "photo", "key": "id", "captions": ["titles"]}
    first, second, repeated = read_table(path, **named, metadata=["taken", "absent"])
    assert (first.key, first.sidecars) == ("7", {"titles": b"one", "json": b'{"taken": "2020-01-02T00:00:00"}'})  # type: ignore[union-attr]
    assert (second.key, first.image) == ("shard-00000001", IMAGES[0])  # type: ignore[union-attr]
    assert (repeated.key, repeated.reason.value) == ("7", "duplicate_key")  # type: ignore[union-attr]
    assert read_table(path, **named, metadata="none")[0].sidecars == {"titles": b"one"}  # type: ignore[union-attr]
    assert set(json.loads(read_table(path, **named)[0].sidecars["json"])) == {"image", "id", "titles", "taken"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("columns", "spec", "detail"),
    [
        ({"url_": ["a"], "text": ["b"]}, {}, "no column has images: it has url_, text; name one in input.image"),
        ({"image": [1]}, {}, "column image has type int64; images are binary, a struct of bytes and path as Hugging"),
        ({"image": [b"x"]}, {"image": "jpg"}, "input.image: there is no column 'jpg'; it has image"),
        ({"image": [b"x"]}, {"key": "id"}, "input.key: there is no column 'id'; it has image"),
        ({"image": [[b"x"]]}, {}, "column image has type list<element: binary>"),
    ],
)
def test_a_file_without_usable_columns_is_refused_with_what_it_has(
    tmp_path: Path, columns: dict[str, Any], spec: dict[str, Any], detail: str
) -> None:
    [refusal] = read_table(written(tmp_path / "x.parquet", columns), **spec)
    assert (refusal.key, refusal.reason.value) == (None, "shard_unreadable")  # type: ignore[union-attr]
    assert refusal.detail.startswith(f"a Parquet file that cannot be used: {detail}")  # type: ignore[union-attr]


def test_values_that_are_no_images_cost_their_row(tmp_path: Path) -> None:
    encoded = base64.b64encode(IMAGES[0]).decode()
    urlsafe = base64.urlsafe_b64encode(IMAGES[1]).decode().rstrip("=")
    texts = [encoded, f"data:image/png;base64,{encoded}", urlsafe, "not base64!", "a" * 9000, None, ""]
    found = read_table(written(tmp_path / "x.parquet", {"image": texts}), limits=Limits(image_bytes=3100))
    *samples, broken, large, null, empty = found
    assert [getattr(item, "image", item) for item in samples] == [IMAGES[0], IMAGES[0], IMAGES[1]]
    assert isinstance(broken, Refusal)
    assert broken.detail == "column image: neither base64 nor a path or URL: 'not base64!'"
    assert (large.reason.value, null.reason.value) == ("image_bytes", "no_image")  # type: ignore[union-attr]
    assert getattr(empty, "image", None) == b"", "the image policy refuses it"


def test_keys_texts_and_rows_are_bounded(tmp_path: Path) -> None:
    columns = {"image": IMAGES, "key": ["a", "b" * 99, "c", "d"], "text": ["t", "t", "t" * 99, "t"]}
    limits = Limits(key_chars=9, sidecar_bytes=50, shard_samples=3)
    found = read_table(written(tmp_path / "x.parquet", columns), limits=limits, metadata="none")
    assert [item.reason.value for item in found if isinstance(item, Refusal)] == ["key_chars", "shard_samples"]
    assert found[2].left_out["txt"].detail == "txt: 99 bytes, above limits.sidecar_bytes of 50"  # type: ignore[union-attr]


def test_a_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    columns = {"image": [picture(number) for number in range(30)], "key": [f"{number:02d}" for number in range(30)]}
    path = written(tmp_path / "x.parquet", columns, row_group_size=10, write_page_checksum=True, compression="none")
    data = bytearray(path.read_bytes())
    data[data.index(columns["image"][12]) + 100] ^= 255
    path.write_bytes(data)
    found = read_table(path)
    assert [item.key for item in found] == [*columns["key"][:10], None, *columns["key"][20:]]
    assert found[10].reason.value == "shard_damaged"  # type: ignore[union-attr]
    assert found[10].detail.startswith("row group 1, from row 10 on: a page does not have its checksum")  # type: ignore[union-attr]
    path.write_bytes(data[:-100])
    [refusal] = read_table(path)
    assert refusal.detail == "a Parquet file that cannot be used: it is not a Parquet file, or it is cut off"  # type: ignore[union-attr]


def test_files_without_rows_have_no_samples(tmp_path: Path) -> None:
    empty = pa.table({"image": pa.array([], pa.binary())})
    pq.write_table(empty, tmp_path / "x.parquet")
    assert read_table(tmp_path / "x.parquet") == []
    with pq.ParquetWriter(tmp_path / "x.parquet", empty.schema) as writer:
        for part in (empty, pa.table({"image": IMAGES[:1]}), empty):
            writer.write_table(part)
    assert [item.key for item in read_table(tmp_path / "x.parquet")] == ["shard-00000000"]


def test_texts_in_columns_of_paths_are_paths(tmp_path: Path) -> None:
    struct = [{"bytes": None, "path": "/etc/passwd"}]
    for image in ({"file_name": ["/etc/passwd"]}, {"image": struct}):
        [refusal] = read_table(written(tmp_path / "x.parquet", image))
        assert refusal.detail.startswith("'/etc/passwd': it is not in the folder of the table")  # type: ignore[union-attr]
    encoded = f"data:image/png;base64,{base64.b64encode(IMAGES[0]).decode()}"
    [item] = read_table(written(tmp_path / "x.parquet", {"image_url": [encoded]}))
    assert item.image == IMAGES[0]  # type: ignore[union-attr]


def test_a_row_group_is_never_decoded_as_a_whole(tmp_path: Path) -> None:
    image = bytes(2**20)
    rows = pa.table({"image": pa.array([image[:-1] + bytes([n]) for n in range(64)], pa.binary())})
    pages = {"compression": "none", "use_dictionary": False, "write_batch_size": 1}
    pq.write_table(rows, tmp_path / "x.parquet", **pages)
    del rows
    assert pq.read_metadata(tmp_path / "x.parquet").num_row_groups == 1
    before, most = pa.total_allocated_bytes(), 0
    for number, item in enumerate(read_lazily(tmp_path / "x.parquet")):
        assert item.image[-1] == number
        most = max(most, pa.total_allocated_bytes() - before)
    assert number == 63
    assert most < 40 * 2**20


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
        path = written(
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


@pytest.mark.parametrize("compression", ["snappy", "zstd", "uncompressed"])
@pytest.mark.parametrize("version", ["V1", "V2"])
def test_files_of_duckdb_are_read(tmp_path: Path, version: str, compression: str) -> None:
    rows = pa.table(dict(ROWS_OF_TOOLS))
    path = tmp_path / "x.parquet"
    with duckdb.connect() as connection:
        connection.register("rows", rows)
        # Versions of DuckDB differ in when they write a dictionary; without one, all have the expected encodings.
        options = f"format parquet, parquet_version {version}, compression {compression}, dictionary_size_limit 1"
        connection.execute(f"copy (select * from rows) to '{path}' ({options})")
    expected = "DELTA_LENGTH_BYTE_ARRAY" if version == "V2" else "PLAIN"
    assert pq.read_metadata(path).row_group(0).column(0).encodings == (expected,)
    check_rows_of_tools(path)


@pytest.mark.parametrize("compression", ["zstd", "snappy", "uncompressed", "lz4"])
def test_files_of_polars_are_read(tmp_path: Path, compression: Any) -> None:
    polars.DataFrame(dict(ROWS_OF_TOOLS)).write_parquet(tmp_path / "x.parquet", compression=compression)
    check_rows_of_tools(tmp_path / "x.parquet")


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
    before, most = pa.total_allocated_bytes(), 0
    refusals = []
    for item in read_lazily(tmp_path / "x.parquet"):
        refusals.append(item)
        most = max(most, pa.total_allocated_bytes() - before)
    assert [refusal.reason.value for refusal in refusals] == ["shard_damaged"]
    assert message in refusals[0].detail
    assert most < 2**20


def test_long_pages_of_delta_encoded_images_are_read_once(
    tmp_path: Path, unsteady: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_WINDOW_BYTES", 0)
    monkeypatch.setattr(parquet, "_READ_BYTES", 2**16)
    images = [bytes([n]) * 40_000 for n in range(100)]
    options = {"compression": "none", "use_dictionary": False, "column_encoding": "DELTA_LENGTH_BYTE_ARRAY"}
    path = written(tmp_path / "x.parquet", {"image": images}, **options, write_batch_size=10)
    unsteady.content = path.read_bytes()
    assert [item.image for item in read_lazily("unsteady://x.parquet")] == images
    assert unsteady.bytes_read < 1.2 * len(unsteady.content)


def test_pages_are_bounded_by_their_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_PAGE_BYTES", 10_000)
    for dictionary in (True, False):
        path = written(tmp_path / "x.parquet", {"image": [bytes(20_000)]}, use_dictionary=dictionary)
        [refusal] = read_table(path)
        assert refusal.detail.endswith("; at most 10,000 are read")  # type: ignore[union-attr]


def test_rows_of_a_long_dictionary_entry_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "MAX_BATCH_BYTES", 16_000_000)
    rows, image = 200, base64.b64encode(bytes(300_000))
    pages = [
        Page(text(image), 1, dictionary=True),
        Page(levels(rows, 1) + b"\x01" + run(rows, 0), rows, RLE_DICTIONARY),
    ]
    keys = [Page(b"".join(text(b"%03d" % n) for n in range(rows)), rows)]
    columns = [Column([("image", OPTIONAL)], pages), Column([("key", REQUIRED)], keys)]
    (tmp_path / "x.parquet").write_bytes(File(columns, rows).encoded())
    before, most = pa.total_allocated_bytes(), 0
    for number, item in enumerate(read_lazily(tmp_path / "x.parquet")):
        assert (item.key, len(item.image)) == (f"{number:03d}", 300_000)
        most = max(most, pa.total_allocated_bytes() - before)
    assert number == rows - 1
    assert most < 4_000_000


def test_a_storage_error_is_raised_and_not_taken_for_damage(tmp_path: Path, unsteady: Any) -> None:
    images = {"image": [bytes([n]) * 10**6 for n in range(50)]}
    path = written(tmp_path / "x.parquet", images, compression="none", write_batch_size=1)
    unsteady.content = path.read_bytes()
    items = read_lazily("unsteady://x.parquet")
    assert next(items).image[:1] == b"\0"
    unsteady.fails_at = 30 * 10**6
    with pytest.raises(TimeoutError, match="no answer"):
        list(items)
    fsspec.filesystem("memory").pipe("/x.parquet", b"")
    assert read_table("memory://x.parquet")[0].reason.value == "shard_unreadable"  # type: ignore[union-attr]
    assert read_table("memory://none.parquet")[0].reason.value == "shard_missing"  # type: ignore[union-attr]
