"""The gradient of a batch in parts is the gradient of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reinforce.training.batches import slice_batch
from reinforce.training.step import StepOutput, backpropagate
from reinforce.training.task import Batch
from teachers.device.accelerator import Accelerator
from tests.helpers.trainings import PairFeed, TowersTask

SIZE = 16


def batch() -> Batch:
    return next(iter(PairFeed().batches(0, 1, SIZE, 0)))


def gradients(parts: int, precision: Any = "fp32", **options: Any) -> tuple[StepOutput, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    task = TowersTask(**options)
    outcome = backpropagate(task, task.model, batch(), SIZE, list(range(parts)), Accelerator("cpu", precision))
    return outcome, {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_give_the_losses_and_gradients_of_the_whole_batch(parts: int) -> None:
    whole, expected = gradients(1)
    outcome, found = gradients(parts)
    assert whole.losses.keys() == outcome.losses.keys() == {"contrast", "closeness"}
    for name, loss in whole.losses.items():
        torch.testing.assert_close(outcome.losses[name], loss)
    torch.testing.assert_close(outcome.scalars, whole.scalars)
    assert found.keys() == expected.keys()
    assert {"logit_scale", "right.weight", "left.0.weight"} <= found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_contrasting_each_part_alone_would_give_another_loss() -> None:
    """The test above can fail: the mean over parts, as in plain gradient accumulation, is another loss."""
    task = TowersTask()
    parts = [slice_batch(batch(), start, start + 4) for start in range(0, SIZE, 4)]
    apart = torch.stack([task.losses(task.model(piece), piece)["contrast"] for piece in parts]).mean()
    whole = task.losses(task.model(batch()), batch())["contrast"]
    assert abs(apart - whole) > 0.1


def test_both_passes_draw_the_same_dropout() -> None:
    """The gradient equals autograd's for the whole loss with each part's dropout."""
    _, found = gradients(4, dropout=0.5)
    torch.manual_seed(0)
    task = TowersTask(dropout=0.5)
    encoded = []
    for seed in range(4):
        torch.manual_seed(seed)
        encoded.append(task.model(slice_batch(batch(), seed * 4, seed * 4 + 4)))
    whole = type(encoded[0])(
        {name: torch.cat([e.features[name] for e in encoded]) for name in encoded[0].features},
        {"closeness": torch.stack([e.losses["closeness"] for e in encoded]).mean()},
        encoded[0].scalars,
    )
    (task.losses(whole, batch())["contrast"] + whole.losses["closeness"]).backward()
    for name, p in task.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad)


def test_running_statistics_are_those_of_one_pass() -> None:
    torch.manual_seed(0)
    twice, once = TowersTask(norm=True), TowersTask(norm=True)
    once.model.load_state_dict(twice.model.state_dict())
    backpropagate(twice, twice.model, batch(), SIZE, [0, 1], Accelerator("cpu"))
    for start in (0, SIZE // 2):
        once.model(slice_batch(batch(), start, start + SIZE // 2))
    for (name, found), expected in zip(twice.model.named_buffers(), once.model.buffers(), strict=True):
        assert torch.equal(found, expected), name


def test_bfloat16_is_close_and_leaves_gradients_in_float32() -> None:
    _, exact = gradients(1)
    for parts in (1, 4):
        _, found = gradients(parts, "bf16")
        for name, gradient in exact.items():
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], gradient, atol=0.05, rtol=0.1)


def test_prepare_sees_the_whole_batch_without_gradients() -> None:
    seen = []

    class Preparing(TowersTask):
        def prepare(self, batch: Batch) -> Batch:
            seen.append((len(batch["key"]), torch.is_grad_enabled()))
            return {**batch, "left": batch["left"] * 2}

    task, plain = Preparing(), TowersTask()
    plain.model.load_state_dict(task.model.state_dict())
    outcome = backpropagate(task, task.model, batch(), SIZE, [0, 1], Accelerator("cpu"))
    doubled = {**batch(), "left": batch()["left"] * 2}
    expected = backpropagate(plain, plain.model, doubled, SIZE, [0], Accelerator("cpu"))
    assert seen == [(SIZE, False)]
    torch.testing.assert_close(outcome.losses, expected.losses)
