"""A model is compiled where a compiled step equals a plain one, and steps of compiled code are counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.storage import Storage
from reinforce.training import trials
from reinforce.training.checkpoints import CheckpointFolder, State
from reinforce.training.ranks import Ranks
from reinforce.training.trials import Trials
from teachers.fast_paths import recompilation, usage
from teachers.runtime.accelerator import Accelerator
from tests.helpers.trainings import PairFeed, StaticTask, TowersTask, curve, job, run, stopped_after

BATCH = next(iter(PairFeed().batches(0, 1, 16, 0)))
Backend = Callable[..., Callable[..., Any]]


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


def wrong(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    run = traced(graph, inputs)
    return lambda *arguments: tuple(1.5 * one for one in run(*arguments))


def failing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    raise RuntimeError("no C compiler\nwas found")


def seeded() -> StaticTask:
    torch.manual_seed(0)
    return StaticTask()


def compile_(task: TowersTask) -> tuple[recompilation.Compiler, bool, Callable[[], Any]]:
    """The compiler, whether the model is compiled, and a step of three passes."""
    accelerator = Accelerator("cpu")
    state = State(task.model.train(), torch.optim.SGD(task.model.parameters()))

    steps = Trials(task, state, BATCH, 16, Ranks(0, 1, accelerator))
    step = partial(steps.step, microbatches=2, kept=1)
    compiler = recompilation.Compiler("Towers", False)
    before = {name: value.clone() for name, value in state.tensors().items()}
    made = trials.compile_if_equal(steps, task.model, step, compiler)
    assert all(torch.equal(value, before[name]) for name, value in state.tensors().items())
    assert all(parameter.grad is None for parameter in task.model.parameters())
    return compiler, made, partial(step, task.model)


def test_a_model_whose_compiled_step_equals_a_plain_one_is_compiled_and_its_passes_are_counted() -> None:
    compiler, made, step = compile_(StaticTask(norm=True))
    assert made
    step()
    step()
    with torch.compiler.set_stance("force_eager"):
        step()
    [found] = usage.snapshot()
    assert (found.path, found.used, found.plain) == ("compile", 9, 3), "one step was compared"
    compiler.give_up("it has changed")
    step()
    [found] = usage.snapshot()
    assert (found.used, found.plain) == (9, 6)


@pytest.mark.parametrize(
    ("options", "backend", "reason"),
    [
        ({}, wrong, r"^Towers: the loss contrast is \d"),
        ({}, failing, r"^Towers: RuntimeError: no C compiler$"),
        ({"dropout": 0.1}, traced, "draw random numbers"),
    ],
)
def test_a_model_that_cannot_be_compiled_safely_stays_plain_with_one_line_of_why(
    options: dict[str, Any],
    backend: Backend,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(recompilation, "inductor", backend)
    _, made, step = compile_(StaticTask(**options))
    assert not made
    [line] = [record.getMessage() for record in caplog.records if record.name.startswith("teachers")]
    assert "runs without the fast path `compile`: " in line
    before = usage.snapshot()[0]
    step()
    after = usage.snapshot()[0]
    assert (after.used, after.plain) == (before.used, before.plain + 3)
    assert re.search(reason, after.reason or "")


def test_a_gradient_that_differs_or_is_missing_is_found() -> None:
    gradients: dict[str, torch.Tensor | None] = {"a": torch.tensor([3.0, 4.0]), "b": None}
    one = trials._Gradient({"loss": torch.tensor(2.0)}, gradients, False)
    ranks = Ranks(0, 1, Accelerator("cpu"))

    def found(**changes: Any) -> str | None:
        other = {"losses": one.losses, "of": gradients, "random": False, **changes}
        return trials._difference(one, trials._Gradient(**other), ranks)

    assert found() is None
    assert found(of={"a": torch.tensor([4.0, 3.0]), "b": None}).startswith("the gradient differs (cosine 0.96000")
    assert found(of={"a": torch.tensor([torch.nan, 3.0]), "b": None}).startswith("the gradient differs (cosine nan")
    assert found(of={"a": gradients["a"], "b": torch.zeros(1)}) == "b has a gradient in one of both only"
    assert found(losses={"loss": torch.tensor(torch.nan)}) == "the loss loss is nan and not 2"


@pytest.mark.usefixtures("no_pictures")
def test_a_compiled_training_has_the_curve_of_a_plain_one_and_one_that_resumes_says_what_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compute = {"accumulate": 2, "keep_activations": True}
    on, off = (job(tmp_path / str(on), steps=6, compute={**compute, "compile": on}) for on in (True, False))
    run(off, task=seeded())
    stopped_after(3, on, task=seeded())
    assert CheckpointFolder(Storage(on.output), 1).load(3)[0].compiled
    assert not CheckpointFolder(Storage(off.output), 1).load(6)[0].compiled
    [found] = usage.snapshot()
    assert (found.asked, found.used, found.plain) == (True, 6, 0)
    capsys.readouterr()
    run(job(on.output, steps=6, compute=compute), task=seeded())
    shown = " ".join(capsys.readouterr().out.split())
    assert "ran compiled code up to the last checkpoint and run plain code now" in shown
    np.testing.assert_allclose(curve(Path(on.output)), curve(Path(off.output)), rtol=1e-5)


def test_nothing_is_compiled_on_a_cpu_by_default_nor_where_fast_paths_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Trials(StaticTask(), None, BATCH, 16, Ranks(0, 1, Accelerator("cpu")))  # type: ignore[arg-type]
    assert trials.compile_model(made, None, pytest.fail, job("x").training.compute, False) is None
    monkeypatch.setenv(usage.VARIABLE, "plain")
    wanted = job("x", compute={"compile": True}).training.compute
    assert trials.compile_model(made, None, pytest.fail, wanted, False) is None
    assert usage.snapshot() == ()
