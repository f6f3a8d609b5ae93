"""All that a training learns, as named tensors and back: weights, the optimizer's moments, averaged weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

_MODEL, _OPTIMIZER, _AVERAGE = "model/", "optimizer/", "average/"


def average_of(model: torch.nn.Module, decay: float) -> ModelEmaV3:
    """A moving average of all weights and statistics.

    Its decay rises from 0 to ``decay`` as 1 - (1 + step)^(-3/4), so that short trainings do not export their start.
    """
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=3 / 4)


@dataclass(frozen=True)
class State:
    """What is saved; ``average`` is held where it is evaluated and exported, on rank 0."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    average: ModelEmaV3 | None = None

    @property
    def result(self) -> torch.nn.Module:
        """The weights that are evaluated and exported."""
        return self.model if self.average is None else self.average.module

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name, without copies: ``model/WEIGHT``, ``average/WEIGHT``, ``optimizer/WEIGHT/MOMENT``."""
        found = {_MODEL + name: value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            found |= {_AVERAGE + name: value for name, value in self.average.module.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{_OPTIMIZER}{name}/{key}"] = value
        return found

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Become what was saved. Raises KeyError or RuntimeError if it was another model's."""
        self.model.load_state_dict(_under(_MODEL, tensors))
        if self.average is not None:
            self.average.module.load_state_dict(_under(_AVERAGE, tensors))
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for path, value in _under(_OPTIMIZER, tensors).items():
            name, _, key = path.rpartition("/")
            moments.setdefault(name, {})[key] = value
        learnt = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        states = {
            index: {key: _like(parameter, key, value) for key, value in moments[names[parameter]].items()}
            for index, parameter in enumerate(learnt)
            if names[parameter] in moments
        }
        self.optimizer.load_state_dict({"state": states, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _like(parameter: torch.Tensor, key: str, value: torch.Tensor) -> torch.Tensor:
    """A moment in the memory layout of its parameter, as the optimizer's kernels want it."""
    return value if key == "step" else torch.empty_like(parameter, requires_grad=False).copy_(value)
