"""The features term: its distances, standardised vectors, weights of teachers, and the queue of similarities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reinforce
from reinforce import settings
from reinforce.errors import UserError
from reinforce.student.loss_config import Loss
from reinforce.student.task import StudentTask
from reinforce.student.teachers import IMAGES, TEXTS, TeacherInfo
from reinforce.student.terms.base import Models
from reinforce.student.terms.features import Moments
from reinforce.student.terms.registry import make_terms
from reinforce.training.config import describe_changes, fixed_config
from reinforce.training.task import Batch
from tests.helpers.students import first_batch, losses_of
from tests.helpers.trainings import curve


@pytest.fixture
def features_config(config: Any) -> Any:
    """Makes configs of students that learn from images alone."""

    def make(features: Any, teachers: Any = ("red", "eyes"), loss: Any = None, **train: Any) -> Any:
        data = {"captions": "none", "teachers": [*teachers]}
        return config({"features": features, **(loss or {})}, train, data=data)

    return make


def loss_of(task: StudentTask, batch: Batch) -> torch.Tensor:
    losses = losses_of(task, batch)
    assert losses.keys() == {"features/image"}
    return losses["features/image"]


def moments(dataset: str, teacher: str) -> Moments:
    """Of all vectors, read as any user does."""
    stored = np.concatenate([sample.images[teacher] for sample in reinforce.open(dataset)])
    return Moments(*(torch.from_numpy(of(stored.astype(np.float64), axis=0)).float() for of in (np.mean, np.std)))


def projected(task: StudentTask, batch: Batch, teacher: str) -> torch.Tensor:
    features = task.model(batch).features["image"]
    return features @ task.model.heads[f"{teacher}/images"].weight.T


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("distance", ["cosine", "l2", "similarities"])
def test_the_distance_is_its_equation_and_teachers_count_by_their_weights(
    features_config: Any, dataset: str, distance: str, standardise: bool
) -> None:
    features = {"teachers": "all", "distance": distance, "standardise": standardise, "weights": {"eyes": 3.0}}
    task, batch = first_batch(features_config(features, loss={"features_weight": 0.5}))
    found = {}
    for name in ("red", "eyes"):
        own, z = projected(task, batch, name), batch["targets"][name]["image"]
        if standardise:
            of = moments(dataset, name)
            z = (z - of.mean) / of.deviation
        if distance == "cosine":
            found[name] = 1 - torch.cosine_similarity(own, z).mean()
        elif distance == "l2":
            found[name] = (own - z).square().sum(1).mean() / (z.shape[1] if standardise else 1)
        else:
            unit = torch.nn.functional.normalize(z)
            p = (unit @ unit.T / 0.07).softmax(1)
            found[name] = -(p * (torch.nn.functional.normalize(own) @ unit.T / 0.07).log_softmax(1)).sum(1).mean()
    expected = 0.5 * (found["red"] + 3 * found["eyes"]) / 4
    torch.testing.assert_close(loss_of(task, batch), expected, rtol=1e-4, atol=1e-5)
    if standardise:
        assert "standardised" in next(note for note in task.notes if note.startswith("teacher eyes"))


def test_similarities_are_with_the_batch_and_the_newest_vectors_of_earlier_ones(features_config: Any) -> None:
    features = {"distance": "similarities", "queue": 8, "temperature": 0.2}
    task, batch = first_batch(features_config(features, ["eyes"]))
    stored = batch["targets"]["eyes"]["image"]
    queue: Any = task.model.heads["eyes/queue-images"]
    assert len(queue.filled()) == 0
    alone = loss_of(task, batch)
    assert torch.equal(queue.filled(), stored), "the batch is kept for the next one"
    earlier = queue.filled().clone()
    references = torch.cat([stored, earlier])
    own = torch.nn.functional.normalize(projected(task, batch, "eyes"))
    p = (stored @ references.T / 0.2).softmax(1)
    expected = -(p * (own @ references.T / 0.2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss_of(task, batch), expected)
    assert expected > alone
    assert torch.equal(queue.filled(), torch.cat([stored, earlier])[:8]), "the oldest are dropped"


def test_a_resumed_training_has_the_queue_and_the_moments_of_an_uninterrupted_one(
    features_config: Any, tmp_path: Path
) -> None:
    features = {"distance": "similarities", "queue": 20, "standardise": True}
    curves = []
    for output, lengths in (("whole", [4]), ("parts", [2, 4])):
        for steps in lengths:
            made = features_config(features, steps=steps, optimizer={"warmup": 0, "hold": 4})
            reinforce.train(made.model_copy(update={"output": str(tmp_path / output)}))
        curves.append(curve(tmp_path / output))
    assert curves[0] == curves[1]


def test_vectors_that_are_all_equal_and_settings_that_do_not_fit_are_refused_before_a_model_is_built() -> None:
    eyes = {"eyes": TeacherInfo(5, frozenset([IMAGES]), None, "")}
    both = {"both": TeacherInfo(5, frozenset([IMAGES, TEXTS]), 10.0, "")}
    same = np.tile(np.array([0.6, 0.8, 0, 0, 0], np.float32), (40, 1))
    equal = Models(eyes, texts=False, vectors=lambda name, side: same)
    refused: list[tuple[Any, Models, str]] = [
        ("all", equal, r"teacher eyes: its first 40 vectors of images are all equal.*Look at the images"),
        ({"standardise": True}, Models(eyes, texts=False), r"standardise needs stored vectors.*set loss\.targets"),
        ({"weights": {"ears": 2.0}}, equal, "the term uses no teacher 'ears'; it uses: eyes"),
        ({"weights": {"both": 2.0}}, Models({**eyes, **both}), "the term uses no teacher 'both'; it uses: eyes"),
    ]
    for features, models, message in refused:
        with pytest.raises(UserError, match=message):
            make_terms(settings.parse(Loss, {"features": features}), models)
    for features, message in (
        ({"queue": 5}, "`queue` needs `distance: similarities`"),
        ({"temperature": 0.2, "distance": "l2"}, "`temperature` needs"),
        ("some", r"features\.teachers: Input should be"),
    ):
        with pytest.raises(UserError, match=message):
            settings.parse(Loss, {"features": features})


def test_a_config_with_the_teachers_alone_is_that_of_earlier_checkpoints() -> None:
    for features in ("all", {"teachers": "all"}, {"teachers": "all", "distance": "cosine"}):
        assert fixed_config(settings.parse(Loss, {"features": features}), ())["features"] == "all"
    now = fixed_config(settings.parse(Loss, {"features": {"teachers": "all", "distance": "l2"}}), ())
    before = fixed_config(settings.parse(Loss, {"features": "all"}), ())
    assert "features.distance: not set before, 'l2' now" in describe_changes(before, now)
