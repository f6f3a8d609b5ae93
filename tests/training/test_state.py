"""The state of a training as named tensors."""

from __future__ import annotations

import pytest
import torch

from reinforce.training.config import Optimizer
from reinforce.training.optimizer import make_adamw
from reinforce.training.state import State, make_average
from tests.helpers.trainings import Towers


def test_a_loaded_state_continues_as_the_saved_one() -> None:
    def state() -> State:
        model = Towers(norm=True)
        return State(model, make_adamw(model, Optimizer(lr=0.1)), make_average(model, 0.9))

    def step(state: State, seed: int) -> None:
        rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        encoded = state.model({"left": rows, "deep": {"right": rows}})
        (encoded.losses["closeness"] * encoded.scalars["logit_scale"]).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        assert state.average is not None
        state.average.update(state.model, seed + 1)

    one, two = state(), state()
    for seed in range(3):
        step(one, seed)
    two.load({name: tensor.clone() for name, tensor in one.tensors().items()})
    for seed in range(3, 6):
        step(one, seed)
        step(two, seed)
    assert one.tensors().keys() == two.tensors().keys()
    assert "optimizer/left.0.weight/exp_avg_sq" in one.tensors()
    assert "average/left.1.running_mean" in one.tensors()
    assert all(torch.equal(two.tensors()[name], tensor) for name, tensor in one.tensors().items())


def test_the_average_is_the_final_model_if_there_is_one() -> None:
    model = Towers()
    optimizer = make_adamw(model, Optimizer())
    assert State(model, optimizer).final_model is model
    average = make_average(model, 0.9)
    assert State(model, optimizer, average).final_model is average.module


def test_tensors_of_another_model_are_refused() -> None:
    one, other = Towers(), Towers(width=20)
    saved = State(one, make_adamw(one, Optimizer())).tensors()
    state = State(other, make_adamw(other, Optimizer()))
    with pytest.raises(RuntimeError, match="size mismatch"):
        state.load(saved)
