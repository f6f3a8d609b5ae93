"""Small segmentation sets in the layouts of Pascal VOC and ADE20K, whose classes are colours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from teachers.protocols import ImageSpec

COLOURS = ((20, 20, 20), (250, 40, 40), (40, 250, 40), (40, 40, 250))


class PatchColours:
    """Its patches of ``patch`` pixels are their mean colours; it has no texts."""

    def __init__(self, size: int = 32, patch: int = 4) -> None:
        self.image: ImageSpec | None = ImageSpec(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self._patch = patch

    def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, self._patch).permute(0, 2, 3, 1)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(pixels.mean((2, 3)) + 1e-3)


def scene(seed: int, height: int = 40, width: int = 56) -> tuple[np.ndarray, np.ndarray]:
    """A picture of rectangles on a dark ground, uint8 [H, W, 3], and the class of each pixel, uint8 [H, W]."""
    random = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.uint8)
    for _ in range(3):
        top, left = int(random.integers(0, height - 15)), int(random.integers(0, width - 15))
        labels[top : top + 16, left : left + 16] = random.integers(1, len(COLOURS))
    pixels = np.array(COLOURS, np.int16)[labels] + random.integers(-8, 8, (height, width, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8), labels


def write_ade(root: Path, parts: Mapping[str, int], ending: str = "jpg") -> str:
    """Write scenes in the layout of ADE20K, where the value 0 is ignored: here two rows of each mask."""
    for number, (part, count) in enumerate(parts.items()):
        for index in range(count):
            pixels, labels = scene(1000 * number + index)
            values = labels + 1
            values[:2] = 0
            _save(root / "images" / part / f"ADE_{index:08d}.{ending}", Image.fromarray(pixels))
            _save(root / "annotations" / part / f"ADE_{index:08d}.png", Image.fromarray(values))
    return str(root)


def write_voc(root: Path, parts: Mapping[str, int], masks: str = "SegmentationClass") -> str:
    """Write scenes in the layout of Pascal VOC: palette masks with borders of 255, and lists of the parts."""
    for number, (part, count) in enumerate(parts.items()):
        names = [f"2007_{number}{index:05d}" for index in range(count)]
        for index, name in enumerate(names):
            pixels, labels = scene(1000 * number + index)
            labels[:, :2] = 255
            mask = Image.fromarray(labels).convert("P")
            mask.putdata(labels.flatten().tolist())
            mask.putpalette(
                [value for triple in np.random.default_rng(0).integers(0, 256, (256, 3)) for value in triple]
            )
            _save(root / "JPEGImages" / f"{name}.jpg", Image.fromarray(pixels))
            _save(root / masks / f"{name}.png", mask)
        listed = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(names) + "\n")
    return str(root)


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
