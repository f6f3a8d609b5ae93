"""The number of steps of a training."""

from __future__ import annotations

from typing import Any

import pytest

from reinforce.errors import UserError
from reinforce.training.job import total_steps
from tests.helpers.trainings import training


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"steps": 12}, 12),
        ({"steps": None, "epochs": 2.5}, 10),  # 2.5 x 64 / 16
        ({"steps": None, "epochs": 0.01, "optimizer": {"warmup": 0}}, 1),
    ],
)
def test_the_length_is_given_in_steps_or_in_epochs(changes: dict[str, Any], steps: int) -> None:
    assert total_steps(training(**changes), samples=64, ranks=1) == steps


def test_the_batch_must_be_divisible_among_ranks_and_parts() -> None:
    with pytest.raises(UserError, match=r"train\.batch \(16\) must be a multiple of .* \(6\)"):
        total_steps(training(compute={"accumulate": 2}), samples=64, ranks=3)


def test_the_warm_up_must_be_shorter_than_the_training() -> None:
    with pytest.raises(UserError, match=r"warmup \(12\) must be below the training's 12 steps"):
        total_steps(training(optimizer={"warmup": 12}), samples=64, ranks=1)
