"""The plot of a tuning."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from reinforce.tuning import plot
from reinforce.tuning.correlation import check_screening
from tests.helpers.tuning import scale_curve, toy_screening


def test_plot_has_a_column_for_each_teacher_and_a_row_for_trials_and_screening(tmp_path: Path) -> None:
    curve = scale_curve({10.0: [0.2, 0.21], 20.0: [0.3, 0.31], 40.0: None})
    screening = toy_screening(10.0, 20.0, 40.0)
    check = check_screening(curve, screening, [{5: 0.1}] * 3)
    paths = [tmp_path / f"{name}.png" for name in ("both", "screening", "two")]
    plot.draw([curve], {"red": screening}, {"red": check}, "accuracy", str(paths[0]))
    plot.draw([], {"red": screening}, {}, "accuracy", str(paths[1]))
    plot.draw([curve], {"red": screening, "blue": screening}, {"red": check}, "accuracy", str(paths[2]))
    both, alone, two = (Image.open(path).size for path in paths)
    assert both[1] > 1.5 * alone[1]
    assert two[0] > 1.5 * both[0]
