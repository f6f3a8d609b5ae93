"""What torch compiles, with which settings, and which calls of it run compiled code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._inductor import config as settings
from torch.utils.flop_counter import FlopCounterMode

from teachers.fast_paths import recompilation
from teachers.fast_paths.recompilation import Compiler, many_shapes
from teachers.fast_paths.usage import Usage, loading, set_enabled, snapshot
from teachers.runtime.determinism import unique_indices
from teachers.runtime.flops import counted_flops
from tests.helpers.compiled_graphs import Graphs, captured_graphs

TORCHS_OWN = recompilation.inductor


@pytest.fixture(autouse=True)
def graphs() -> Iterator[Graphs]:
    set_enabled(True)
    with captured_graphs() as graphs, many_shapes():
        yield graphs
    set_enabled(True)


def multiply(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return one @ other.relu()


def compiled(accepted: bool = True, **options: Any) -> Callable[..., torch.Tensor]:
    with loading("vit"):
        compiler = Compiler("the tower", asked=True)
    function = compiler.compile(multiply, **options)
    if accepted:
        function(square(2), square(2))
        compiler.accept()
    return function


def square(side: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.eye(side, dtype=dtype) - 0.5


def counts(used: int, plain: int, reason: str | None = None) -> tuple[Usage, ...]:
    return (Usage("vit", "compile", asked=True, used=used, plain=plain, reason=reason),)


@pytest.mark.parametrize("own", [True, False])
def test_functions_run_compiled_after_their_operations_were_counted(graphs: Graphs, own: bool) -> None:
    """Also those that others compile, such as the model of a training."""
    function = compiled(dynamic=False)
    if not own:
        function = torch.compile(multiply, backend=graphs.inductor, dynamic=False)
        function(square(2), square(2))
    before = graphs.calls
    for side in (2, 3):  # compiled before, and not yet
        assert counted_flops(lambda side=side: function(square(side), square(side))) == 2 * side**3
    assert graphs.calls == before
    for side in (2, 3, 4):
        function(square(side), square(side))
    assert graphs.calls == before + 3
    assert snapshot() == counts(used=4 if own else 1, plain=0)


def test_calls_without_compiled_code_are_reported_once(graphs: Graphs, caplog: pytest.LogCaptureFixture) -> None:
    function = compiled(dynamic=False)
    with FlopCounterMode(display=False):
        function(square(3), square(3))
    for side in (2, 3):  # torch skips the function from now on
        torch.testing.assert_close(function(square(side), square(side)), multiply(square(side), square(side)))
    assert graphs.calls == 1
    [used] = snapshot()
    assert (used.used, used.plain) == (1, 3)
    assert used.reason == "the tower: torch runs it without compiled code, at least for some shapes"
    assert caplog.text.count("without the fast path `compile`: the tower: ") == 1


@pytest.mark.slow
def test_kernels_of_torch_count_by_thread(graphs: Graphs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found: list[torch.Tensor] = []
    with patch.object(recompilation, "inductor", TORCHS_OWN):
        function = compiled(dynamic=False)

        def run() -> None:
            with many_shapes():
                found.append(function(square(3), square(3)))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], multiply(square(3), square(3)))
    assert snapshot() == counts(used=2, plain=0)
    assert graphs.captured == []
    assert [*tmp_path.rglob("*.so")], "kernels"


def test_a_function_that_torch_never_compiles_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # as TORCH_COMPILE_DISABLE does
    with pytest.raises(ValueError, match="torch runs it without compiled code"):
        compiled()
    assert snapshot() == counts(used=0, plain=1)


def test_what_fails_to_compile_later_runs_as_it_is(graphs: Graphs, caplog: pytest.LogCaptureFixture) -> None:
    function = compiled(dynamic=False)
    graphs.fails = lambda graph: True
    for side in (2, 3, 4, 2):
        torch.testing.assert_close(function(square(side), square(side)), multiply(square(side), square(side)))
    [used] = snapshot()
    assert (used.used, used.plain) == (2, 3)
    assert used.reason is not None
    assert "the tower: " in used.reason
    assert "Failed to find C compiler" in used.reason
    assert caplog.text.count("without the fast path `compile`: the tower: ") == 1


def test_further_shapes_than_torch_compiles_cost_no_run(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recompilation, "_SHAPES", 1)
    with many_shapes():
        function = compiled(fullgraph=True, dynamic=True)
        for dtype in (torch.float64, torch.float32):
            torch.testing.assert_close(
                function(square(3, dtype), square(3, dtype)), multiply(square(3, dtype), square(3, dtype))
            )
    [used] = snapshot()
    assert (used.used, used.plain, len(graphs.captured)) == (1, 2, 1)
    assert "FailOnRecompileLimitHit" in str(used.reason)


def test_errors_are_raised_while_a_function_is_compared_and_where_they_are_not_of_the_compiler(graphs: Graphs) -> None:
    graphs.fails = lambda graph: True
    with pytest.raises(Exception, match="Failed to find C compiler"):
        compiled(accepted=False)(square(2), square(2))
    graphs.fails = lambda graph: False
    function = compiled()

    def out_of_memory(graph: Any) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    graphs.fails = out_of_memory
    with pytest.raises(Exception, match="CUDA out of memory"):
        function(square(3, torch.float64), square(3, torch.float64))
    with pytest.raises(RuntimeError):
        function(square(2), square(3))
    assert snapshot()[0].reason is None


@pytest.mark.parametrize("deterministic", [True, False])
def test_settings_of_the_compiler_are_those_of_the_process_in_each_thread(graphs: Graphs, deterministic: bool) -> None:
    found: list[tuple[int, bool]] = []

    def note(graph: Any) -> bool:
        found.append((settings.compile_threads, settings.deterministic))
        return False

    graphs.fails, threads = note, torch.get_num_threads()
    function = compiled(accepted=False, dynamic=False)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    before = settings.compile_threads, settings.deterministic

    def run() -> None:
        with many_shapes():
            function(square(2), square(2))
            with unique_indices():  # which lifts torch's flag
                function(square(3), square(3))

    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        function(square(4), square(4))
        assert (settings.compile_threads, settings.deterministic) == before
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert found == [(1, deterministic)] * 3


def test_settings_are_also_those_of_backward_passes_in_threads(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx  # takes half a second

    found: list[tuple[bool, bool]] = []

    def run_as_it_is(graph: Any, _: Any, **options: Any) -> Callable[..., Any]:
        found.append((threading.current_thread() is threading.main_thread(), settings.deterministic))
        boxed: Callable[..., Any] = make_boxed_func(graph.forward)
        return boxed

    monkeypatch.setattr(compile_fx, "compile_fx", partial(compile_fx.compile_fx, inner_compile=run_as_it_is))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with patch.object(recompilation, "inductor", TORCHS_OWN):
            side = square(3).requires_grad_()
            loss = Compiler("multiply", False).compile(multiply, dynamic=False)(side, square(3)).sum()
            thread = threading.Thread(target=loss.backward)  # as on CUDA; on CPUs it is the caller's
            thread.start()
            thread.join()
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == [(True, True), (False, True)]
    assert side.grad is not None
