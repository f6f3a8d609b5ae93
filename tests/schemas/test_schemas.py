"""The reasons of the quarantine; tests/golden has the schemas of the layer files."""

from __future__ import annotations

from schemas import WHOLE_SHARD, Reason


def test_reasons_are_their_names_and_those_of_whole_shards_are_all_but_damage() -> None:
    assert all(reason.value == reason.name.lower() for reason in Reason)
    assert {Reason(value) for value in WHOLE_SHARD} == {
        reason for reason in Reason if reason.value.startswith("shard_")
    } - {Reason.SHARD_DAMAGED, Reason.SHARD_SAMPLES}
