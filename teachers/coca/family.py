"""CoCa models of open_clip, as captioners."""

from __future__ import annotations

from typing import ClassVar

from teachers.decoding.postprocess import cleaning_identity
from teachers.open_clip import catalog
from teachers.open_clip.family import OpenClipOptions, model_identity
from teachers.spec import CHAT_FIELDS, CaptionerSpec, ModelInfo


class CocaSpec(OpenClipOptions, CaptionerSpec):
    loader: ClassVar[str] = "teachers.coca.captioner:CocaCaptioner"

    def describe(self) -> ModelInfo:
        if given := [field for field in CHAT_FIELDS if getattr(self, field) is not None]:
            raise ValueError(f"{', '.join(given)}: used only by chat models of `family: transformers`; remove it")
        identity = model_identity(self)
        catalog.check_coca(self.name)
        identity = {**identity, **self.decoding(), **cleaning_identity(self.clean)}
        return ModelInfo(dim=None, images=True, texts=False, identity=identity)
