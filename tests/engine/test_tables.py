"""Tables of one row group."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from reinforce.dataset.augment.records import Augmentation, Crop, from_records, to_records
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import Layer
from reinforce.engine.decode.row import Decoded, Row
from reinforce.engine.worker.refusals import Refusals
from reinforce.engine.worker.stale_files import OutOfStep
from reinforce.engine.worker.tables import aligned_captions, captions_table, samples_table, vectors_table
from reinforce.source.references import image_digest
from reinforce.source.samples import RawSample
from schemas import captions_schema, embeddings_schema, samples_schema

AUGMENTATION = Augmentation(Crop(1, 2, 10, 20), 24, None)


def row(key: str, caption: str | None, image: bytes, offset: int, decoded: Decoded) -> Row:
    return Row(key, caption, sample=RawSample(key, image, offset, len(image), {}), decoded=decoded)


RECORDS = to_records([AUGMENTATION])
ROWS = [
    row("a", "A", b"first", 512, Decoded(metadata='{"a": 1}', width=40, height=30, records=RECORDS)),
    row("b", None, b"second", 2048, Decoded(width=20, height=10, records=RECORDS)),
]


def test_a_samples_table_has_the_encoded_images_or_references_to_them() -> None:
    embedded = samples_table(samples_schema("embed"), ROWS, "s3://bucket/x.tar").to_pylist()
    referenced = samples_table(samples_schema("reference"), ROWS, "s3://bucket/x.tar").to_pylist()
    assert [row.pop("image") for row in embedded] == [b"first", b"second"]
    assert [row.pop("image_ref") for row in referenced] == [
        {"url": "s3://bucket/x.tar", "offset": 512, "length": 5},
        {"url": "s3://bucket/x.tar", "offset": 2048, "length": 6},
    ]
    assert [row.pop("image_digest") for row in referenced] == [image_digest(b"first"), image_digest(b"second")]
    assert embedded == referenced
    assert from_records(embedded[0].pop("augmentations")) == [AUGMENTATION]
    assert embedded[0] == {"key": "a", "caption": "A", "metadata": '{"a": 1}', "width": 40, "height": 30}


def test_a_captions_table_keeps_rows_without_captions() -> None:
    table = captions_table(captions_schema(), ["a", "b"], [["x", "y"], None])
    assert table.to_pylist() == [{"key": "a", "captions": ["x", "y"]}, {"key": "b", "captions": None}]


def test_vectors_are_null_where_they_are_not_valid_or_not_finite_and_only_the_latter_are_refused() -> None:
    layer = Layer("embeddings/t/images", KINDS["images"], "0", model="t", count=2, dim=3, dtype="float32")
    values = np.ones((4, 2, 3), np.float32)
    values[1, 1, 2] = np.nan
    values[2] = np.inf
    refusals = Refusals()
    valid = np.array([True, True, False, True])
    table = vectors_table(embeddings_schema(2, 3, "float32"), layer, list("abcd"), values, valid, refusals)
    assert [value is None for value in table["embeddings"].to_pylist()] == [False, True, True, False]
    assert refusals.counts() == {"not_finite": 1}


def test_stored_captions_must_have_the_keys_of_samples_in_their_order() -> None:
    table = pa.table({"key": ["a", "b"], "captions": [["x"], None]})
    assert aligned_captions("captions/c", table, ["a", "b"]) == [["x"], None]
    with pytest.raises(OutOfStep, match=r"captions/c does not have the rows of the samples"):
        aligned_captions("captions/c", table, ["b", "a"])
