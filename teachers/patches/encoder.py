"""Patch encoders: images to grids of patch vectors, whose size is known before the first batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from teachers.fast_paths.towers import padded
from teachers.patches.maps import image_tower, resized, spatial_map
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator

Encode = Callable[[torch.Tensor], torch.Tensor]


class PatchEncoder:
    """Encodes images to ``rows`` x ``columns`` vectors of ``dim`` numbers, found by one black image at construction.

    ``image`` is the preprocessing of its images. Raises ValueError for a model that gives no grid.
    """

    def __init__(self, encode: Encode, image: ImageSpec, device: torch.device, name: str) -> None:
        self.image, self._encode, self._name = image, encode, name
        with _errors_of(name, image):
            found = encode(torch.zeros(1, 3, image.height, image.width, device=device))
            if not isinstance(found, torch.Tensor) or found.ndim != 4 or len(found) != 1 or not found.numel():
                shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
                raise ValueError(f"[1, rows, columns, dim] is needed, got {shape}")
        self.rows, self.columns, self.dim = found.shape[1:]

    def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float32 [B, 3, H, W] on the device, preprocessed by ``image`` -> float32 [B, rows, columns, dim].

        The vectors have any norm. The first row is the top of the image, the first column its left.
        """
        patches = self._encode(pixels)
        if patches.shape != (shape := (len(pixels), self.rows, self.columns, self.dim)):
            raise ValueError(f"{self._name} gives patches of shape {list(patches.shape)}, not {list(shape)}")
        return patches.float().contiguous()


def patches_of(
    teacher: Any, device: torch.device, stage: int = -1, size: tuple[int, int] | None = None
) -> PatchEncoder:
    """The patch encoder of a loaded teacher, or of any other encoder of images.

    It has a method ``patches(stage, size)``, as the teachers of open_clip and transformers have, or is of a class of
    the user's with ``encode_patches(pixels) -> [B, rows, columns, dim]``. ``stage`` is that of ``spatial_map``,
    ``size`` another (height, width) of the images. Raises ValueError where it has no patches.
    """
    name = type(teacher).__name__
    if getattr(teacher, "image", None) is None:
        raise ValueError(f"{name} has no patches, since it encodes no images")
    if callable(getattr(teacher, "patches", None)):
        found: PatchEncoder = teacher.patches(stage, size)
        return found
    if not callable(getattr(teacher, "encode_patches", None)):
        raise ValueError(f"{name} has no patches: add a method `encode_patches(pixels) -> [B, rows, columns, dim]`")
    if stage != -1:
        raise ValueError(f"{name} gives its own patches, of no stages: remove stage {stage}")
    image = teacher.image if size is None else replace(teacher.image, size=size)
    return PatchEncoder(teacher.encode_patches, image, device, name)


def encoder_of_model(
    model: Any,
    image: ImageSpec,
    accelerator: Accelerator,
    stage: int = -1,
    size: tuple[int, int] | None = None,
    inputs: Callable[[torch.Tensor], Any] | None = None,
) -> PatchEncoder:
    """The patch encoder of a model on its device in eval mode. ``inputs`` is that of ``spatial_map``.

    For another ``size`` of images the position embeddings of a transformer are interpolated, in a copy of the tower.
    """
    tower = image_tower(model)
    name = f"{type(model).__name__}, stage {stage}" if stage != -1 else type(model).__name__
    if size is not None and size != (image.height, image.width):
        image = replace(image, size=size)
        with _errors_of(name, image):
            tower = resized(tower, *size)
    to_map = spatial_map(tower, stage, inputs)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with accelerator.forward():
            return to_map(accelerator.layout(pixels)).permute(0, 2, 3, 1).float()

    compiled = any(module._compiled_call_impl is not None for module in tower.modules())
    return PatchEncoder(padded(encode) if compiled else encode, image, accelerator.device, name)


@contextmanager
def _errors_of(name: str, image: ImageSpec) -> Iterator[None]:
    """Errors of any library as a ValueError that names the model and the size of its images."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{name} gives no patches for images of {image.height} x {image.width} pixels: {reason}"
        ) from error
