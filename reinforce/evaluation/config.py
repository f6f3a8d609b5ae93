"""Config of evaluations: zero-shot classification and image-text retrieval sets."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from reinforce.config import Format, Limits
from reinforce.config_schema import OneOrMore, keys_match
from reinforce.settings import Section

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

#: Ranks k of recall@k.
RECALLS = (1, 5, 10)
ZERO_SHOT, RETRIEVAL = "zero_shot", "retrieval"


def _check_set_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a set: use letters, digits, '.', '_' and '-'")
    return name


SetName = Annotated[str, AfterValidator(_check_set_name)]
_SET_NAMES = keys_match(f"^{_NAME.pattern}$")


class Table(Section):
    """How the files of a set are read, beside their names."""

    format: Format | None = Field(
        None, description="what the files are; default: recognised by their names, else by the first file"
    )
    image: str | None = Field(
        None, description="column of a table with the images, or with their paths or URLs; default: as in a run"
    )


class ZeroShotSet(Table):
    """A classification set: images with classes."""

    images: str | list[str] = Field(
        min_length=1,
        description="a folder with one folder per class, or what `source` of a run may be, by any fsspec URL: tars, "
        "Parquet, jsonl or csv files, or a reinforced dataset",
    )
    classes: str | list[str] | None = Field(
        None,
        description="class names in label order: a list, a text file with one per line, or `imagenet` (whose folders "
        "are named by WordNet ids); default: the folder names, or the names that the labels give, sorted",
    )
    label: str = Field(
        "cls",
        description="of shards: extension of the member with the image's class, or json:FIELD; an integer is an index "
        "into the classes, text is a class name; of tables: the column, by default `cls`, else `label`",
    )
    templates: str | list[str] = Field(
        "simple",
        description="`openai` (80), `simple` (7), `none`, a text file with one per line, or a list; {} (or {c}) is the "
        "class name",
    )
    groups: str | dict[str, str] | None = Field(
        None,
        description="the group of each class: a mapping, a JSON file with a mapping, or json:FIELD of the samples; "
        "adds the metric `group`, the share of images whose predicted class is in the right group",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="images to use: of shards the first ones, of folders an equal share of each class",
    )


class RetrievalSet(Table):
    """A retrieval set: images with captions. Any true match counts as a hit.

    All captions of an image match it. Equal captions are one text, which matches all of their images.
    """

    pairs: str | list[str] = Field(
        min_length=1,
        description="what `source` of a run may be: tars, Parquet, jsonl or csv files, a folder of images, or a "
        "reinforced dataset",
    )
    captions: list[str] = Field(
        default=["txt", "json:caption"],
        min_length=1,
        description="where to find an image's captions, first hit wins: a member's extension, lines:EXTENSION for one "
        "caption per line, or json:FIELD (text or a list of texts); `txt` of a reinforced dataset is its caption; of "
        "tables: COLUMN, or json:COLUMN for all texts of a list",
    )
    limit: int | None = Field(None, ge=1, description="images to use, the first ones")


class Evaluation(Section):
    """Sets by name, and how often they are evaluated during training (always at its end)."""

    every: int | None = Field(None, ge=1, description="steps between evaluations; default: only at the end")
    zero_shot: Annotated[dict[SetName, ZeroShotSet], _SET_NAMES] = Field(
        default_factory=dict, description="classification sets by name"
    )
    retrieval: Annotated[dict[SetName, RetrievalSet], _SET_NAMES] = Field(
        default_factory=dict, description="retrieval sets by name"
    )
    best: str | None = Field(
        None,
        description="metric that selects the best checkpoint, e.g. zero_shot/NAME/top1; higher is better, and the "
        "earlier of two equal ones is kept; default: top1 of the first zero-shot set, else text_to_image/r1 of the "
        "first retrieval set",
    )
    export: Literal["last", "best"] = Field(
        "last", description="weights that a training exports: of its last step, or of its best evaluated one by `best`"
    )
    batch: int = Field(256, ge=1, description="images or texts in one forward pass")
    threads: int | None = Field(None, ge=1, description="threads that decode images; default: one per core")
    memory: int = Field(
        2 * 2**30,
        ge=0,
        description="bytes of decoded images kept between evaluations; a set that does not fit is decoded each time",
    )
    images_from: OneOrMore | None = Field(
        None,
        description="folders or URLs of the tars from which images that a dataset stores by reference may be read",
    )
    limits: Limits = Field(default=Limits(), description="bounds on images and captions, as in a run's input")

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics of the sets, in order; all are between 0 and 1, and higher is better."""
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
        """The metric that selects the best checkpoint; None without sets."""
        return self.best or next(iter(self.metrics), None)

    @model_validator(mode="after")
    def _check_best(self) -> Evaluation:
        if self.best is not None and self.best not in self.metrics:
            known = ", ".join(self.metrics) or "none, since there are no sets"
            raise ValueError(f"best: no set gives {self.best!r}; the metrics are: {known}")
        if self.export == "best" and not self.metrics:
            raise ValueError("export: best needs a set to evaluate on; add one, or remove `export`")
        return self
