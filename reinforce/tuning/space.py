"""The search space: settings, their trials, and the student configs of each trial and with the best values."""

from __future__ import annotations

import itertools
import random
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reinforce import settings
from reinforce.errors import UserError
from reinforce.student.config import StudentConfig
from reinforce.tuning.config import TuneConfig

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
