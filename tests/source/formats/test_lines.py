"""Files with a row on each line: jsonl, plain and compressed, as RayGen writes it, and damaged."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from reinforce.config import Limits
from reinforce.source.samples import RawSample, Refusal
from tests.helpers.data import picture
from tests.helpers.tables import outcomes, read_table

IMAGES = [picture(number) for number in range(3)]


def raygen(number: int) -> bytes:
    """A line as RayGen writes it: uid, text and url, the image as base64."""
    image = base64.b64encode(IMAGES[number]).decode()
    return json.dumps({"uid": f"u{number}", "text": f"thing {number}", "url": "http://x", "image": image}).encode()


LINES = b"\n".join(map(raygen, range(3))) + b"\n"


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.jsonl", bytes),
        ("x.jsonl.gz", gzip.compress),
        ("x.ndjson.zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
    ],
)
def test_files_of_raygen_are_read_plain_and_compressed(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / name).write_bytes(pack(LINES))
    found = read_table(tmp_path / name, "jsonl")
    assert outcomes(found) == {f"u{number}": f"thing {number}" for number in range(3)}
    assert [item.image for item in found if isinstance(item, RawSample)] == IMAGES
    assert json.loads(found[0].sidecars["json"]) == {"uid": "u0", "text": "thing 0", "url": "http://x"}  # type: ignore[union-attr]


def test_broken_lines_cost_their_rows(tmp_path: Path) -> None:
    limits = Limits(image_bytes=4000, sidecar_bytes=1000)
    lines = [raygen(0), b"", b"{broken", b"[1]", b'{"text": "no image"}', b"x" * 80_000, raygen(0), raygen(1)]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    assert outcomes(read_table(tmp_path / "x.jsonl", "jsonl", limits=limits)) == {
        "u0": "duplicate_key: the key occurs earlier in this shard; the first is kept",
        "shard-00000001": "row_broken: invalid JSON, null, or nested too deeply: jsonl has one object on each line",
        "shard-00000002": "row_broken: not a JSON object but [1]: jsonl has one object on each line",
        "shard-00000003": "no_image: no column has images: it has text; name one in input.image",
        "shard-00000004": "image_bytes: a line of more than 74,869 bytes",
        "u1": "thing 1",
    }


def test_rows_may_have_different_columns(tmp_path: Path) -> None:
    image = base64.b64encode(IMAGES[0]).decode()
    rows = [{"jpg": image, "caption": "a"}, {"image": image}, {"caption": "c", "jpg": image, "key": 3}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert outcomes(read_table(tmp_path / "x.jsonl", "jsonl")) == {
        "shard-00000000": "a",
        "shard-00000001": "None",
        "3": "c",
    }


def test_damage_ends_a_file_after_the_rows_before_it(tmp_path: Path) -> None:
    packed = gzip.compress(LINES * 40, compresslevel=0)
    (tmp_path / "x.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    *rows, last = read_table(tmp_path / "x.jsonl.gz", "jsonl")
    assert {row.key for row in rows} == {"u0", "u1", "u2"}
    assert isinstance(last, Refusal)
    assert (last.key, last.reason.value) == (None, "shard_damaged")


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"\x1f\x8b\x08junk", "compressed data; name the file .gz"),
        (b'[{"image": 1},\n {"image": 2}]', "no line is a JSON object with an image; invalid JSON"),
        (b'{"title": "a"}\n', "no line is a JSON object with an image; no column has images: it has title"),
    ],
)
def test_a_file_without_any_row_is_refused_as_a_whole(tmp_path: Path, content: bytes, detail: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    last = read_table(tmp_path / "x.jsonl", "jsonl")[-1]
    assert isinstance(last, Refusal)
    assert (last.key, last.reason.value) == (None, "shard_unreadable")
    assert last.detail.startswith(detail)


def test_csv_and_tsv_are_read_with_quotes_and_compression(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    (tmp_path / "x.csv").write_bytes('\ufefffile_name,text\r\na.png,"one, ""two""\nthree"\r\na.png\r\n'.encode())
    (tmp_path / "x.tsv.gz").write_bytes(gzip.compress(b"file_name\ttext\tkey\na.png\tone, two\tk\n"))
    found = read_table(tmp_path / "x.csv", "csv")
    assert outcomes(found) == {"shard-00000000": 'one, "two" three', "shard-00000001": "None"}
    assert outcomes(read_table(tmp_path / "x.tsv.gz", "csv")) == {"k": "one, two"}
    (tmp_path / "x.csv").write_text(f"file_name,text\na.png,one\n{'a' * 2**20}b,two\na.png,three\n")
    assert list(outcomes(read_table(tmp_path / "x.csv", "csv")).values()) == [
        "one", "image_bytes: line 3: a line of more than 1,048,576 bytes", "three",
    ]  # fmt: skip
    (tmp_path / "x.csv").write_text('file_name,text\na.png,"cut off\n')
    [broken, whole] = read_table(tmp_path / "x.csv", "csv")
    assert (broken.key, broken.reason.value) == ("shard-00000000", "row_broken")  # type: ignore[union-attr]
    assert whole.detail.startswith("no line is a row with an image; line 2: unexpected end of data")  # type: ignore[union-attr]
