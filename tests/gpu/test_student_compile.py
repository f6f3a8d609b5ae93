"""When a student is compiled by default on a stand-in for a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from reinforce.training import trials
from reinforce.training.checkpoints import State
from reinforce.training.ranks import Ranks
from reinforce.training.step import Prefetcher
from reinforce.training.trials import Trials
from teachers.fast_paths import recompilation, usage
from teachers.runtime.accelerator import Accelerator
from tests.helpers.stand_in_cuda import stand_in_cuda
from tests.helpers.trainings import PairFeed, StaticTask, job

BATCH = next(iter(PairFeed().batches(0, 1, 16, 0)))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has compiled nothing, with a compiler that needs no C compiler."""
    monkeypatch.setattr(recompilation, "inductor", traced)
    torch._dynamo.reset()
    usage.set_enabled(True)
    yield
    torch._dynamo.reset()
    usage.set_enabled(True)


def traced(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Forward and backward pass as traced graphs of torch's own operations."""
    made: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    return made


def test_on_cuda_a_student_is_compiled_by_default_in_a_long_training_without_shared_statistics() -> None:
    """The stand-in's compiler does nothing, so that a path is registered and falls back."""
    with stand_in_cuda():
        accelerator = Accelerator("cuda")

        def paths(suits: bool = True, once: bool = True, ranks: int = 1, **compute: Any) -> int:
            usage.set_enabled(True)
            task = StaticTask()
            task.compiles_once = once
            model = accelerator.place(task.model).train()
            state = State(model, torch.optim.SGD(model.parameters()))
            batches = Prefetcher([BATCH], accelerator)
            batches.fetch()

            class Alone(Ranks):
                def start_max(self, value: int) -> Any:
                    return lambda: value

            config = job("x", batch=16 * ranks, compute=compute).training.compute
            made = Trials(task, state, batches.peek(), 16, Alone(0, ranks, accelerator))
            step = partial(made.step, microbatches=1, kept=0)
            trials.compile_model(made, model, step, config, suits)
            return len(usage.snapshot())

        assert paths() == paths(ranks=2) == 1
        assert paths(suits=False) == paths(once=False) == paths(compile=False) == 0
        assert (paths(sync_batch_norm=True), paths(ranks=2, sync_batch_norm=True)) == (1, 0)
