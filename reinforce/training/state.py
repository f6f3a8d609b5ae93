"""The state of a training as named tensors: weights, optimizer moments, averaged weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

_MODEL, _OPTIMIZER, _AVERAGE = "model/", "optimizer/", "average/"


def make_average(model: torch.nn.Module, decay: float) -> ModelEmaV3:
    """An exponential moving average of all weights and buffers.

    Its decay rises from 0 to ``decay`` as 1 - (1 + step)^(-3/4), so that a short training does not export its start.
    """
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=3 / 4)


@dataclass(frozen=True)
class State:
    """What a checkpoint stores. ``average`` exists only on rank 0, which evaluates and exports it."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    average: ModelEmaV3 | None = None

    @property
    def final_model(self) -> torch.nn.Module:
        """The model that is evaluated and exported: the average if there is one."""
        return self.model if self.average is None else self.average.module

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, without copies: ``model/WEIGHT``, ``average/WEIGHT``, ``optimizer/WEIGHT/MOMENT``."""
        found = {_MODEL + name: value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            found |= {_AVERAGE + name: value for name, value in self.average.module.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{_OPTIMIZER}{name}/{key}"] = value
        return found

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the tensors of a checkpoint. Raises KeyError or RuntimeError if they are of another model."""
        self.model.load_state_dict(_with_prefix(_MODEL, tensors))
        if self.average is not None:
            self.average.module.load_state_dict(_with_prefix(_AVERAGE, tensors))
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for path, value in _with_prefix(_OPTIMIZER, tensors).items():
            name, _, key = path.rpartition("/")
            moments.setdefault(name, {})[key] = value
        learnt = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        states = {
            index: {key: _in_layout_of(parameter, key, value) for key, value in moments[names[parameter]].items()}
            for index, parameter in enumerate(learnt)
            if names[parameter] in moments
        }
        self.optimizer.load_state_dict({"state": states, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _in_layout_of(parameter: torch.Tensor, key: str, value: torch.Tensor) -> torch.Tensor:
    """A moment in the memory layout of its parameter, which the optimizer's fused kernels require."""
    return value if key == "step" else torch.empty_like(parameter, requires_grad=False).copy_(value)
