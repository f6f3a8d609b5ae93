"""student.yaml, as `reinforce train` reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from reinforce import settings
from reinforce.student.config import StudentConfig, load_student_config
from reinforce.tuning.space import LAMBDA
from reinforce.tuning.student_yaml import render_student_yaml


def raw_student(url: str, loss: dict[str, Any] | None = None) -> dict[str, Any]:
    """A student's config as a user writes it."""
    return {
        "output": "before",
        "student": {"model": "MobileCLIP2-S0"},
        "data": {"datasets": url, "teachers": ["red", "blue", "x"], "captioners": {"coca": 2.0}},
        **({} if loss is None else {"loss": loss}),
        "train": {"epochs": 8, "batch": 128, "optimizer": {"lr": 1e-3}},
    }


@pytest.mark.parametrize("loss", [None, {"lambda": 0.7, "logit_scales": {"red": 10.0, "x": 5.0}, "features": "all"}])
def test_written_config_differs_in_scales_and_lambda_and_states_their_origins(
    tmp_path: Path, loss: dict[str, Any] | None
) -> None:
    best = {"red": 43.0, LAMBDA: 0.5}
    origins = {
        "red": "reinforce tune: best at 43 (0.6), # plateau",
        "blue": "unchanged: 30, dataset: model",
        LAMBDA: "best",
    }
    path = tmp_path / "student.yaml"
    path.write_text(
        render_student_yaml(raw_student("data", loss), best, origins, "runs/tuning/student", "Written by a test.")
    )
    text = path.read_text()
    written = load_student_config(path)
    before = settings.parse(StudentConfig, raw_student("data", loss))
    assert written.loss.logit_scales == {**before.loss.logit_scales, "red": 43.0}
    assert (written.loss.lambda_, written.loss.features) == (0.5, before.loss.features)
    assert written.output == "runs/tuning/student"
    assert written.model_copy(update={"output": "before", "loss": before.loss}) == before
    assert text.startswith("# Written by a test.\n")
    lines = [line.strip() for line in text.splitlines()]
    assert lines[lines.index("red: 43.0") - 1] == "# reinforce tune: best at 43 (0.6), # plateau"
    assert "# blue: unchanged: 30, dataset: model" in lines
    assert yaml.safe_load(text)["data"] == json.loads(json.dumps(raw_student("data")["data"]))
