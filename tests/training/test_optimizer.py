"""The learning rate of every step, and which parameters are decayed."""

from __future__ import annotations

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reinforce.training.config import Optimizer
from reinforce.training.optimizer import learning_rate, make_adamw, undecayed_parameters
from tests.helpers.tiny_models import open_clip_config


def test_the_learning_rate_warms_up_linearly_and_decays_as_a_cosine() -> None:
    config = Optimizer(lr=1.0, final_lr=0.1, warmup=4)
    rates = [learning_rate(step, 9, config) for step in range(9)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[6] == pytest.approx(0.55)  # half way, between 1 and 0.1
    assert rates[8] == pytest.approx(0.1)


@given(steps=st.integers(1, 300), data=st.data())
def test_the_learning_rate_never_rises_after_the_warm_up_nor_leaves_its_bounds(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    config = Optimizer(lr=1.0, final_lr=0.01, warmup=warmup)
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert steps == warmup + 1 or rates[-1] == pytest.approx(0.01)


def test_matrices_are_decayed_but_gains_biases_scales_and_positions_are_not() -> None:
    model = torch.nn.ModuleDict({"clip": open_clip.CLIP(**open_clip_config())})
    undecayed = undecayed_parameters(model)
    assert {"clip.logit_scale", "clip.positional_embedding", "clip.visual.positional_embedding"} <= undecayed
    assert {"clip.ln_final.weight", "clip.ln_final.bias", "clip.visual.ln_post.weight"} <= undecayed
    decayed = dict(model.named_parameters()).keys() - undecayed
    assert "clip.token_embedding.weight" in decayed
    assert "clip.visual.conv1.weight" in decayed
    assert all(dict(model.named_parameters())[name].ndim >= 2 for name in decayed)


def test_a_gain_per_channel_is_not_decayed_in_any_shape() -> None:
    model = torch.nn.Module()
    model.gamma = torch.nn.Parameter(torch.ones(8, 1, 1))  # as in timm's LayerScale2d
    assert undecayed_parameters(model) == {"gamma"}


def test_frozen_parameters_are_not_optimised() -> None:
    model = torch.nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    optimizer = make_adamw(model, Optimizer(weight_decay=0.3))
    weights = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert weights == {id(model.weight): 0.3}
