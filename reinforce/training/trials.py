"""Steps before the first one, which leave no trace: what fits in memory, what a sample costs, and compiled code.

The division of a rank's batch into microbatches that fit in the memory of its accelerator is found by steps after which
weights, buffers and gradients are as before; random generators are seeded for each step anyway. No rank waits for
another in them, since one that is out of memory would not come: a rank takes copies of its own rows for those of
others.

With ``compile: auto``, a model on CUDA is compiled where nothing but rounding may change: its batches have one shape,
its passes draw no random numbers and wait for no other rank, and a whole step, with the passes of all microbatches,
has the losses and the gradient of a plain step. In DistributedDataParallel it is compiled inside of that, in one graph
for each bucket of gradients, so that the step which is checked runs the code of all later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from reinforce.errors import UserError
from reinforce.training import gather
from reinforce.training.checkpoints import State
from reinforce.training.config import Compute
from reinforce.training.ranks import Ranks
from reinforce.training.step import StepOutput, backpropagate, slice_batch
from reinforce.training.task import Batch, Task
from teachers.fast_paths.recompilation import Compiler, many_shapes
from teachers.fast_paths.usage import enabled, loading
from teachers.runtime.accelerator import forget_frames, is_out_of_memory, release_cache
from teachers.runtime.determinism import is_without_engine
from teachers.runtime.flops import count_flops

#: Share of an accelerator's memory that a trial leaves to the next batch, to communication and to fragmentation.
_RESERVE = 0.06
#: Least cosine between the gradients of a compiled and of a plain step, and largest relative difference of a loss: in
#: fp32, and in bf16, to which compiled code rounds less often.
_LIMITS_FP32, _LIMITS = (0.9999, 1e-3), (0.99, 0.01)

#: A step of a model, which may be wrapped, without an update.
Step = Callable[[Any], StepOutput]


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

        with no_trace(self.state):
            for rows in range(1, min(2, self.size) + 1):  # batch normalisation of one row may raise
                with torch.no_grad():
                    few = task.prepare(slice_batch(self.batch, 0, rows))
                if whole := count_flops(lambda: encode().sum().backward()):
                    break
            once = count_flops(torch.no_grad()(encode)) if recomputed or not whole else 0
        return max(once, whole - once * recomputed) / rows

    def _fits(self, microbatches: int, kept: int) -> bool:
        """Whether a step of so many microbatches, of which some are ``kept``, fits on each rank.

        The optimizer's state and a reserve are beside it.
        """
        device, optimizer, fits = self.ranks.accelerator.device, self.state.optimizer, False
        try:
            with no_trace(self.state):
                total = torch.cuda.get_device_properties(device).total_memory
                beside = [torch.empty(int(_RESERVE * total), dtype=torch.uint8, device=device)]
                for group in optimizer.param_groups:
                    new = [parameter for parameter in group["params"] if parameter not in optimizer.state]
                    beside += [torch.empty_like(parameter) for parameter in new for _ in range(2)]
                self.step(self.task.model, microbatches, kept)
            fits = True
        except Exception as error:
            # cuDNN reports lack of memory for a convolution's workspace as lack of an algorithm.
            if not is_out_of_memory(error) and not (is_without_engine(error) and (kept or microbatches < self.size)):
                raise
            forget_frames(error)
        finally:
            beside = []
            release_cache(device)
        return not self.ranks.start_max(not fits)()


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


def compile_model(trials: Trials, model: Any, step: Step, compute: Compute, suits: bool) -> Compiler | None:
    """Compile the task's model, which ``model`` may wrap, as ``compute.compile`` says; None if it stays plain.

    ``step`` is that of the first batch; ``suits`` is whether the training run may be compiled by ``auto``. All ranks
    decide alike.
    """
    task, ranks = trials.task, trials.ranks
    if compute.compile is False or not enabled():
        return None
    shares = compute.sync_batch_norm and ranks.size > 1
    safe = task.compiles_once and ranks.accelerator.device.type == "cuda" and not shares
    if compute.compile == "auto" and not (suits and safe):
        return None
    with loading("the trained model"):
        compiler = Compiler(type(task.model).__name__, asked=compute.compile is True)
    if compute.compile == "auto":
        return compiler if compile_if_equal(trials, model, step, compiler) else None
    _compile(task, compiler)
    return compiler


def compile_if_equal(trials: Trials, model: Any, step: Step, compiler: Compiler) -> bool:
    """Compile the task's model and return whether steps equal plain ones on each rank; otherwise they are plain."""
    task, ranks = trials.task, trials.ranks
    plain = reason = None
    try:
        plain = _gradient(trials, task.model, step)
        _compile(task, compiler)
        if plain.random:
            reason = "its passes draw random numbers, which compiled ones would draw in another order"
        else:
            with _without_reduction(model):
                reason = _difference(plain, _gradient(trials, model, step), ranks)
            compiler.accept()
    except Exception as error:  # of the compiler, of the C compiler that it needs, or of memory
        forget_frames(error)
        cause = getattr(error, "inner_exception", error)  # what dynamo has wrapped
        reason = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
    plain = None
    release_cache(ranks.accelerator.device)
    if equal := not ranks.start_max(reason is not None)():
        return equal
    compiler.give_up(reason or "steps of another rank do not equal plain ones")
    return False


