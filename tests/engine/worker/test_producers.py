"""Tables of one row group, by the producers of their layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from reinforce.config import parse_config
from reinforce.dataset.augment.records import Augmentation, Crop, from_records, to_records
from reinforce.engine.decode.row import Decoded, Row
from reinforce.engine.inference.inference import Batch
from reinforce.engine.inference.models import Models
from reinforce.engine.inference.session import Session
from reinforce.engine.plan.recipe import build_layers, describe_models
from reinforce.engine.worker.producers.base import RowGroup
from reinforce.engine.worker.producers.registry import make_producers
from reinforce.engine.worker.refusals import Refusals
from reinforce.engine.worker.stale_files import MisalignedLayer
from reinforce.source.references import image_digest
from reinforce.source.samples import RawSample, Refusal
from schemas import Reason
from teachers.device.accelerator import Accelerator
from tests.helpers.data import config_of
from tests.helpers.models import ColorTeacher, GroupCaptioner

AUGMENTATION = Augmentation(Crop(1, 2, 10, 20), 24, None)


def row(key: str, caption: str | None, image: bytes, offset: int, decoded: Decoded) -> Row:
    return Row(key, caption, sample=RawSample(key, image, offset, len(image), {}), decoded=decoded)


RECORDS = to_records([AUGMENTATION])
ROWS = [
    row("a", "A", b"first", 512, Decoded(metadata='{"a": 1}', width=40, height=30, records=RECORDS)),
    row("b", None, b"second", 2048, Decoded(width=20, height=10, records=RECORDS)),
]


def table(layer: str, group: RowGroup, **changes: Any) -> tuple[pa.Table, Refusals]:
    """The table of a layer of a config with a teacher ``red`` of dimension 8 and 2 augmentations."""
    config = parse_config(config_of("x.tar", "out", **changes))
    models = Models({"red": ColorTeacher(torch.device("cpu"))}, {}, Accelerator("cpu"))
    layers = build_layers(config, describe_models(config))
    [producer] = make_producers([layers[layer]], Session(config, models), source="s3://bucket/x.tar")
    [(_, found)] = producer.tables(group)
    return found, producer.refusals


def test_a_samples_table_has_the_encoded_images_or_references_to_them() -> None:
    embedded = table("samples", RowGroup(ROWS, [], {}), images="embed")[0].to_pylist()
    referenced = table("samples", RowGroup(ROWS, [], {}), images="reference")[0].to_pylist()
    assert [row.pop("image") for row in embedded] == [b"first", b"second"]
    assert [row.pop("image_ref") for row in referenced] == [
        {"url": "s3://bucket/x.tar", "offset": 512, "length": 5},
        {"url": "s3://bucket/x.tar", "offset": 2048, "length": 6},
    ]
    assert [row.pop("image_digest") for row in referenced] == [image_digest(b"first"), image_digest(b"second")]
    assert embedded == referenced
    assert from_records(embedded[0].pop("augmentations")) == [AUGMENTATION]
    assert embedded[0] == {"key": "a", "caption": "A", "metadata": '{"a": 1}', "width": 40, "height": 30}


@pytest.mark.parametrize("side", ["images", "caption"])
def test_a_row_whose_decode_process_crashed_has_no_published_vector_and_its_refusal(side: str) -> None:
    name = f"embeddings/old/{side}"
    old = {"family": "published", "model": "OLD", "columns": [0, 8], "logit_scale": 50.0}
    count = 2 if side == "images" else 1
    rows = [
        Row("a", decoded=Decoded({name: np.ones((count, 8), np.float32)}), caption="A"),
        Row("b", decoded=Decoded(unreadable=Refusal("b", Reason.IMAGE_CRASHED, "gone"))),
    ]
    found, refusals = table(name, RowGroup(rows, [], {}), teachers={"old": old}, reinforcements="x.tar", captioners={})
    assert [value is None for value in found["embeddings"].to_pylist()] == [False, True]
    assert refusals.counts() == {"image_crashed": 1}


def test_vectors_are_null_where_an_image_is_unreadable_or_they_are_not_finite_and_both_are_refused() -> None:
    values = np.ones((4, 2, 8), np.float32)
    values[1, 1, 2] = np.nan
    values[2] = np.inf
    rows = [Row(key, None) for key in "abc"] + [
        Row("d", decoded=Decoded(unreadable=Refusal("d", Reason.IMAGE_BROKEN, "gone")))
    ]
    name = "embeddings/red/images"
    found, refusals = table(name, RowGroup(rows, [{name: values[:3]}, {name: values[3:]}, {}], {}))
    assert [value is None for value in found["embeddings"].to_pylist()] == [False, True, True, True]
    assert refusals.counts() == {"not_finite": 2, "image_broken": 1}


def test_captions_of_a_row_group_are_decoded_without_the_rows_that_have_labels() -> None:
    config, captioner = parse_config(config_of("x.tar", "out")), GroupCaptioner(torch.device("cpu"))
    layer = build_layers(config, describe_models(config))["captions/namer"]
    layer = replace(layer, labels="those of another run")  # type: ignore[arg-type]
    models = Models({}, {"namer": captioner}, Accelerator("cpu"))
    [producer] = make_producers([layer], Session(config, models))
    given = {layer.name: ["one", "two"]}
    batches = [[Row("a"), Row("b", values=given)], [Row("c", values=given)], [Row("d")]]
    outputs = []
    for rows in batches:
        views = {captioner.image: torch.full((len(rows), 8, 8, 3), 100, dtype=torch.uint8)}
        outputs.append(producer.encode(Batch(rows, "rows", None, views), producer.prepare(rows))())
    captioner.decoded.clear()
    found = producer.table(layer, RowGroup([row for rows in batches for row in rows], outputs, {}))
    texts = found["captions"].to_pylist()
    assert captioner.decoded == [2]
    assert texts[1:3] == [["one", "two"]] * 2
    assert all(text.startswith("a picture of -0.216, seed ") for text in texts[0] + texts[3])
    empty = producer.table(layer, RowGroup(batches[1], [{layer.name: [None]}], {}))
    assert empty["captions"].to_pylist() == [["one", "two"]]


def test_stored_captions_must_have_the_keys_of_samples_in_their_order() -> None:
    stored = {"captions/c": pa.table({"key": ["a", "b"], "captions": [["x"], None]})}
    assert RowGroup(ROWS, [], stored).values("captions/c") == [["x"], None]
    with pytest.raises(MisalignedLayer, match=r"captions/c does not have the rows of the samples"):
        RowGroup(ROWS[::-1], [], stored)
