"""Classes of scores: exact, and failing on demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from teachers.protocols import ImageSpec

SPEC = ImageSpec(8, (0.0,) * 3, (1.0,) * 3)  # type: ignore[arg-type]


class Colors:
    """Means of the red and the blue channel of the whole image. It changes its pixels, and reuses its outputs."""

    names = ("red", "blue")
    inputs = ("pixels",)
    image = SPEC
    version = 1

    def __init__(self, device: torch.device, capacity: float = 0) -> None:
        self.device, self.capacity, self.out = device, capacity, torch.zeros(1024, 2, device=device)

    def score(self, pixels: torch.Tensor) -> torch.Tensor:
        if 0 < self.capacity < len(pixels):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.out[: len(pixels)] = pixels.mean(dim=(2, 3))[:, ::2]
        pixels.zero_()
        return self.out[: len(pixels)]


class Described(Colors):
    """Red times the length of the caption."""

    names = ("product",)
    inputs = ("pixels", "caption")

    def score(self, pixels: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        return pixels[:, 0].mean(dim=(1, 2)) * torch.tensor([len(text) for text in texts], device=self.device)


class Everything:
    """The first number of a vector, lengths of the captions, and the end of the uid in the metadata."""

    names = ("first", "true", "synthetic", "uid")
    inputs = ("embeddings/red/images", "caption", "captions/namer", "metadata")
    version = 1

    def __init__(self, device: torch.device, capacity: float = 0, **broken: str) -> None:
        self.capacity, self.broken = capacity, broken

    def score(
        self,
        vectors: torch.Tensor,
        texts: Sequence[str],
        captions: Sequence[Sequence[str]],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray[Any, Any]:
        assert len(vectors) == len(texts) == len(captions) == len(metadata) > 0
        if 0 < self.capacity < len(texts):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        rows = [
            [float(vector[0, 0]), len(text), sum(map(len, synthetic)), int(one["uid"])]
            for vector, text, synthetic, one in zip(vectors, texts, captions, metadata, strict=True)
        ]
        if "nan" in self.broken:
            rows = [[float("nan") if row[3] == int(self.broken["nan"]) else row[0], *row[1:]] for row in rows]
        return np.array(rows)[: -1 if "rows" in self.broken else None]


class Length:
    """The number of letters, or a wrong answer."""

    names = ("letters",)
    inputs = ("caption",)

    def __init__(self, device: torch.device, wrong: str = "") -> None:
        self.wrong, self.calls = wrong, 0

    def score(self, texts: Sequence[str]) -> Any:
        self.calls += 1
        numbers = torch.tensor([float(len(text)) for text in texts])
        wrong = {
            "rows": numbers[:1],
            "columns": torch.stack([numbers, numbers], dim=1),
            "type": "many",
            "nan": numbers * torch.nan,
            "random": numbers + 10 * self.calls,
            "batch": numbers + 10 * len(texts),
        }
        return wrong.get(self.wrong, numbers)


class NoNames(Length):
    names = None  # type: ignore[assignment]


class NoImage(Length):
    inputs = ("pixels",)


class Other(Length):
    inputs = ("pixels", "metadata")  # type: ignore[assignment]


class Unknown(Length):
    inputs = ("text",)


class TwoInputs(Length):
    inputs = ("caption", "metadata")  # type: ignore[assignment]


class NoScore:
    names, inputs = ("a",), ("caption",)

    def __init__(self, device: torch.device) -> None: ...
