"""Compiled forward and backward passes of the model that is trained, checked against plain ones, and counted.

With ``compile: auto``, a model on CUDA is compiled where nothing but rounding may change: its batches have one shape,
its passes draw no random numbers and wait for no other rank, and a whole step, with the passes of all microbatches,
has the losses and the gradient of a plain step. In DistributedDataParallel it is compiled inside of that, in one graph
for each bucket of gradients, so that the step which is checked runs the code of all later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from reinforce.training.config import Compute
from reinforce.training.distributed.ranks import Ranks
from reinforce.training.step import StepOutput
from reinforce.training.task import Task
from reinforce.training.trials.division import Trials, no_trace
from teachers.fast_paths.recompilation import Compiler, many_shapes
from teachers.fast_paths.usage import enabled, loading
from teachers.runtime.memory import forget_frames, release_cache

#: Least cosine between the gradients of a compiled and of a plain step, and largest relative difference of a loss: in
#: fp32, and in bf16, to which compiled code rounds less often.
_LIMITS_FP32, _LIMITS = (0.9999, 1e-3), (0.99, 0.01)

#: A step of a model, which may be wrapped, without an update.
Step = Callable[[Any], StepOutput]


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
