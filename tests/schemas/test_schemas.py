"""Schemas of the layer files, and the reasons of the quarantine; tests/reinforce_docs reads their descriptions."""

from __future__ import annotations

import pyarrow as pa

from schemas import HELD_OUT, WHOLE_SHARD, Reason, captions_schema, embeddings_schema, quarantine_schema, samples_schema


def test_every_layer_repeats_the_key_and_samples_have_the_image_or_a_reference_to_it() -> None:
    embed, reference = samples_schema("embed"), samples_schema("reference")
    vectors = [embeddings_schema(2, 8, dtype) for dtype in ("float16", "int8")]
    for schema in (embed, reference, captions_schema(), *vectors, HELD_OUT, quarantine_schema()):
        key = schema.field("key")
        assert (key.type, key.nullable) == (pa.string(), schema == quarantine_schema())
    assert set(embed.names) ^ set(reference.names) == {"image", "image_ref", "image_digest"}


def test_reasons_are_their_names_and_those_of_whole_shards_are_all_but_damage() -> None:
    assert all(reason.value == reason.name.lower() for reason in Reason)
    assert {Reason(value) for value in WHOLE_SHARD} == {
        reason for reason in Reason if reason.value.startswith("shard_")
    } - {Reason.SHARD_DAMAGED, Reason.SHARD_SAMPLES}
