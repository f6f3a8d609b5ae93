"""Config of `reinforce tune`: the values to try, the length of a trial, and the metric that decides."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from reinforce.config_schema import InSchema, either
from reinforce.settings import Section


def _expand_grid(value: Any) -> Any:
    """Expand {from, to, count} to values at equal ratios, rounded to three digits; a list stays as it is."""
    if not isinstance(value, dict):
        return value
    if set(value) != {"from", "to", "count"}:
        raise ValueError("must be a list of values, or {from, to, count}")
    first, last, count = value["from"], value["to"], value["count"]
    if not all(isinstance(end, (int, float)) and not isinstance(end, bool) and end > 0 for end in (first, last)):
        raise ValueError("`from` and `to` must be numbers above 0")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError("`count` must be a whole number above 0")
    return [float(f"{scale:.3g}") for scale in np.geomspace(first, last, count)]


_GRID = {
    "type": "object",
    "properties": {
        "from": {"type": "number", "exclusiveMinimum": 0},
        "to": {"type": "number", "exclusiveMinimum": 0},
        "count": {"type": "integer", "minimum": 1},
    },
    "required": ["from", "to", "count"],
    "additionalProperties": False,
}
Scale = Annotated[float, Field(gt=0)]
Scales = Annotated[list[Scale], BeforeValidator(_expand_grid), InSchema(lambda values: either(values, _GRID))]


class EarlyStopping(Section):
    """ASHA (arXiv 1810.05934): a trial continues past a rung if it is among the best there so far.

    ASHA applies to the trials of the first seed. The settings that it does not stop are then trained to the end with
    every seed, and so are the neighbours of the best, because the plateau cannot be measured without them.
    """

    grace: float = Field(0.3, gt=0, lt=1, description="the first rung, as a share of a trial's steps")
    reduction: float = Field(
        2.0, gt=1, description="1 / the share of trials that continue past a rung, and the ratio of steps between rungs"
    )


class Screening(Section):
    """Measures of the scales from stored embeddings, without training."""

    batches: int = Field(4, ge=1, description="number of training batches to measure")
    batch: int | None = Field(
        None, ge=2, description="batch size, on which all measures depend; default: the training's, at most 4096"
    )


class TuneConfig(Section):
    """Short training runs of one student that differ in the teachers' logit scales and in lambda."""

    output: str = Field(min_length=1, description="folder or fsspec URI for the trials and the results")
    student: str | dict[str, Any] = Field(description="training to tune: path of a student's YAML file, or a mapping")
    trial: dict[str, Any] = Field(
        default_factory=dict,
        description="keys that replace those of the student's config in trials, e.g. {train: {steps: 2000}}; null "
        "removes a section that has a name, such as a set under `evaluate.zero_shot`",
    )
    mode: Literal["independent", "joint"] = Field(
        "independent",
        description="`independent`: each teacher alone, as in MobileCLIP2, then lambda with all teachers at their best "
        "scales; `joint`: all teachers together, every combination of scales and lambdas",
    )
    scales: dict[str, Scales] = Field(
        default_factory=dict, description="logit scales to try by teacher: a list, or {from, to, count}"
    )
    lambda_: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=list, alias="lambda", description="values of loss.lambda to try; default: the student's"
    )
    sample: int | None = Field(
        None, ge=2, description="with `joint`: number of combinations, drawn by the first seed; default: all"
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 1, 2], min_length=1, description="seeds with which each setting is trained"
    )
    metric: str | None = Field(None, description="metric to maximize; default: the student's evaluate.best")
    early_stopping: EarlyStopping | None = Field(
        EarlyStopping(), description="ends trials that fall behind (ASHA); null: every trial is trained to the end"
    )
    concurrent: int | None = Field(
        None,
        ge=1,
        description="trials at a time; default: as many as the cluster can hold; without `train.compute.cpus`, they "
        "share its cores",
    )
    screening: Screening = Screening()

    @model_validator(mode="after")
    def _check_values(self) -> TuneConfig:
        for name, values in {**{f"scales.{t}": v for t, v in self.scales.items()}, "lambda": self.lambda_}.items():
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: duplicate value; remove one")
            if len(values) == 1 and (self.mode == "independent" or name == "lambda"):
                raise ValueError(
                    f"{name}: {values[0]:g} is the only value, nothing to compare; give two or more, or set it in the "
                    f"student's config ({'loss.lambda' if name == 'lambda' else 'loss.logit_scales'})"
                )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: duplicate seed; remove one")
        if not self.lambda_ and all(len(values) < 2 for values in self.scales.values()):
            raise ValueError("nothing to try: give two values or more under `scales` (by teacher) or `lambda`")
        if self.sample is not None and self.mode != "joint":
            raise ValueError("`sample` requires `mode: joint`; `independent` tries every value. Remove `sample`")
        return self
