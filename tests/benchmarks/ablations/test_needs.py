"""A question whose captioner is not trained is left out, unless it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.ablations import __main__ as ablations
from benchmarks.ablations import questions
from benchmarks.ablations.questions import make_questions
from reinforce.errors import UserError
from reinforce.terminal import Screen
from tests.helpers.demo import ROOT


def test_a_named_question_without_its_captioner_is_an_error_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(questions, "PRETRAINED_CAPTIONER", tmp_path / "captioner")
    with pytest.raises(UserError, match=r"finetuning needs .*captioner, which `make demo-teachers` writes"):
        ablations.main(tmp_path / "out", ["lambda", "finetuning"], 3, [], None)
    assert not (tmp_path / "out").exists()


def test_among_all_questions_it_is_left_out_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    captioner = tmp_path / "captioner"
    monkeypatch.setattr(questions, "PRETRAINED_CAPTIONER", captioner)
    study = ablations.Study(tmp_path / "out")
    finetuning, others = make_questions(study)["finetuning"], make_questions(study)["lambda"]
    assert ablations.can_answer(others, [], Screen())
    assert not ablations.can_answer(finetuning, [], Screen())
    assert "left out: finetuning needs" in "".join(capsys.readouterr())
    captioner.mkdir()
    assert ablations.can_answer(finetuning, ["finetuning"], Screen())
    assert study.dataset_config("pretrained-captioner").captioners["coca"].model == f"local-dir:{captioner}"
