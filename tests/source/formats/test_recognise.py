"""Files that are not tars: what they are, and what to do."""

from __future__ import annotations

import gzip
import io
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforce.source.file_types import foreign_content, foreign_name
from reinforce.source.formats.recognise import unexpected_name
from reinforce.source.formats.registry import find_format
from tests.helpers.data import picture
from tests.helpers.tars import TAR, outcomes, read


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"caption": ["a cat"]}), out)
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.png", b"x" * 1000)
    return out.getvalue()


def array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(100))
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
CONTENTS = [
    (parquet(), "a Parquet file, not a tar: in `source` of a run, name such files alone or set input.format"),
    (picture(1), "an image, not a tar: name the folder of the images"),
    (picture(1, format_="JPEG"), "an image, not a tar: "),
    (picture(1, format_="WEBP"), "an image, not a tar: "),
    (picture(1, format_="GIF"), "an image, not a tar: "),
    (zipped(), "a zip archive, not a tar: unpack it"),
    (array(), "a NumPy file, not a tar: "),
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


def test_a_tar_is_read_whatever_its_name() -> None:
    assert outcomes(read(TAR, "x.png")) == outcomes(read(TAR))


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("s3://b/part-0.parquet", "a Parquet file"),
        ("/data/cat.PNG", "an image"),
        ("/data/00000_stats.json", "a JSON file"),
        ("data.zip", "an archive"),
        ("https://host/x.zip?name=x.tar", "an archive"),
        ("parquet", None),
        ("/data/parquet/x", None),
        ("s3://b/x.tar", None),
        ("s3://b/x.tar.gz", None),
        ("s3://b/x.dat", None),
        ("s3://b.parquet/x", None),
    ],
)
def test_other_formats_are_recognised_by_names(url: str, kind: str | None) -> None:
    found = foreign_name(url)
    assert (found is None) == (kind is None)
    assert found is None or found.startswith(str(kind))


@pytest.mark.parametrize(
    ("name", "format_", "kind"),
    [
        ("x.jsonl.bz2", "tar", "a table with a compression that is not read: store it as it is, or as .gz or .zst"),
        ("x.tar.bz2", "tar", None),
        ("x.json", "jsonl", None),
        ("x.json.gz", "jsonl", None),
        ("x.parquet", "jsonl", "a parquet file by its name, not a jsonl file"),
    ],
)
def test_names_that_do_not_fit_the_format_are_described(name: str, format_: str, kind: str | None) -> None:
    assert unexpected_name(f"/data/{name}", find_format(format_)) == kind
