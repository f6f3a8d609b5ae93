"""How torch compiles functions in this process, and how decoding steps are launched, such as by CUDA graphs."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from teachers.fast_paths.usage import enabled, fast_path
from teachers.runtime.accelerator import is_out_of_memory
from teachers.runtime.determinism import must_be_deterministic, unique_indices
from teachers.runtime.flops import is_eager

#: Blocks of all towers of a process that have one class share the graphs of its ``forward``: two towers with eight
#: batch sizes each need sixteen. At torch's limit of eight, further shapes would run eagerly for good, so that the
#: rounding of a batch depended on those before it.
_SHAPES = 1024


@contextmanager
def many_shapes() -> Iterator[None]:
    """Let torch compile functions for as many shapes as there are, while calls run inside of it.

    Sizes that are equal in the first call of ``Compiler.for_any_rows`` are not taken to be equal in all calls.
    """
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.6
    sizes: Any = importlib.import_module("torch.fx.experimental._config")
    limits = {limit: _SHAPES, f"accumulated_{limit}": _SHAPES}
    with config.patch(limits), sizes.patch(use_duck_shape=False):
        yield


class Compiler:
    """Compiles functions of one model, and counts their calls as those of its fast path ``compile``.

    torch may run a function as it is and report nothing, so a call counts as used only if compiled code ran in it.
    Until ``accept``, errors of the compiler are raised. After it they end the compilation of ``what``, since they would
    cost a run its shards: its functions then run as they are.
    """

    def __init__(self, what: str, asked: bool) -> None:
        self._what, self._path = what, fast_path("compile", asked)
        self._accepted = self._given_up = self._skipped = False

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """``torch.compile`` of a function; ``options`` are those of torch. Calls run inside of ``many_shapes``."""
        compiled: Callable[..., Any] = torch.compile(function, backend=_compile_graph, **options)

        def call(*args: Any, **kwargs: Any) -> Any:
            if is_eager():
                return function(*args, **kwargs)
            if self._given_up:
                self._path.plain += 1
                return function(*args, **kwargs)
            before = _ran.graphs
            try:
                result = compiled(*args, **kwargs)
            except Exception as error:
                is_of_compiler = any(one.__module__ == "torch._dynamo.exc" for one in type(error).__mro__)
                if not self._accepted or not is_of_compiler or is_out_of_memory(error):
                    raise
                result = function(*args, **kwargs)  # raises what is no fault of the compiler
                self.give_up(error)
            if _ran.graphs > before:
                self._path.used += 1
                return result
            self._path.plain += 1
            if self._accepted and not self._given_up and not self._skipped:
                self._skipped = True
                self._path.fall_back(f"{self._what}: torch runs it without compiled code, at least for some shapes")
            return result

        return call

    def for_any_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``compile`` with one graph for all sizes of the arguments but those that parameters decide."""
        return self.compile(function, fullgraph=True, dynamic=True)

    def accept(self) -> None:
        """End the comparison with the plain functions. Raises ValueError if torch has run no compiled code in it."""
        if not self._path.used:
            raise ValueError("torch runs it without compiled code")
        self._accepted = True

    def give_up(self, reason: Exception | str) -> None:
        """Run the functions as they are from now on."""
        self._given_up = True
        text = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
        self._path.fall_back(f"{self._what}: {text}")


class _Ran(threading.local):
    """Calls of compiled graphs in a thread."""

    graphs = 0


_ran = _Ran()


def _compile_graph(graph: Any, inputs: Any) -> Callable[..., Any]:
    """Backend of ``torch.compile``: ``inductor``, whose graphs count their calls.

    All functions have it in common, since graphs are shared only by functions with the same backend. It sets what is
    needed here, because settings of inductor belong to the thread that made them.
    """
    config: Any = importlib.import_module("torch._inductor.config")
    with config.patch(_settings()):
        compiled = inductor(graph, inputs)

    def run(*args: Any) -> Any:
        _ran.graphs += 1
        return compiled(*args)

    return run


def inductor(graph: Any, inputs: Any) -> Callable[..., Any]:
    """Kernels for a graph, of torch's own compiler, which makes those of its backward pass in a thread of autograd."""
    compiler: Any = importlib.import_module("torch._inductor.compile_fx")
    compiled: Callable[..., Any] = compiler.compile_fx(graph, inputs, config_patches=_settings())
    return compiled


def _settings() -> dict[str, Any]:
    """At most as many processes as torch has threads, and no choice of kernels by their time where operations must be
    deterministic."""
    config: Any = importlib.import_module("torch._inductor.config")
    changes: dict[str, Any] = {"compile_threads": min(config.compile_threads or 1, torch.get_num_threads())}
    if must_be_deterministic() and hasattr(config, "deterministic"):
        changes["deterministic"] = True
    return changes


#: A decoding step of fixed shapes: without arguments and results, it reads and writes tensors that stay where they are.
Step = Callable[[], None]


class Steps:
    """Launches steps: operation by operation, or each as one CUDA graph if ``graphs`` is set on CUDA.

    The first step of a kind with a shape runs eagerly, which also lets libraries choose and load their kernels, and is
    then captured. A capture runs nothing. All graphs share one memory pool, since a step keeps no result in it.

    After a capture that fails, no more of that kind are captured: they run eagerly, but those that are graphs already.
    Lack of memory raises, since a smaller batch may be captured. ``asked``: the config sets ``graphs`` to true.
    """

    def __init__(self, device: torch.device, graphs: bool = True, asked: bool = False) -> None:
        self._device = device
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._path = fast_path("graphs", asked) if graphs and device.type == "cuda" and enabled() else None
        self._stream = torch.cuda.Stream(device) if self._path else None
        self._failed = set[str]()

    def captures(self, kind: str) -> bool:
        """Whether steps of a kind become graphs."""
        return self._path is not None and kind not in self._failed

    def run(self, kind: str, shape: Hashable, step: Step) -> None:
        """Run a step. Those of equal kind and shape are the same operations on the same tensors."""
        if (graph := self.graphs.get((kind, shape))) is not None:
            graph.replay()
        else:
            with decoding_kernels(self._device):
                step()
                if self.captures(kind):
                    self._capture(kind, shape, step)
        if self._path is not None:
            self._path.plain += graph is None
            self._path.used += graph is not None

    def _capture(self, kind: str, shape: Hashable, step: Step) -> None:
        pool = next((graph.pool() for graph in self.graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate and copy meanwhile. If a capture fails, torch.cuda.graph may leave its own stream
        # as the current one, so the outer context sets it back.
        stream = torch.cuda.stream(torch.cuda.current_stream(self._device))
        graphed = torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.device(self._device), stream, graphed:
                step()
        except Exception as error:  # any error of a driver or a library
            if is_out_of_memory(error):
                raise
            if not self._failed and self._path is not None:
                self._path.fall_back(f"{type(error).__name__}: {error}")
            self._failed.add(kind)
        else:
            self.graphs[kind, shape] = graph


@contextmanager
def decoding_kernels(device: torch.device) -> Iterator[None]:
    """Context in which decoding steps choose their kernels on CUDA. No-op on CPU.

    Attention never uses cuDNN, which builds a plan for each new shape in tens of milliseconds, and whose results may
    differ between runs. Writes by index need no sorting, which torch's deterministic mode adds: rows are distinct
    wherever their values are used, or have equal values.
    """
    if device.type != "cuda":
        yield
        return
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends), unique_indices():
        yield