def _compile(task: Task, compiler: Compiler) -> None:
    """Let calls of the model run compiled code; in DistributedDataParallel, which it is compiled inside of, too."""
    compiled = compiler.compile(task.model._call_impl, dynamic=False if task.compiles_once else None)

    def call(*arguments: Any) -> Any:
        with many_shapes():
            return compiled(*arguments)

    task.model._compiled_call_impl = call  # as by ``torch.nn.Module.compile``


@dataclass(frozen=True)
class _Gradient:
    """The losses of a step and the gradients of the parameters, by name, and whether its passes drew random numbers."""

    losses: dict[str, torch.Tensor]
    of: dict[str, torch.Tensor | None]
    random: bool


def _gradient(trials: Trials, model: Any, step: Step) -> _Gradient:
    device = trials.ranks.accelerator.device
    with no_trace(trials.state):
        losses = step(model).losses
        after = _random_states(device)
        gradients = {name: parameter.grad for name, parameter in trials.task.model.named_parameters()}
    torch.manual_seed(0)
    drew = any(not torch.equal(one, other) for one, other in zip(after, _random_states(device), strict=True))
    return _Gradient(losses, gradients, drew)


def _random_states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _difference(plain: _Gradient, compiled: _Gradient, ranks: Ranks) -> str | None:
    """What differs by more than rounding; None if nothing does."""
    least, most = _LIMITS_FP32 if ranks.accelerator.dtype == torch.float32 else _LIMITS
    for name, loss in plain.losses.items():
        before, after = float(loss), float(compiled.losses[name])
        if not abs(after - before) <= most * abs(before):  # nor if one is NaN
            return f"the loss {name} is {after:.6g} and not {before:.6g}"
    product = of_plain = of_compiled = 0.0
    for name, one in plain.of.items():
        other = compiled.of[name]
        if (one is None) != (other is None):
            return f"{name} has a gradient in one of both only"
        if one is not None and other is not None:
            product, of_plain, of_compiled = (
                total + float(torch.linalg.vecdot(a.flatten(), b.flatten()))
                for total, a, b in ((product, one, other), (of_plain, one, one), (of_compiled, other, other))
            )
    cosine = product / max((of_plain * of_compiled) ** 0.5, 1e-30)
    return None if cosine >= least else f"the gradient differs (cosine {cosine:.5f}, at least {least} is required)"


@contextmanager
def _without_reduction(model: Any) -> Iterator[None]:
    """Let a model in DistributedDataParallel wait for no other rank."""
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        yield
        return
    before = model.require_forward_param_sync
    model.require_forward_param_sync = False  # of buffers
    try:
        with model.no_sync():
            yield
    finally:
        model.require_forward_param_sync = before
