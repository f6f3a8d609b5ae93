"""What the fast paths compile, without code generation, which takes minutes on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from teachers.fast_paths import recompilation


class Graphs:
    """The graphs that torch has captured, and the calls of them.

    A graph of which ``fails`` is true cannot be compiled.
    """

    def __init__(self) -> None:
        self.captured: list[Any] = []
        self.calls = 0
        self.fails: Callable[[Any], bool] = lambda graph: False

    def inductor(self, graph: Any, _: Any) -> Callable[..., Any]:
        if self.fails(graph):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
        self.captured.append(graph)

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph.forward(*args)

        return run


@contextmanager
def captured_graphs() -> Iterator[Graphs]:
    """Let graphs run as they were captured."""
    graphs = Graphs()
    torch._dynamo.reset()
    with patch.object(recompilation, "inductor", graphs.inductor):
        yield graphs
    torch._dynamo.reset()
