"""The screening compared with its definitions in numpy, on a real dataset."""

from __future__ import annotations

import numpy as np
import pytest

from reinforce import settings
from reinforce.student.config import StudentConfig
from reinforce.tuning.screening import TeacherScreening, _read_batches, screen

SIZE, COUNT = 12, 3
SCALES = {"red": [0.01, 5.0, 40.0], "blue": [20.0, 60.0]}


@pytest.fixture(scope="module")
def config(labelled: str) -> StudentConfig:
    return settings.parse(
        StudentConfig,
        {
            "output": "student",
            "student": {"model": "MobileCLIP2-S0"},
            "data": {"datasets": labelled, "window": 16},
            "train": {"steps": 1, "batch": SIZE},
        },
    )


@pytest.fixture(scope="module")
def screenings(config: StudentConfig) -> dict[str, TeacherScreening]:
    return screen(config, ["red", "blue"], SCALES, {"red": 50.0, "blue": 30.0}, COUNT, None)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_measures_match_their_definitions(config: StudentConfig, screenings: dict[str, TeacherScreening]) -> None:
    entropies, true, losses, agreements = [], [], [], []
    for batch in _read_batches(config, ["red", "blue"], COUNT, SIZE):
        for kind in ("caption", "synthetic"):
            for turn in (lambda m: m, lambda m: m.T):
                one = softmax(turn(5.0 * batch["red"][kind].numpy().astype(np.float64)))
                other = softmax(turn(30.0 * batch["blue"][kind].numpy().astype(np.float64)))
                entropies.append(-(one * np.log(one)).sum(axis=1).mean() / np.log(SIZE))
                true.append(np.diag(one).mean())
                losses.append(-np.log(np.diag(one)).mean())
                middle = (one + other) / 2
                divergence = [(p * np.log(p / middle)).sum(axis=1).mean() for p in (one, other)]
                agreements.append(1 - np.mean(divergence) / np.log(2))
    measured = screenings["red"].scales[1]
    assert measured.scale == 5.0
    expected = [np.mean(values) for values in (entropies, true, losses, agreements)]
    assert [measured.entropy, measured.true_pair, measured.calibration, measured.agreement] == pytest.approx(
        expected, rel=1e-4
    )
    assert np.mean([measured.entropy_of_images, measured.entropy_of_texts]) == pytest.approx(measured.entropy)


def test_most_likely_scale_has_the_lowest_loss_on_a_grid(config: StudentConfig) -> None:
    grid = [float(scale) for scale in np.geomspace(1, 30, 60)]
    screening = screen(config, ["blue"], {"blue": grid}, {"blue": 30.0}, COUNT, None)["blue"]
    losses = screening.curve("calibration")
    best = grid[int(np.argmin(losses))]  # type: ignore[arg-type]
    assert screening.calibrated == pytest.approx(best, rel=0.06)
    assert screening.curve("agreement") == [None] * 60  # undefined for a single teacher


def test_screening_is_deterministic_and_depends_on_the_seed(
    config: StudentConfig, screenings: dict[str, TeacherScreening]
) -> None:
    for seed in (config.seed, config.seed + 1):
        again = screen(
            config.model_copy(update={"seed": seed}), ["red", "blue"], SCALES, {"red": 50.0, "blue": 30.0}, COUNT, None
        )
        assert (again == screenings) == (seed == config.seed)
