"""Schemas of the layer files, and the reasons of the quarantine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from schemas import PAIRS, WHOLE_SHARD, Reason, captions_schema, embeddings_schema, quarantine_schema, samples_schema

SCHEMAS = {
    "samples, embed": samples_schema("embed"),
    "samples, reference": samples_schema("reference"),
    "captions": captions_schema(),
    "embeddings": embeddings_schema(2, 8, "float16"),
    "int8 embeddings": embeddings_schema(2, 8, "int8"),
    "quarantine": quarantine_schema(),
    "pairs": PAIRS,
}


def _fields(fields: list[pa.Field]) -> Iterator[pa.Field]:
    for field in fields:
        yield field
        type_ = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_struct(type_):
            yield from _fields([type_.field(i) for i in range(type_.num_fields)])


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_field_has_a_description(schema: pa.Schema) -> None:
    for field in _fields(list(schema)):
        assert field.metadata[b"description"], field.name


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_layer_repeats_the_key(name: str) -> None:
    field = SCHEMAS[name].field("key")
    assert field.type == pa.string()
    assert field.nullable == (name == "quarantine")


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_embeddings_are_tensors_of_count_and_dim_with_scales_for_int8(dtype: str) -> None:
    schema = embeddings_schema(3, 4, dtype)
    vectors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((5, 3, 4), dtype))
    assert schema.field("embeddings").type == vectors.type
    assert ("scales" in schema.names) == (dtype == "int8")


def test_samples_have_the_image_or_a_reference_to_it() -> None:
    either = {"image", "image_ref", "image_digest"}
    assert set(samples_schema("embed").names) ^ set(samples_schema("reference").names) == either


def test_values_are_the_names_in_lower_case() -> None:
    assert all(reason.value == reason.name.lower() for reason in Reason)


def test_whole_shard_reasons_are_of_shards_and_damage_is_not_among_them() -> None:
    assert {Reason(value) for value in WHOLE_SHARD} == {
        reason for reason in Reason if reason.value.startswith("shard_")
    } - {Reason.SHARD_DAMAGED, Reason.SHARD_SAMPLES}
