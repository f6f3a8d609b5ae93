"""The features term: its distances, balanced vectors, weights of teachers, and the queue of similarities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import reinforce
from reinforce import settings
from reinforce.errors import UserError
from reinforce.student.config import Loss
from reinforce.student.teachers import IMAGES, TEXTS, TeacherInfo
from reinforce.student.terms.balance import Fit, Moments
from reinforce.student.terms.base import TargetModels
from reinforce.student.terms.registry import make_terms
from reinforce.student.train import StudentTask
from reinforce.training.task import Batch
from tests.helpers.models import ColorTeacher
from tests.helpers.students import PAIRS, first_batch, losses_of


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


def vectors(dataset: str, teacher: str, what: str = "image", **keys: Any) -> np.ndarray:
    """Of all examples of the first epoch, made as any user does."""
    examples = reinforce.Examples(dataset, teachers=[teacher], **keys)
    examples.set_epoch(0)
    return np.stack([item["targets"][teacher][what] for item in examples]).astype(np.float64)


def moments(dataset: str, teacher: str) -> Moments:
    stored = vectors(dataset, teacher, captions="none")
    return Moments(*(torch.from_numpy(of(stored, axis=0)).float() for of in (np.mean, np.std)))


def projected(task: StudentTask, batch: Batch, teacher: str) -> torch.Tensor:
    features = task.model(batch).features["image"]
    return features @ task.model.heads[f"{teacher}/images"].weight.T


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("distance", ["cosine", "l2", "similarities"])
def test_the_distance_is_its_equation_and_teachers_count_by_their_weights(
    features_config: Any, dataset: str, distance: str, standardise: bool
) -> None:
    features = {"teachers": "all", "distance": distance, "balance": "standardise" if standardise else "none"}
    task, batch = first_batch(features_config(features, loss={"features_weight": 0.5, "weights": {"eyes": 3.0}}))
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
        note = next(note for note in task.notes if note.startswith("teacher eyes"))
        assert note.endswith("balanced by standardise; weight 3")


def test_similarities_are_with_the_batch_and_the_newest_vectors_of_earlier_ones(features_config: Any) -> None:
    features = {"distance": "similarities", "queue": 8, "temperature": 0.2}
    task, batch = first_batch(features_config(features, ["eyes"]))
    stored = batch["targets"]["eyes"]["image"]
    queue: Any = task.model.heads["eyes/queue-image"]
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


def test_moments_are_those_of_all_parts_and_need_vectors_that_differ() -> None:
    found, rows = Fit(), 50 + torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(0))
    rows[:, :, 4] = 7.0
    for part in (rows[0, :1], rows[0, 1:], torch.full((2, 5), torch.nan), rows[1:]):
        found.add(part)
    deviation, mean = torch.std_mean(rows.double(), dim=(0, 1), correction=0)
    assert found.count == 120
    torch.testing.assert_close(found.moments().mean, mean.float())
    torch.testing.assert_close(found.moments().deviation[:4], deviation[:4].float())
    assert found.moments().deviation[4] == pytest.approx(1e-3 * deviation.square().mean().sqrt().item())
    for part in (torch.tensor([[0.6, 0.8, 0.0]]).expand(40, 3), torch.full((5, 3), 1e3)):
        equal = Fit()
        for chunk in part.split(7):
            equal.add(chunk)
        with pytest.raises(ValueError, match=f"all {len(part)} are equal, so nothing can be learnt"):
            equal.moments()
    with pytest.raises(ValueError, match="there is none that is finite"):
        Fit().moments()


def test_settings_that_do_not_fit_are_refused_before_a_model_is_built() -> None:
    eyes = {"eyes": TeacherInfo(5, frozenset([IMAGES]), None, "")}
    both = {"both": TeacherInfo(5, frozenset([IMAGES, TEXTS]), 10.0, "")}
    alone = TargetModels(eyes, kinds=())
    pair = TargetModels({**eyes, **both})
    refused: list[tuple[Any, TargetModels, str]] = [
        (
            {"weights": {"ears": 2.0}},
            alone,
            "no loss is a mean over teachers with 'ears'; those .* are: eyes",
        ),
        ({"weights": {"eyes": 2.0}, "features": "none"}, pair, "with 'eyes'; those with a weight are: both"),
        ({"weights": "confidence"}, pair, "there is only both. Remove it, or name more under data.teachers"),
        ({"weights": "confidence", "lambda": 0.0}, pair, "and there is none"),
    ]
    for keys, models, message in refused:
        with pytest.raises(UserError, match=message):
            make_terms(settings.parse(Loss, keys), models)
    for features, message in (
        ({"queue": 5}, "`queue` needs `distance: similarities`"),
        ({"temperature": 0.2, "distance": "l2"}, "`temperature` needs"),
        ("some", r"features\.teachers: Input should be"),
    ):
        with pytest.raises(UserError, match=message):
            settings.parse(Loss, {"features": features})


class Failing(ColorTeacher):
    """Gives NaN for the images that are brighter than the mean of a batch, and zeros for texts with the letter k."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        bright = pixels.flatten(1).mean(dim=1)
        return torch.where((bright == bright.max())[:, None], torch.nan, super().encode_images(pixels))

    def encode_texts(self, texts: Any) -> torch.Tensor:
        return super().encode_texts(texts) * torch.tensor([[float(text != texts[0])] for text in texts])


def test_rows_of_which_an_online_teacher_gives_nan_or_zeros_are_in_no_loss_as_stored_ones_are(config: Any) -> None:
    def first(of: str) -> tuple[StudentTask, Batch]:
        spec = {"class": f"{of}", "codec": "float32", "logit_scale": 50.0}
        return first_batch(config({"features": "all", "teachers": {"red": spec}}))

    _, whole = first("tests.helpers.models:ColorTeacher")
    task, batch = first("tests.student.test_features:Failing")
    assert all(value.isfinite() for value in losses_of(task, batch).values())
    images = whole["image"]
    rows = [next(n for n in range(PAIRS) if torch.equal(images[n], image)) for image in batch["image"]]
    lost = [n for n in range(PAIRS) if n not in rows]
    assert 0 in lost, "texts of zeros"
    assert 1 <= len(lost) <= 2
    assert rows == [next(m % PAIRS for m in range(n, 2 * PAIRS) if m % PAIRS not in lost) for n in range(PAIRS)]
    for name in ("caption", "synthetic"):
        assert torch.equal(batch[name], whole[name][rows])
        assert torch.equal(batch["targets"]["red"][name], whole["targets"]["red"][name][rows])
    assert torch.equal(batch["targets"]["red"]["image"], whole["targets"]["red"]["image"][rows])
