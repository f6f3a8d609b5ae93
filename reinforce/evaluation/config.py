"""What a model is judged by: zero-shot classification and image-text retrieval sets."""

from __future__ import annotations

from pydantic import Field

from reinforce.settings import Section


class ZeroShotSet(Section):
    """Images with classes."""

    images: str = Field(
        min_length=1, description="a folder with one folder a class, or WebDataset shards by any fsspec URL"
    )
    classes: str | list[str] | None = Field(
        None, description="names in the order of labels: a list, a text file, or `imagenet`; default: the folders'"
    )
    label: str = Field("cls", description="of shards: the member that holds the class's index, or json:FIELD")
    templates: str | list[str] = Field(
        "simple", description="`openai` (80), `simple` (7), `none`, or own ones with {} for the class"
    )
    limit: int | None = Field(None, ge=1, description="the first so many images")


class RetrievalSet(Section):
    """Images with captions, each the other's match."""

    pairs: str = Field(min_length=1, description="WebDataset shards, or a reinforced dataset's folder or URL")
    limit: int | None = Field(None, ge=1, description="the first so many pairs")


class Evaluation(Section):
    """Sets by name, and when they are run during training (and always at its end)."""

    every: int | None = Field(None, ge=1, description="steps between evaluations; default: at the end alone")
    zero_shot: dict[str, ZeroShotSet] = Field(default_factory=dict)
    retrieval: dict[str, RetrievalSet] = Field(default_factory=dict)
    best: str | None = Field(
        None, description="metric whose best checkpoint is kept, e.g. zero_shot/NAME/top1; default: the first"
    )
    batch: int = Field(256, ge=1, description="images or texts in one forward pass")
