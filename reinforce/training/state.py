"""The state of a training run as named tensors: weights, optimizer moments, averaged weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reinforce.errors import UserError
from reinforce.training.config import HIGHEST_LOGIT_SCALE
from reinforce.training.saving import Progress

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

#: Steps without an update that end a training run: in a row, in a row at its end, and as a share of its steps so far,
#: which counts at the end or from ``_MAX_SKIPPED`` steps without an update.
_MAX_SKIPPED, _MAX_SKIPPED_LAST, _MAX_SKIPPED_SHARE = 20, 3, 0.25
_MODEL, _OPTIMIZER, _AVERAGE = "model/", "optimizer/", "average/"


def make_average(model: torch.nn.Module, decay: float) -> ModelEmaV3:
    """An exponential moving average of all weights and buffers.

    Its decay rises from 0 to ``decay`` as 1 - (1 + step)^(-3/4), so that a short training does not export its start.
    """
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=3 / 4)


@dataclass(frozen=True)
class State:
    """State that a checkpoint stores. ``average`` exists only on rank 0, which evaluates and exports it."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    average: ModelEmaV3 | None = None

    @property
    def final_model(self) -> torch.nn.Module:
        """The model that is evaluated and exported: the average if there is one."""
        return self.model if self.average is None else self.average.module

    @functools.cached_property
    def _logit_scales(self) -> list[torch.Tensor]:
        return [p for name, p in self.model.named_parameters() if name.rpartition(".")[2] == "logit_scale"]

    def update(self, clip: float | None, step: int) -> float:
        """Clip the gradient and update the weights as step ``step``, or skip if it is not finite.

        Returns the norm before clipping, which is the same on all ranks, so that all skip the same steps.
        """
        # Reading the norm waits for the device.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip))
        if math.isfinite(norm):
            self.optimizer.step()
            with torch.no_grad():
                for scale in self._logit_scales:
                    scale.clamp_(0, math.log(HIGHEST_LOGIT_SCALE))
            if self.average is not None:
                self.average.update(self.model, step)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

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


def check_skipped(progress: Progress, steps: int) -> None:
    """Raise UserError if so many of the steps so far made no update that the training run of ``steps`` steps has
    failed."""
    ended, step = progress.step == steps, progress.step
    last = progress.skipped_last >= (_MAX_SKIPPED_LAST if ended else _MAX_SKIPPED)
    share = (ended or progress.skipped >= _MAX_SKIPPED) and progress.skipped > _MAX_SKIPPED_SHARE * step
    if last or share:
        count = f"{progress.skipped_last} steps in a row" if last else f"{progress.skipped:,} of {step:,} steps"
        raise UserError(
            f"the gradient was not finite in {count} up to step {step:,}{', the last one' * ended}, so they made no "
            "update. Lower train.optimizer.lr, raise its warmup, or set train.compute.precision to fp32, in another "
            "`output`; earlier progress is in the last checkpoint."
        )


def _with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _in_layout_of(parameter: torch.Tensor, key: str, value: torch.Tensor) -> torch.Tensor:
    """A moment in the memory layout of its parameter, which the optimizer's fused kernels require."""
    return value if key == "step" else torch.empty_like(parameter, requires_grad=False).copy_(value)
