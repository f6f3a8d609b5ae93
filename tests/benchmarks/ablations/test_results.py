"""Finished trainings, answers and progress, read from their folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.ablations.arms import BASE, Study
from benchmarks.ablations.questions import make_questions
from benchmarks.ablations.results import find_training, read_answer
from benchmarks.ablations.trainings import _Progress
from reinforce.errors import UserError
from tests.helpers.ablations import finish_training, write_dataset, write_page


def test_question_is_answered_when_all_seeds_are_finished(study: Study, tmp_path: Path) -> None:
    questions = make_questions(study)
    assert find_training(study, study.plain, 0) is None  # no dataset yet
    write_dataset(study)
    for arm in questions["lambda"].arms:
        for seed in range(2):
            training = find_training(study, arm, seed)
            assert training.results() is None
            finish_training(training, 0.2 if arm.name == "distilled" else 0.1, study.steps)
    answers = [found for question in questions.values() if (found := read_answer(study, question, 2)) is not None]
    assert [found.question.name for found in answers] == ["lambda"]  # others need the plain student
    text, numbers = write_page(study, answers, tmp_path, seeds=2)
    assert list(numbers["questions"]) == ["lambda"]  # type: ignore[call-overload]
    assert "## Synthetic captions" not in text
    assert read_answer(study, questions["lambda"], 3) is None
    shutil.rmtree(study.out / "students" / "distilled-1")
    assert read_answer(study, questions["lambda"], 2) is None


def test_training_of_another_config_or_dataset_is_rejected(study: Study) -> None:
    write_dataset(study)
    training = find_training(study, study.distilled, 0)
    finish_training(training, 0.2, study.steps)
    assert training.results() is not None
    assert training.step == study.steps
    longer = find_training(Study(study.out, ["train.steps=9999"]), study.distilled, 0)
    assert longer.results() is None
    with pytest.raises(UserError, match=r"train\.steps: \d+ before, 9999 now\n.*Delete "):
        longer.begin()
    manifest = json.loads(Path(study.dataset_url(BASE), "dataset.json").read_text())
    manifest["layers"]["samples"]["fingerprint"] = "beef"
    Path(study.dataset_url(BASE), "dataset.json").write_text(json.dumps(manifest))
    other = find_training(study, study.distilled, 0)
    with pytest.raises(UserError, match="fingerprint of samples"):
        other.begin()


def test_progress_counts_finished_trainings_and_logged_steps(study: Study) -> None:
    write_dataset(study)
    first, second = (find_training(study, arm, 0) for arm in (study.plain, study.distilled))
    progress = _Progress([first, second], done=3)
    assert (progress.total, progress.steps) == (2 * study.steps, 0)
    second.folder.mkdir(parents=True)
    (second.folder / "log.jsonl").write_text('{"step": 80, "loss": 1.0}\n{"step": 90, "lo')
    progress.finish(first)
    line = progress.line([second])
    assert line.startswith(f"4 of 5 trainings  distilled-0 at 80 of {study.steps}  about ")
    assert progress.steps == study.steps + 80
