"""Means, plateaus and predictions, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from reinforce.tuning.prediction import predict, spearman
from reinforce.tuning.screening import Measured, Screened
from reinforce.tuning.space import Setting, Trial
from reinforce.tuning.table import Curve, curves_of, rows_of
from reinforce.tuning.trials import Outcome


def outcomes(of_scales: dict[float, list[float] | None]) -> dict[Trial, Outcome]:
    """By scale: the metric with each seed, or None where the first was stopped at step 5."""
    made = {}
    for scale, values in of_scales.items():
        setting = Setting("red", {"red": scale}, alone=True)
        for seed, value in enumerate(values or [0.1]):
            state: Any = "stopped" if values is None else "finished"
            made[Trial(setting, seed)] = Outcome(
                state, [(5, value / 2 if values else value), (10, value)][: 1 + bool(values)]
            )
    return made


def curve(of_scales: dict[float, list[float] | None], seeds: int = 2) -> Curve:
    (found,) = curves_of(rows_of(outcomes(of_scales), range(seeds)))
    return found


def test_the_plateau_is_what_is_within_a_standard_error_of_the_best() -> None:
    spread = 0.02  # of two seeds: deviation 0.02 x sqrt 2, standard error 0.02
    means = {10.0: 0.50, 20.0: 0.59, 40.0: 0.60, 60.0: 0.585, 90.0: 0.55, 120.0: 0.595}
    found = curve({scale: [mean - spread, mean + spread] for scale, mean in means.items()})
    assert found.best == 40.0
    assert found.plateau is not None
    assert (found.plateau.low, found.plateau.high) == (20.0, 60.0)  # 120 is as good, and not next to it
    assert found.plateau.width == pytest.approx(0.02)
    assert found.plateau.unknown == []
    assert found.text() == "red: best at 40 (0.6000), plateau 20 to 60 (within 0.0200, one standard error)"


def test_a_plateau_may_be_wider_where_trials_were_stopped() -> None:
    found = curve({10.0: None, 20.0: [0.58, 0.62], 40.0: [0.59, 0.63], 80.0: [0.1, 0.14]})
    assert found.plateau is not None
    assert (found.plateau.low, found.plateau.high, found.plateau.unknown) == (20.0, 40.0, ["below"])
    assert "the value below it was not trained to the end" in found.text()
    assert [row.setting.scales["red"] for row in found.neighbours] == [10.0, 80.0]


def test_one_seed_tells_no_plateau_and_a_missing_seed_no_mean() -> None:
    assert "no plateau is known" in curve({10.0: [0.2], 20.0: [0.3]}, seeds=1).text()
    found = curve({10.0: [0.2, 0.2], 20.0: [0.9]})
    assert found.best == 10.0
    assert [row.mean for _, row in found.rows] == [0.2, None]


def test_jointly_a_value_is_as_good_as_the_best_setting_with_it() -> None:
    made = {}
    for red, blue, value in ((10.0, 1.0, 0.3), (10.0, 2.0, 0.5), (20.0, 1.0, 0.6), (20.0, 2.0, 0.2)):
        made[Trial(Setting("joint", {"red": red, "blue": blue}), 0)] = Outcome("finished", [(10, value)])
    of_red, of_blue = curves_of(rows_of(made, [0]))
    assert [(value, row.mean) for value, row in of_red.rows] == [(10.0, 0.5), (20.0, 0.6)]
    assert [(value, row.mean) for value, row in of_blue.rows] == [(1.0, 0.6), (2.0, 0.5)]


def test_ranks_correlate_as_spearman_says() -> None:
    assert spearman([1, 2, 3, 4], [10, 30, 50, 900]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Worked example with a tie: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4.
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def screened(*scales: float) -> Screened:
    measured = [Measured(s, 1 / s, 1 / s, 1 / s, s / 100, abs(s - 30), None) for s in scales]
    return Screened(measured, calibrated=30.0, top1=0.5)


def test_a_screening_is_held_against_what_was_trained_to_the_end() -> None:
    found = curve({10.0: [0.1, 0.1], 20.0: [0.3, 0.3], 40.0: [0.4, 0.4]})
    told = predict(found, screened(10.0, 20.0, 40.0), [])
    assert told.ranks["entropy"] == pytest.approx(-1)
    assert told.ranks["true_pair"] == pytest.approx(1)
    assert told.ranks["agreement"] is None
    assert (told.step, told.count, told.nearest) == (None, 3, 40.0)
    assert told.lost == pytest.approx(0)


def test_where_trials_were_stopped_it_is_held_against_the_last_step_that_all_reached() -> None:
    found = curve({10.0: None, 20.0: [0.3, 0.3], 40.0: [0.2, 0.2]})
    told = predict(found, screened(10.0, 20.0, 40.0), [{5: 0.1}, {5: 0.2, 10: 0.3}, {5: 0.3, 10: 0.2}])
    assert told.step == 5
    assert told.ranks["true_pair"] == pytest.approx(1)
    assert "at step 5, which all reached" in told.text("red")


def test_a_setting_with_a_trial_that_failed_is_told_and_not_compared() -> None:
    made = outcomes({10.0: [0.2, 0.2], 20.0: [0.9]})
    made[Trial(Setting("red", {"red": 20.0}, alone=True), 1)] = Outcome("open", [(5, 0.9)], fault="no memory")
    rows = rows_of(made, [0, 1])
    assert [(row.state, row.mean) for row in rows] == [("finished", 0.2), ("failed", None)]
    assert rows[1].json()["fault"] == "no memory"
    (found,) = curves_of(rows)
    assert found.best == 10.0
