"""Which shards are complete, and what the layers lack."""

from __future__ import annotations

from pathlib import Path

from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import Store
from reinforce.dataset.reading.completeness import check_completeness
from schemas import Reason


def of(*shards: str) -> Listing:
    return Listing.of((shard, 1) for shard in shards)


def test_layers_that_lack_shards_are_named_with_some_of_the_shards(tmp_path: Path) -> None:
    every = of(*(f"s{number}" for number in range(6)))
    found = check_completeness(Store(str(tmp_path)), {"samples": every, "captions/c": every, "e": of("s0", "s3")})
    assert (found.complete, found.total, found.quarantined) == (["s0", "s3"], 6, 0)
    assert found.missing == {"e": ["s1", "s2", "s4", "s5"]}
    assert found.describe_missing() == "e lacks 4 of 6 shards (s1, s2, s4, ...)"


def test_shards_that_every_layer_has_lost_are_missing_if_they_are_known(tmp_path: Path) -> None:
    found = check_completeness(Store(str(tmp_path)), {"samples": of("s1", "s2")}, [of("s0", "s1"), of("s3")])
    assert (found.complete, found.missing) == (["s1", "s2"], {"samples": ["s0", "s3"]})
    assert found.describe_missing() == "samples lacks 2 of 4 shards (s0, s3)"


def test_a_shard_that_is_quarantined_in_one_layer_is_missing_in_none(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.quarantine("captions/c", "s1", [(None, Reason.SHARD_FAILED, "raised")])
    store.quarantine("captions/c", "s2", [("a key", Reason.NO_TEXT, "one row")])
    layers = {"samples": of("s1", "s2", "s3"), "captions/c": of("s3"), "embeddings/t/c": of("s3")}
    found = check_completeness(store, layers)
    assert (found.complete, found.quarantined) == (["s3"], 1)
    assert found.missing == {"captions/c": ["s2"], "embeddings/t/c": ["s2"]}
    assert found.describe_quarantined() == "1 shard is left out because it is quarantined in a layer"
