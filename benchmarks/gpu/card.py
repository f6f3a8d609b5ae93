"""What the card can do at most: products of matrices, and copies."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.pipeline.figures import Figure, alternate, medians
from teachers.device.flops import peak_flops

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
    """Rates that are the limits of all others."""
    device, size = bench.accelerator().device, bench.size
    sides = [torch.randn(size.matrix, size.matrix, device=device, dtype=torch.bfloat16) for _ in range(2)]
    host = torch.zeros(size.copied, dtype=torch.uint8)
    there = torch.zeros(size.copied, dtype=torch.uint8, device=device)
    other = torch.zeros_like(there)
    pinned = host.pin_memory() if bench.on_cuda else host

    def copy(target: torch.Tensor, source: torch.Tensor) -> Callable[[], object]:
        return lambda: target.copy_(source, non_blocking=True)

    works: dict[str, tuple[Callable[[], object], float]] = {
        "products": (lambda: sides[0] @ sides[1], 2 * size.matrix**3),
        "pinned": (copy(there, pinned), size.copied),
        "pageable": (copy(there, host), size.copied),
        "back": (copy(pinned, there), size.copied),
        "inside": (copy(other, there), size.copied),
    }
    for work, _ in works.values():
        work()
    variants = {
        name: lambda work=work, items=items: {"rate": bench.rate(work, items)} for name, (work, items) in works.items()
    }
    values = alternate(variants, size.rounds)
    rates = {name.removesuffix(" rate"): rate for name, rate in medians(values).items()}
    bench.measured.update(rates)
    names = {
        "pinned": "copies from pinned memory to the device",
        "pageable": "copies from other memory to the device",
        "back": "copies from the device to pinned memory",
        "inside": "copies inside the device",
    }
    peak = peak_flops(bench.card(), "bf16")
    products = Figure(
        CARD,
        f"products of bf16 matrices of {size.matrix:,} x {size.matrix:,}",
        rates["products"] / 1e12,
        "TFLOP/s",
        None if peak is None else peak / 1e12,
        "" if peak is None else "limit",
        [value / 1e12 for value in values["products rate"]],
    )
    copies = []
    for name, text in names.items():
        limit = _copy_limit(bench.card()) if name == "inside" else None
        rounds = [value / 1e9 for value in values[f"{name} rate"]]
        copies.append(Figure(CARD, text, rates[name] / 1e9, "GB/s", limit, "limit" if limit else "", rounds))
    return [products, *copies]


def _copy_limit(card: str) -> float | None:
    """GB/s that a copy inside a card can reach, since it reads and writes each byte; None if that is not known."""
    words = card.replace("-", " ").split()
    return next((rate / 2 for name, rate in _BANDWIDTHS if all(word in words for word in name.split())), None)
