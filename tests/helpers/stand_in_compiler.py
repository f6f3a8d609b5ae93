"""``torch.compile`` of ``stand_in_cuda``: which calls reach compiled code, as torch decides it. No kernels are made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


def compiler(compiled: list[dict[str, Any]], own: type[TorchDispatchMode]) -> Callable[..., Any]:
    """A ``torch.compile`` that appends its arguments to ``compiled``. ``own`` is the mode of the stand-in.

    What it returns calls the function by the result of ``backend``, or as it is:

    - where the stance is ``force_eager``;
    - from the first call inside of another mode on, such as torch's counter of operations. torch then skips that code
      for the rest of the process, also for other modules of the class.
    """
    skipped: set[Any] = set()

    def compile_(function: Any, backend: Any = "inductor", **options: Any) -> Any:
        compiled.append({"function": function, **options})
        if not callable(backend):
            return function
        code = getattr(type(getattr(function, "__self__", None)), "forward", function)
        graph: list[Callable[..., Any]] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            stance = getattr(torch._dynamo.eval_frame, "_stance", None)  # since torch 2.6
            if stance is not None and stance.stance == "force_eager":
                return function(*args, **kwargs)
            if not all(isinstance(mode, own) for mode in _get_current_dispatch_mode_stack()):
                skipped.add(code)
            if code in skipped:
                return function(*args, **kwargs)
            if not graph:
                graph.append(backend(SimpleNamespace(forward=lambda work: work()), args))
            return graph[0](partial(function, *args, **kwargs))

        return call

    return compile_
