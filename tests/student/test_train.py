"""The student's task on batches of a real reinforced dataset, with stored targets and with online teachers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

import reinforce
from reinforce.errors import UserError
from reinforce.student.train import StudentTask, build, student_job
from reinforce.training.step import backpropagate, slice_batch
from teachers.runtime.accelerator import Accelerator
from tests.helpers.evaluation import colour_samples, write_classification
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.students import PAIRS, first_batch, losses_of
from tests.helpers.trainings import gradients_of, rows

ANCHORS = {"anchor": {"teacher": "vit", "similarities": 2.0, "features": 3.0, "weights": 10.0}}
#: Losses that every part of a batch has its share of, for students that start from the weights of ``vit``.
LOSSES: dict[str, dict[str, Any]] = {
    "learnt scales": {"lambda": 0.7, "learn_scales": True},
    "interactive": {"lambda": 0.5, "interactive": 2.0},
    "anchors": {"lambda": 0.0, **ANCHORS},
    "queue": {"features": {"teachers": "all", "distance": "similarities", "queue": 9}},
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_microbatches_have_the_gradients_of_the_whole_batch(
    config: Any, teachers: dict[str, dict[str, Any]], loss: dict[str, Any]
) -> None:
    found = []
    for parts in (1, 2):
        task, batch = first_batch(config(loss, student={"model": teachers["vit"]["model"]}))
        with torch.no_grad():
            for parameter in task.model.clip.parameters():  # away from the start
                parameter.add_(0.01)
        for _ in range(2):  # the second one has a queue
            task.model.zero_grad()
            output = backpropagate(task, task.model, batch, PAIRS, [1] * parts, Accelerator("cpu"))
        queues = {name: value for name, value in task.model.named_buffers() if "queue" in name}
        found.append((output.losses, gradients_of(task.model), queues))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_stored_targets_give_a_loss_for_every_text_and_all_teachers(config: Any) -> None:
    task, batch = first_batch(config({"lambda": 0.7, "logit_scales": {"vit": 30.0}}))
    losses = losses_of(task, batch)
    texts = ("caption", "synthetic")
    terms = {f"{term}/{kind}" for term in ("clip", "distill", "features") for kind in texts} | {"features/image"}
    assert losses.keys() == terms
    torch.stack(list(losses.values())).sum().backward()
    trained = [value for value in task.model.parameters() if value.requires_grad]
    assert all(value.grad is not None and value.grad.isfinite().all() for value in trained)
    assert task.terms.merged(lambda term: term.recorded) == {
        "loss.logit_scales.red": 50.0,
        "loss.logit_scales.vit": 30.0,
    }
    assert set(task.model.heads) == {"eyes/images", "ears/texts"}
    assert [note.split(": ", 1)[0] for note in task.notes] == [
        f"student {task.model.name}", "teacher red", "teacher vit", "teacher eyes", "teacher ears",
    ]  # fmt: skip
    assert "random weights of seed 0" in task.notes[0]
    assert "logit scale 50 (dataset: config)" in task.notes[1]
    assert "logit scale 30 (config: loss.logit_scales.vit, instead of 20 of the dataset: config)" in task.notes[2]


def test_images_alone_train_the_image_tower_by_the_vectors_of_images(config: Any) -> None:
    """Also those of a teacher with both sides, and with loader processes, whose memory has no tokens."""
    made = config(data={"captions": "none", "teachers": ["red", "eyes", "ears"], "workers": 2}, train={"steps": 2})
    task, feed = build(made, Accelerator("cpu"))
    batch = next(iter(feed.batches(0, 1, PAIRS, 0)))
    assert batch.keys() == {"key", "image", "targets"}
    assert {name: set(of) for name, of in batch["targets"].items()} == {"red": {"image"}, "eyes": {"image"}}
    assert losses_of(task, task.prepare(batch)).keys() == {"features/image"}
    assert task.notes[3].startswith("teacher ears: unused")
    before = {name: value.clone() for name, value in task.model.clip.state_dict().items()}
    trained = reinforce.train(made)
    after = load_file(Path(trained.output) / trained.export / "open_clip_model.safetensors")
    assert {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])} == {"visual"}


def test_images_alone_need_targets_of_images(config: Any) -> None:
    data = {"captions": "none"}
    for loss, teachers in (({}, ["ears"]), ({"lambda": 0.0}, ["eyes"]), ({"features": "none"}, ["red"])):
        with pytest.raises(UserError, match=r"data\.captions is none.*layers embeddings/TEACHER/images"):
            StudentTask(config(loss, data={**data, "teachers": teachers}))
    with pytest.raises(UserError, match=r"remove logit_scales, learn_scales and form under `loss`"):
        config({"logit_scales": {"red": 5.0}}, data=data)


def test_a_batch_that_is_larger_than_the_dataset_is_reported(config: Any) -> None:
    data = {"samples": 5}  # an epoch may be shorter than the dataset
    for batch in (12, 13):
        task, _ = build(config({"lambda": 0.0}, data=data, train={"batch": batch}), Accelerator("cpu"))
        reported = "train.batch (13) is larger than the data (12 samples)" in task.notes[-1]
        assert reported == (batch > 12)


def test_lambda_0_is_plain_clip_without_teachers(config: Any, teachers: dict[str, dict[str, Any]]) -> None:
    for online in ({}, {"teachers": teachers}):
        task, batch = first_batch(config({"lambda": 0.0, **online}))
        assert not batch.get("targets")
        encoded = task.model(batch)
        expected = open_clip.ClipLoss()
        losses = task.losses(encoded, batch)
        assert encoded.losses == {}
        for kind in ("caption", "synthetic"):
            theirs = expected(encoded.features["image"], encoded.features[kind], encoded.scalars["logit_scale"])
            torch.testing.assert_close(losses[f"clip/{kind}"], theirs)


@pytest.mark.parametrize("loss", [{}, ANCHORS])
def test_a_student_is_compiled_once_for_all_batches(
    config: Any, teachers: dict[str, dict[str, Any]], loss: dict[str, Any]
) -> None:
    task, feed = build(config(loss, student={"model": teachers["vit"]["model"]}), Accelerator("cpu"))
    batches = feed.batches(0, 1, PAIRS, 0)
    graphs = CompileCounter()
    task.model.compile(backend=graphs)
    for _ in range(3):
        task.model(task.prepare(next(batches)))
    assert graphs.frame_count == 1
    batch = task.prepare(next(batches))
    for size in (PAIRS - 1, 2, PAIRS - 2, 3, PAIRS, PAIRS - 3):  # one more graph serves all of them
        task.model(slice_batch(batch, 0, size))
    assert graphs.frame_count == 2


def test_a_student_with_sigmoid_learns_from_softmax_teachers_and_mixed_captions_give_one_loss(config: Any) -> None:
    task, batch = first_batch(config({"form": "sigmoid", "lambda": 0.5, "features": "none"}))
    losses = losses_of(task, batch)
    assert losses.keys() == {f"{term}/{kind}" for term in ("clip", "distill") for kind in ("caption", "synthetic")}
    torch.stack(list(losses.values())).sum().backward()
    assert task.model.clip.logit_bias.grad.abs() > 0
    output = backpropagate(task, task.model, batch, PAIRS, [0], Accelerator("cpu"))
    with torch.no_grad():
        task.model.clip.logit_bias.add_(1.0)
    assert output.scalars["logit_bias"] == task.model.clip.logit_bias - 1, "as it was in the step"
    task, batch = first_batch(config({"features": "none"}, data={"captions": "mixed"}))
    assert losses_of(task, batch).keys() == {"distill/caption"}


def test_crops_that_loaders_left_to_the_device_become_the_images_of_the_batch(config: Any) -> None:
    _, expected = first_batch(config())
    _, found = first_batch(config(data={"backend": "device-1"}))
    assert found["image"].shape == expected["image"].shape
    assert (found["image"].int() - expected["image"].int()).abs().max() <= 2
    assert torch.equal(found["caption"], expected["caption"])
    assert found.keys() == expected.keys()
    with pytest.raises(UserError, match="backend: device-1 makes no images for teachers in the loop"):
        config({"teachers": {"red": {"class": "a:B"}}}, data={"backend": "device-1"})
    with pytest.raises(UserError, match="backend"):
        config(data={"backend": "device-2"})


def test_the_exported_student_has_the_evaluated_metrics(config: Any, dataset: str, tmp_path: Path) -> None:
    own = {"retrieval": {"own": {"pairs": dataset}}}
    task = StudentTask(config(evaluate=own))
    metrics = task.evaluate(task.model)
    assert {name.rpartition("/")[0] for name in metrics} == {
        "retrieval/own/text_to_image", "retrieval/own/image_to_text",
    }  # fmt: skip
    task.export(task.model, str(tmp_path / "exported"))
    again = StudentTask(config(student={"model": f"local-dir:{tmp_path / 'exported'}"}, evaluate=own))
    assert "pretrained" in again.notes[0]
    assert again.evaluate(again.model) == metrics


def test_a_training_evaluates_a_suite_and_names_a_set_that_fails(
    config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "sets"
    write_classification(root, "mnist", colour_samples())
    write_classification(root, "stl10", [(99, image, None) for _, image, _ in colour_samples()])
    suite = {"suite": "datacomp", "data": str(root), "sets": ["mnist", "stl10"]}
    results = reinforce.train(config(evaluate=suite))
    assert "datacomp/stl10 failed, and has no metric: STL-10: s0000000 has the label 99" in caplog.text
    assert results.metrics["datacomp/stl10/acc1"] is None
    assert results.metrics["datacomp/mean"] is None
    assert results.parts == {
        "datacomp/mean": "2 of 38 sets with 1 in part",
        "datacomp/mnist/acc1": "12 of 10000 images",
    }
    assert results.best is None
    task = StudentTask(config(evaluate={**suite, "sets": ["mnist"]}))
    metrics = task.combine_evaluations([task.evaluate(task.model)])
    assert metrics == {
        "datacomp/mean": metrics["datacomp/mnist/acc1"],
        "datacomp/mnist/acc1": pytest.approx(0.5, abs=0.5),
    }
    for parameter in task.model.clip.visual.parameters():
        parameter.data.fill_(torch.nan)
    caplog.clear()
    metrics = task.combine_evaluations([task.evaluate(task.model)])
    assert all(math.isnan(score) for score in metrics.values()), "a student that has diverged"
    assert "datacomp/mnist failed, and has no metric: 12 of 12 image embeddings are not finite" in caplog.text
    with pytest.raises(UserError, match=r"SVHN is expected at .*wds_vtab-svhn_test; published at .* leave it out of"):
        StudentTask(config(evaluate={**suite, "sets": ["mnist", "vtab/svhn"]}))


def test_teachers_that_cannot_be_loaded_and_scales_that_leave_their_bounds_are_refused(config: Any) -> None:
    wrong = {"big": {"model": "ViT-B-33", "pretrained": "openai"}}
    with pytest.raises(UserError, match=r"teacher big: model 'ViT-B-33' is unknown .* did you mean ViT-B-32"):
        StudentTask(config({"teachers": wrong}))
    with pytest.raises(UserError, match="keeps scales within 1 and 100"):
        StudentTask(config({"learn_scales": True, "logit_scales": {"red": 120.0}}))


def test_the_interactive_term_contrasts_each_side_of_the_student_with_the_other_side_of_teachers(config: Any) -> None:
    task, batch = first_batch(config({"lambda": 0.5, "interactive": 2.0, "logit_scales": {"vit": 30.0}}))
    encoded = task.model(batch)
    scale, expected = encoded.scalars["logit_scale"], []
    for name in ("red", "vit"):
        for side, own, other in (("images", "image", "caption"), ("texts", "caption", "image")):
            head = task.model.heads[f"{name}/interactive-{side}"].weight
            rows = torch.nn.functional.normalize(encoded.features[own] @ head.T, dim=-1)
            logits = scale * rows @ batch["targets"][name][other].T
            expected.append(torch.nn.functional.cross_entropy(logits, torch.arange(PAIRS)))
    losses = task.losses(encoded, batch)
    torch.testing.assert_close(losses["interactive/caption"], 0.5 * 2.0 * torch.stack(expected).mean())
    assert "contrasted with the student's images and texts" in task.notes[1]
    plain, _ = first_batch(config({"lambda": 0.5, "logit_scales": {"vit": 30.0}}))
    shared = plain.losses(encoded, batch)
    assert {name: losses[name] for name in shared} == shared, "the other terms do not see its features"
    with pytest.raises(UserError, match=r"loss\.interactive needs a teacher with vectors of images and texts"):
        StudentTask(config({"lambda": 0.0, "interactive": 1.0}))


def test_learning_scales_does_not_change_the_students_losses_and_gradients(config: Any) -> None:
    def gradients(**loss: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        task, batch = first_batch(config({"lambda": 0.7, **loss}))
        outcome = backpropagate(task, task.model, batch, PAIRS, [1], Accelerator("cpu"))
        return outcome.losses, gradients_of(task.model)

    plain, of_plain = gradients()
    learnt, of_learnt = gradients(learn_scales=True)
    assert learnt.keys() - plain.keys() == {"scale/red", "scale/vit"}
    assert of_learnt.keys() - of_plain.keys() == {"scales.red.logit_scale", "scales.vit.logit_scale"}
    torch.testing.assert_close({name: learnt[name] for name in plain}, plain)
    torch.testing.assert_close({name: of_learnt[name] for name in of_plain}, of_plain)
    assert all(of_learnt[f"scales.{name}.logit_scale"] != 0 for name in ("red", "vit"))


@pytest.mark.usefixtures("no_pictures")
def test_learnt_scales_are_noted_and_logged(config: Any, tmp_path: Path) -> None:
    loss = {"learn_scales": True, "logit_scales": {"red": 40.0}}
    notes = StudentTask(config(loss)).notes
    assert "logit scale 20 (dataset: config), then learnt by its own" in notes[2]
    assert "loss.logit_scales.red, instead of 50 of the dataset: config), then learnt" in notes[1]
    reinforce.train(config(loss, {"steps": 3, "optimizer": {"lr": 0.01, "warmup": 0}}))
    learnt = [row["scalars"]["logit_scale/red"] for row in rows(tmp_path / "out") if "scalars" in row]
    assert learnt[0] == pytest.approx(40)
    assert len(set(learnt)) == 3


@pytest.mark.usefixtures("no_pictures")
def test_a_fine_tuning_is_evaluated_before_its_first_step_on_the_same_sets(
    config: Any, dataset: str, tmp_path: Path
) -> None:
    model, own = open_clip_model(tmp_path / "model"), {"retrieval": {"own": {"pairs": dataset}}}
    at_start = {"student": {"model": model}, "evaluate": own, "data": {"workers": 0}}
    made = config(train={"steps": 2, "optimizer": {"lr": 0.0, "final_lr": 0.0, "warmup": 0}}, **at_start)
    trained = reinforce.train(made)
    first, *_, last = [row for row in rows(Path(made.output)) if "metrics" in row]
    assert (first["step"], last["step"]) == (0, 2)
    assert first == rows(Path(made.output))[0]
    assert first["metrics"] == last["metrics"] == trained.metrics
    assert trained.best is not None
    assert trained.best.step == 2, "the student before the first step has no checkpoint"
    for sections in ({"evaluate": {}}, {"student": {}}):  # nothing to evaluate, and random weights
        assert not student_job(config(**{**at_start, **sections})).evaluate_start
