"""The questions follow the demo's configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.ablations.arms import Study
from benchmarks.ablations.questions import SCALES, make_questions
from tests.helpers.demo import ROOT


def test_teachers_and_captioners_are_read_from_the_demo_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo, student = (yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()) for name in ("demo", "student-demo"))
    others = list(demo["teachers"])[1:]
    demo["teachers"] = dict(zip(["dr.one", *others], demo["teachers"].values(), strict=True))
    demo["captioners"] = dict(zip(["words"], demo["captioners"].values(), strict=False))
    student["data"] |= {"teachers": ["dr.one", *others], "captioners": ["words"]}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo-models").symlink_to(ROOT / "configs/demo-models")
    for name, config in (("demo", demo), ("student-demo", student)):
        (tmp_path / f"configs/{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    study = Study(tmp_path)
    questions = make_questions(study)
    assert [arm.label for arm in questions["teachers"].arms] == ["dr.one", *others, "ensemble"]
    online = study.student_config(questions["ways"].arms[1], 0)
    assert online.loss.targets == "online"
    in_fp32 = {name: spec.model_copy(update={"precision": "fp32"}) for name, spec in study.demo.teachers.items()}
    assert online.loss.teachers == in_fp32
    assert study.student_config(questions["scales"].arms[0], 0).loss.logit_scales == dict.fromkeys(
        ["dr.one", *others], float(SCALES[0])
    )
    two = study.student_config(questions["captions"].arms[-1], 0)
    assert list(two.data.captioners or {}) == list(study.dataset_config("two-captioners").captioners)
