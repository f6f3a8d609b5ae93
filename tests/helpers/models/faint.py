"""Models that give nothing for some images and texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tests.helpers.models import ColorTeacher, SeedCaptioner

#: Texts that begin so have no vector with ``nulls``.
VOID = "void"
#: Largest mean, on the scale from -1 to 1, of an image that has none.
DARK = -0.6


class Faint(ColorTeacher):
    """With ``nulls`` gives NaN for images that are dark, and for texts that begin with ``void``. ``half`` is bf16."""

    def __init__(self, device: torch.device, nulls: bool = False, half: bool = False, **options: int) -> None:
        super().__init__(device, **options)
        self._nulls, self._dtype = nulls, torch.bfloat16 if half else torch.float32

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._vectors(super().encode_images(pixels), pixels.flatten(1).mean(dim=1) < DARK)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self._vectors(super().encode_texts(texts), torch.tensor([text.startswith(VOID) for text in texts]))

    def _vectors(self, values: torch.Tensor, faint: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(self._nulls & faint[:, None], torch.nan).to(self._dtype)


class Silent(SeedCaptioner):
    """Returns None where the first seed is 1 modulo 8."""

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str] | None]:
        texts = super().caption(pixels, seeds)
        return [None if int(row[0]) % 8 == 1 else text for row, text in zip(seeds, texts, strict=True)]
