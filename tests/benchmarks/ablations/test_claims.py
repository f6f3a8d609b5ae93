"""Claims and measures, checked on small numbers."""

from __future__ import annotations

import math

from benchmarks.ablations.claims import Compare, Pick, Sooner, Within
from benchmarks.ablations.measures import ALL_MEASURES, MILLISECONDS, REACHED_AT, step_of_level
from tests.helpers.ablations import numbers_of


def test_arms_differ_if_their_means_differ_by_more_than_the_noise() -> None:
    near = numbers_of(a=[0.30, 0.32, 0.31], b=[0.29, 0.33, 0.30])
    far = numbers_of(a=[0.3, 0.32, 0.31], b=[0.1, 0.12, 0.11])
    for relation, of_near, of_far in (
        ("level with", True, False), ("not above", True, False), ("above", False, True),
    ):  # fmt: skip
        claim = Compare("unseen_style", "a", relation, "b")
        assert (claim.check(near).holds, claim.check(far).holds) == (of_near, of_far)
    assert Compare("unseen_style", "b", "below", "a").check(far).holds
    # two standard errors: twice the root of 2 / 3 x (the mean of 0.01^2 and 0.01^2)
    assert "difference 20.0 points, noise 1.6" in Compare("unseen_style", "a", "above", "b").check(far).text


def test_best_of_several_arms_needs_a_larger_difference() -> None:
    numbers = numbers_of(a=[0.30, 0.32, 0.31], b=[0.28, 0.30, 0.29], c=[0.28, 0.30, 0.29])
    assert Compare("unseen_style", "a", "above", "b").check(numbers).holds
    verdict = Compare("unseen_style", "a", "above", Pick(["b", "c"], "the best other")).check(numbers)
    assert not verdict.holds
    assert "a above the best other (b): no, level with it" in verdict.text


def test_first_arm_must_be_sooner_with_every_seed() -> None:
    never = {"a": {"own_style" + REACHED_AT: [5.0, math.inf]}, "b": {"own_style" + REACHED_AT: [20.0, 20.0]}}
    verdict = Sooner("own_style", "a", "b").check(never)
    assert not verdict.holds
    assert "with 1 of 2 seeds" in verdict.text
    assert "never with 1" in verdict.text


def test_times_within_a_share_are_within_it_in_both_directions() -> None:
    numbers = {label: {MILLISECONDS: [value] * 3} for label, value in {"a": 1.0, "b": 1.09, "c": 1.11}.items()}
    assert Within(MILLISECONDS, "a", "b", 0.1).check(numbers).holds
    assert Within(MILLISECONDS, "b", "a", 0.1).check(numbers).holds
    verdict = Within(MILLISECONDS, "a", "c", 0.1).check(numbers)
    assert verdict.text == "ms/image, 64 together: a within 10% of c: no (1.00 and 1.11, difference 0.11, 1.11 times)"
    assert not Within(MILLISECONDS, "c", "a", 0.1).check(numbers).holds


def test_step_of_a_level_is_interpolated() -> None:
    curve = [(10, 0.1), (20, 0.3), (30, 0.2)]
    assert [step_of_level(curve, level) for level in (0, 0.05, 0.1, 0.2, 0.3)] == [0, 5, 10, 15, 20]
    assert math.isinf(step_of_level(curve, 0.31))
    assert ALL_MEASURES["own_style" + REACHED_AT].format_cell([5, math.inf, math.inf]) == "never in 2 of 3"
