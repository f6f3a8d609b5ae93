"""Files that are not tars: what they are, and what to do."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforce.source.file_types import foreign_content, foreign_name
from reinforce.source.formats.base import find_format, unexpected_name
from tests.helpers.data import picture
from tests.helpers.published import npz
from tests.helpers.tars import TAR, outcomes, read


def written(write: Callable[..., object], *arguments: object) -> bytes:
    """What a function writes to the file that it gets as ``out``."""
    out = io.BytesIO()
    write(*arguments, out)
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
CONTENTS = [
    (
        written(pq.write_table, pa.table({"caption": ["a cat"]})),
        "a Parquet file, not a tar: in `source` of a run, name such files alone or set input.format",
    ),
    (picture(1), "an image, not a tar: name the folder of the images"),
    (picture(1, format_="JPEG"), "an image, not a tar: "),
    (picture(1, format_="WEBP"), "an image, not a tar: "),
    (picture(1, format_="GIF"), "an image, not a tar: "),
    (npz({"a": np.zeros(100)}), "a zip archive, not a tar: unpack it"),
    (written(lambda out: np.save(out, np.zeros(100))), "a NumPy file, not a tar: "),
    (LFS, "a pointer of Git LFS, not a tar: run `git lfs pull`"),
    (b"  <!DOCTYPE html>", "an HTML or XML page, not a tar: it may be the error page"),
    (b'\xef\xbb\xbf{"url": 1}', "a JSON file, not a tar: "),
    (b"s3://bucket/a.tar\n" * 50, "a text file, not a tar: if it lists URLs, name it .txt"),
    ("ü".encode() * 400, "a text file, not a tar: "),
]


@pytest.mark.parametrize(("content", "detail"), CONTENTS, ids=[detail[:12] for _, detail in CONTENTS])
def test_the_detail_of_a_file_that_is_not_a_tar_says_what_it_is_and_what_to_do(content: bytes, detail: str) -> None:
    [refusal] = read(content)
    assert (refusal.key, refusal.reason.value) == (None, "shard_unreadable")  # type: ignore[union-attr]
    assert refusal.detail.startswith(detail)  # type: ignore[union-attr]


def test_a_damaged_tar_and_unknown_bytes_are_not_taken_for_another_format() -> None:
    named = TAR.replace(b"a.jpg", b"PAR1.")  # the wrong checksum of a header whose name begins as a Parquet file
    assert "not a tar header" in read(named)[-1].detail  # type: ignore[union-attr]
    for content in (b"\0\1\2" * 300, TAR[:300], b"x" * 200 + b"\xff" * 400):
        [refusal] = read(content)
        assert "not a tar header" in refusal.detail or "ends inside a header" in refusal.detail  # type: ignore[union-attr]
    assert foreign_content(b"") is None
    assert "name the file .tar.gz" in read(gzip.compress(TAR))[0].detail  # type: ignore[union-attr]
    assert outcomes(read(TAR, "x.png")) == outcomes(read(TAR)), "a tar is read whatever its name"


def test_names_of_other_formats_are_described() -> None:
    for url, kind in {
        "s3://b/part-0.parquet": "a Parquet file",
        "/data/cat.PNG": "an image",
        "/data/00000_stats.json": "a JSON file",
        "https://host/x.zip?name=x.tar": "an archive",
    }.items():
        assert str(foreign_name(url)).startswith(kind)
    others = ("parquet", "/data/parquet/x", "s3://b/x.tar", "s3://b/x.tar.gz", "s3://b/x.dat", "s3://b.parquet/x")
    assert not [*filter(None, map(foreign_name, others))]
    for name, format_, unexpected in (
        ("x.jsonl.bz2", "tar", "a table with a compression that is not read: store it as it is, or as .gz or .zst"),
        ("x.tar.bz2", "tar", None),
        ("x.json", "jsonl", None),
        ("x.json.gz", "jsonl", None),
        ("x.parquet", "jsonl", "a parquet file by its name, not a jsonl file"),
    ):
        assert unexpected_name(f"/data/{name}", find_format(format_)) == unexpected
