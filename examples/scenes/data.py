"""Scenes: three to five Twemoji on a background of two colours, with the class of each pixel by their alpha channels.

The classes are the background and Unicode's categories. Training scenes are a shard with captions; those of the
evaluation are other scenes, in the layout of ADE20K. Twemoji are by Twitter, Inc and other contributors, CC-BY 4.0.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from examples.demo.data import encode_tar, shared_concepts, write_if_changed
from examples.demo.names import Concept
from examples.demo.styles import credits_text, twemoji
from schemas.seeds import seed_for

SIDE = 96
SCENES = "scenes"
_EMOJI, _SIZES = (3, 5), (24, 44)
_SOLID = 128  # alpha from which a pixel is of the emoji


@dataclass(frozen=True)
class Scene:
    """``labels`` [H, W] are 0 for the background, or the number of a category."""

    image: Image.Image
    labels: np.ndarray
    caption: str


class Drawer:
    """Draws scenes by number; a seed and a part, such as ``training``, make them different."""

    def __init__(self, concepts: Sequence[Concept] | None = None) -> None:
        self._concepts = concepts or shared_concepts()
        self._drawings = twemoji()
        self.categories = sorted({concept.emoji.category for concept in self._concepts})

    @property
    def classes(self) -> int:
        return 1 + len(self.categories)

    def draw(self, part: str, number: int, seed: int = 0) -> Scene:
        random = np.random.Generator(np.random.PCG64(seed_for(seed, str(number), f"scene {part}")))
        image = self._background(random)
        labels = np.zeros((SIDE, SIDE), np.uint8)
        chosen = random.choice(len(self._concepts), int(random.integers(_EMOJI[0], _EMOJI[1] + 1)), replace=False)
        for index in chosen:
            concept, size = self._concepts[int(index)], int(random.integers(*_SIZES))
            emoji = Image.open(io.BytesIO(self._drawings[concept.emoji.key]())).convert("RGBA")
            emoji = emoji.resize((size, size), Image.Resampling.LANCZOS)
            left, top = (int(place) for place in random.integers(0, SIDE - size + 1, 2))
            image.paste(emoji, (left, top), emoji)
            solid = np.asarray(emoji.getchannel("A")) >= _SOLID
            labels[top : top + size, left : left + size][solid] = 1 + self.categories.index(concept.emoji.category)
        names = ", ".join(self._concepts[int(index)].emoji.phrase for index in chosen)
        return Scene(image, labels, names)

    def _background(self, random: np.random.Generator) -> Image.Image:
        first, second = random.integers(0, 256, (2, 3))
        share = np.linspace(0, 1, SIDE)[:, None, None] * np.ones((1, SIDE, 1))
        pixels = first + (second - first) * (share if random.random() < 0.5 else share.transpose(1, 0, 2))
        return Image.fromarray(np.clip(pixels + random.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8))


def write_scenes(out: Path, train: int, masks: int, seed: int = 0, drawer: Drawer | None = None) -> int:
    """Write ``shard.tar`` with ``train`` scenes, and ``scenes`` with ``masks`` and a third as many to test on.

    Returns the number of classes.
    """
    drawer = drawer or Drawer()
    members = []
    for number in range(train):
        scene = drawer.draw("shard", number, seed)
        members += [(f"{number:06d}.png", _png(scene.image)), (f"{number:06d}.txt", scene.caption.encode())]
    (out / SCENES).mkdir(parents=True, exist_ok=True)
    write_if_changed(out / "shard.tar", encode_tar(members))
    for part, count in (("training", masks), ("validation", -(-masks // 3))):
        for folder in ("images", "annotations"):
            (out / SCENES / folder / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            scene = drawer.draw(part, number, seed)
            write_if_changed(out / SCENES / "images" / part / f"{number:06d}.png", _png(scene.image))
            mask = Image.fromarray(scene.labels + np.uint8(1))  # 0 would be ignored
            write_if_changed(out / SCENES / "annotations" / part / f"{number:06d}.png", _png(mask))
    write_if_changed(out / "CREDITS.txt", credits_text("twemoji").encode())
    return drawer.classes


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
