"""Keys of teachers of transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from teachers.spec import TeacherSpec


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
