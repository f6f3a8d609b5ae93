"""A tuning's config and outcomes, in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reinforce import settings
from reinforce.student.config import StudentConfig
from reinforce.tuning.config import Setting, Trial, TuneConfig
from reinforce.tuning.results import Curve, TrialOutcome, make_curves, make_rows
from reinforce.tuning.screening import ScaleMeasures, TeacherScreening

METRIC = "retrieval/own/text_to_image/r1"
STUDENT: dict[str, Any] = {
    "output": "out",
    "student": {"model": "MobileCLIP2-S0"},
    "data": {"datasets": "data", "teachers": ["red", "blue"]},
    "loss": {"lambda": 0.7, "logit_scales": {"red": 33.0}},
    "train": {"epochs": 3, "batch": 64, "optimizer": {"warmup": 10}},
    "evaluate": {"retrieval": {"own": {"pairs": "data"}}},
}


def tune_config(**keys: Any) -> TuneConfig:
    """A tuning of two scales of one teacher, with other keys."""
    base = {"output": "tuning", "student": STUDENT, "scales": {"red": [10.0, 20.0]}}
    return settings.parse(TuneConfig, {**base, **keys})


def scale_outcomes(by_scale: dict[float, list[float] | None]) -> dict[Trial, TrialOutcome]:
    """Outcomes by scale: the metric with each seed, or None where the first trial was stopped at step 5."""
    outcomes = {}
    for scale, values in by_scale.items():
        setting = Setting("red", {"red": scale}, alone=True)
        for seed, value in enumerate(values or [0.1]):
            state: Any = "stopped" if values is None else "finished"
            outcomes[Trial(setting, seed)] = TrialOutcome(
                state, [(5, value / 2 if values else value), (10, value)][: 1 + bool(values)]
            )
    return outcomes


def scale_curve(by_scale: dict[float, list[float] | None], seeds: int = 2) -> Curve:
    """The curve of these outcomes."""
    (curve,) = make_curves(make_rows(scale_outcomes(by_scale), range(seeds)))
    return curve


def toy_screening(*scales: float) -> TeacherScreening:
    """A screening whose entropy falls and whose true pair rises with the scale; 30 is the most likely one."""
    measured = [ScaleMeasures(s, 1 / s, 1 / s, 1 / s, s / 100, abs(s - 30), None) for s in scales]
    return TeacherScreening(measured, calibrated=30.0, top1=0.5)


def trial_student(output: Path | str, steps: int = 12, data: Any = None, **train: Any) -> StudentConfig:
    """The training of a trial."""
    return settings.parse(
        StudentConfig,
        {
            "output": str(output),
            "student": {"model": "MobileCLIP2-S0"},
            "data": data or {"datasets": "data"},
            "train": {"steps": steps, "batch": 8, **train},
        },
    )
