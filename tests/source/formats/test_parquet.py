"""Parquet files as sources: those of img2dataset and Hugging Face's datasets, odd ones, damaged and hostile ones."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from reinforce.source import parquet_file as checked_file
from reinforce.source.config import Limits
from reinforce.source.formats import parquet
from reinforce.source.samples import RawSample, Refusal
from tests.helpers.data import picture
from tests.helpers.tables import IMG2DATASET, outcomes, read_lazily, read_table, write_columns, write_huggingface
from tests.hostile.parquet import REQUIRED, Column, File, Page, text

IMAGES = [picture(number) for number in range(4)]


def test_files_of_img2dataset_are_read_with_their_keys_captions_and_metadata() -> None:
    first, second = map(read_table, IMG2DATASET)
    assert outcomes(first) == {f"{number:06d}": f"thing {number}" for number in range(6)}
    sample = first[0]
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
    path = write_columns(
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


def test_a_file_without_usable_columns_is_refused_with_what_it_has(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"url_": ["a"], "text": ["b"]}, {}, "no column has images: it has url_, text; name one in input.image"),
        ({"image": [1]}, {}, "column image has type int64; images are binary, a struct of bytes and path as Hugging"),
        ({"image": [b"x"]}, {"image": "jpg"}, "input.image: there is no column 'jpg'; it has image"),
        ({"image": [b"x"]}, {"key": "id"}, "input.key: there is no column 'id'; it has image"),
        ({"image": [[b"x"]]}, {}, "column image has type list<element: binary>"),
    ]
    for columns, spec, detail in cases:
        [refusal] = read_table(write_columns(tmp_path / "x.parquet", columns), **spec)
        assert (refusal.key, refusal.reason.value) == (None, "shard_unreadable")  # type: ignore[union-attr]
        assert refusal.detail.startswith(f"a Parquet file that cannot be used: {detail}")  # type: ignore[union-attr]


def test_values_that_are_no_images_and_texts_above_limits_cost_their_row(tmp_path: Path) -> None:
    encoded = base64.b64encode(IMAGES[0]).decode()
    urlsafe = base64.urlsafe_b64encode(IMAGES[1]).decode().rstrip("=")
    texts = [encoded, f"data:image/png;base64,{encoded}", urlsafe, "not base64!", "a" * 9000, None, ""]
    found = read_table(write_columns(tmp_path / "x.parquet", {"image": texts}), limits=Limits(image_bytes=3100))
    *samples, broken, large, null, empty = found
    assert [getattr(item, "image", item) for item in samples] == [IMAGES[0], IMAGES[0], IMAGES[1]]
    assert broken.detail == "column image: neither base64 nor a path or URL: 'not base64!'"
    assert (large.reason.value, null.reason.value) == ("image_bytes", "no_image")  # type: ignore[union-attr]
    assert getattr(empty, "image", None) == b"", "the image policy refuses it"
    columns = {"image": IMAGES, "key": ["a", "b" * 99, "c", "d"], "text": ["t", "t", "t" * 99, "t"]}
    limits = Limits(key_chars=9, sidecar_bytes=50, shard_samples=3)
    found = read_table(write_columns(tmp_path / "x.parquet", columns), limits=limits, metadata="none")
    assert [item.reason.value for item in found if isinstance(item, Refusal)] == ["key_chars", "shard_samples"]
    assert found[2].left_out["txt"].detail == "txt: 99 bytes, above limits.sidecar_bytes of 50"  # type: ignore[union-attr]


def test_a_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    columns = {"image": [picture(number) for number in range(30)], "key": [f"{number:02d}" for number in range(30)]}
    path = write_columns(
        tmp_path / "x.parquet", columns, row_group_size=10, write_page_checksum=True, compression="none"
    )
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


_READ = """
import sys
from reinforce.source.config import Input
from reinforce.source.formats.base import Shard
from reinforce.source.formats.base import read_samples
for path in sys.argv[1:]:
    print([item.detail for item in read_samples(Shard(path, "s", "parquet"), Input())])
