"""The page of the ablations and its stored numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.ablations import page
from benchmarks.ablations.arms import Study
from benchmarks.ablations.claims import agreement
from benchmarks.ablations.measures import REACHED_AT, RETAINED
from benchmarks.ablations.questions import make_questions
from tests.helpers.ablations import make_answer, rising_answer, write_page
from tests.helpers.demo import ROOT


def test_page_reports_agreement_and_disagreement(study: Study, tmp_path: Path) -> None:
    questions = make_questions(study)
    agrees = make_answer(
        questions["lambda"], {"lambda 0": 0.1, "lambda 0.7": 0.31, "lambda 0.85": 0.2, "lambda 1": 0.31}
    )
    falls = make_answer(questions["lambda"], {"lambda 0": 0.4, "lambda 0.7": 0.2, "lambda 0.85": 0.3, "lambda 1": 0.1})
    text, _ = write_page(study, [agrees], tmp_path)
    assert "| [Lambda](#lambda) | agree |" in text
    assert "**These results agree.**" in text
    assert "unseen style: lambda 1 above lambda 0: yes (31.1% and 10.1%, difference 21.0 points" in text
    assert "| lambda 0.7 | 31.1% ± 0.1 |" in text
    text, numbers = write_page(study, [falls], tmp_path)
    assert "**These results do not agree.**" in text
    assert "unseen style: lambda 1 above lambda 0: no, below it" in text
    assert "retrieval, unseen style: lambda 0.7 not below the best other (lambda 0): no" in text
    found = numbers["questions"]["lambda"]  # type: ignore[index]
    assert [claim["holds"] for claim in found["claims"]] == [False] * 3
    assert found["arms"]["lambda 0.85"]["arm"] == "distilled"
    assert found["arms"]["lambda 1"]["unseen_style"]["seeds"] == pytest.approx([0.1, 0.101, 0.102])
    assert numbers["command"] == "python -m benchmarks.ablations --questions lambda"
    assert "`make ablations` does it:\n\n- Plain, online" in text
    assert "- Lambda\n" not in text


def test_figures_and_derived_measures_are_written(study: Study, tmp_path: Path) -> None:
    questions = make_questions(study)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "scales.png").touch()  # figure of an earlier page
    answers = [rising_answer(questions[name]) for name in ("augmentations", "noise", "steps")]
    _, numbers = write_page(study, answers, tmp_path, draw=True)
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"augmentations.png", "noise.png", "steps.png"}
    noise, steps = (numbers["questions"][name]["arms"] for name in ("noise", "steps"))  # type: ignore[index]
    wrong = [label for label in noise if RETAINED in noise[label]]
    assert len(wrong) == 2
    assert noise[wrong[0]][RETAINED]["mean"] == pytest.approx(noise[wrong[0]]["own_style"]["mean"] / 0.101, rel=0.01)
    assert steps["plain"]["own_style" + REACHED_AT]["mean"] == 100
    assert steps["distilled"]["own_style" + REACHED_AT]["mean"] == pytest.approx(100 * 0.101 / 0.151, rel=0.01)


def test_stored_answers_are_kept_while_their_arms_are_unchanged(study: Study, tmp_path: Path) -> None:
    questions = make_questions(study)
    answers = [rising_answer(questions[name]) for name in ("noise", "steps")]
    answers[1].numbers["plain"]["own_style" + REACHED_AT] = [50.0, math.inf, 60.0]  # type: ignore[index]
    text, numbers = write_page(study, answers, tmp_path)
    kept = page.read_stored_answers(study, 3, tmp_path / "numbers.json")
    assert list(kept) == ["noise", "steps"]
    assert write_page(study, [*kept.values()], tmp_path / "again") == (text, numbers)
    assert not page.read_stored_answers(study, 2, tmp_path / "numbers.json")
    assert not page.read_stored_answers(study, 3, tmp_path / "nothing.json")
    assert not page.read_stored_answers(Study(study.out, ["train.steps=120"]), 3, tmp_path / "numbers.json")
    numbers["questions"]["steps"]["recipe"] = "another"  # type: ignore[index]
    (tmp_path / "numbers.json").write_text(json.dumps(numbers))
    assert list(page.read_stored_answers(study, 3, tmp_path / "numbers.json")) == ["noise"]


def test_other_machines_are_listed_with_their_questions(study: Study, tmp_path: Path) -> None:
    questions = make_questions(study)
    here, there = rising_answer(questions["lambda"]), replace(rising_answer(questions["scales"]), machine="another")
    assert "(torch" in write_page(study, [here], tmp_path)[0]
    assert ";\nthis one).\n" in write_page(study, [here], tmp_path)[0]
    assert "\nthis one; another, for *Logit scales*).\n" in write_page(study, [here, there], tmp_path)[0]


def test_single_seed_gives_no_conclusion(study: Study) -> None:
    question = make_questions(study)["teachers"]
    answer = make_answer(question, dict.fromkeys((arm.label for arm in question.arms), 0.1), seeds=1)
    info = page.describe_study(study, 1, ["teachers"])
    assert page.check_claims(answer) == []
    assert agreement([]) in page.render_page([(answer, [])], info)
    assert info.command.endswith("--questions teachers --seeds 1")


def test_committed_page_has_the_stored_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stored = json.loads(page.RESULTS.read_text())
    monkeypatch.setattr(torch, "__version__", stored["torch"])
    study = Study(Path("demo/ablations"), stored["changes"])
    answers = page.read_stored_answers(study, stored["seeds"])
    text = page.PAGE.read_text()
    assert list(answers) == list(stored["questions"])
    checked = [(answer, page.check_claims(answer)) for answer in answers.values()]
    assert text == page.render_page(checked, page.describe_study(study, stored["seeds"], list(answers)))
    assert {path.stem for path in page.PAGE.with_suffix("").iterdir()} == set(answers)
