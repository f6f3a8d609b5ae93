"""The config of a tuning: which values of which settings are tried, for how long, and what decides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from reinforce import settings
from reinforce.settings import Section


def _grid(value: Any) -> Any:
    """A list, or {from, to, count}: so many values at equal ratios, of three digits."""
    if not isinstance(value, dict):
        return value
    if set(value) != {"from", "to", "count"}:
        raise ValueError("want a list of values, or {from, to, count}")
    first, last, count = value["from"], value["to"], value["count"]
    if not all(isinstance(end, (int, float)) and end > 0 for end in (first, last)):
        raise ValueError("`from` and `to` must be numbers above 0")
    if not isinstance(count, int) or count < 1:
        raise ValueError("`count` must be a whole number above 0")
    return [float(f"{scale:.3g}") for scale in np.geomspace(first, last, count)]


Scale = Annotated[float, Field(gt=0)]
Scales = Annotated[list[Scale], BeforeValidator(_grid)]


class EarlyStopping(Section):
    """ASHA (arXiv 1810.05934): a trial goes on beyond a rung if it is among the best there so far.

    It judges the trials of the first seed. The settings it leaves, and those next to the best, without which no plateau
    can be told, are trained with the other seeds, to the end.
    """

    grace: float = Field(0.3, gt=0, lt=1, description="share of a trial's steps at the first rung")
    reduction: float = Field(
        2.0, gt=1, description="1 / the share of trials that go on beyond a rung; a rung's steps over those before"
    )


class Screening(Section):
    """What is told of scales without training, from stored embeddings alone."""

    batches: int = Field(4, ge=1, description="batches of the training's samples that are looked at")
    batch: int | None = Field(
        None, ge=2, description="their size, on which all measures depend; default: the training's, at most 4096"
    )


class TuneConfig(Section):
    """Short trainings of one student that differ in the teachers' logit scales and in lambda."""

    output: str = Field(min_length=1, description="folder or fsspec URL of the trials and of what comes of them")
    student: str | dict[str, Any] = Field(description="the training to tune: a student's YAML file, or its mapping")
    trial: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of the student's config that trials have instead, e.g. {train: {steps: 2000}}",
    )
    mode: Literal["independent", "joint"] = Field(
        "independent",
        description="`independent`: each teacher alone, as in MobileCLIP2, then lambda with all of them at their best; "
        "`joint`: all teachers at once, every combination of scales and lambdas",
    )
    scales: dict[str, Scales] = Field(
        default_factory=dict, description="logit scales to try by teacher: a list, or {from, to, count}"
    )
    lambda_: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=list, alias="lambda", description="values of loss.lambda to try; default: the student's"
    )
    sample: int | None = Field(
        None, ge=2, description="with `joint`: so many combinations, drawn by the first seed; default: all"
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1)
    metric: str | None = Field(None, description="that decides; default: the student's evaluate.best")
    early_stopping: EarlyStopping | None = EarlyStopping()
    concurrent: int | None = Field(None, ge=1, description="trials at a time; default: as many as there is room for")
    screening: Screening = Screening()

    @model_validator(mode="after")
    def _something_to_try(self) -> TuneConfig:
        for name, values in {**{f"scales.{t}": v for t, v in self.scales.items()}, "lambda": self.lambda_}.items():
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: a value stands there twice; remove one")
            if len(values) == 1 and (self.mode == "independent" or name == "lambda"):
                raise ValueError(
                    f"{name}: with {values[0]:g} alone there is nothing to compare; give two values or more, or set it "
                    f"in the student's config ({'loss.lambda' if name == 'lambda' else 'loss.logit_scales'})"
                )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: a seed stands there twice; remove one")
        if not self.lambda_ and all(len(values) < 2 for values in self.scales.values()):
            raise ValueError("nothing to try: give two values or more under `scales` (by teacher) or `lambda`")
        if self.sample is not None and self.mode != "joint":
            raise ValueError("`sample` belongs to `mode: joint`: the other mode tries every value; remove it")
        return self


def load_tune_config(path: str | Path, overrides: list[str] | None = None) -> TuneConfig:
    """Read a YAML config and apply ``key.sub=value`` overrides. Raises UserError."""
    return settings.load(TuneConfig, path, overrides)
