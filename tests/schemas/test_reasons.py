"""Quarantine reasons are stored by value."""

from schemas import WHOLE_SHARD, Reason


def test_values_are_the_names_in_lower_case() -> None:
    assert all(reason.value == reason.name.lower() for reason in Reason)


def test_whole_shard_reasons_are_of_shards_and_damage_is_not_among_them() -> None:
    assert {Reason(value) for value in WHOLE_SHARD} == {
        reason for reason in Reason if reason.value.startswith("shard_")
    } - {Reason.SHARD_DAMAGED, Reason.SHARD_SAMPLES}
