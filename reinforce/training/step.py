"""The gradient of one batch, whole or in parts, which comes to the same."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from reinforce.training.batches import part
from reinforce.training.task import Batch, Encoded, Task
from teachers.device import Accelerator


@dataclass(frozen=True)
class Outcome:
    """Losses by name, weighted, and the learnt numbers behind them, of one rank's batch; without gradients."""

    losses: dict[str, torch.Tensor]
    scalars: dict[str, torch.Tensor]


def backpropagate(
    task: Task, model: Any, batch: Batch, size: int, seeds: Sequence[int], accelerator: Accelerator
) -> Outcome:
    """Add the gradient of a rank's batch of ``size`` samples to the parameters.

    ``model`` is the task's, possibly wrapped in DistributedDataParallel. The batch passes it in as many parts as
    there are ``seeds``, each seeding what is random in its part.
    """
    with torch.no_grad():
        batch = task.prepare(batch)
    if len(seeds) == 1:
        return _whole(task, model, batch, seeds[0], accelerator)
    length = size // len(seeds)
    parts = [part(batch, start, start + length) for start in range(0, size, length)]
    return _in_parts(task, model, batch, parts, seeds, accelerator)


def _whole(task: Task, model: Any, batch: Batch, seed: int, accelerator: Accelerator) -> Outcome:
    torch.manual_seed(seed)
    with accelerator.autocast():
        encoded = model(batch)
    losses = {**task.losses(encoded, batch), **encoded.losses}
    _sum(losses).backward()
    return Outcome(_detached(losses), _detached(encoded.scalars))


def _in_parts(
    task: Task, model: Any, batch: Batch, parts: Sequence[Batch], seeds: Sequence[int], accelerator: Accelerator
) -> Outcome:
    """Contrast the whole batch with the activations of one part in memory (Gao et al., 2101.06983).

    The first pass has the features of all parts; the loss gives the gradient of each; the second pass takes these
    gradients through the model, part by part. Both passes draw the same random numbers. Batch normalisation sees a
    part at a time, and its running statistics are those of the second pass.
    """
    firsts = _first_pass(task.model, parts, seeds, accelerator)
    features = {
        name: torch.cat([first.features[name] for first in firsts]).requires_grad_() for name in firsts[0].features
    }
    scalars = {name: value.detach().clone().requires_grad_() for name, value in firsts[0].scalars.items()}
    losses = task.losses(Encoded(features, scalars=scalars), batch)
    if losses:
        _sum(losses).backward()

    share = 1 / len(parts)
    for index, (piece, seed) in enumerate(zip(parts, seeds, strict=True)):
        last = index == len(parts) - 1
        torch.manual_seed(seed)
        # The gradient of all parts travels once, with that of the last.
        with contextlib.nullcontext() if last or model is task.model else model.no_sync():
            with accelerator.autocast():
                encoded = model(piece)
            ends = [(loss, torch.full_like(loss, share)) for loss in encoded.losses.values()]
            for name, value in encoded.scalars.items():
                if (gradient := scalars[name].grad) is not None:
                    ends.append((value, gradient * share))
            for name, value in encoded.features.items():
                if (gradient := features[name].grad) is not None:
                    ends.append((value, gradient[index * len(value) : (index + 1) * len(value)]))
            ends = [(value, gradient) for value, gradient in ends if value.requires_grad]
            torch.autograd.backward([value for value, _ in ends], [gradient for _, gradient in ends])
    local = {name: torch.stack([first.losses[name] for first in firsts]).mean() for name in firsts[0].losses}
    return Outcome(_detached({**losses, **local}), _detached(scalars))


def _first_pass(
    model: torch.nn.Module, parts: Sequence[Batch], seeds: Sequence[int], accelerator: Accelerator
) -> list[Encoded]:
    kept = [buffer.clone() for buffer in model.buffers()]
    encoded = []
    with torch.no_grad(), accelerator.autocast():
        for piece, seed in zip(parts, seeds, strict=True):
            torch.manual_seed(seed)
            encoded.append(model(piece))
        for buffer, before in zip(model.buffers(), kept, strict=True):
            buffer.copy_(before)
    return encoded


def _detached(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in values.items()}


def _sum(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([loss.float() for loss in losses.values()]).sum()
