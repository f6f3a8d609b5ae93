"""A dataset of every kind of teacher, and configs of students on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reinforce.student.config import StudentConfig
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.reinforced import small_dataset
from tests.helpers.students import PAIRS, student_config


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A custom class, an open_clip model, which may be a student's start, and one-sided ones."""
    vit = open_clip_model(tmp_path_factory.mktemp("vit"), context_length=16)
    made = {
        "red": {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16}, "logit_scale": 50.0},
        "vit": {"model": vit, "logit_scale": 20.0},
        "eyes": {"class": "tests.helpers.models:ImageOnly"},
        "ears": {"class": "tests.helpers.models:TextOnly"},
    }
    return {name: {**keys, "codec": "float32"} for name, keys in made.items()}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, dict[str, Any]]) -> str:
    return small_dataset(tmp_path_factory.mktemp("dataset"), (12,), teachers=teachers)


@pytest.fixture
def config(tmp_path: Path, dataset: str) -> Callable[..., StudentConfig]:
    """Makes configs of trainings of one step; ``sections`` are further ones than those of the loss and the training."""

    def make(loss: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **sections: Any) -> StudentConfig:
        train = {"steps": 1, "batch": PAIRS, **(train or {})}
        return student_config(tmp_path, dataset, loss=loss or {}, train=train, **sections)

    return make
