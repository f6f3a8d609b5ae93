"""How torch compiles functions in this process: for how many shapes, with which kernels, in how many processes."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any

import torch

#: Blocks of all towers of a process that have one class share the graphs of its ``forward``: two towers with eight
#: batch sizes each need sixteen. At torch's limit of eight, further shapes would run eagerly for good, so that the
#: rounding of a batch depended on those before it.
_SHAPES = 1024


def many_shapes() -> AbstractContextManager[object]:
    """Let torch compile functions for as many shapes as there are, while calls run inside of it."""
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.6
    patched: AbstractContextManager[object] = config.patch({limit: _SHAPES, f"accumulated_{limit}": _SHAPES})
    return patched


def settle_compiler() -> None:
    """Let torch.compile use as many processes as torch has threads, and choose no kernel by its time where operations
    must be deterministic. What is compiled later in this process stays so."""
    compiler: Any = importlib.import_module("torch._inductor.config")
    compiler.compile_threads = min(compiler.compile_threads or 1, torch.get_num_threads())
    if torch.are_deterministic_algorithms_enabled() and hasattr(compiler, "deterministic"):
        compiler.deterministic = True
