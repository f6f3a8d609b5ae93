"""Terminal tables of a tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from reinforce.tuning.results import Row, best_row
from reinforce.tuning.screening import TeacherScreening


def results_table(rows: Sequence[Row], metric: str) -> Table:
    """Return a table with one line for each setting."""
    table = Table("curve", "setting", metric, "deviation", "seeds", "", title="Trials", title_justify="left")
    best = [best_row(rows, curve) for curve in dict.fromkeys(row.setting.curve for row in rows)]
    for row in rows:
        values = ", ".join(f"{name} {value:g}" for name, value in row.setting.values.items())
        if row.mean is not None:
            note = "best" if any(row is one for one in best) else ""
            deviation = "-" if row.deviation is None else f"{row.deviation:.4f}"
            table.add_row(row.setting.curve, values, f"{row.mean:.4f}", deviation, str(len(row.values)), note)
        elif row.state == "stopped":
            last = "-" if row.last_value is None else f"{row.last_value:.4f}"
            table.add_row(row.setting.curve, values, f"({last})", "", "", f"stopped at step {row.last_step:,}")
        else:
            table.add_row(row.setting.curve, values, "", "", str(len(row.values)), f"failed: {row.error}")
    return table


def screening_table(screenings: Mapping[str, TeacherScreening]) -> Table:
    """Return a table with one line for each scale; ``reinforce.tuning.screening`` defines the measures."""
    table = Table(
        "teacher", "logit scale", "entropy", "true pair", "calibration loss", "agreement", "",
        title="Screening without training", title_justify="left",
    )  # fmt: skip
    for teacher, screening in screenings.items():
        best = screening.calibrated
        nearest = min(screening.scales, key=lambda measured: max(measured.scale / best, best / measured.scale))
        for measured in screening.scales:
            agreement = "-" if measured.agreement is None else f"{measured.agreement:.3f}"
            note = f"most likely: {best:g}" if measured is nearest else ""
            numbers = (f"{measured.entropy:.3f}", f"{measured.true_pair:.3f}", f"{measured.calibration:.3f}")
            table.add_row(teacher, f"{measured.scale:g}", *numbers, agreement, note)
    return table
