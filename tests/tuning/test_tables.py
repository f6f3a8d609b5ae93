"""Terminal tables of a tuning."""

from __future__ import annotations

from rich.table import Table

from reinforce.tuning.results import make_rows
from reinforce.tuning.space import Setting, Trial
from reinforce.tuning.tables import results_table, screening_table
from reinforce.tuning.trials import Outcome
from tests.helpers.tuning import scale_outcomes, toy_screening


def cells(table: Table) -> list[tuple[str, ...]]:
    """The rows of a table."""
    return list(zip(*(map(str, column.cells) for column in table.columns), strict=True))


def test_results_show_the_best_a_stopped_and_a_failed_setting() -> None:
    outcomes = scale_outcomes({10.0: [0.2, 0.2], 20.0: [0.3, 0.3], 40.0: None})
    outcomes[Trial(Setting("red", {"red": 80.0}, alone=True), 0)] = Outcome("open", error="no memory")
    assert cells(results_table(make_rows(outcomes, [0, 1]), "accuracy")) == [
        ("red", "red 10", "0.2000", "0.0000", "2", ""),
        ("red", "red 20", "0.3000", "0.0000", "2", "best"),
        ("red", "red 40", "(0.1000)", "", "", "stopped at step 5"),
        ("red", "red 80", "", "", "0", "failed: no memory"),
    ]


def test_screening_marks_the_scale_nearest_to_the_most_likely_one() -> None:
    rows = cells(screening_table({"red": toy_screening(10.0, 40.0)}))
    assert rows == [
        ("red", "10", "0.100", "0.100", "20.000", "-", ""),
        ("red", "40", "0.025", "0.400", "10.000", "-", "most likely: 30"),
    ]
