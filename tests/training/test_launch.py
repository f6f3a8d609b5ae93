"""Where a training runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.training.launch import launch, runs_on_ray
from tests.helpers.trainings import builder, job


@pytest.mark.parametrize(
    ("ranks", "address", "environment", "on_ray"),
    [
        (1, None, {}, False),
        (2, None, {}, True),
        (1, "auto", {}, True),
        (1, None, {"RAY_ADDRESS": "auto"}, True),
        (2, "auto", {"RANK": "0", "WORLD_SIZE": "2"}, False),
    ],
)
def test_ray_train_is_used_for_several_ranks_or_an_address_but_not_under_torchrun(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    address: str | None,
    environment: dict[str, str],
    on_ray: bool,
) -> None:
    for name in ("RAY_ADDRESS", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert runs_on_ray(job(tmp_path, compute={"ranks": ranks}), address) == on_ray


def test_a_second_training_with_the_same_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with Storage(str(tmp_path)).lock(), pytest.raises(UserError, match="another run is writing to"):
        launch(builder(), job(tmp_path))
    assert launch(builder(), job(tmp_path, steps=3)).steps == 3
