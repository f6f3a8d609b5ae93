"""The interface between the training loop and what it trains.

The loop handles the optimizer, ranks, microbatches, checkpoints and logs. A task provides a model and its loss, and
evaluates and exports the result; a feed provides the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch

from teachers.runtime.accelerator import Accelerator

#: Nested mappings of tensors [b, ...] and lists of length b, where b is the number of samples of one rank.
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """The output of a task's model for a batch, or for a microbatch of p samples.

    ``features`` are tensors [p, ...] that ``Task.losses`` contrasts over the whole batch and all ranks. ``losses`` are
    scalars, already weighted: means over the samples of the microbatch, which add to the total loss. ``scalars`` are
    learnt numbers that the loss needs (the logit scale); they are logged under their names.
    """

    features: dict[str, torch.Tensor]
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    scalars: dict[str, torch.Tensor] = field(default_factory=dict)


class Metrics(dict[str, float]):
    """Metrics by name, higher is better. ``parts`` says which are of a part of what their names say.

    Such a part is ``151 of 301 images`` or ``2 of 38 sets``. ``combine_evaluations`` may get other keys in ``parts``.
    """

    def __init__(self, metrics: Mapping[str, float], parts: Mapping[str, str]) -> None:
        super().__init__(metrics)
        self.parts = dict(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return Metrics, (dict(self), self.parts)


class Task(Protocol):
    """What the loop trains. Implementations are subclasses, such as ``reinforce.student.train``.

    Draw random numbers (dropout) only from torch's global generators: the loop seeds them for each step, rank and
    microbatch, so that a resumed training run draws the numbers that an uninterrupted one would have drawn.
    """

    #: All parameters that are learnt, heads included; ``model(batch)`` returns ``Encoded``. The loop moves it to the
    #: device, compiles it, wraps it in DistributedDataParallel, averages it and saves it. The forward pass runs under
    #: autocast unless the precision is fp32. Parameters named ``logit_scale`` hold logarithms and are clamped to
    #: [0, ln 100].
    model: torch.nn.Module
    #: Lines for the user about what is trained from what; rank 0 prints them at the start.
    notes: Sequence[str] = ()
    #: Whether all prepared batches have the same shapes and nothing but tensors, so that one graph is for all.
    compiles_once: bool = False
    #: What the task chose where the config leaves it open, by key of the config; checkpoints record it.
    chosen: Mapping[str, Any] = MappingProxyType({})

    def begin_step(self, step: int, steps: int) -> str | None:
        """Change the model for step ``step`` (from 0) of ``steps``, if it is to change; returns a line for the user.

        Called before each step on every rank. The model must depend on the arguments alone, since a training run may
        resume at any step, and keep its parameters, buffers and their names.
        """
        return None

    def prepare(self, batch: Batch) -> Batch:
        """Complete a rank's whole batch on its device; called once per step, before it is split into microbatches.

        Online teachers add their embeddings here. Runs without gradients and outside autocast.
        """
        return batch

    def losses(self, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
        """Weighted losses of a rank's whole batch by name, without ``encoded.losses``; their sum is minimised.

        Gathers over the ranks itself; the mean over the ranks is the loss of the global batch. Runs outside autocast,
        with features in the dtype of the model's output and the batch on the device.
        """
        ...

    def shares(self, encoded: Encoded, batch: Batch) -> dict[str, dict[str, torch.Tensor]]:
        """Numbers by kind and name for the log, about what the losses of a step consist of, where a row is added.

        ``encoded`` has no gradients. Called on every rank; those of rank 0 are logged.
        """
        return {}

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Metrics by name, higher is better. Called with the (averaged) weights of rank 0 in eval mode.

        ``Metrics`` names those of parts. A task with a method ``combine_evaluations(parts)``, which makes one dict of
        those of all ranks, is called on every rank and returns the metrics of the rank's share; another one is called
        on rank 0.
        """
        ...

    def export(self, model: torch.nn.Module, folder: str) -> None:
        """Write the files that users load, safetensors and configs, to a local folder."""
        ...


@dataclass(frozen=True)
class Reading:
    """How a feed reads: the result of ``Feed.set_up``.

    ``loaders`` is the number of processes or threads of each rank that read, ``text`` describes them. ``streams`` is a
    number on which the order of samples depends, and ``files`` a hash of the names and sizes of the files with the
    samples; checkpoints record both. ``notes`` are lines for the user.
    """

    loaders: int
    text: str
    streams: int | None = None
    notes: tuple[str, ...] = ()
    files: str | None = None


class Feed(Protocol):
    """Where the loop gets its batches from. ``samples`` are those of an epoch over all ranks."""

    samples: int

    @property
    def data(self) -> Mapping[str, Any]:
        """The data that are read, as JSON values by dotted keys; a training run resumes only if they are equal.

        A key of the config stands for what the config leaves to the data, such as the teachers of a dataset.
        """
        ...

    def set_up(self, ranks: int, batch: int, loaders: int, streams: int | None = None) -> Reading:
        """Choose what the config leaves open, before ``batches`` of the same ranks; the same on every rank.

        ``loaders`` is the number of processes or threads that suits the machine, ``streams`` what the checkpoint
        recorded from which the training run resumes.
        """
        ...

    def batches(self, rank: int, ranks: int, batch: int, start: int) -> Iterable[Batch]:
        """Endless batches of ``batch`` samples for one rank, beginning with step ``start``; epochs follow one another.

        Must be a pure function of its arguments and of ``Reading.streams``, so that a resumed training run gets the
        batches that an uninterrupted one would have got.
        """
        ...


#: Makes a rank's task and feed. It is pickled for Ray's workers, so use a module-level function or a partial of one.
Build = Callable[[Accelerator], tuple[Task, Feed]]
