"""How torch compiles functions in this process: for how many shapes, with which kernels, in how many processes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Blocks of all towers of a process that have one class share the graphs of its ``forward``: two towers with eight
#: batch sizes each need sixteen. At torch's limit of eight, further shapes would run eagerly for good, so that the
#: rounding of a batch depended on those before it.
_SHAPES = 1024


@contextmanager
def many_shapes() -> Iterator[None]:
    """Let torch compile functions for as many shapes as there are, while calls run inside of it.

    Sizes that are equal in the first call of ``for_any_rows`` are not taken to be equal in all calls.
    """
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.6
    sizes: Any = importlib.import_module("torch.fx.experimental._config")
    limits = {limit: _SHAPES, f"accumulated_{limit}": _SHAPES}
    with config.patch(limits), sizes.patch(use_duck_shape=False):
        yield


def for_any_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` with one graph for all sizes of the arguments but those that parameters decide.

    Calls run inside of ``many_shapes``.
    """
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=True)
    return compiled


def settle_compiler() -> None:
    """Let torch.compile use as many processes as torch has threads, and choose no kernel by its time where operations
    must be deterministic. What is compiled later in this process stays so."""
    compiler: Any = importlib.import_module("torch._inductor.config")
    compiler.compile_threads = min(compiler.compile_threads or 1, torch.get_num_threads())
    if torch.are_deterministic_algorithms_enabled() and hasattr(compiler, "deterministic"):
        compiler.deterministic = True
