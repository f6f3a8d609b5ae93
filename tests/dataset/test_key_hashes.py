"""Hashes of many keys at once: equal keys have equal hashes wherever they are, and others do not."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.dataset.validate.key_hashes import digest_keys, hash_keys

texts = st.lists(st.text(max_size=20) | st.sampled_from(["x" * 255, "x" * 256, "x" * 257]), max_size=8)
few = settings(max_examples=40, deadline=None)


@few
@given(texts)
def test_keys_have_equal_hashes_exactly_if_they_are_equal(keys: list[str]) -> None:
    every = [*keys, *(f"{key}\0" for key in keys), *keys[::-1]]
    hashes = hash_keys(pa.array(every, pa.string())).tolist()
    assert len({*hashes}) == len({*every})
    assert dict(zip(every, hashes, strict=True)) == {
        key: hash_keys(pa.array([key], pa.string())).tolist()[0] for key in every
    }


@few
@given(texts, st.integers(0, 5))
def test_hashes_and_digests_do_not_depend_on_how_arrow_holds_the_keys(keys: list[str], start: int) -> None:
    whole = pa.array(["before", *keys], pa.string())[1:]
    parts = pa.chunked_array([whole[:start], whole[start:]])
    assert hash_keys(parts).tolist() == hash_keys(pa.array(keys, pa.string())).tolist()
    assert digest_keys(parts) == digest_keys(pa.array(keys, pa.string()))


@few
@given(texts, texts)
def test_other_keys_have_another_digest(first: list[str], second: list[str]) -> None:
    digests = [digest_keys(pa.array(keys, pa.string())) for keys in (first, second, [*first, None], [*first, ""])]
    assert (digests[0] == digests[1]) == (first == second)
    assert len({digests[0], *digests[2:]}) == 3


def test_hashes_are_spread_evenly() -> None:
    hashes = hash_keys(pa.array([f"{number:08d}" for number in range(20_000)]))
    shares = [(hashes < share * 2**64).mean() for share in (0.01, 0.25, 0.5, 0.75)]
    assert all(abs(found - share) < 0.01 for found, share in zip(shares, (0.01, 0.25, 0.5, 0.75), strict=True))
    assert abs((hashes & 1).mean() - 0.5) < 0.02
