"""Decoding steps as CUDA graphs, and their captures that fail, on a stand-in for CUDA."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from teachers.fast_paths.recompilation import Steps
from teachers.fast_paths.usage import VARIABLE, Usage, set_enabled, snapshot
from tests.helpers.models.tiny_coca import batch, build
from tests.helpers.stand_in_cuda import StandIn, stand_in_cuda

MESSAGE = "CUDA error: operation not permitted when stream is capturing"


class Refusing(list[Any]):
    """The tape of a capture that fails in the middle of a step."""

    def append(self, operation: Any) -> None:
        if len(self) == 5:
            raise RuntimeError(MESSAGE)
        super().append(operation)


@contextmanager
def failing_captures(cuda: StandIn, first: int) -> Iterator[None]:
    """Captures fail from that number on, counted from 0."""
    graph, captures = torch.cuda.graph, list[None]()

    @contextmanager
    def capture(*arguments: Any, **others: Any) -> Iterator[None]:
        with graph(*arguments, **others):
            captures.append(None)
            if len(captures) > first:
                cuda.tape = Refusing()
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "graph", capture)
        yield
    assert len(captures) - first <= 4, "a kind of steps was captured again after that had failed"


@pytest.fixture
def cuda() -> Iterator[StandIn]:
    set_enabled(True)
    with stand_in_cuda() as cuda:
        yield cuda


@pytest.mark.parametrize(
    ("loading", "first", "replayed"),
    [(True, 0, False), (True, 4, False), (False, 2, True), (False, 4, True)],
    ids=["at loading", "of compiled steps at loading", "of the first word", "of a later shape"],
)
def test_a_capture_that_fails_leaves_plain_steps_with_equal_captions_and_one_warning(
    cuda: StandIn, caplog: pytest.LogCaptureFixture, loading: bool, first: int, replayed: bool
) -> None:
    def graphs() -> Usage:
        return next(one for one in snapshot() if one.path == "graphs")

    captioner = build("cpu")
    wanted = captioner.caption(*batch(captioner, 20))
    captioner = captioner if loading else build("cuda")
    with failing_captures(cuda, first):
        captioner = build("cuda") if loading else captioner
        pixels, seeds = batch(captioner, 20)
        for count in (20, 3, 20):
            before = graphs().used
            assert captioner.caption(pixels[:count], seeds[:count]) == wanted[:count]
    [line] = [message for message in caplog.messages if "graphs" in message]
    assert line.endswith(f"runs without the fast path `graphs`: RuntimeError: {MESSAGE}")
    assert (graphs().used > before, graphs().reason) == (replayed, f"RuntimeError: {MESSAGE}")
    assert graphs().plain >= 10


def test_steps_are_replayed_from_the_second_with_a_key(cuda: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(steps: Steps) -> list[int]:
        done = list[int]()
        values = torch.zeros(1, device="cuda")

        def step(key: int) -> None:
            done.append(key)
            values.add_(1)

        for key in (1, 1, 2, 1):
            steps.run("step", key, partial(step, key))
        assert values.item() == 4
        return done

    device = torch.device("cuda", 0)
    assert run(Steps(device, asked=True)) == [1, 1, 2, 2], "each key runs once, and is captured"
    assert snapshot() == (Usage("", "graphs", asked=True, used=2, plain=2),)
    monkeypatch.setenv(VARIABLE, "plain")
    assert run(Steps(device)) == run(Steps(device, graphs=False)) == [1, 1, 2, 1]
    assert len(snapshot()) == 1


def test_a_capture_that_fails_leaves_the_thread_on_its_stream(cuda: StandIn) -> None:
    entered = list[Any]()  # and not left when nothing refers to it

    class Failing:
        """As torch.cuda.graph, whose end raises before it sets the stream back."""

        def __init__(self, graph: Any, pool: Any, stream: Any, **_: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            entered.append(torch.cuda.stream(self.stream))
            entered[0].__enter__()

        def __exit__(self, *_: Any) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "graph", Failing)
        before = torch.cuda.current_stream()
        Steps(torch.device("cuda", 0)).run("step", 1, lambda: None)
        assert torch.cuda.current_stream() is before
    assert "failed due to a previous error" in str(snapshot()[0].reason)


def test_a_capture_without_memory_raises_so_that_a_smaller_batch_is_captured(cuda: StandIn) -> None:
    steps, values = Steps(torch.device("cuda", 0)), torch.zeros(100, device="cuda")

    def step() -> None:
        values.copy_(values + 1)

    allocations = itertools.count()
    full = cuda.failing_allocations(lambda _: next(allocations) == 1)  # the first is that of the step itself
    with full, pytest.raises(torch.OutOfMemoryError):
        steps.run("step", 1, step)
    steps.run("step", 1, step)
    steps.run("step", 1, step)
    assert values[0].item() == 3
    assert snapshot()[0].used == 1
