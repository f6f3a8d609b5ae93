"""The ablations: arms that follow the demo's configs, answers from finished trainings, and the page of claims."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from benchmarks.ablations import __main__ as ablations
from benchmarks.ablations import page, questions
from benchmarks.ablations.arms import BASE, WRONG, Study
from benchmarks.ablations.encoders import Encoder
from benchmarks.ablations.measures import BYTES, MILLISECONDS, MILLISECONDS_ALONE, REACHED_AT, RETAINED
from benchmarks.ablations.questions import STAGES, Question, make_questions
from benchmarks.ablations.results import Answer, Training, add_derived_measures, find_training, read_answer
from benchmarks.ablations.trainings import _Progress
from examples.demo.compare import MEASURES, SECONDS
from reinforce import settings
from reinforce.config import load_config
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.student.layers import avoid_faulty_convolutions
from reinforce.terminal import Screen
from teachers.open_clip.teacher import random_model
from tests.helpers import demo

_PARSED = cache(settings.load_yaml)


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse each YAML text once: arms read the configs of the demo thousands of times."""
    monkeypatch.setattr(settings, "load_yaml", lambda text: deepcopy(_PARSED(text)))


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(demo.ROOT)
    return Study(tmp_path / "out")


def test_every_arm_is_a_valid_training_on_one_core_and_equal_arms_are_trained_once(study: Study) -> None:
    questions, trained = make_questions(study), {}
    for question in questions.values():
        labels = [arm.label for arm in question.arms]
        assert len(set(labels)) == len(labels) > 1
        for arm in question.arms:
            config = study.student_config(arm, seed=2)
            assert (config.seed, config.output) == (2, f"{study.out}/students/{arm.name}-2")
            assert [source.url for source in config.data.datasets] == [study.dataset_url(arm.dataset)]
            assert (config.train.compute.cpus, config.data.workers) == (1, 0)
            assert {metric for _, metric in MEASURES.values()} <= set(config.evaluate.metrics)
            trained[arm.name] = config.model_dump_json(exclude={"output", "seed", "evaluate"})
    assert len({*trained.values()}) == len(trained)
    shared = {"ways": "stored", "lambda": "lambda 0.85", "storage": "float16"}
    for name, label in shared.items():
        assert {arm.label: arm.name for arm in questions[name].arms}[label] == "distilled"
    count = study.demo.augmentations.count
    assert {arm.name for arm in questions["augmentations"].arms if arm.x == count} == {"distilled"}


def test_every_dataset_is_a_distinct_valid_run(study: Study) -> None:
    make_questions(study)
    configs = {name: study.dataset_config(name) for name in study.datasets}
    assert configs[BASE] == load_config("configs/demo.yaml", [f"output={study.out}/datasets/base"])
    assert len({config.model_dump_json(exclude={"output"}) for config in configs.values()}) == len(configs)
    assert {config.augmentations.count for config in configs.values()} >= {1, 2, 5, 10}
    assert {spec.codec for config in configs.values() for spec in config.teachers.values()} >= {"float32", "int8"}
    assert configs[WRONG].source == f"{study.wrong_shards}/*.tar"
    first, second = configs["two-captioners"].captioners.values()
    assert (first.model, first.captions, second.captions) == (second.model, 1, 1)
    assert first.decoding() != second.decoding()
    assert study.own_scales() == {"conv-64": 27.3, "conv-48": 29.8, "styles-64": 24.0}, "of the teachers' weights"


def test_overrides_apply_to_all_students_and_errors_come_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.ROOT)
    study = Study(tmp_path, ["train.steps=120", "train.optimizer.warmup=5"])
    questions = make_questions(study)
    steps = {name: {study.student_config(arm, 0).train.steps for arm in one.arms} for name, one in questions.items()}
    assert steps.pop("specialists") == {480}
    assert set().union(*steps.values()) == {study.steps} == {120}
    assert study.student_config(study.plain, 0).evaluate.every == 10  # has a curve
    assert study.student_config(questions["ways"].arms[1], 0).evaluate.every is None
    with pytest.raises(UserError, match="warmup"):
        Study(tmp_path, ["train.steps=5", "train.optimizer.warmup=5"])
    with pytest.raises(UserError, match=r"train\.epochs=null"):
        Study(tmp_path, ["train.steps=null", "train.epochs=3"])


def test_a_question_without_its_captioner_is_an_error_if_it_is_named_and_left_out_of_all_others(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captioner = tmp_path / "captioner"
    monkeypatch.setattr(questions, "PRETRAINED_CAPTIONER", captioner)
    with pytest.raises(UserError, match=r"finetuning needs .*captioner, which `make demo-teachers` writes"):
        ablations.main(tmp_path / "out", ["lambda", "finetuning"], 3, [], None)
    assert not (tmp_path / "out").exists(), "before anything starts"
    finetuning, others = make_questions(study)["finetuning"], make_questions(study)["lambda"]
    assert ablations.can_answer(others, [], Screen())
    assert not ablations.can_answer(finetuning, [], Screen())
    assert "left out: finetuning needs" in "".join(capsys.readouterr())
    captioner.mkdir()
    assert ablations.can_answer(finetuning, ["finetuning"], Screen())
    assert study.dataset_config("pretrained-captioner").captioners["coca"].model == f"local-dir:{captioner}"


@pytest.mark.parametrize("encoder", STAGES, ids=lambda encoder: encoder.name)
def test_encoders_have_their_stages_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Encoder) -> None:
    monkeypatch.chdir(demo.ROOT)
    stages, size = len(encoder.blocks), encoder.size
    encoder.write(tmp_path)
    clip = random_model(encoder.model(tmp_path))
    avoid_faulty_convolutions(clip)
    trunk = clip.visual.trunk
    assert [len(stage.blocks) for stage in trunk.stages] == list(encoder.blocks)
    assert [stage["num_chs"] for stage in trunk.feature_info] == [encoder.width * 2**i for i in range(stages)]
    with torch.inference_mode():
        assert clip.encode_image(torch.zeros(2, 3, size, size)).shape == (2, 96)
        x = trunk.forward_features(torch.zeros(1, 3, size, size))
    assert x.shape[-1] == size // 2 ** (stages + 1)


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
