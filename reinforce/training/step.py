"""One step: its batch is moved to the device, and its gradient computed at once or in microbatches.

The gradient is the same if the model treats samples alone. Batch normalisation and dropout do not: they see one
microbatch at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from reinforce.training.config import Compute
from reinforce.training.task import Batch, Encoded, Task
from teachers.runtime import determinism
from teachers.runtime.accelerator import Accelerator, is_out_of_memory


@dataclass(frozen=True)
class StepOutput:
    """Weighted losses by name, learnt scalars and ``Task.shares`` of one rank's batch, without gradients."""

    losses: dict[str, torch.Tensor]
    scalars: dict[str, torch.Tensor]
    shares: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


class Prefetcher:
    """Batches on the device; each is copied there while the device computes the one before."""

    def __init__(self, batches: Iterable[Batch], accelerator: Accelerator) -> None:
        self._batches = iter(batches)
        self._accelerator = accelerator
        self._ready: Batch | None = None

    def fetch(self) -> None:
        """Wait for the next batch of the feed and start copying it. Raises RuntimeError if the feed has ended."""
        batch = next(self._batches, None)
        if batch is None:
            raise RuntimeError("the feed ended before the training: its batches must be endless")
        with self._accelerator.copy_stream():
            put = self._accelerator.put
            self._ready = map_batch(batch, lambda value: put(value) if isinstance(value, torch.Tensor) else value)

    def take(self) -> Batch:
        """Return the batch that was fetched last, once."""
        batch, self._ready = self.peek(), None
        return batch

    def peek(self) -> Batch:
        """Return the batch that was fetched last and keep it."""
        assert self._ready is not None
        self._accelerator.wait_for_copies(_tensors(self._ready))
        return self._ready


def slice_batch(batch: Batch, start: int, stop: int) -> dict[str, Any]:
    """Samples ``start`` to ``stop`` of a batch, without a copy."""
    return map_batch(batch, lambda value: value[start:stop])


def map_batch(batch: Batch, change: Callable[[Any], Any]) -> dict[str, Any]:
    """A batch with changed tensors and lists."""
    return {
        name: map_batch(value, change) if isinstance(value, Mapping) else change(value) for name, value in batch.items()
    }


def _tensors(batch: Batch) -> Iterator[torch.Tensor]:
    for value in batch.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


def backpropagate(
    task: Task,
    model: Any,
    batch: Batch,
    size: int,
    seeds: Sequence[int],
    accelerator: Accelerator,
    kept: int = 0,
    logged: bool = False,
) -> StepOutput:
    """Add the gradient of the summed losses of a rank's batch of ``size`` samples to the parameters.

    ``model`` is the task's, possibly wrapped in DistributedDataParallel. The batch is split into as many equal
    microbatches as there are ``seeds``; each seed initialises torch's random generators for one. Of several, the first
    ``kept`` pass the model once, since their activations stay in memory, and the others twice, with the same result.
    In DistributedDataParallel the last one is not kept: its forward pass begins the reduction of gradients. A step that
    is ``logged`` has ``shares``.
    """
    with torch.no_grad():
        batch = task.prepare(batch)
    if len(seeds) == 1:
        encoded = _encode(model, batch, seeds[0], accelerator)
        losses = {**task.losses(encoded, batch), **encoded.losses}
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        encoded = Encoded(_detached(encoded.features), scalars=_detached(encoded.scalars)) if logged else encoded
        shares = task.shares(encoded, batch) if logged else {}
        return StepOutput(_detached(losses), _detached(encoded.scalars), shares)
    length = size // len(seeds)
    microbatches = [slice_batch(batch, start, start + length) for start in range(0, size, length)]
    return _backpropagate_microbatches(task, model, batch, microbatches, seeds, accelerator, kept, logged)


