"""Tables of a tuning for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from reinforce.tuning.screening import Screened
from reinforce.tuning.table import Row, best_of


def results_table(rows: Sequence[Row], metric: str) -> Table:
    """A line a setting."""
    table = Table("curve", "setting", metric, "deviation", "seeds", "", title="Short trainings", title_justify="left")
    best = [best_of(rows, curve) for curve in dict.fromkeys(row.setting.curve for row in rows)]
    for row in rows:
        values = ", ".join(f"{name} {value:g}" for name, value in row.setting.values.items())
        if row.mean is not None:
            note = "best" if any(row is one for one in best) else ""
            deviation = "-" if row.deviation is None else f"{row.deviation:.4f}"
            table.add_row(row.setting.curve, values, f"{row.mean:.4f}", deviation, str(len(row.values)), note)
        elif row.state == "stopped":
            last = "-" if row.last is None else f"{row.last:.4f}"
            table.add_row(row.setting.curve, values, f"({last})", "", "", f"stopped at step {row.reached:,}")
        else:
            table.add_row(row.setting.curve, values, "", "", str(len(row.values)), f"failed: {row.fault}")
    return table


def screening_table(screened: Mapping[str, Screened]) -> Table:
    """A line a scale; what each measure is stands in ``reinforce.tuning.screening``."""
    table = Table(
        "teacher", "logit scale", "entropy", "true pair", "calibration loss", "agreement", "",
        title="Screening, without training", title_justify="left",
    )  # fmt: skip
    for teacher, found in screened.items():
        nearest = min(found.scales, key=lambda at: max(at.scale / found.calibrated, found.calibrated / at.scale))
        for at in found.scales:
            agreement = "-" if at.agreement is None else f"{at.agreement:.3f}"
            note = f"most likely: {found.calibrated:g}" if at is nearest else ""
            numbers = (f"{at.entropy:.3f}", f"{at.true_pair:.3f}", f"{at.calibration:.3f}")
            table.add_row(teacher, f"{at.scale:g}", *numbers, agreement, note)
    return table
