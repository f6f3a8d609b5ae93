"""Pixels as teachers and as torchvision have them."""

from __future__ import annotations

import io
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from reinforce.dataset.augment.operations import OPS
from teachers.protocols import ImageSpec


class PixelRecorder:
    """A teacher for images of 24 x 24 pixels that keeps those it is given, uint8 [24, 24, 3]."""

    dim = 2
    logit_scale = 1.0
    seen: ClassVar[list[np.ndarray]] = []

    def __init__(self, device: torch.device) -> None:
        self.image = ImageSpec(24, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.extend((pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        return torch.tensor([[1.0, 0.0]]).repeat(len(pixels), 1)


def torchvision_replay(data: bytes, record: Any, size: int) -> np.ndarray:
    """Replay a published augmentation record on an encoded image with only Pillow and torchvision."""
    crop, ops = record
    view = F.resized_crop(Image.open(io.BytesIO(data)).convert("RGB"), *crop, [size, size], InterpolationMode.BICUBIC)
    for number, magnitude in ops or []:
        view = _apply_op(view, OPS[number], magnitude, InterpolationMode.NEAREST, None)
    return np.asarray(view)
