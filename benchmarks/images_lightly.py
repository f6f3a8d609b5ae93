"""A distillation by lightly-train, for ``benchmarks.images``: run by the Python of its own environment.

lightly-train loads teachers by name. Here its ``get_teacher`` returns the one of the benchmark, a TorchScript file, so
that both programs have the same.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import lightly_train
import torch
import torchvision
from lightly_train._methods.distillation import distillation

#: Batch at which the learning rate of lightly-train is as stated; others scale it by the square root.
REFERENCE = 1536


class Teacher(torch.nn.Module):
    """The teacher of a TorchScript file: pixels [B, 3, H, W] -> vectors [B, D]."""

    def __init__(self, path: str, dim: int) -> None:
        super().__init__()
        self.embed_dim = dim
        self.network = torch.jit.load(path).eval()

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> Any:
        return self.network(pixels)


class Clock:
    """Wall and CPU seconds at the end of each training step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def mark(self) -> None:
        self.times.append((time.perf_counter(), time.process_time()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--images", "--teacher", "--student", "--out", "--report"):
        parser.add_argument(name, required=True)
    for name in ("--dim", "--size", "--batch", "--epochs", "--seed"):
        parser.add_argument(name, type=int, required=True)
    for name in ("--rate", "--scale"):
        parser.add_argument(name, type=float, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    clock = Clock()
    distillation.get_teacher = lambda *arguments, **options: Teacher(given.teacher, given.dim)
    step = distillation.Distillation.training_step_impl

    def counted(self: Any, *arguments: Any) -> Any:
        clock.mark()
        return step(self, *arguments)

    distillation.Distillation.training_step_impl = counted
    torch.manual_seed(given.seed)
    lightly_train.pretrain(
        out=given.out,
        data=given.images,
        model=getattr(torchvision.models, given.student)(weights=None),
        method="distillationv1",
        epochs=given.epochs,
        batch_size=given.batch,
        num_workers=0,
        accelerator="cpu",
        devices=1,
        precision="32-true",
        seed=given.seed,
        optim="adamw",
        optim_args={"lr": given.rate / math.sqrt(given.batch / REFERENCE)},
        transform_args={
            "image_size": (given.size, given.size),
            "random_resize": {"min_scale": given.scale},
        },
        overwrite=True,
    )
    report = {"steps": len(clock.times), "times": clock.times, "version": lightly_train.__version__}
    Path(given.report).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