"""


class PlainKeys(encryption.KmsClient):
    """Stores keys as they are."""

    def __init__(self, _: object) -> None:
        super().__init__()

    def wrap_key(self, key_bytes: bytes, _: str) -> bytes:
        return base64.b64encode(key_bytes)


@pytest.mark.parametrize("plain_footer", [False, True])
@pytest.mark.parametrize("columns", [["image", "text"], ["text"]])
def test_an_encrypted_file_is_named_as_that(tmp_path: Path, plain_footer: bool, columns: list[str]) -> None:
    rows = pa.table({"image": IMAGES[:2], "text": ["a", "b"]})
    settings = encryption.EncryptionConfiguration("key", column_keys={"key": columns}, plaintext_footer=plain_footer)
    connection = encryption.KmsConnectionConfig()
    properties = encryption.CryptoFactory(PlainKeys).file_encryption_properties(connection, settings)
    with pq.ParquetWriter(tmp_path / "x.parquet", rows.schema, encryption_properties=properties) as writer:
        writer.write_table(rows)
    [refusal] = read_table(tmp_path / "x.parquet")
    what = "its columns are" if plain_footer else "it is"
    assert refusal.detail.endswith(f"{what} encrypted, which is not read: decrypt it")


@pytest.mark.parametrize("unknown", ["image", "key"])
def test_an_unknown_compression_in_a_footer_is_damage_and_does_not_end_the_process(
    unknown: str, tmp_path: Path
) -> None:
    values = {"image": IMAGES[0], "key": b"a"}
    columns = [
        Column([(name, REQUIRED)], [Page(text(value), 1)], codec="unknown" if name == unknown else "uncompressed")
        for name, value in values.items()
    ]
    path = tmp_path / "x.parquet"
    path.write_bytes(File(columns, 1).encoded())
    command = [sys.executable, "-c", _READ, str(path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"row group 0, from row 0 on: column {unknown} cannot be read: Unsupported compression" in out


def test_files_without_rows_have_no_samples_and_texts_in_columns_of_paths_are_paths(tmp_path: Path) -> None:
    empty = pa.table({"image": pa.array([], pa.binary())})
    pq.write_table(empty, tmp_path / "x.parquet")
    assert read_table(tmp_path / "x.parquet") == []
    with pq.ParquetWriter(tmp_path / "x.parquet", empty.schema) as writer:
        for part in (empty, pa.table({"image": IMAGES[:1]}), empty):
            writer.write_table(part)
    assert [item.key for item in read_table(tmp_path / "x.parquet")] == ["shard-00000000"]
    struct = [{"bytes": None, "path": "/etc/passwd"}]
    for image in ({"file_name": ["/etc/passwd"]}, {"image": struct}):
        [refusal] = read_table(write_columns(tmp_path / "x.parquet", image))
        assert refusal.detail.startswith("'/etc/passwd': it is not in the folder of the table")  # type: ignore[union-attr]
    encoded = f"data:image/png;base64,{base64.b64encode(IMAGES[0]).decode()}"
    [item] = read_table(write_columns(tmp_path / "x.parquet", {"image_url": [encoded]}))
    assert item.image == IMAGES[0]  # type: ignore[union-attr]


def test_long_pages_of_delta_encoded_images_are_read_once(
    tmp_path: Path, unsteady: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_file, "_WINDOW_BYTES", 0)
    monkeypatch.setattr(parquet, "_READ_BYTES", 2**16)
    images = [bytes([n]) * 40_000 for n in range(100)]
    options = {"compression": "none", "use_dictionary": False, "column_encoding": "DELTA_LENGTH_BYTE_ARRAY"}
    path = write_columns(tmp_path / "x.parquet", {"image": images}, **options, write_batch_size=10)
    unsteady.content = path.read_bytes()
    assert [item.image for item in read_lazily("unsteady://x.parquet")] == images
    assert unsteady.bytes_read < 1.2 * len(unsteady.content)


def test_a_storage_error_is_raised_and_not_taken_for_damage(tmp_path: Path, unsteady: Any) -> None:
    images = {"image": [bytes([n]) * 10**6 for n in range(50)]}
    path = write_columns(tmp_path / "x.parquet", images, compression="none", write_batch_size=1)
    unsteady.content = path.read_bytes()
    items = read_lazily("unsteady://x.parquet")
    assert next(items).image[:1] == b"\0"
    unsteady.fails_at = 30 * 10**6
    with pytest.raises(TimeoutError, match="no answer"):
        list(items)
    fsspec.filesystem("memory").pipe("/x.parquet", b"")
    assert read_table("memory://x.parquet")[0].reason.value == "shard_unreadable"  # type: ignore[union-attr]
    assert read_table("memory://none.parquet")[0].reason.value == "shard_missing"  # type: ignore[union-attr]
