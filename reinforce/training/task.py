"""The seam between the training loop and what is learnt.

The loop knows optimizers, ranks, parts of batches, checkpoints and logs; a task knows a model, a loss and how the
result is judged and shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from teachers.device import Accelerator

#: Nested mappings of tensors and lists, each with one entry a sample along its first dimension.
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """What the model makes of (a part of) a batch.

    ``features`` [part, ...] are contrasted over the whole batch and all ranks; ``losses`` are means over the part's
    samples, already weighted, and simply add up; ``scalars`` are learnt numbers the loss needs (the logit scale), and
    are logged under their names.
    """

    features: dict[str, torch.Tensor]
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    scalars: dict[str, torch.Tensor] = field(default_factory=dict)


class Task(Protocol):
    """What a training needs to know of its subject; see ``reinforce.student.task`` for one.

    Draw random numbers (dropout) from torch's global generators alone: the loop seeds them for each step, rank and
    part, so that a training goes on with the numbers it would have had.
    """

    @property
    def model(self) -> torch.nn.Module:
        """All that is learnt, heads included: ``model(batch) -> Encoded``.

        The loop moves it, compiles it, wraps it in DistributedDataParallel, averages it and saves it. The forward pass
        runs under autocast where the precision asks for it. Parameters named ``logit_scale`` hold logarithms and are
        kept within [0, ln 100].
        """
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What is learnt from what, in lines that a user is told at the start."""
        ...

    def prepare(self, batch: Batch) -> Batch:
        """The rank's whole batch, on its device, as ``model`` and ``losses`` want it; called once, before it is cut.

        Here teachers in the loop add their embeddings. Runs without gradients and outside of autocast.
        """
        ...

    def losses(self, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
        """Weighted losses of a rank's whole batch, whose sum is minimised, without ``encoded.losses``.

        Gathers over ranks by itself; the mean over the ranks is the loss of the global batch. Called outside of
        autocast, with features in the dtype in which the model left them and a batch on the device.
        """
        ...

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Metrics by name, the higher the better; called on rank 0 with the (averaged) weights in eval mode."""
        ...

    def export(self, model: torch.nn.Module, folder: str) -> None:
        """Write what users load into a local folder, safetensors and configs."""
        ...


class Feed(Protocol):
    """Where the loop gets its batches from."""

    @property
    def samples(self) -> int:
        """Samples of one epoch over all ranks."""
        ...

    def batches(self, rank: int, ranks: int, batch: int, start: int) -> Iterable[Batch]:
        """Endless batches of ``batch`` samples for one rank, from step ``start`` on.

        A pure function of its arguments, so that a training that was killed goes on with the batches it would have
        seen; epochs follow one another without an end.
        """
        ...


#: Makes a rank's task and feed. It travels to Ray's workers: a function of a module, or a partial of one.
Build = Callable[[Accelerator], tuple[Task, Feed]]
