"""The division of a rank's batch into microbatches that fit in the memory of its accelerator, and what a sample costs.

They are found before the first step, by steps that leave no trace: weights, buffers and gradients are as before, and
random generators are seeded for each step anyway. No rank waits for another in them, since one that is out of memory
would not come: a rank takes copies of its own rows for those of others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from reinforce.errors import UserError
from reinforce.training.distributed import gather
from reinforce.training.distributed.ranks import Ranks
from reinforce.training.state import State
from reinforce.training.step import StepOutput, backpropagate, slice_batch
from reinforce.training.task import Batch, Task
from teachers.runtime.determinism import is_without_engine
from teachers.runtime.flops import count_flops
from teachers.runtime.memory import forget_frames, is_out_of_memory, release_cache

#: Share of an accelerator's memory that a trial leaves to the next batch, to communication and to fragmentation.
_RESERVE = 0.06


@dataclass(frozen=True)
class Trials:
    """Steps of a rank's ``batch`` of ``size`` samples; all ranks make them together."""

    task: Task
    state: State
    batch: Batch
    size: int
    ranks: Ranks

    def step(self, model: Any, microbatches: int, kept: int) -> StepOutput:
        """Add the gradient of the batch; ``model`` is the task's, which may be wrapped. Leaves a trace by itself."""
        return backpropagate(self.task, model, self.batch, self.size, [0] * microbatches, self.ranks.accelerator, kept)

    def fewest_microbatches(self, before: int | None) -> int:
        """The fewest microbatches of the batch with which a step fits, the same on all ranks.

        It begins with one microbatch, or with microbatches of ``before`` samples, and tries the next divisor of the
        size from twice as many on. Raises UserError if a single sample does not fit.
        """
        size = self.size
        microbatches = size // before if before and size % before == 0 else 1
        while not self._fits(microbatches, 0):
            if microbatches == size:
                raise UserError(
                    "out of memory: a step does not fit in the memory of the accelerator, even one sample at a time. "
                    "Lower train.batch, use more ranks, or set train.compute.gradient_checkpointing: true."
                )
            microbatches = next(count for count in range(min(2 * microbatches, size), size + 1) if size % count == 0)
        return microbatches

    def most_kept(self, microbatches: int, keep: bool | Literal["auto"]) -> int:
        """The number of microbatches whose activations a step keeps between its passes, the same on all ranks.

        All or none as ``keep`` states, or with ``auto`` as many as fit on accelerators, and none on CPUs. Results are
        the same for any number. With several ranks the last microbatch is not kept.
        """
        most = microbatches - (self.ranks.size > 1) if microbatches > 1 else 0
        if keep != "auto":
            return most * keep
        kept = 0
        while kept < most and self.ranks.accelerator.device.type == "cuda":
            tried = (kept + most + 1) // 2
            if self._fits(microbatches, tried):
                kept = tried
            else:
                most = tried - 1
        return kept

    def flops_of_sample(self) -> float:
        """FLOPs of the model for a sample, forward and backward, as far as they can be counted; 0 if not at all.

        The loss over the batch counts for nothing, nor do forward passes that are repeated to save memory: of
        microbatches, and in blocks whose activations are recomputed.
        """
        task = self.task
        recomputed = any(getattr(module, "grad_checkpointing", False) for module in task.model.modules())

        def encode() -> torch.Tensor:
            with self.ranks.accelerator.autocast():
                encoded = task.model(few)
            outputs = (*encoded.features.values(), *encoded.losses.values())
            return torch.stack([value.float().sum() for value in outputs])

        def forward() -> None:
            with torch.no_grad():
                encode()

        with no_trace(self.state):
            for rows in range(1, min(2, self.size) + 1):  # batch normalisation of one row may raise
                with torch.no_grad():
                    few = task.prepare(slice_batch(self.batch, 0, rows))
                if whole := count_flops(lambda: encode().sum().backward()):
                    break
            once = count_flops(forward) if recomputed or not whole else 0
        return max(once, whole - once * recomputed) / rows

    def _fits(self, microbatches: int, kept: int) -> bool:
        """Whether a step of so many microbatches, of which some are ``kept``, fits on each rank."""
        return not self.ranks.start_max(not self._fits_here(microbatches, kept))()

    def _fits_here(self, microbatches: int, kept: int) -> bool:
        """Whether a step fits on this rank, with the optimizer's state and a reserve beside it."""
        device, optimizer = self.ranks.accelerator.device, self.state.optimizer
        try:
            with no_trace(self.state):
                total = torch.cuda.get_device_properties(device).total_memory
                beside = [torch.empty(int(_RESERVE * total), dtype=torch.uint8, device=device)]
                for group in optimizer.param_groups:
                    new = [parameter for parameter in group["params"] if parameter not in optimizer.state]
                    beside += [torch.empty_like(parameter) for parameter in new for _ in range(2)]
                self.step(self.task.model, microbatches, kept)
            return True
        except Exception as error:
            # cuDNN reports lack of memory for a convolution's workspace as lack of an algorithm.
            if not is_out_of_memory(error) and not (is_without_engine(error) and (kept or microbatches < self.size)):
                raise
            forget_frames(error)
        finally:
            beside = []
            release_cache(device)
        return False


@contextmanager
def no_trace(state: State) -> Iterator[None]:
    """Wait for no other rank; restore the model's buffers, and drop its gradients."""
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    try:
        with gather.without_communication():
            yield
    finally:
        state.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
