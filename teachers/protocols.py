"""What a model that labels must offer: two small protocols and the image preprocessing they state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class ImageSpec:
    """The pixels a model wants: ``(x / 255 - mean) / std`` of an RGB image at ``size``.

    ``size`` is a square's side or (height, width). ``resize`` says how a whole image gets there: ``crop``
    (shorter side, then the centre) or ``squash``. Augmented crops are square already and are only resized.
    """

    size: int | tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    resize: Literal["crop", "squash"] = "crop"

    @property
    def height(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[1]


class Teacher(Protocol):
    """A dual encoder. One side may be missing: without ``encode_images`` (or with ``image = None``) it has
    text layers only, without ``encode_texts`` image layers only.

    A teacher whose tokenizer is slow may split ``encode_texts`` into ``tokenize(texts) -> tokens`` and
    ``encode_tokens(tokens)``: tokens are then made while another shard has the accelerator.
    """

    dim: int
    image: ImageSpec | None
    logit_scale: float | None

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] float32 on the device, preprocessed as ``image`` says -> [B, dim], unit norm."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> [B, dim], unit norm. Called with texts of similar length."""
        ...


class Captioner(Protocol):
    """Images to texts: ``captions`` of them for each image."""

    image: ImageSpec
    captions: int

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> Sequence[list[str] | None]:
        """[B, 3, H, W] float32 and uint64 seeds [B, captions] -> captions of each image.

        Caption (b, n) depends on image b and seeds[b, n] alone, never on its neighbours in the batch. None stands for
        an image that has no captions because the model's numbers were not finite: its row goes to quarantine.
        """
        ...
