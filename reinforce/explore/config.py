"""The config of ``reinforce select``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from reinforce import settings
from reinforce.settings import InSchema, LayerName, Section

Cosine = Annotated[float, Field(gt=0, le=1)]


Share = Annotated[int | float, InSchema(lambda _: {"type": "number", "exclusiveMinimum": 0})]


def check_share(key: str, value: int | float) -> None:
    """Raise ValueError for a share above 1."""
    if isinstance(value, float) and value > 1:
        raise ValueError(f"{key}: a share is at most 1, got {value}; write a number of samples without a point")


class Keep(Section):
    """The samples with the largest values of an expression."""

    top: Share = Field(gt=0, description="number of samples, or with a decimal point their share")
    by: str = Field(description="an expression of SQL that gives a number")
    within: str | None = Field(
        None, description="an expression of SQL: the largest values of each group of samples that have the same"
    )

    @model_validator(mode="after")
    def _check_share(self) -> Keep:
        check_share("top", self.top)
        return self


class Deduplicate(Section):
    """The best sample of those whose images are nearly, or exactly, the same."""

    teacher: LayerName | None = Field(None, description="whose embeddings of the images are compared")
    threshold: Cosine = Field(0.95, description="smallest cosine of two near duplicates, of means over crops")
    exact: Literal[True] | None = Field(None, description="compare the bytes of the images instead, by their digests")
    keep: str | None = Field(
        None,
        description="an expression of SQL that gives a number, the largest for the sample to keep; default: the first",
    )

    @model_validator(mode="after")
    def _check_one(self) -> Deduplicate:
        if (self.teacher is None) == (self.exact is None):
            raise ValueError("name a `teacher` for near duplicates, or set `exact: true` for equal images")
        if self.exact and "threshold" in self.model_fields_set:
            raise ValueError("threshold: it is for near duplicates by a `teacher`; remove it, or `exact`")
        return self


class Decontaminate(Section):
    """The samples whose images are not among those of an evaluation."""

    against: Annotated[
        list[str],
        Field(
            min_length=1,
            description="folders or URLs of reinforced datasets; with `config`, also other images",
        ),
    ]
    teacher: LayerName = Field(description="whose embeddings of the images are compared")
    threshold: Cosine = Field(0.95, description="smallest cosine of images that are the same, of means over crops")
    without_vectors: int | None = Field(
        None,
        ge=0,
        description="number of images of `against` without a vector that are accepted, although samples that have them "
        "are kept; default: none",
    )
    config: str | None = Field(
        None,
        description="config of the run of this dataset, by which the teacher embeds the images of what `against` names "
        "that is no reinforced dataset; they are kept in the folder of the view",
    )


Count = Annotated[int, Field(ge=1)]
MAX_CLUSTERS = 2**15


class Balance(Section):
    """Samples of all clusters of images, as equally as they have them."""

    teacher: LayerName = Field(description="whose embeddings of the images are clustered")
    clusters: Annotated[list[Annotated[int, Field(ge=1, le=MAX_CLUSTERS)]], Field(min_length=1)] = Field(
        description="number of clusters, and of clusters of these on each level above: [1000, 50]"
    )
    keep: Share = Field(gt=0, description="number of samples, or with a decimal point their share")

    @model_validator(mode="after")
    def _check_levels(self) -> Balance:
        check_share("keep", self.keep)
        if any(below <= above for below, above in itertools.pairwise(self.clusters)):
            raise ValueError(f"clusters: each level has fewer than the one before it, got {self.clusters}")
        return self


class Together(Section):
    """A number of samples of which copies are taken together."""

    count: Count = Field(description="number of samples; a last group may add some")
    together: list[list[str]] = Field(
        description="groups of samples by SHARD/KEY; one of more than half of `count` is never taken"
    )


class Rule(Section):
    """One rule: ``where``, ``keep``, ``sample``, ``all_but``, ``deduplicate``, ``balance`` or ``decontaminate``."""

    where: str | None = Field(None, description="an expression of SQL that is true for the samples to keep")
    keep: Keep | None = Field(None, description="the samples with the largest values")
    sample: Count | Together | None = Field(
        None, description="so many samples, at random by seed and key; with `together`, groups of samples as one"
    )
    all_but: Count | Together | None = Field(
        None,
        description="the samples that `sample` of this number leaves out, with equal seed and rules before it",
    )
    deduplicate: Deduplicate | None = Field(None, description="one sample of each group of duplicates")
    balance: Balance | None = Field(None, description="equally many samples of each cluster of images")
    decontaminate: Decontaminate | None = Field(None, description="the samples that are not in other datasets")

    @model_validator(mode="after")
    def _check_one(self) -> Rule:
        if len(self.model_fields_set) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"a rule is one of {names}; write several rules as several entries")
        return self

    @property
    def name(self) -> str:
        """The key that it has."""
        [name] = self.model_fields_set
        return name


class SelectConfig(Section):
    """A view of a dataset: the samples that rules keep."""

    dataset: str = Field(min_length=1, description="folder or fsspec URI of the dataset")
    name: LayerName = Field(description="name of the view")
    rules: Annotated[list[Rule], Field(min_length=1, description="rules that are applied in order")]
    seed: int = Field(0, description="which samples `sample` takes")


def load_config(path: str | Path, overrides: list[str] | None = None) -> SelectConfig:
    """Read a YAML config and apply ``key=value`` overrides. Raises UserError."""
    return settings.load(SelectConfig, path, overrides)
