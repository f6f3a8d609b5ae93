"""One step: the batch on its way to the device, the gradient of a batch in parts, and the optimizer."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch

from reinforce.training.checkpoints import learning_rate, make_adamw, undecayed_parameters
from reinforce.training.config import Optimizer
from reinforce.training.step import Prefetcher, StepOutput, backpropagate
from reinforce.training.task import Batch
from teachers.runtime.accelerator import Accelerator
from tests.helpers.models.tiny_models import open_clip_config
from tests.helpers.trainings import PairFeed, TowersTask, gradients_of

SIZE = 16


def batch() -> Batch:
    return next(iter(PairFeed().batches(0, 1, SIZE, 0)))


def gradients(parts: int, precision: Any = "fp32", **options: Any) -> tuple[StepOutput, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    task = TowersTask(**options)
    outcome = backpropagate(task, task.model, batch(), SIZE, list(range(parts)), Accelerator("cpu", precision))
    return outcome, gradients_of(task.model)


def test_parts_give_the_losses_and_gradients_of_the_whole_batch_and_bfloat16_is_close() -> None:
    whole, expected = gradients(1)
    assert whole.losses.keys() == {"contrast", "closeness"}
    assert {"logit_scale", "right.weight", "left.0.weight"} <= expected.keys()
    for parts in (2, 4, 8):
        outcome, found = gradients(parts)
        torch.testing.assert_close((outcome.losses, outcome.scalars, found), (whole.losses, whole.scalars, expected))
    for parts in (1, 4):
        _, found = gradients(parts, "bf16")
        for name, gradient in expected.items():
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], gradient, atol=0.05, rtol=0.1)


@pytest.mark.parametrize("options", [{}, {"norm": True, "dropout": 0.5}])
def test_kept_parts_pass_the_model_once_with_the_gradients_and_statistics_of_two_passes(
    options: dict[str, Any],
) -> None:
    """With all kept, the gradient is autograd's; both passes of the others draw the same dropout."""
    found = []
    for kept in range(5):
        torch.manual_seed(0)
        task = TowersTask(**options)
        passes: list[bool] = []
        task.model.register_forward_hook(lambda *_, passes=passes: passes.append(torch.is_grad_enabled()))
        outcome = backpropagate(task, task.model, batch(), SIZE, range(4), Accelerator("cpu"), kept)
        assert (passes.count(True), passes.count(False)) == (4, 4 - kept)
        gradients = gradients_of(task.model)
        found.append((outcome.losses, outcome.scalars, gradients, dict(task.model.named_buffers())))
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-6, atol=1e-9)


def test_prepare_sees_the_whole_batch_without_gradients_and_a_feed_that_ends_is_an_error() -> None:
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
    with pytest.raises(RuntimeError, match="the feed ended before the training"):
        Prefetcher([], Accelerator("cpu")).fetch()


def test_the_learning_rate_warms_up_linearly_may_be_held_and_decays_as_a_cosine() -> None:
    config = Optimizer(lr=1.0, final_lr=0.1, warmup=4)
    rates = [learning_rate(step, 9, config) for step in range(9)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[6] == pytest.approx(0.55)  # half way, between 1 and 0.1
    assert rates[8] == pytest.approx(0.1)
    assert [Optimizer().warmup_of(steps) for steps in (5, 40, 1000, 1001)] == [0, 4, 100, 1000]
    assert learning_rate(3, 40, Optimizer(lr=1.0)) == 1.0
    assert Optimizer(warmup=1000).warmup_of(40) == 1000, "what is stated is kept, or refused"
    held = Optimizer(lr=1.0, final_lr=0.0, warmup=2, hold=4)
    rates = [learning_rate(step, 11, held) for step in range(11)]
    assert rates[:7] == [0.5, *[1.0] * 6]
    decay = Optimizer(lr=1.0, final_lr=0.0, warmup=0)
    assert rates[6:] == pytest.approx([learning_rate(step, 5, decay) for step in range(5)])
    assert {learning_rate(step, 9, Optimizer(lr=1.0, warmup=0, hold=9)) for step in range(9)} == {1.0}


@pytest.mark.parametrize(("decay", "last"), [("linear", [0.75, 0.5, 0.25, 0.0]), (None, [0.854, 0.5, 0.146, 0.0])])
def test_the_learning_rate_is_constant_up_to_the_cool_down_whatever_the_length(decay: Any, last: list[float]) -> None:
    config = Optimizer(lr=1.0, final_lr=0.0, warmup=2, cooldown=0.4, decay=decay)
    assert [learning_rate(step, 10, config) for step in range(10)] == pytest.approx([0.5, *[1.0] * 5, *last], abs=1e-3)
    longer = [learning_rate(step, 20, config) for step in range(12)]
    assert longer == [0.5, *[1.0] * 11], "a longer training goes on from any step before the cool-down"


def test_matrices_are_decayed_but_gains_biases_scales_and_positions_are_not() -> None:
    model = torch.nn.ModuleDict({"clip": open_clip.CLIP(**open_clip_config())})
    undecayed = undecayed_parameters(model)
    assert {"clip.logit_scale", "clip.positional_embedding", "clip.visual.positional_embedding"} <= undecayed
    assert {"clip.ln_final.weight", "clip.ln_final.bias", "clip.visual.ln_post.weight"} <= undecayed
    decayed = dict(model.named_parameters()).keys() - undecayed
    assert "clip.token_embedding.weight" in decayed
    assert "clip.visual.conv1.weight" in decayed
    assert all(dict(model.named_parameters())[name].ndim >= 2 for name in decayed)
    scaled = torch.nn.Module()
    scaled.gamma = torch.nn.Parameter(torch.ones(8, 1, 1))  # as in timm's LayerScale2d
    assert undecayed_parameters(scaled) == {"gamma"}
    frozen = torch.nn.Linear(2, 3)
    frozen.bias.requires_grad_(False)
    groups = make_adamw(frozen, Optimizer(weight_decay=0.3)).param_groups
    assert {id(p): group["weight_decay"] for group in groups for p in group["params"]} == {id(frozen.weight): 0.3}
