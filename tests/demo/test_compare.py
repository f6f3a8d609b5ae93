"""The comparison of the demo's students."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from reinforce.dataset.files.store import Store
from reinforce.demo.compare import ARMS, MEASURES, PAIRS, compare_students, student_config
from reinforce.errors import UserError
from reinforce.training.record.results import Results
from tests.helpers.demo import ROOT


def finish_training(folder: Path, metric: float, steps: int = 300) -> None:
    """Write the files of a finished training."""
    metrics = {name: metric for _, name in MEASURES.values()}
    results = Results(str(folder), "student", steps, steps * 192, 60.0, 1_000_000, 1.0, metrics, None, 0)
    results.write(Store(str(folder)))
    rows = [{"step": step, "metrics": dict.fromkeys(metrics, metric * step / steps)} for step in (100, steps)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"step": 10, "loss": 5.0}, *rows]))


def test_comparison_prints_a_table_and_writes_results_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arm, metric in zip(ARMS, (0.125, 0.25, 0.0625, 0.1875), strict=True):
        finish_training(tmp_path / "students" / arm, metric)
    compare_students(tmp_path / "students", tmp_path)
    printed = capsys.readouterr().out
    assert len(re.findall(r"unseen \w+ +│ +12\.5% │ +25\.0% │ +2\.0 │ +6\.2% │ +18\.8% │ +3\.0 │", printed)) >= 3
    assert f"{tmp_path}/students/distilled/student" in printed
    finish_training(tmp_path / "students" / "plain", 0.0)
    compare_students(tmp_path / "students", tmp_path)
    assert re.search(r"unseen icons +│ +0\.0% │ +25\.0% │ +- │", capsys.readouterr().out)
    finish_training(tmp_path / "students" / "plain", 0.125)
    compare_students(tmp_path / "students", tmp_path)
    assert len(printed.splitlines()) < 30
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["distilled"] == {**dict.fromkeys(MEASURES, 0.25), "seconds_per_step": 0.2}
    assert {"own_style", "unseen_style", "unseen_pictures", "retrieval"} <= found["plain"].keys()
    with Image.open(tmp_path / "summary.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=2**20) or []) > 20


def test_unfinished_or_unequal_trainings_are_a_user_error(tmp_path: Path) -> None:
    finish_training(tmp_path / "plain", 0.1)
    with pytest.raises(UserError, match="distilled has no finished training"):
        compare_students(tmp_path, tmp_path)
    finish_training(tmp_path / "distilled", 0.1, steps=200)
    for arm in ("plain-noisy", "distilled-noisy"):
        finish_training(tmp_path / arm, 0.1)
    with pytest.raises(UserError, match="200 and 300 steps"):
        compare_students(tmp_path, tmp_path)


@pytest.mark.parametrize("arms", PAIRS.values(), ids=["right", "wrong"])
def test_students_differ_only_in_lambda_and_captions(monkeypatch: pytest.MonkeyPatch, arms: tuple[str, str]) -> None:
    monkeypatch.chdir(ROOT)
    plain, distilled = (student_config(arm, "out", seed=3).model_dump() for arm in arms)
    assert (plain["loss"]["lambda_"], plain["data"]["captioners"]) == (0, {})
    for section, key in (("loss", "lambda_"), ("data", "captioners")):
        assert plain[section].pop(key) != distilled[section].pop(key)
    assert plain == distilled
    assert plain["seed"] == 3
    assert {name for _, name in MEASURES.values()} <= set(student_config("plain", "out").evaluate.metrics)
