"""The loss terms as functions and as a module, beside what a training run computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import reinforce
from reinforce import losses
from reinforce.errors import UserError
from reinforce.student.task import StudentTask
from reinforce.student.train import build
from teachers.runtime.accelerator import Accelerator
from tests.helpers.students import student_config

SCALED = partial(losses.StudentLoss, logit_scales={"blue": 9.0})


def rows(seed: int, pairs: int = 6, dim: int = 5) -> torch.Tensor:
    return torch.randn(pairs, dim, generator=torch.Generator().manual_seed(seed))


def test_functions_are_the_equations_of_the_papers() -> None:
    image, text, one, other = (normalize(rows(n), dim=-1) for n in range(4))
    diagonal, scale = torch.arange(6), torch.tensor(20.0)
    logits = scale * image @ text.T
    clip = (cross_entropy(logits, diagonal) + cross_entropy(logits.T, diagonal)) / 2
    torch.testing.assert_close(losses.contrastive(3 * image, text, scale), clip)
    signs = 2 * torch.eye(6) - 1
    siglip = -torch.nn.functional.logsigmoid(signs * (logits - 10)).sum() / 6
    torch.testing.assert_close(losses.contrastive(image, text, 20.0, -10.0, form="sigmoid"), siglip)
    target = ((30 * one @ other.T).softmax(1) + (50 * other @ one.T).softmax(1)) / 2
    back = ((30 * one @ other.T).softmax(0) + (50 * other @ one.T).softmax(0)) / 2
    soft = (cross_entropy(logits, target) + cross_entropy(logits.T, back.T)) / 2
    found = losses.distillation(image, text, scale, [(one, other, 30.0), (other, one, torch.tensor(50.0))])
    torch.testing.assert_close(found, soft)
    torch.testing.assert_close(losses.features(image, one), 1 - (image * one).sum(1).mean())
    both = cross_entropy(scale * image @ other.T, diagonal) + cross_entropy(scale * other @ image.T, diagonal)
    both += cross_entropy(scale * text @ one.T, diagonal) + cross_entropy(scale * one @ text.T, diagonal)
    torch.testing.assert_close(losses.interactive(image, text, one, other, scale), both / 4)
    stored = (rows(9) / 2).softmax(1)
    [values, classes] = stored.topk(5)
    found = losses.probabilities(rows(8), classes, values, torch.zeros(6), temperature=2.0)
    expected = 4 * torch.nn.functional.kl_div((rows(8) / 2).log_softmax(1), stored, reduction="batchmean")
    torch.testing.assert_close(found, expected)
    start = {"a": torch.zeros(2), "b": torch.ones(1)}
    assert losses.distance_from_start({"a": torch.ones(2), "b": torch.tensor([3.0]), "c": one}, start) == 3.0


def test_the_module_gives_the_losses_and_gradients_of_a_training_run(made: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"lambda": 0.6, "features": "all", "interactive": 0.5, "logit_scales": {"blue": 30.0}}
    config = student_config(tmp_path, str(made), loss=keys)
    task, feed = build(config, Accelerator("cpu"))
    assert isinstance(task, StudentTask)
    batch = task.prepare(next(iter(feed.batches(0, 1, 8, 0))))
    encoded = task.model(batch)
    trained = {**encoded.losses, **task.losses(encoded, batch)}

    own = losses.StudentLoss(
        reinforce.Examples(made), width=16, lambda_=0.6, **{k: v for k, v in keys.items() if k != "lambda"}
    )
    own.heads.load_state_dict(task.model.heads.state_dict())
    clip = task.model.clip
    plain = {name: rows for name, rows in encoded.features.items() if "/" not in name}
    found = own.losses({n: 2 * v for n, v in plain.items()}, batch["targets"], clip.logit_scale.exp())
    assert found.keys() == trained.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, trained[name], msg=name)
    total = own(plain, batch["targets"], clip.logit_scale.exp())
    torch.testing.assert_close(total, torch.stack([*trained.values()]).sum())
    total.backward()
    assert all(p.grad is not None for p in own.parameters())
    assert "teacher red: similarities, logit scale 50" in own.notes[0]


def test_learnt_scales_are_parameters_of_the_module(made: Path) -> None:
    own = losses.StudentLoss(reinforce.Examples(made, captioners=[], teachers=["red"]), learn_scales=True)
    assert [name for name, _ in own.named_parameters()] == ["scales.red.logit_scale"]
    vectors = {"red": {"image": normalize(rows(1), dim=-1), "caption": normalize(rows(2), dim=-1)}}
    features = {"image": rows(3), "caption": rows(4)}
    assert own.losses(features, vectors, 10.0).keys() == {"distill/caption", "scale/red"}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda data: losses.StudentLoss(data, lambda_=2), "lambda_: Input should be less than or equal to 1"),
        (lambda data: losses.StudentLoss(data, lamda=1), "lamda: unknown key; known keys here: lambda"),
        (lambda data: losses.StudentLoss(data, interactive=1.0), "set `width` to their dimension"),
        (lambda data: losses.StudentLoss(data, anchor={"weights": 1.0}), "distance_from_start"),
        (lambda data: SCALED(data)({"images": rows(0)}, {}, 1.0), "'images' is none of"),
        (lambda data: SCALED(data)({"image": rows(0), "caption": rows(1)}, {}, 1.0), "the batch has no 'red'"),
        (lambda data: losses.contrastive(rows(0), rows(1, pairs=5), 1.0), r"got \[6, 5\] and \[5, 5\]"),
        (lambda data: losses.contrastive(rows(0), rows(1), 1.0, form="sigmoid"), "needs `logit_bias`"),
        (lambda data: losses.contrastive(rows(0), rows(1), 1.0, form="hinge"), "want softmax or sigmoid, got 'hinge'"),
        (lambda data: losses.distillation(rows(0), rows(1), 1.0, []), "teachers is empty"),
        (lambda data: losses.distance_from_start({}, {"w": rows(0)}), "weights has no 'w'"),
    ],
)  # fmt: skip
def test_what_a_loss_cannot_be_made_of_is_one_error_with_the_fix(
    made: Path, act: Callable[[reinforce.Examples], Mapping[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        act(reinforce.Examples(made))
