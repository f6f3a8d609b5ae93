"""What a model is judged by: zero-shot classification and image-text retrieval sets."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from reinforce.config import Limits
from reinforce.settings import Section

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

#: Recall is given at these ranks.
RECALLS = (1, 5, 10)
ZERO_SHOT, RETRIEVAL = "zero_shot", "retrieval"


def _set_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a set: use letters, digits, '.', '_' and '-'")
    return name


SetName = Annotated[str, AfterValidator(_set_name)]


class ZeroShotSet(Section):
    """Images with classes."""

    images: str | list[str] = Field(
        min_length=1,
        description="a folder with one folder a class, WebDataset shards by any fsspec URL, or a reinforced dataset",
    )
    classes: str | list[str] | None = Field(
        None,
        description="names in the order of labels: a list, a text file with one a line, or `imagenet` (folders are "
        "told by their WordNet ids then); default: the folders' names, or the names that the labels give, sorted",
    )
    label: str = Field(
        "cls",
        description="of shards: the member with the image's class, or json:FIELD; an integer is an index into the "
        "classes, text a class's name",
    )
    templates: str | list[str] = Field(
        "simple",
        description="`openai` (80), `simple` (7), `none`, a text file with one a line, or a list; {} (or {c}) is the "
        "class",
    )
    groups: str | dict[str, str] | None = Field(
        None,
        description="the group of each class: a mapping, a JSON file of one, or json:FIELD beside the images; with "
        "it `group` tells how often the class that was chosen is of the right group",
    )
    limit: int | None = Field(
        None, ge=1, description="so many images: of shards the first, of folders by turns from each class"
    )


class RetrievalSet(Section):
    """Images with captions: a hit is any true match.

    All captions of an image are right for it. Equal captions are one text, for which all of their images are right.
    """

    pairs: str | list[str] = Field(min_length=1, description="WebDataset shards, or a reinforced dataset")
    captions: list[str] = Field(
        default=["txt", "json:caption"],
        min_length=1,
        description="where an image's captions stand, first hit wins: a member's extension, lines:EXTENSION for one "
        "caption a line, or json:FIELD (text or a list of texts); `txt` of a reinforced dataset is its caption",
    )
    limit: int | None = Field(None, ge=1, description="the first so many images")


class Evaluation(Section):
    """Sets by name, and when they are run during training (and always at its end)."""

    every: int | None = Field(None, ge=1, description="steps between evaluations; default: at the end alone")
    zero_shot: dict[SetName, ZeroShotSet] = Field(default_factory=dict)
    retrieval: dict[SetName, RetrievalSet] = Field(default_factory=dict)
    best: str | None = Field(
        None,
        description="metric by which the best checkpoint is kept, e.g. zero_shot/NAME/top1; the higher the better, and "
        "of equal ones the earlier stays; default: top1 of the first zero-shot set, else text_to_image/r1 of the first "
        "retrieval set",
    )
    batch: int = Field(256, ge=1, description="images or texts in one forward pass")
    threads: int | None = Field(None, ge=1, description="that decode images; default: the cores of this process")
    memory: int = Field(
        2 * 2**30,
        ge=0,
        description="bytes of decoded images kept between evaluations; a set that does not fit is decoded anew",
    )
    limits: Limits = Field(default=Limits(), description="bounds on images and captions, as in a run's input")

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics that the sets give, in their order; all lie within 0 and 1, the higher the better."""
        names = []
        for name, zero_shot in self.zero_shot.items():
            scores = ["top1", "top5", "mean_per_class"] + ["group"] * (zero_shot.groups is not None)
            names += [f"{ZERO_SHOT}/{name}/{score}" for score in scores]
        for name in self.retrieval:
            for direction in ("text_to_image", "image_to_text"):
                names += [f"{RETRIEVAL}/{name}/{direction}/r{k}" for k in RECALLS]
        return names

    @property
    def best_metric(self) -> str | None:
        """The metric that decides between checkpoints; None without sets."""
        return self.best or next(iter(self.metrics), None)

    @model_validator(mode="after")
    def _best_is_given(self) -> Evaluation:
        if self.best is not None and self.best not in self.metrics:
            given = ", ".join(self.metrics) or "none, since there are no sets"
            raise ValueError(f"best: no set gives {self.best!r}; the metrics are: {given}")
        return self
