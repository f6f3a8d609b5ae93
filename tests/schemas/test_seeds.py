"""Seeds are part of the format: stored data depends on their exact values."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from schemas.seeds import permutation, philox_bits, seed_for, uniforms


def test_seeds_never_change() -> None:
    assert seed_for(0, "key", "augmentations") == 10_275_061_987_377_452_597
    assert uniforms(3, ["a", "b"], "text", 1, 2).tolist() == [
        [0.4638517403058193, 0.7746142518832602],
        [0.661941752224691, 0.1556716447617026],
    ]
    assert permutation(8, 5, "shuffle", 2).tolist() == [3, 2, 5, 4, 0, 1, 6, 7]


def test_seeds_differ_in_every_argument_and_keys_with_lone_surrogates_have_some() -> None:
    others = [(1, "key", "purpose"), (0, "kez", "purpose"), (0, "key", "another"), (0, "key", "purpose", 1)]
    surrogates = [(0, "\udc80", "purpose"), (0, "\udc81", "purpose")]
    assert len({seed_for(*one) for one in [(0, "key", "purpose"), *others, *surrogates]}) == 7


def test_uniforms_are_uniform_and_independent_of_the_other_keys() -> None:
    keys = [str(i) for i in range(4_000)]
    drawn = uniforms(0, keys, "purpose", 0, 8)
    assert drawn.shape == (4_000, 8)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 0.02
    assert np.array_equal(uniforms(0, keys[7:9], "purpose", 0, 8), drawn[7:9])


def test_a_permutation_has_every_index_once_and_follows_the_seed() -> None:
    order = permutation(1_000, 0, "purpose")
    assert sorted(order.tolist()) == list(range(1_000))
    assert order.tolist() == permutation(1_000, 0, "purpose").tolist()
    assert order.tolist() != permutation(1_000, 1, "purpose").tolist()


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 40)), min_size=1, max_size=5))
def test_philox_bits_are_those_of_a_new_generator(draws: list[tuple[int, int]]) -> None:
    for key, count in draws:
        assert philox_bits(key, count).tolist() == np.random.Philox(key=key).random_raw(count).tolist()


def test_threads_draw_philox_bits_independently() -> None:
    keys = list(range(2_000))
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda key: philox_bits(key, 3).tolist(), keys))
    assert drawn == [np.random.Philox(key=key).random_raw(3).tolist() for key in keys]
