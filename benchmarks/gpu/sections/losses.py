"""The loss of a rank of a large training, in chunks: its seconds, its memory, and what TF32 changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.pipeline.figures import Figure
from reinforce.student.terms import pairs
from reinforce.student.terms.pairs import Objective, contrastive_losses
from reinforce.training import gather
from teachers.runtime.accelerator import Accelerator
from teachers.runtime.flops import counted_flops, peak_flops

SECTION = "loss"
RANKS = 8
GIGABYTES = 3.0
CHANGED = 0.001  # of the gradients of features; rounding these to bf16 changes 0.002 to 0.004
_KINDS = ("image", "caption", "synthetic")
_DIM, _TEACHERS = 512, {"first": 768, "second": 768}
#: Lambda, and whether products are in TF32: of the recipe, in plain fp32, and with both parts of the loss.
_VARIANTS = ((1.0, True), (1.0, False), (0.7, True))


def measure_loss(bench: Bench) -> list[Figure]:
    """Forward and backward pass of one of ``RANKS`` ranks, in TF32 and in fp32, and how far apart gradients are."""
    figures: list[Figure] = []
    for share, reduced in _VARIANTS:
        figures += bench.attempt(f"{SECTION}: {share}, {reduced}", partial(_measure, bench, share, reduced))
    return figures + bench.attempt(SECTION, partial(_compare, bench))


class _Rank:
    """Random features and targets of a rank, whose rows stand for those of the others, too."""

    def __init__(self, bench: Bench, share: float) -> None:
        rows, device = bench.size.pairs // RANKS, bench.accelerator().device
        random = torch.Generator(device).manual_seed(0)

        def unit(dim: int) -> torch.Tensor:
            values = torch.randn(rows, dim, generator=random, device=device)
            return torch.nn.functional.normalize(values, dim=-1)

        self.features = {kind: unit(_DIM).bfloat16().requires_grad_() for kind in _KINDS}
        self.targets = {name: {kind: unit(dim) for kind in _KINDS} for name, dim in _TEACHERS.items()}
        self.scale = torch.tensor(50.0, device=device, requires_grad=True)
        self._objective = Objective(share, "softmax", dict.fromkeys(_TEACHERS, 60.0))

    def step(self, reduced: bool) -> None:
        for value in (*self.features.values(), self.scale):
            value.grad = None
        losses = contrastive_losses(self._objective, self.features, self.scale, None, self.targets, reduced)
        torch.stack([*losses.values()]).sum().backward()


def _measure(bench: Bench, share: float, reduced: bool) -> list[Figure]:
    accelerator, precision = bench.accelerator("tf32" if reduced else "fp32"), "TF32" if reduced else "fp32"
    what = f"{bench.size.pairs:,} pairs, a rank of {RANKS}, lambda {share}, {precision}"
    with _one_of_ranks(bench):
        before = _allocated(accelerator)
        rank = _Rank(bench, share)
        work = partial(rank.step, reduced)
        flops, peak = counted_flops(work), peak_flops(bench.card(), accelerator.precision)
        if bench.on_cuda:
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        seconds = bench.duration(SECTION, what, work, 1, "s", flops / peak if peak else None)
        memory = (accelerator.peak_memory() - before) / 1e9
    return [
        seconds,
        Figure(SECTION, f"{what}: products", flops / 1e12, "TFLOP"),
        Figure(SECTION, f"{what}: peak of memory", memory, "GB", GIGABYTES, "at most"),
    ]


def _compare(bench: Bench) -> list[Figure]:
    """How far gradients of features in TF32 are from those in fp32, by their norms; 0 on a CPU, which has no TF32."""
    rank = _Rank(bench, 1.0)
    rank.features = {kind: value.detach().float().requires_grad_() for kind, value in rank.features.items()}
    found = []
    with _one_of_ranks(bench):
        for reduced in (True, False):
            rank.step(reduced)
            found.append(torch.cat([value.grad for value in rank.features.values() if value.grad is not None]))
    apart = float((found[0] - found[1]).norm() / found[1].norm())
    return [Figure(SECTION, "gradients of features in TF32, from those in fp32", apart, "", CHANGED, "at most")]


@contextlib.contextmanager
def _one_of_ranks(bench: Bench) -> Iterator[None]:
    """Compute as one rank of ``RANKS`` does, without the others. A tiny batch has chunks, too."""
    entries = bench.size.pairs**2 // RANKS
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.multiple(gather, world_size=lambda: RANKS, rank=lambda: 0))
        stack.enter_context(gather.without_communication())
        if bench.size.tiny:
            stack.enter_context(patch.object(pairs, "CHUNK", entries // 2))
        yield


def _allocated(accelerator: Accelerator) -> int:
    on_cuda = accelerator.device.type == "cuda"
    return torch.cuda.memory_allocated(accelerator.device) if on_cuda else accelerator.peak_memory()
