"""Keys that occur in several shards: exact for small datasets, estimated in bounded memory for large ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reinforce.dataset.runs.key_sample import ALL, SHARD_HASHES, KeySample, ShardKeys

shards = st.lists(st.sets(st.text(max_size=2)), max_size=5)


@given(shards)
def test_keys_of_small_datasets_are_counted_exactly(content: list[set[str]]) -> None:
    sample = KeySample()
    for number, keys in enumerate(content):
        sample.add(str(number), ShardKeys.of(keys))
    found = sample.repeated()
    every = [key for keys in content for key in keys]
    repeated = {key for key in every if every.count(key) > 1}
    assert (found.keys, found.exact, found.shards) == (len(repeated), True, len(content))
    if found.pair is not None:
        first, second = (content[int(name)] for name in found.pair)
        assert first & second
    assert (found.pair is None) == (not repeated)


@given(st.lists(st.sets(st.integers(0, 5000).map(str)), max_size=4), st.integers(0, ALL))
def test_parts_of_a_shard_join_to_its_smallest_hashes(parts: list[set[str]], limit: int) -> None:
    keys = ShardKeys.of([])
    for part in parts:
        keys = keys.joined(ShardKeys.of(part), 100)
    whole = ShardKeys.of(key for part in parts for key in part)
    assert keys.hashes.tolist() == whole.below(keys.limit).hashes.tolist()
    assert len(keys.hashes) == min(100, len(whole.hashes))
    assert keys.below(limit).hashes.tolist() == [value for value in keys.hashes.tolist() if value <= limit]


def test_a_sample_of_bounded_size_estimates_the_repeated_keys() -> None:
    sample = KeySample(4000)
    for number in range(100):
        keys = ShardKeys.of(f"{number % 90} {key}" for key in range(2000))
        sample.add(str(number), ShardKeys.of([]).joined(keys))
        assert sum(len(sample[str(shard)].hashes) for shard in range(100)) <= 4000
    found = sample.repeated()
    assert not found.exact
    assert 15_000 < found.keys < 25_000  # truly 20,000
    assert 0.08 < found.share < 0.15  # truly 1/9
    assert len(ShardKeys.of([]).joined(keys).hashes) == SHARD_HASHES


def test_a_shard_that_was_computed_again_does_not_repeat_its_keys() -> None:
    sample = KeySample()
    for _ in range(2):
        sample.add("a", ShardKeys.of("xyz"))
    assert sample.repeated().keys == 0
    sample.add("deleted", ShardKeys.of("xyz"))
    assert sample.repeated({"a"}).lines(1, "out") == []
    assert sample.repeated({"a"}).lines(2, "out") == [
        "keys: 1 of 2 shards were compared, those that runs have recorded; `reinforce validate out` compares all"
    ]
    [line] = sample.repeated().lines(2, "out")
    assert line == "repeated keys: 3 keys, 100.00% of all, occur in more than one shard, for example in a and deleted"