def describe_failure(error: BaseException, compute: Compute, accelerator: Accelerator) -> str | None:
    """What to set where a step fails for lack of a kernel or of memory; None for other errors."""
    loosen = (
        "Set train.compute.deterministic to false: a resumed training then differs from an uninterrupted one in "
        "rounding"
    )
    if operation := determinism.operation_without_kernel(error):
        return f"CUDA has no deterministic kernel for {operation}, which this model uses. {loosen}."
    if determinism.is_without_engine(error):
        found = "deterministic algorithm" if compute.deterministic else "algorithm"
        remedy = loosen if compute.deterministic else "Set another train.compute.precision"
        return (
            f"cuDNN has no {found} for a convolution of this model in channels-last order and {accelerator.precision}, "
            f"or no memory for one. {remedy}; or increase train.compute.accumulate."
        )
    if is_out_of_memory(error):
        keep = "train.compute.keep_activations to auto, or " * (compute.keep_activations is True)
        return (
            f"out of memory in a training run: {str(error).splitlines()[0]} Increase train.compute.accumulate, or set "
            f"{keep}train.compute.gradient_checkpointing to true."
        )
    return None


def _backpropagate_microbatches(
    task: Task,
    model: Any,
    batch: Batch,
    microbatches: Sequence[Batch],
    seeds: Sequence[int],
    accelerator: Accelerator,
    kept: int,
    logged: bool,
) -> StepOutput:
    """Contrast the whole batch with the activations of few microbatches in memory (Gao et al., arXiv 2101.06983).

    With features f_m = model(m) of all microbatches m and L = task.losses(f), the gradient with respect to the weights
    w is

        dL/dw = sum over m of dL/df_m * df_m/dw

    The first pass computes f, with activations of ``kept`` microbatches alone, then the losses give dL/df; the second
    pass runs the model on each other microbatch again and backpropagates dL/df_m. Both passes draw the same random
    numbers. Batch normalisation sees one microbatch at a time, and each changes its running statistics once, in order.
    """

    def reducing(index: int) -> Any:
        """Context in which DDP reduces the gradient of all microbatches once, with the last one."""
        return contextlib.nullcontext() if index == len(microbatches) - 1 or model is task.model else model.no_sync()

    encodings = []
    for index in range(kept):
        with reducing(index):
            encodings.append(_encode(model, microbatches[index], seeds[index], accelerator))
    before = [buffer.clone() for buffer in task.model.buffers()]  # running statistics, which keep their values
    with torch.no_grad():
        for microbatch, seed in zip(microbatches[kept:], seeds[kept:], strict=True):
            encodings.append(_encode(task.model, microbatch, seed, accelerator))
        for buffer, value in zip(task.model.buffers(), before, strict=True):
            buffer.data.copy_(value)  # kept microbatches refer to it, and autograd would take it for changed
    features = {
        name: torch.cat([encoded.features[name].detach() for encoded in encodings]).requires_grad_()
        for name in encodings[0].features
    }
    scalars = {name: value.detach().clone().requires_grad_() for name, value in encodings[0].scalars.items()}
    losses = task.losses(Encoded(features, scalars=scalars), batch)
    if losses:
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()

    share = 1 / len(microbatches)
    for index, (microbatch, seed) in enumerate(zip(microbatches, seeds, strict=True)):
        with reducing(index):
            encoded = encodings[index] if index < kept else _encode(model, microbatch, seed, accelerator)
            outputs = [(loss, torch.full_like(loss, share)) for loss in encoded.losses.values()]
            for name, value in encoded.scalars.items():
                if (gradient := scalars[name].grad) is not None:
                    outputs.append((value, gradient * share))
            for name, value in encoded.features.items():
                if (gradient := features[name].grad) is not None:
                    outputs.append((value, gradient[index * len(value) : (index + 1) * len(value)]))
            outputs = [(value, gradient) for value, gradient in outputs if value.requires_grad]
            torch.autograd.backward([value for value, _ in outputs], [gradient for _, gradient in outputs])
    local = {name: torch.stack([encoded.losses[name] for encoded in encodings]).mean() for name in encodings[0].losses}
    shares = task.shares(Encoded(_detached(features), scalars=_detached(scalars)), batch) if logged else {}
    return StepOutput(_detached({**losses, **local}), _detached(scalars), shares)


def _encode(model: Any, microbatch: Batch, seed: int, accelerator: Accelerator) -> Encoded:
    torch.manual_seed(seed)
    with accelerator.autocast():
        encoded: Encoded = model(microbatch)
    return encoded


def _detached(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies, since a value may be a view of a parameter, which the step updates before the log reads it."""
    return {name: value.detach().clone() for name, value in values.items()}
