"""What the card can do at most: products of matrices, and copies."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.pipeline.figures import Figure, Rule

CARD = "card"
#: GB/s of the memory, as NVIDIA's data sheets state them, by words of torch's name; the first that matches is used.
_BANDWIDTHS = (
    ("B200", 7700),
    ("H200", 4800),
    ("H100 PCIe", 2000),
    ("H100 80GB", 3350),
    ("A100 40GB", 1555),
    ("A100 80GB", 2039),
    ("L40S", 864),
    ("A40", 696),
    ("L4", 300),
)


def measure_card(bench: Bench) -> list[Figure]:
    """Rates that are the limits of all others; that of products for a minute, since the clock falls with the power."""
    device, size = bench.accelerator().device, bench.size
    sides = [torch.randn(size.matrix, size.matrix, device=device, dtype=torch.bfloat16) for _ in range(2)]
    host = torch.zeros(size.copied, dtype=torch.uint8)
    there = torch.zeros(size.copied, dtype=torch.uint8, device=device)
    other = torch.zeros_like(there)
    pinned = host.pin_memory() if bench.on_cuda else host
    copies = {
        "pinned memory to the device": (there, pinned),
        "other memory to the device": (there, host),
        "the device to pinned memory": (pinned, there),
        "the device to itself": (other, there),
    }
    peak, bandwidth = bench.peak(), _copy_limit(bench.card())
    name = f"products of bf16 matrices of {size.matrix:,} x {size.matrix:,}"
    work, teraflop = partial(torch.matmul, *sides), 2 * size.matrix**3 / 1e12
    rule: Rule = "limit"
    figures = [bench.figure(CARD, name, work, teraflop, "TFLOP/s", peak and peak / 1e12, rule)]
    for what, (target, source) in copies.items():
        work, name = partial(target.copy_, source, non_blocking=True), f"copies from {what}"
        limit = bandwidth if target is other else None
        figures.append(bench.figure(CARD, name, work, size.copied / 1e9, "GB/s", limit, rule, seconds=size.point))
    return figures


def _copy_limit(card: str) -> float | None:
    """GB/s that a copy inside a card can reach, since it reads and writes each byte; None if that is not known."""
    words = card.replace("-", " ").split()
    return next((rate / 2 for name, rate in _BANDWIDTHS if all(word in words for word in name.split())), None)
