"""What is gained on held-out images: by shares that are chosen on others of them, by classes, by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from reinforce.tuning.adapt_config import Point, Rule
from reinforce.tuning.gain import Answers, Queries, chance, cross_fit, one_class

TOP1, PER_CLASS = "zero_shot/domain/top1", "zero_shot/domain/mean_per_class"


def answered(found: Mapping[float, Sequence[int]], classes: Sequence[int]) -> tuple[list[Point], Answers]:
    """Points and answers of models that take image n for the class ``found[alpha][n]``."""
    answers = {
        alpha: {
            "zero_shot/domain": Queries(
                range(len(classes)), [int(a == b) for a, b in zip(of, classes, strict=True)], classes, of
            )
        }
        for alpha, of in found.items()
    }
    points = []
    for alpha, of in answers.items():
        right, labels = np.array(of["zero_shot/domain"].right), np.array(classes)
        per_class = np.mean([right[labels == one].mean() for one in {*classes}])
        points.append(Point(alpha, {TOP1: float(right.mean()), PER_CLASS: float(per_class)}))
    return points, answers


def test_a_gain_is_counted_on_images_that_did_not_choose_it() -> None:
    generator = np.random.default_rng(0)
    rule, best, estimated = Rule((TOP1,)), [], []
    for _ in range(60):
        found = {alpha / 10: generator.integers(0, 2, 40).tolist() for alpha in range(11)}
        points, answers = answered(found, [0] * 40)
        gain = cross_fit(points, rule, answers, range(40), seed=0)
        assert gain is not None
        best.append(rule.choose(points).metrics[TOP1] - points[0].metrics[TOP1])
        estimated.append(gain.gain)
        [counted] = gain.counted
        assert (counted.after - counted.before) / 40 == pytest.approx(gain.gain)
        assert counted.gained - counted.lost == counted.after - counted.before
    assert np.mean(best) > 0.1, "shares of guesses: the best of eleven looks like a gain on the images that chose it"
    assert abs(np.mean(estimated)) < 0.03


def test_a_true_gain_is_counted_with_its_interval_and_p() -> None:
    points, answers = answered({0.0: [1] * 20 + [0] * 20, 0.5: [0] * 40, 1.0: [1] * 40}, [0] * 40)
    gain = cross_fit(points, Rule((TOP1,)), answers, range(40), seed=3)
    assert gain is not None
    assert (gain.before, gain.after, gain.alphas) == (0.5, 1.0, [0.5] * 5)
    assert 0.3 < gain.low < 0.5 < gain.high < 0.7
    assert gain.lines()[1] == f"  {TOP1}: 20 -> 40 of 40 right (20 gained, 0 lost)"
    assert gain.p < 0.01
    copies = cross_fit(points, Rule((TOP1,)), answers, [0] * 20 + [*range(1, 21)], seed=3)
    assert copies is not None
    assert copies.p == 1.0, "twenty copies of one image are one that changed"


def test_a_collapse_to_the_largest_class_is_no_gain_and_a_warning() -> None:
    classes = [0] * 11 + [1, 2, 3, 4, 5, 1, 2]
    points, answers = answered({0.0: [1, 2] * 5 + [3] + [0, 0, 3, 4, 0, 0, 0], 1.0: [0] * 18}, classes)
    top1 = cross_fit(points, Rule((TOP1,)), answers, range(18), seed=0)
    assert top1 is not None
    assert top1.p < 0.05, "by the share of right images"
    by_class = cross_fit(points, Rule((PER_CLASS,)), answers, range(18), seed=0)
    assert by_class is not None
    assert (by_class.gain, by_class.alphas) == (0, [0.0] * 5)
    names = ["cat", "dog", "fox", "owl", "elk", "bee"]
    [warning] = one_class(answers[1.0], names)
    assert "take 18 of 18 held-out images for cat, and 11 are" in warning
    assert not [*one_class(answers[0.0], names)]
    assert not [*one_class(answered({0.0: classes}, classes)[1][0.0], names)], "a large class that is right"
    assert not [*one_class({}, names)], "captions alone"


def test_too_few_held_out_images_give_no_estimate() -> None:
    points, answers = answered({0.0: [0], 1.0: [1]}, [1])
    assert cross_fit(points, Rule((TOP1,)), answers, [0], seed=0) is None
    points, answers = answered({0.0: [0, 0], 1.0: [1, 1]}, [1, 1])
    assert cross_fit(points, Rule((TOP1,)), answers, [0, 0], seed=0) is None, "copies of one image"


@pytest.mark.parametrize(
    ("gained", "lost", "expected"),
    [(0, 0, 1), (1, 0, 1), (5, 0, 1 / 16), (0, 6, 1 / 32), (2, 1, 1), (14, 6, 0.115), (20, 0, 2**-16)],
)
def test_few_images_that_change_are_likely_by_chance(gained: int, lost: int, expected: float) -> None:
    assert chance([0.5] * gained + [-0.5] * lost + [0.0]) == pytest.approx(expected, rel=5e-2, abs=2e-5)
