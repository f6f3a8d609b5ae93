"""Claims, checked on small numbers."""

from __future__ import annotations

import math

import pytest

from benchmarks.ablations.claims import Compare, Pick, Sooner, Verdict, agreement, standard_error
from benchmarks.ablations.measures import REACHED_AT
from tests.helpers.ablations import numbers_of


def test_arms_differ_if_their_means_differ_by_more_than_the_noise() -> None:
    near, far = (
        numbers_of(a=[0.30, 0.32, 0.31], b=[0.29, 0.33, 0.30]),
        numbers_of(a=[0.3, 0.32, 0.31], b=[0.1, 0.12, 0.11]),
    )
    assert Compare("unseen_style", "a", "level with", "b").check(near).holds
    assert Compare("unseen_style", "a", "not above", "b").check(near).holds
    assert not Compare("unseen_style", "a", "above", "b").check(near).holds
    assert Compare("unseen_style", "a", "above", "b").check(far).holds
    assert not Compare("unseen_style", "a", "level with", "b").check(far).holds
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


def test_standard_error_pools_the_variances_of_all_arms() -> None:
    numbers = numbers_of(a=[0.30, 0.32, 0.31], b=[0.1, 0.12, 0.11])
    assert standard_error(numbers, "unseen_style") == pytest.approx((2 * 0.01**2 / 3) ** 0.5)


def test_agreement_counts_the_claims_that_hold() -> None:
    holds, fails = Verdict(True, ""), Verdict(False, "")
    assert agreement([holds, holds]) == "agree"
    assert agreement([holds, fails, fails]) == "agree in 1 of 3 points"
    assert agreement([fails]) == "do not agree"
    assert "no conclusion" in agreement([])
