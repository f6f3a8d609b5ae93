"""The image encoder of a model on its device, as the teachers of all libraries have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from teachers.fast_paths import towers
from teachers.patches.encoder import PatchEncoder, encoder_of_model
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator
from teachers.spec import TeacherSpec


class ImageEncoder:
    """Encodes images by ``encode``, [B, 3, H, W] -> [B, dim], of a model that is on its device in eval mode.

    ``inputs`` is that of ``teachers.patches.maps.spatial_map``.
    """

    def __init__(
        self,
        model: Any,
        image: ImageSpec,
        accelerator: Accelerator,
        encode: Callable[[torch.Tensor], torch.Tensor],
        inputs: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        self._model, self._accelerator = model, accelerator
        self._encode_images, self._tower_inputs = encode, inputs
        self.image: ImageSpec | None = image

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] float32 -> [B, dim] float32, unit norm."""
        with self._accelerator.forward():
            return unit(self._encode_images(self._accelerator.layout(pixels)))

    def patches(self, stage: int = -1, size: tuple[int, int] | None = None) -> PatchEncoder:
        """The encoder of the tower's patches; see ``teachers.patches.encoder``."""
        assert self.image is not None
        return encoder_of_model(self._model, self.image, self._accelerator, stage, size, self._tower_inputs)

    def _embed_black(self) -> torch.Tensor:
        """The embedding [1, dim] of a black image."""
        assert self.image is not None
        shape = 1, 3, self.image.height, self.image.width
        return self.encode_images(torch.zeros(shape, device=self._accelerator.device))

    def _make_fast(self, tower: torch.nn.Module, spec: TeacherSpec) -> None:
        """Take the fast paths that ``spec`` asks for, or that work; ``tower`` is the model's part for images."""
        towers.freeze(self, self._model, self._accelerator, spec)
        if spec.precision == "fp8":
            towers.use_fp8(self, tower, self._accelerator)
        self._encode_images = towers.compile_images(self, tower, self._encode_images, spec.compile, self._accelerator)


def unit(features: torch.Tensor) -> torch.Tensor:
    """Features [B, dim] of any norm -> float32 of unit norm."""
    return torch.nn.functional.normalize(features.float(), dim=-1)
