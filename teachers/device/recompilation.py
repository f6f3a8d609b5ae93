"""The one place that says for how many shapes torch compiles a function."""

from __future__ import annotations

from contextlib import AbstractContextManager

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
