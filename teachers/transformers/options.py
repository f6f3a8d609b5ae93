"""Keys of teachers and captioners of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from teachers.caption_readers import CaptionReaderSpec
from teachers.spec import TeacherSpec

#: Defaults of translators, whose texts may be as short as a word.
_TRANSLATION = {"strategy": "greedy", "captions": 1, "min_length": 0, "max_length": 128}
_STRATEGIES = ("greedy", "beams")
LANGUAGES = ("source_language", "target_language")


class TransformersOptions(TeacherSpec):
    image_size: int | None = Field(
        None,
        ge=8,
        description="family transformers: side in pixels of the square image, for models that accept several sizes; "
        "default: the model's own",
    )
    pooling: Literal["cls", "mean", "summary"] | None = Field(
        None,
        description="family transformers, models of texts or images alone: which outputs become the embedding. mean: "
        "the mean of the text's tokens; cls: the first token; summary: C-RADIO's summary; default: mean for texts, the "
        "pooler if it has weights or else cls for images",
    )
    trust_remote_code: bool = Field(
        False,
        description="family transformers: run the code in the model's folder or repository, which can do anything; for "
        "models that transformers itself does not have",
    )
    lowercase: bool | None = Field(
        None,
        description="family transformers: texts in lower case, as SigLIP 2 needs; default: as the tokenizer does",
    )


class TransformersCaptionerOptions(CaptionReaderSpec):
    source_language: str | None = Field(
        None,
        description="family transformers with `sees: caption`: language of the true captions, as the tokenizer names "
        "it, such as eng_Latn; for models of several source languages",
    )
    target_language: str | None = Field(
        None,
        description="family transformers with `sees: caption`: language of the translations, as the tokenizer names "
        "it, such as deu_Latn; for models of several target languages",
    )

    @model_validator(mode="before")
    @classmethod
    def _set_defaults_of_translators(cls, values: Any) -> Any:
        translates = isinstance(values, Mapping) and values.get("sees") == "caption"
        return {**_TRANSLATION, **values} if translates else values

    @model_validator(mode="after")
    def _check_translation(self) -> TransformersCaptionerOptions:
        if self.sees is None:
            if given := [key for key in LANGUAGES if getattr(self, key) is not None]:
                raise ValueError(f"`{given[0]}` is used only with `sees: caption`: add that, or remove the key")
        elif self.sees == "both":
            raise ValueError("`sees: both` is used only with family openai: translators see `caption` alone")
        elif self.strategy not in _STRATEGIES:
            raise ValueError(f"strategy {self.strategy} is not used with `sees: caption`: use greedy or beams")
        elif self.image_size is not None:
            raise ValueError("`image_size` is not used with `sees: caption`, by which no image is seen: remove it")
        return self
