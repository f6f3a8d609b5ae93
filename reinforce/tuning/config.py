"""Config of `reinforce tune`: the values to try, the length of a trial, and the metric that decides."""

from __future__ import annotations

import itertools
import random
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BeforeValidator, Field, model_validator

from reinforce import settings
from reinforce.errors import UserError
from reinforce.settings import InSchema, Section, either
from reinforce.student.config import StudentConfig


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
    early_stopping: bool = Field(
        True, description="end trials that fall behind (ASHA); false: every trial is trained to the end"
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


LAMBDA, JOINT = "lambda", "joint"
TRIALS = "trials"
_UNCHANGED = "unchanged from the tuned config"
_WIDTH = 110


@dataclass(frozen=True)
class Setting:
    """One point of the search: logit scales by teacher, and lambda where it is tried.

    ``curve`` is the group of settings that it is compared with: a teacher's name, LAMBDA or JOINT. With ``alone``, the
    student learns from this one teacher.
    """

    curve: str
    scales: Mapping[str, float] = field(hash=False)
    lambda_: float | None = None
    alone: bool = False

    @property
    def values(self) -> dict[str, float]:
        """The values by teacher, and by LAMBDA."""
        return {**self.scales, **({} if self.lambda_ is None else {LAMBDA: self.lambda_})}

    @property
    def name(self) -> str:
        """Name in logs and folder names."""
        return "_".join(f"{name}-{value:g}" for name, value in self.values.items())


@dataclass(frozen=True)
class Trial:
    """One training of a setting."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting.name}_seed-{self.seed}"


def scale_settings(config: TuneConfig) -> list[Setting]:
    """List the settings of scales, curve by curve; in `joint` mode they include lambda."""
    if config.mode == "independent":
        return [Setting(name, {name: v}, alone=True) for name, values in config.scales.items() for v in values]
    grids = [[(name, value) for value in values] for name, values in config.scales.items()]
    lambdas: Sequence[float | None] = config.lambda_ or [None]
    settings = [Setting(JOINT, dict(point), lambda_) for point in itertools.product(*grids) for lambda_ in lambdas]
    if config.sample is not None and config.sample < len(settings):
        drawn = random.Random(config.seeds[0]).sample(range(len(settings)), config.sample)  # noqa: S311
        settings = [settings[number] for number in sorted(drawn)]
    return settings


def lambda_settings(config: TuneConfig, scales: Mapping[str, float]) -> list[Setting]:
    """List the settings of lambda with all teachers at ``scales``; empty unless the mode is `independent`."""
    return [Setting(LAMBDA, scales, lambda_) for lambda_ in config.lambda_] if config.mode == "independent" else []


class BaseStudent:
    """The student's config that is tuned by a ``config``.

    ``raw`` is the mapping as the user wrote it, ``full`` the training run that `reinforce train` would run, ``short``
    that of a trial without its setting, and ``origin`` the name of the config in messages. Raises UserError for an
    invalid config.
    """

    def __init__(self, config: TuneConfig) -> None:
        self.config = config
        self.origin = "student" if isinstance(config.student, dict) else config.student
        self.raw: dict[str, Any] = dict(config.student) if isinstance(config.student, dict) else {}
        if isinstance(config.student, str):
            settings.load(StudentConfig, config.student)  # raises UserError with the place of a fault
            self.raw = settings.load_yaml(Path(config.student).read_text(encoding="utf-8"))
        for key in ("output", "seed"):
            if key in config.trial:
                raise UserError(f"trial.{key}: set for each trial by the tuning. Remove it.")
        self._raw_short = settings.merge(self.raw, config.trial, settings.LENGTHS)
        self.full = settings.parse(StudentConfig, self.raw, where=f"config {self.origin}")
        where = f"config {self.origin} with the keys of `trial`"
        self.short = settings.parse(StudentConfig, self._raw_short, where=where)

    def trial_config(self, trial: Trial) -> StudentConfig:
        """Return the training run of a trial."""
        output = f"{self.config.output.rstrip('/')}/{TRIALS}/{trial.name}"
        data = {**self._raw_short, "output": output, "seed": trial.seed}
        return settings.parse(StudentConfig, apply_setting(data, trial.setting))


def apply_setting(data: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """Return a student's config with the scales and lambda of a setting."""
    loss = dict(data.get("loss") or {})
    before = {} if setting.alone else loss.get("logit_scales") or {}
    loss["logit_scales"] = {**before, **setting.scales}
    if setting.lambda_ is not None:
        loss.pop("lambda_", None)
        loss["lambda"] = setting.lambda_
    changed = {**data, "loss": loss}
    if setting.alone:
        changed["data"] = {**data["data"], "teachers": list(setting.scales)}
    return changed


def render_student_yaml(
    raw: Mapping[str, Any], best: Mapping[str, float], origins: Mapping[str, str], output: str, header: str
) -> str:
    """Return student.yaml: the tuned config as the user wrote it, with other output, scales and lambda.

    ``best`` are values by teacher and LAMBDA. ``origins`` states in one line where each scale and lambda comes from,
    also for teachers that were not tuned. ``header`` is a comment at the top.
    """
    scales = {name: value for name, value in best.items() if name != LAMBDA}
    data = apply_setting(raw, Setting("", scales, best.get(LAMBDA)))
    data["output"] = output
    lines = _comment(header)
    for key, value in data.items():
        if key == "loss":
            lines += ["loss:", *_loss_lines(value, origins)]
        else:
            lines += _yaml_lines({key: value})
    return "\n".join(lines) + "\n"


def _loss_lines(loss: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    lines = []
    for key, value in loss.items():
        if key == "logit_scales":
            for name, origin in origins.items():
                if name not in value and name != LAMBDA:
                    lines += _comment(f"{name}: {origin}")
            if value:
                lines.append("logit_scales:")
                for name, scale in value.items():
                    entry = [*_comment(origins.get(name, _UNCHANGED)), *_yaml_lines({name: scale})]
                    lines += [f"  {line}" for line in entry]
        elif key == LAMBDA:
            lines += [*_comment(origins.get(LAMBDA, _UNCHANGED)), *_yaml_lines({key: value})]
        else:
            lines += _yaml_lines({key: value})
    return [f"  {line}" for line in lines]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH)]


def _yaml_lines(value: Mapping[str, Any]) -> list[str]:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=10_000).rstrip("\n").split("\n")
