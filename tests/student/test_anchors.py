"""Anchors of a fine-tuning: the released student is a stored teacher, and its weights are kept near their start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import reinforce
from reinforce.errors import UserError
from reinforce.student.train import StudentTask
from reinforce.training.task import Batch
from tests.helpers.students import first_batch, losses_of, student_folder
from tests.helpers.trainings import curve

BOTH = {"teacher": "vit", "similarities": 2.0, "features": 3.0}


@pytest.fixture
def released(teachers: dict[str, dict[str, Any]]) -> str:
    model: str = teachers["vit"]["model"]
    return model


@pytest.fixture
def anchored(config: Any, released: str) -> Any:
    """Makes configs with lambda 0, an anchor, and a student that starts as the teacher ``vit``."""

    def make(anchor: dict[str, Any] | None, loss: Any = None, **sections: Any) -> Any:
        loss = {"lambda": 0.0, **(loss or {}), **({} if anchor is None else {"anchor": anchor})}
        return config(loss, **{**sections, "student": {"model": released, **sections.get("student", {})}})

    return make


def numbers_of(task: StudentTask, batch: Batch) -> dict[str, float]:
    return {name: value.item() for name, value in losses_of(task, batch).items()}


def test_an_unchanged_student_is_at_its_anchors_which_are_added_to_the_loss_of_any_lambda(
    anchored: Any, released: str
) -> None:
    task, batch = first_batch(anchored({**BOTH, "weights": 0.5}))
    assert batch["targets"].keys() == {"vit"}, "lambda 0 reads no other teacher"
    losses = numbers_of(task, batch)
    texts = ("caption", "synthetic")
    expected = {f"{term}/{kind}" for term in ("clip", "anchor_similarities", "anchor_features") for kind in texts}
    assert losses.keys() == expected | {"anchor_features/image", "anchor_weights"}
    assert losses["anchor_weights"] == 0
    for what in ("image", *texts):
        assert losses[f"anchor_features/{what}"] == pytest.approx(0, abs=2e-3)
    alone, batch = first_batch(anchored(None, loss={"lambda": 1.0}, data={"teachers": ["vit"]}))
    ordinary = numbers_of(alone, batch)
    for kind in texts:
        assert losses[f"anchor_similarities/{kind}"] == pytest.approx(2 * ordinary[f"distill/{kind}"], rel=1e-5)
    in_loop = {"vit": {"model": released, "logit_scale": 20.0}, "unread": {"model": "local-dir:/nowhere"}}
    online, batch = first_batch(anchored({**BOTH, "weights": 0.5}, loss={"teachers": in_loop}))
    assert numbers_of(online, batch) == pytest.approx(losses, rel=1e-3, abs=1e-4)
    assert task.terms.merged(lambda term: term.recorded) == {"loss.logit_scales.vit": 20.0}
    assert task.notes[1] == (
        "teacher vit: anchor of similarities, logit scale 20 (dataset: config); anchor of features of images and texts"
    )


def test_the_teacher_of_an_anchor_is_read_beside_the_ensemble_and_is_not_in_it(anchored: Any) -> None:
    loss, data = {"lambda": 0.5, "logit_scales": {"vit": 9.0}}, {"teachers": ["red"]}
    with_anchor, batch = first_batch(anchored({**BOTH, "similarities": 1.0}, loss=loss, data=data))
    assert batch["targets"].keys() == {"red", "vit"}
    plain, of_plain = first_batch(anchored(None, loss={"lambda": 0.5}, data={"teachers": ["red"]}))
    losses, others = numbers_of(with_anchor, batch), numbers_of(plain, of_plain)
    assert {name: losses[name] for name in others} == pytest.approx(others)
    assert with_anchor.terms.merged(lambda term: term.recorded) == {
        "loss.logit_scales.red": 50.0,
        "loss.logit_scales.vit": 9.0,
    }


def test_the_anchor_of_weights_pulls_them_to_their_start(anchored: Any) -> None:
    task, batch = first_batch(anchored({"weights": 0.5}, student={"freeze": ["text"]}))
    student = task.model
    assert {name.split(".")[1] for name in student.start} == {"visual", "logit_scale"}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    encoded = student(batch)
    count = sum(value.numel() for value in student.start.values())
    assert encoded.losses["anchor_weights"].item() == pytest.approx(0.25 * count * 0.01**2, rel=1e-3)
    encoded.losses["anchor_weights"].backward()
    for name in student.start:
        gradient = student.get_parameter(name).grad
        torch.testing.assert_close(gradient, torch.full_like(gradient, 0.5 * 0.01), rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("no_pictures")
def test_a_training_keeps_near_its_start_by_each_anchor_and_resumes_with_equal_bits(
    anchored: Any, released: str, tmp_path: Path
) -> None:
    start = load_file(Path(released.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    optimizer = {"lr": 0.003, "warmup": 0, "hold": 9, "weight_decay": 0.0}

    def train(name: str, anchor: dict[str, Any] | None, stop_at: int | None = None) -> tuple[float, list[float]]:
        made = anchored(anchor, train={"steps": 6, "optimizer": optimizer, "ema": 0.5})
        made = made.model_copy(update={"output": str(tmp_path / name)})
        if stop_at is not None:
            reinforce.train(made.model_copy(update={"train": made.train.model_copy(update={"steps": stop_at})}))
        trained = reinforce.train(made)
        after = load_file(Path(trained.output) / trained.export / "open_clip_model.safetensors")
        moved = sum(float((after[key] - value).square().sum()) for key, value in start.items())
        return moved, curve(tmp_path / name)

    free, _ = train("free", None)
    weights, whole = train("weights", {"weights": 1.0})
    assert weights < 0.5 * free
    assert train("resumed", {"weights": 1.0}, stop_at=3) == (weights, whole)


def test_anchors_that_do_not_fit_are_refused(anchored: Any, tmp_path: Path) -> None:
    for keys, message in (
        ({"similarities": 1.0}, "`similarities` and `features` need `teacher`"),
        ({"teacher": "vit"}, "set a weight: `similarities` or `features` of `teacher`, or `weights`"),
        ({}, "set a weight"),
        ({"weights": 0.0}, "greater than 0"),
    ):
        with pytest.raises(UserError, match=message):
            anchored(keys)
    images = {"data": {"captions": "none"}}
    random = {"student": {"model": student_folder(tmp_path / "random")}}
    for keys, sections, message in (
        ({**BOTH, "teacher": "gone"}, {}, "no teacher 'gone'"),
        ({"teacher": "eyes", "similarities": 1.0}, {}, r"anchor\.similarities needs vectors of images and texts of"),
        (BOTH, images, r"anchor\.similarities needs .* texts of teacher vit, and data\.captions"),
        ({"teacher": "red", "features": 1.0}, {}, r"teacher red has \d+ dimensions and the student 16"),
        ({"weights": 1.0}, random, r"loss\.anchor\.weights: .* starts from random weights; set student\.pretrained"),
        ({"weights": 1.0}, {**images, "loss": {"features": "none", "lambda": 1.0}}, r"data\.captions is none"),
    ):
        with pytest.raises(UserError, match=message):
            StudentTask(anchored(keys, **sections))
    task, batch = first_batch(anchored({"teacher": "vit", "features": 1.0}, **images))
    assert numbers_of(task, batch).keys() == {"anchor_features/image"}
