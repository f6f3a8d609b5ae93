"""How a decoding step of fixed shapes is launched: operation by operation, or as one CUDA graph.

A step is a function without arguments and results that reads and writes tensors that stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from teachers.fast_paths.usage import enabled, fast_path
from teachers.runtime.determinism import unique_indices
from teachers.runtime.memory import is_out_of_memory

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
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._path = fast_path("graphs", asked) if graphs and device.type == "cuda" and enabled() else None
        self._stream = torch.cuda.Stream(device) if self._path else None
        self._failed = set[str]()

    def captures(self, kind: str) -> bool:
        """Whether steps of a kind become graphs."""
        return self._path is not None and kind not in self._failed

    def run(self, kind: str, shape: Hashable, step: Step) -> None:
        """Run a step. Those of equal kind and shape are the same operations on the same tensors."""
        if (graph := self._graphs.get((kind, shape))) is not None:
            graph.replay()
        else:
            with decoding_kernels(self._device):
                step()
                if self.captures(kind):
                    self._capture(kind, shape, step)
        if self._path is not None:
            (self._path.plain if graph is None else self._path.used)()

    def clear(self) -> None:
        self._graphs.clear()

    def _capture(self, kind: str, shape: Hashable, step: Step) -> None:
        pool = next((graph.pool() for graph in self._graphs.values()), None)
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
            self._graphs[kind, shape] = graph


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
