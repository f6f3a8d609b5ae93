"""A tuning with its output in an object store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import s3fs

from reinforce import settings
from reinforce.tuning.command import tune
from reinforce.tuning.config import TuneConfig
from tests.helpers.reinforced import small_dataset
from tests.helpers.students import student_folder

STEPS = 3


@pytest.mark.slow
def test_trials_and_results_are_written_to_the_store(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    url = small_dataset(tmp_path, sizes=(13,))
    student: dict[str, Any] = {
        "output": str(tmp_path / "student"),
        "student": {"model": student_folder(tmp_path / "model")},
        "data": {"datasets": url, "teachers": ["red"], "workers": 0, "window": 16},
        "train": {"steps": STEPS, "batch": 8, "optimizer": {"warmup": 1}},
        "evaluate": {"retrieval": {"own": {"pairs": url}}},
    }
    config = settings.parse(
        TuneConfig,
        {
            "output": "s3://bucket/tuning",
            "student": student,
            "scales": {"red": [5.0, 50.0]},
            "seeds": [0],
            "early_stopping": None,
            "concurrent": 1,
            "screening": {"batches": 1},
        },
    )
    first = tune(config)
    assert [row.state for row in first.rows] == ["finished", "finished"]
    assert json.loads(s3.cat("bucket/tuning/table.json"))["found"] == first.best
    assert s3.exists("bucket/tuning/scales.png")
    assert s3.exists("bucket/tuning/student.yaml")
    assert s3.find("bucket/tuning/.ray") == []
    before = {path: info["LastModified"] for path, info in s3.find("bucket/tuning/trials", detail=True).items()}
    assert tune(config).json() == first.json()
    assert {p: i["LastModified"] for p, i in s3.find("bucket/tuning/trials", detail=True).items()} == before
