"""One more family of models, with a key of its own, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from teachers.protocols import Captioner, Teacher
from teachers.registry import Family
from teachers.spec import CaptionerSpec, ModelInfo, TeacherSpec
from tests.helpers.models import ColorTeacher, SeedCaptioner


class PaletteTeacherSpec(TeacherSpec):
    colors: int = Field(8, ge=1)

    def describe(self) -> ModelInfo:
        identity = {"family": self.family, "colors": self.colors, "precision": self.resolved_precision}
        return ModelInfo(self.colors, images=True, texts=True, identity=identity)

    def hosts(self) -> Iterator[str]:
        yield f"palettes.example ({self.model})"

    def load(self, name: str, device: str) -> Teacher:
        return ColorTeacher(torch.device("cpu"), dim=self.colors)  # type: ignore[return-value]


class PaletteCaptionerSpec(CaptionerSpec):
    uses_precision: ClassVar[bool] = False

    def describe(self) -> ModelInfo:
        return ModelInfo(None, images=True, texts=False, identity={"family": self.family, "captions": self.captions})

    def load(self, name: str, device: str) -> Captioner:
        return SeedCaptioner(torch.device("cpu"), self.captions)  # type: ignore[return-value]


PALETTE = Family(f"{__name__}:PaletteTeacherSpec", f"{__name__}:PaletteCaptionerSpec")
