"""Keys of captioners that may read the true caption, such as to translate it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from teachers.spec import CaptionerSpec

#: Stands for the true caption in a prompt.
CAPTION = "{caption}"


class CaptionReaderSpec(CaptionerSpec):
    sees: Literal["caption", "both"] | None = Field(
        None,
        description="openai and transformers: what the model sees. caption: the true caption, in place of {caption} in "
        "the prompt, such as for its translation; both, of openai: the image, too; default: the image",
    )

    @model_validator(mode="after")
    def _check_prompt(self) -> CaptionReaderSpec:
        if self.sees is not None and self.prompt is not None and CAPTION not in self.prompt:
            raise ValueError(f"`sees: {self.sees}` needs {CAPTION} in the prompt, where the true caption is to be")
        return self
