"""Arms, datasets and questions of the ablations, which follow the demo's configs, and the image encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.ablations import __main__ as ablations
from benchmarks.ablations import questions
from benchmarks.ablations.arms import BASE, WRONG, Study
from benchmarks.ablations.encoders import Encoder
from benchmarks.ablations.questions import STAGES, make_questions
from examples.demo.compare import MEASURES
from reinforce.config import load_config
from reinforce.errors import UserError
from reinforce.student.layers.pointwise import avoid_faulty_convolutions
from reinforce.terminal import Screen
from teachers.open_clip.teacher import random_model
from tests.helpers.demo import ROOT


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
    assert {spec.dtype for config in configs.values() for spec in config.teachers.values()} >= {"float32", "int8"}
    assert configs[WRONG].source == f"{study.wrong_shards}/*.tar"
    first, second = configs["two-captioners"].captioners.values()
    assert (first.model, first.captions, second.captions) == (second.model, 1, 1)
    assert first.decoding() != second.decoding()
    assert study.own_scales() == {"conv-64": 27.3, "conv-48": 29.8, "styles-64": 24.0}, "of the teachers' weights"


def test_overrides_apply_to_all_students_and_errors_come_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = Study(tmp_path, ["train.steps=120", "train.optimizer.warmup=5"])
    questions = make_questions(study)
    trained = [study.student_config(arm, 0) for question in questions.values() for arm in question.arms]
    assert {config.train.steps for config in trained} == {study.steps} == {120}
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
    monkeypatch.chdir(ROOT)
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
