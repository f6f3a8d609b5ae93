"""The teacher of the scenes: a teacher of the demo, which sees them enlarged, so that emoji have the size it knows."""

from __future__ import annotations

from dataclasses import replace

import torch

from teachers.image_encoder import encoder_of_model
from teachers.open_clip.teacher import OpenClipTeacher
from teachers.registry import teacher_spec
from teachers.runtime.accelerator import Accelerator


class Enlarged:
    """The image side of a model of open_clip whose tower takes any size: the mean of its patches, and the patches."""

    logit_scale = None
    version = 1

    def __init__(self, device: torch.device, model: str, size: int = 192) -> None:
        teacher = OpenClipTeacher(teacher_spec(model=model), accelerator := Accelerator(str(device)))
        assert teacher.image is not None
        self._encoder = encoder_of_model(teacher._model, teacher.image, accelerator, size=(size, size))
        self.image = replace(teacher.image, size=size)
        self.dim = self._encoder.dim

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.encode_patches(pixels).mean((1, 2)), dim=-1)

    def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._encoder.encode_patches(pixels)
