"""Small evaluation sets whose right answers are known, and dual encoders that find or miss them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from teachers.protocols import ImageSpec
from tests.helpers.data import write_tar

COLOURS = {
    "blue": (0, 0, 250),
    "green": (0, 250, 0),
    "grey": (120, 120, 120),
    "red": (250, 0, 0),
    "violet": (250, 0, 250),
    "yellow": (250, 250, 0),
}


def plain(colour: str, shade: int = 0) -> bytes:
    """A picture of one colour; shades of it differ by little."""
    red, green, blue = COLOURS[colour]
    return encoded(np.full((20, 30, 3), (red, green, blue), np.uint8) + np.uint8(shade))


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def colour_folder(root: Path, each: int = 2) -> str:
    """A folder with a folder for each colour."""
    for colour in COLOURS:
        for shade in range(each):
            path = root / colour / f"{shade}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(plain(colour, shade))
    return str(root)


def shard(path: Path, samples: Sequence[tuple[str, bytes, Mapping[str, Any]]]) -> str:
    """(key, image, {extension: text or JSON}) as a tar."""
    members = []
    for key, image, sidecars in samples:
        members.append((f"{key}.png", image))
        for extension, value in sidecars.items():
            text = value if isinstance(value, str) else json.dumps(value)
            members.append((f"{key}.{extension}", text.encode()))
    return str(write_tar(path, members))


def colour_shard(path: Path, each: int = 2) -> str:
    """The images of ``colour_folder`` in its order, each with its class by index, by name and in words."""
    samples = []
    for index, colour in enumerate(COLOURS):
        for shade in range(each):
            sidecar = {"class": colour, "group": "bright" if max(COLOURS[colour]) == 250 else "dull"}
            texts = {"cls": str(index), "txt": f"a photo of {colour} paint, {shade}", "json": sidecar}
            samples.append((f"{index}{shade}", plain(colour, shade), texts))
    return shard(path, samples)


class Seer:
    """Sees the mean colour and reads the names of colours: never wrong about plain pictures."""

    image: ImageSpec | None = ImageSpec(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        seen = pixels.mean((2, 3))
        colours = torch.tensor([*COLOURS.values()]) / 255
        nearest = torch.cdist(seen, colours).argmin(1)
        return torch.eye(len(COLOURS))[nearest]

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([self._read(text) for text in texts])

    def _read(self, text: str) -> torch.Tensor:
        found = [colour for colour in COLOURS if colour in text]
        return torch.eye(len(COLOURS))[list(COLOURS).index(found[0])]


class Blind(Seer):
    """All images and texts are one to it."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.eye(4)[[0] * len(pixels)]

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.eye(4)[[0] * len(texts)]


class Diverged(Blind):
    """What a training that went wrong leaves behind."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode_images(pixels) * torch.nan
