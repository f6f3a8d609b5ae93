"""Claims and measures on small numbers, finished trainings and their answers, and the page that shows them."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from benchmarks.ablations import page
from benchmarks.ablations.arms import BASE, Study
from benchmarks.ablations.measures import (
    BYTES,
    MILLISECONDS,
    MILLISECONDS_ALONE,
    REACHED_AT,
    RETAINED,
)
from benchmarks.ablations.questions import Question, make_questions
from benchmarks.ablations.results import Answer, Training, add_derived_measures, find_training, read_answer
from benchmarks.ablations.trainings import _Progress
from examples.demo.compare import MEASURES, SECONDS
from reinforce.dataset.files.store import Store
from reinforce.errors import UserError
from tests.helpers import demo


def make_answer(question: Question, levels: Mapping[str, float], seeds: int = 3) -> Answer:
    """Return an answer where every measure of an arm is its level plus 0.001 per seed; curves are linear."""
    numbers: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, dict[str, list[list[tuple[int, float]]]]] = {}
    for arm in question.arms:
        values = [levels[arm.label] + 0.001 * seed for seed in range(seeds)]
        numbers[arm.label] = dict.fromkeys((*MEASURES, SECONDS, BYTES, MILLISECONDS, MILLISECONDS_ALONE), values)
        if question.target is not None:
            curves[arm.label] = {name: [[(50, v / 2), (100, v)] for v in values] for name in MEASURES}
    return add_derived_measures(Answer(question, numbers, "this one", curves))


def rising_answer(question: Question) -> Answer:
    """Return an answer in which each arm is better than the previous one."""
    return make_answer(question, {arm.label: 0.1 + 0.05 * place for place, arm in enumerate(question.arms)})


def write_dataset(study: Study, name: str = BASE) -> None:
    """Write the manifest of a dataset."""
    manifest = {
        "format": "reinforced-dataset",
        "schema_version": 1,
        "images": "embed",
        "augmentations": {"count": 2, "size": 64},
        "layers": {"samples": {"kind": "samples", "fingerprint": "f00d"}},
        "teachers": {name: {"logit_scale": 50.0, "logit_scale_from": "config"} for name in study.teachers},
        "captioners": {},
    }
    Store(study.dataset_url(name)).write_json(manifest, "dataset.json")


def finish_training(training: Training, metric: float, steps: int) -> None:
    """Write the files of a finished training."""
    training.begin()
    demo.finish_training(training.folder, metric, steps)


def write_page(
    study: Study, answers: Sequence[Answer], folder: Path, seeds: int = 3, draw: bool = False
) -> tuple[str, dict[str, object]]:
    """Write the page and the numbers to a folder; return both. Figures are left out by default: they take seconds."""
    info = page.describe_study(study, seeds, [answer.question.name for answer in answers])
    with contextlib.nullcontext() if draw else patch.object(page.figures, "draw"):
        page.write_page(study, answers, info, folder / "page.md", folder / "numbers.json")
    return (folder / "page.md").read_text(), json.loads((folder / "numbers.json").read_text())


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


def test_committed_page_has_the_stored_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.ROOT)
    stored = json.loads(page.RESULTS.read_text())
    monkeypatch.setattr(torch, "__version__", stored["torch"])
    study = Study(Path("demo/ablations"), stored["changes"])
    answers = page.read_stored_answers(study, stored["seeds"])
    text = page.PAGE.read_text().partition("\n<!-- transfer:")[0]
    assert list(answers) == list(stored["questions"])
    checked = [(answer, page.check_claims(answer)) for answer in answers.values()]
    assert text == page.render_page(checked, page.describe_study(study, stored["seeds"], list(answers)))
    assert {path.stem for path in page.PAGE.with_suffix("").iterdir()} == set(answers)
