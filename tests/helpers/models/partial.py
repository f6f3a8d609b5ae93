"""A teacher that gives no usable vector of some images and texts."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch

from tests.helpers.models import ColorTeacher


class Partial(ColorTeacher):
    """Of a quarter of all images and a third of all texts: ``nan`` vectors, or first halves that are ``zero``.

    None of them is an image or a text of the self-test, which would refuse the teacher.
    """

    def __init__(self, device: torch.device, nulls: Literal["none", "nan", "zero"] = "none", **options: Any) -> None:
        super().__init__(device, **options)
        self._nulls = nulls

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        values = super().encode_images(pixels)
        return self._spoilt(values, values.argmax(dim=1) // 2 == 2)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        chosen = [zlib.crc32(text.encode()) % 3 == 1 for text in texts]
        return self._spoilt(super().encode_texts(texts), torch.tensor(chosen, dtype=torch.bool))

    def _spoilt(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        chosen = rows.unsqueeze(1)
        if self._nulls == "none":
            return values
        if self._nulls == "nan":
            return values.where(~chosen, torch.nan)
        first = torch.arange(self.dim) < self.dim // 2
        return torch.nn.functional.normalize(values.where(~(chosen & first), 0.0), dim=-1)
