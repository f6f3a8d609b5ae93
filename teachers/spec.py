"""What a user writes about one teacher or captioner in a config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelSpec(BaseModel):
    """A model by name and weights, or a class of the user's own."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    family: Literal["open_clip", "transformers"] = Field("open_clip", description="library that `model` belongs to")
    model: str | None = Field(
        None,
        description="open_clip: a model name, hf-hub:ORG/REPO or local-dir:PATH; transformers: hub name or folder",
    )
    pretrained: str | None = Field(
        None, description="open_clip: pretrained tag, or a checkpoint file by path or fsspec URL"
    )
    class_: str | None = Field(None, alias="class", description="a class of your own, package.module:Class")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of your class")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="arithmetic of the forward pass")

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        if (self.model is None) == (self.class_ is None):
            raise ValueError("give either `model` (with `pretrained` if need be) or `class`, not both")
        if self.class_ is not None:
            module, _, name = self.class_.partition(":")
            if not module or not name:
                raise ValueError(f"`class` must be package.module:Class, got {self.class_!r}")
            if self.pretrained is not None:
                raise ValueError("`pretrained` belongs to `model`; pass weights to your class in `options`")
        elif self.options:
            raise ValueError("`options` are for a `class` of your own")
        return self


class TeacherSpec(ModelSpec):
    """One entry of ``teachers:``."""

    logit_scale: float | None = Field(
        None, gt=0, description="1/temperature students distil with; default: the model's own"
    )
    dtype: Literal["float16", "float32", "int8"] = Field("float16", description="storage of the embeddings")


class Clean(BaseModel):
    """What is done to captions before they are stored. White space becomes single spaces and empty ones are dropped."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    first_sentence: bool = Field(False, description="keep the first sentence of each")
    words: int | None = Field(None, ge=1, description="cut behind that many words")
    characters: int | None = Field(None, ge=1, description="cut at the last word that ends within that many characters")
    drop_repetitive: bool = Field(True, description="drop a caption in which some words stand three times in a row")
    drop_duplicates: bool = Field(True, description="drop a caption that an image has already, in any case")


class CaptionerSpec(ModelSpec):
    """One entry of ``captioners:``. Sampling is nucleus sampling, seeded per (key, index)."""

    captions: int = Field(5, ge=1, le=64, description="captions per image")
    prompt: str | None = Field(None, min_length=1, description="what a chat model of transformers is asked")
    image_size: int | None = Field(
        None, ge=8, description="side in pixels of the square that a chat model of any resolution sees"
    )
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.9, gt=0, le=1)
    min_length: int = Field(5, ge=0, description="the end token is impossible before that many tokens")
    max_length: int = Field(30, ge=2, description="longest caption in tokens, start and end included")

    clean: Clean | None = Field(
        None, description="what is done to captions before they are stored; the slots of dropped ones repeat the others"
    )

    @model_validator(mode="after")
    def _lengths(self) -> CaptionerSpec:
        if self.min_length + 2 > self.max_length:
            raise ValueError("max_length must be at least min_length + 2 (start and end count)")
        return self
