"""Random RGB images for tests of pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0, saturated: bool = False) -> Image.Image:
    """Random RGB pixels; ``saturated`` ones are 0 or 255, so that filters overshoot."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels // 128 * 255 if saturated else pixels)


def natural(width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB pixels with the spectrum of a photograph."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for octave in range(2, 7):
        cells = rng.normal(size=(2**octave, 2**octave, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(cells[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer) / 2**octave
    pixels = 128 + pixels * (50 / pixels.std()) + rng.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
