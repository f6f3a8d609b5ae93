"""The config of ``reinforce select``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from reinforce import settings
from reinforce.config import LayerName
from reinforce.config_schema import InSchema
from reinforce.settings import Section


class Keep(Section):
    """The samples with the largest values of an expression."""

    top: Annotated[int | float, InSchema(lambda _: {"type": "number", "exclusiveMinimum": 0})] = Field(
        gt=0, description="number of samples, or with a decimal point their share"
    )
    by: str = Field(description="an expression of SQL that gives a number")

    @model_validator(mode="after")
    def _check_share(self) -> Keep:
        if isinstance(self.top, float) and self.top > 1:
            raise ValueError(f"top: a share is at most 1, got {self.top}; write a number of samples without a point")
        return self


class Rule(Section):
    """One rule: ``where``, ``keep`` or ``sample``."""

    where: str | None = Field(None, description="an expression of SQL that is true for the samples to keep")
    keep: Keep | None = Field(None, description="the samples with the largest values")
    sample: int | None = Field(None, ge=1, description="so many samples, at random by seed and key")

    @model_validator(mode="after")
    def _check_one(self) -> Rule:
        if len(self.model_fields_set) != 1:
            raise ValueError("a rule is one of where, keep, sample; write several rules as several entries")
        return self

    @property
    def name(self) -> str:
        """``where``, ``keep`` or ``sample``."""
        [name] = self.model_fields_set
        return name


class SelectConfig(Section):
    """A view of a dataset: the samples that rules keep."""

    dataset: str = Field(min_length=1, description="folder or fsspec URL of the dataset")
    name: LayerName = Field(description="name of the view")
    rules: Annotated[list[Rule], Field(min_length=1, description="rules that are applied in order")]
    seed: int = Field(0, description="which samples `sample` takes")


def load_config(path: str | Path, overrides: list[str] | None = None) -> SelectConfig:
    """Read a YAML config and apply ``key=value`` overrides. Raises UserError."""
    return settings.load(SelectConfig, path, overrides)
