"""Stand-ins for an accelerator and its models that take no CPU, so that only the host is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.pipeline.inputs import SIZE
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator

STAND_IN = "stand-in"


class FixedTimeTeacher:
    """A teacher that takes a fixed time per image and no CPU.

    ``busy`` sums the time, ``first`` and ``last`` are when its first batch began and its last one ended.
    """

    dim = 512
    logit_scale: float | None = 50.0
    image: ImageSpec | None = ImageSpec(SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def __init__(self, device: torch.device, seconds_per_image: float = 0.0) -> None:
        self._row = torch.nn.functional.normalize(torch.ones(1, self.dim, device=device), dim=-1)
        self.reset(seconds_per_image)

    def reset(self, seconds_per_image: float) -> None:
        self.seconds = seconds_per_image
        self.busy, self.first, self.last = 0.0, float("inf"), 0.0

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.first = min(self.first, time.perf_counter())
        time.sleep(self.seconds * len(pixels))
        self.busy += self.seconds * len(pixels)  # an accelerator is idle until its host notices the end
        self.last = time.perf_counter()
        return self._row.expand(len(pixels), -1)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self._row.expand(len(texts), -1)


class StandInAccelerator(Accelerator):
    """An accelerator that copies no bytes: on CUDA, the device reads them from memory without the CPU."""

    def __init__(self) -> None:
        super().__init__("cpu")

    def put_parts(self, parts: Sequence[np.ndarray]) -> torch.Tensor:
        """A tensor of the right shape with arbitrary content."""
        return torch.empty(1, dtype=torch.uint8).expand(sum(map(len, parts)), *parts[0].shape[1:])


def skip_conversion(images: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """Stands in for ``to_pixels``, which the accelerator computes."""
    return images
