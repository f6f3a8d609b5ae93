"""The demo's captioner, which is small and trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from teachers.coca.captioner import CocaCaptioner
from teachers.device.accelerator import Accelerator
from teachers.registry import captioner_spec
from tests.helpers.pages import ROOT

MODEL = f"local-dir:{ROOT / 'configs' / 'demo-models' / 'coca-64'}"


def build(device: str, **options: Any) -> CocaCaptioner:
    spec = captioner_spec(**{"model": MODEL, "captions": 3, "max_length": 16, **options})
    return CocaCaptioner(spec, Accelerator(device))


def batch(captioner: CocaCaptioner, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Pixels on the device of a captioner, and seeds."""
    pixels = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(pixels, (64, 64))
    seeds = np.arange(count * captioner.captions, dtype=np.uint64).reshape(count, captioner.captions)
    return captioner._accelerator.put(pixels), seeds
