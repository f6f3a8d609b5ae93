"""What the profiler saw of a device: the share of the time in which it computed, and on what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

_PRODUCTS = re.compile(
    r"gemm|gemv|cutlass|nvjet|xmma|cublas|fmha|flash|attention|conv|mm\b|linear", flags=re.IGNORECASE
)
_COPIES = re.compile(r"Memcpy|Memset|aten::copy_|aten::to\b")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_TOP = 5
_BUSY, _MOSTLY = 0.9, 0.6


@dataclass
class Trace:
    """Kernels as (name, start, end) in microseconds, and calls of the host by name.

    On a CPU, ATen's operations stand for kernels and for launches, and those that read a value for waits.
    """

    kernels: list[tuple[str, float, float]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    on_cuda: bool = True

    @property
    def launches(self) -> int:
        return sum(count for name, count in self.calls.items() if not self.on_cuda or name.startswith(_LAUNCHES))

    @property
    def waits(self) -> int:
        return sum(self.calls[name] for name in (_WAITS if self.on_cuda else ("aten::_local_scalar_dense",)))

    def summary(self) -> dict[str, Any]:
        """Busy share, shares of products and copies in it, and the kernels that took most; empty without kernels."""
        if not self.kernels:
            return {}
        took: Counter[str] = Counter()
        for name, start, end in self.kernels:
            took.update({name: end - start})
        total = sum(took.values()) or 1.0
        busy, span = _union(self.kernels)
        return {
            "busy": round(busy / span, 3) if span else 1.0,
            "products": round(sum(t for name, t in took.items() if _PRODUCTS.search(name)) / total, 3),
            "copies": round(sum(t for name, t in took.items() if _COPIES.search(name)) / total, 3),
            "kernels": len(self.kernels),
            "launches": self.launches,
            "waits": self.waits,
            "most": [[name[:80], round(time / total, 3)] for name, time in took.most_common(_TOP)],
        }


def limit_of(trace: dict[str, Any], at_power_limit: float = 0.0) -> str:
    """What limited a figure, by its trace and by the share of the time at which the card was at its power limit."""
    if not trace:
        return ""
    if trace["busy"] < _BUSY:
        text = f"host: the device computed {trace['busy']:.0%} of the time ({trace['waits']:,} waits)"
    elif trace["products"] >= _MOSTLY:
        text = f"products and attention, {trace['products']:.0%} of the time"
    elif trace["copies"] >= _MOSTLY:
        text = f"copies, {trace['copies']:.0%} of the time"
    else:
        text = f"memory traffic: products are {trace['products']:.0%} of the time; most is {trace['most'][0][0][:40]}"
    return f"{text}; power limit reached" if at_power_limit > _MOSTLY else text


@contextmanager
def traced(path: Path, on_cuda: bool) -> Iterator[Trace]:
    """Fill a trace by what runs in the block, and write it for chrome://tracing or Perfetto."""
    trace = Trace(on_cuda=on_cuda)
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]) as profiled:
        yield trace
    for event in profiled.events() or []:
        is_kernel = "CUDA" in str(event.device_type) if on_cuda else event.name.startswith("aten::")
        if is_kernel and (on_cuda or event.cpu_parent is None):
            trace.kernels.append((event.name, event.time_range.start, event.time_range.end))
        if not (on_cuda and is_kernel):
            trace.calls[event.name] += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    profiled.export_chrome_trace(str(path))


def _union(intervals: Sequence[tuple[str, float, float]]) -> tuple[float, float]:
    """Time that at least one interval covers, and the time from the first to the last."""
    covered, reached = 0.0, min(start for _, start, _ in intervals)
    first = reached
    for _, start, end in sorted(intervals, key=lambda interval: interval[1]):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered, reached - first
