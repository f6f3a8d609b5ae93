"""Models of timm by name, hub name or folder, as teachers of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import model_validator

from teachers.spec import ModelInfo, TeacherSpec
from teachers.timm import catalog


class TimmTeacherSpec(TeacherSpec):
    loader: ClassVar[str] = "teachers.timm.teacher:TimmTeacher"
    takes_options: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_model(self) -> TimmTeacherSpec:
        catalog.check_source(self.name)
        return self

    def describe(self) -> ModelInfo:
        return ModelInfo(dim=None, images=True, texts=False, identity=catalog.model_identity(self))

    def hosts(self) -> Iterator[str]:
        return catalog.hosts(self)
