"""Students that learn probabilities of classes, from images alone and beside the distillation of teachers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import reinforce
from reinforce.dataset import vectors
from reinforce.errors import UserError
from reinforce.student.terms.probabilities import divergence
from reinforce.student.train import build
from reinforce.training.step import backpropagate
from teachers.runtime.accelerator import Accelerator
from tests.helpers.data import config_of_tar, members_of
from tests.helpers.evaluation import encode_png
from tests.helpers.reinforced import manifest_to_change, reinforce_here, small_dataset
from tests.helpers.students import first_batch, losses_of, student_config
from tests.helpers.trainings import gradients_of, rows

COLORS = {"class": "tests.helpers.models.classifiers:Colors"}
CLASSES, IMAGES = 6, 24


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images without text, with two classifiers, one of which sees each image as a whole."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        image = np.full((24, 24, 3), generator.integers(0, 256, 3), np.uint8)
        (folder / "images" / f"{number:02d}.png").write_bytes(encode_png(image))
    classifiers = {"near.by": {**COLORS, "k": 3}, "whole": {**COLORS, "k": 6, "sees": "image", "temperature": 2.0}}
    return reinforce_here(
        {
            "source": str(folder / "images"),
            "output": str(folder / "out"),
            "augmentations": {"count": 2, "size": 16, "rand_augment": {"ops": 0}},
            "classifiers": classifiers,
        }
    )


@pytest.mark.parametrize("top", [1, 4, 11])
def test_the_divergence_is_that_of_the_stored_cells(top: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    stored, classes = torch.randn(5, 11, dtype=torch.float64).softmax(dim=1).topk(top)
    rest = (1 - stored.sum(dim=1)).clamp(min=0)
    predicted = logits.softmax(dim=1)
    expected = (stored * (stored / predicted.gather(1, classes)).log()).sum(dim=1)
    if top < 11:
        expected = expected + rest * (rest / (1 - predicted.gather(1, classes).sum(dim=1))).log()
    found = divergence(logits, classes.int(), stored, rest)
    torch.testing.assert_close(found, expected)
    of_found, of_expected = (torch.autograd.grad(one.sum(), logits, retain_graph=True)[0] for one in (found, expected))
    torch.testing.assert_close(of_found, of_expected)


def test_a_certain_class_and_far_logits_give_finite_losses_and_gradients() -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    for stored, rest in ((1.0, 0.0), (0.0, 1.0)):
        found = divergence(logits, torch.tensor([[1]]), torch.tensor([[stored]]), torch.tensor([rest]))
        assert found >= 0
        assert torch.autograd.grad(found.sum(), logits)[0].isfinite().all()


def test_a_student_learns_probabilities_alone_from_images_without_text(tmp_path: Path, alone: str) -> None:
    train = {"steps": 60, "optimizer": {"warmup": 0, "lr": 0.003}}
    config = student_config(
        tmp_path, alone, data={"captions": "none", "workers": 1}, loss={"probabilities": 1.0}, train=train
    )
    task, batch = first_batch(config)
    assert {name: tuple(value.shape) for name, value in batch["targets"]["near.by"].items()} == {
        "classes": (8, 3), "probabilities": (8, 3), "rest": (8,),
    }  # fmt: skip
    assert batch["targets"]["near.by"]["classes"].dtype == torch.int32
    assert "classifier near.by: probabilities of the 3 most likely of 6 classes" in task.notes
    output = backpropagate(task, task.model, batch, 8, [0, 0], Accelerator("cpu"))
    assert output.losses.keys() == {"probabilities/near.by", "probabilities/whole"}
    learnt = gradients_of(task.model)
    assert {name.split(".")[0] for name in learnt} == {"clip", "heads"}
    assert all("visual" in name for name in learnt if name.startswith("clip"))
    reinforce.train(config)
    losses = [row["losses"]["probabilities/near.by"] for row in rows(tmp_path / "out") if "losses" in row]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def test_probabilities_are_learnt_beside_distillation_and_lambda_does_not_weigh_them(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path, (12,), classifiers={"near": {**COLORS, "k": 2}})
    found = []
    for share in (0.0, 0.5):
        made = student_config(tmp_path, dataset, loss={"lambda": share, "probabilities": 2.0})
        found.append(losses_of(*first_batch(made)))
    plain, distilled = found
    assert plain.keys() == {"clip/caption", "clip/synthetic", "probabilities/near"}
    assert distilled.keys() == plain.keys() | {"distill/caption", "distill/synthetic"}
    torch.testing.assert_close(plain["probabilities/near"], distilled["probabilities/near"])


@pytest.mark.parametrize("changes", [{"learn_scales": True}, {"interactive": 1.0}])
def test_a_classifier_may_have_the_name_of_a_teacher(tmp_path: Path, changes: dict[str, Any]) -> None:
    made = config_of_tar(tmp_path, members_of(0, 12), classifiers={"red": {**COLORS, "k": 2}})
    online = {"teachers": {"red": made["teachers"]["red"]}} if "interactive" in changes else {}
    loss = {**changes, **online, "probabilities": 1.0}
    task, batch = first_batch(student_config(tmp_path, reinforce_here(made), loss=loss))
    assert batch["targets"]["red"].keys() == {"image", "caption", "synthetic", "classes", "probabilities", "rest"}
    losses = losses_of(task, batch)
    assert losses.keys() >= {"distill/caption", "probabilities/red"}
    assert all(loss.isfinite() for loss in losses.values())


def test_classes_that_dataset_json_does_not_have_are_one_error_with_the_file(tmp_path: Path, alone: str) -> None:
    folder = Path(shutil.copytree(alone, tmp_path / "forged"))
    shutil.rmtree(folder / "index")  # a cache with the size of the file
    [path] = (folder / "probabilities/near.by").iterdir()
    table = pq.read_table(path)
    classes = vectors.tensor_rows(table["classes"])[0] + CLASSES
    column = vectors.tensor_column(classes, [*classes.shape[1:]], np.ones(len(table), bool))
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table.set_column(1, table.schema.field("classes"), column), row_group_size=8)
    config = student_config(tmp_path, str(folder), data={"captions": "none"}, loss={"probabilities": 1.0})
    with pytest.raises(UserError, match=r"has classes of near\.by that are not from 0 to 5"):
        first_batch(config)


def test_a_dataset_without_the_classifiers_that_a_training_needs_is_named(tmp_path: Path, alone: str) -> None:
    other = small_dataset(tmp_path, (4,))
    none = {"captions": "none", "teachers": []}
    changed, unfinished = str(tmp_path / "changed"), str(tmp_path / "unfinished")
    for folder, entry in ((changed, {"top": 2, "temperature": 3.0}), (unfinished, {"dim": None})):
        manifest = Path(shutil.copytree(alone, folder), "dataset.json")
        content = manifest_to_change(folder)
        content["layers"]["probabilities/near.by"] |= entry
        manifest.write_text(json.dumps(content))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (other, none, "loss.probabilities needs layers probabilities/CLASSIFIER, and the datasets have none"),
        (alone, {**none, "classifiers": ["far"]}, "has no classifier 'far'; it has: near.by, whole"),
        ([alone, changed], none, f"classifier near.by has another top and another temperature in {changed} than in"),
        ([alone, other], none, "the datasets have different classifiers: .* has near.by, whole, .* has none"),
        (unfinished, none, r"no dimension of probabilities/near\.by\. Finish the run"),
        (alone, {}, "no teacher has vectors of both .* set data.captions to none"),
    ]
    for dataset, data, message in cases:
        with pytest.raises(UserError, match=message):
            build(student_config(tmp_path, dataset, data=data, loss={"probabilities": 1.0}), Accelerator("cpu"))
