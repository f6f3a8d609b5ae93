"""Spearman's correlation, and the comparison of a screening with trained students."""

from __future__ import annotations

import pytest

from reinforce.tuning.correlation import check_screening, spearman
from tests.helpers.tuning import scale_curve, toy_screening


def test_spearman_of_worked_examples() -> None:
    assert spearman([1, 2, 3, 4], [10, 30, 50, 900]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Worked example with a tie: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4.
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_screening_is_compared_at_the_end_of_training() -> None:
    curve = scale_curve({10.0: [0.1, 0.1], 20.0: [0.3, 0.3], 40.0: [0.4, 0.4]})
    check = check_screening(curve, toy_screening(10.0, 20.0, 40.0), [])
    assert check.correlations["entropy"] == pytest.approx(-1)
    assert check.correlations["true_pair"] == pytest.approx(1)
    assert check.correlations["agreement"] is None
    assert (check.step, check.count, check.nearest) == (None, 3, 40.0)
    assert check.gap == pytest.approx(0)


def test_screening_is_compared_at_the_last_shared_step_if_trials_were_stopped() -> None:
    curve = scale_curve({10.0: None, 20.0: [0.3, 0.3], 40.0: [0.2, 0.2]})
    check = check_screening(curve, toy_screening(10.0, 20.0, 40.0), [{5: 0.1}, {5: 0.2, 10: 0.3}, {5: 0.3, 10: 0.2}])
    assert check.step == 5
    assert check.correlations["true_pair"] == pytest.approx(1)
    assert "at step 5, which all trials reached" in check.describe("red")


def test_comparison_is_stored_under_the_keys_of_table_json() -> None:
    check = check_screening(scale_curve({10.0: [0.1, 0.1], 20.0: [0.3, 0.3]}), toy_screening(10.0, 20.0), [])
    assert list(check.json()) == ["ranks", "count", "step", "calibrated", "best", "nearest", "lost"]
