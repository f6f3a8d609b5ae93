"""What is tried: settings, the trainings that try each, and how they come out of the student's config."""

from __future__ import annotations

import itertools
import random
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


@dataclass(frozen=True)
class Setting:
    """One point of the search: the logit scales of teachers, and lambda where it is tried.

    ``curve`` names what it is compared with: a teacher, LAMBDA or JOINT. ``alone``: its teacher is the only one.
    """

    curve: str
    scales: Mapping[str, float] = field(hash=False)
    share: float | None = None
    alone: bool = False

    @property
    def values(self) -> dict[str, float]:
        """By teacher, and by LAMBDA."""
        return {**self.scales, **({} if self.share is None else {LAMBDA: self.share})}

    @property
    def name(self) -> str:
        """For people, and for folders."""
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
    """What is tried of scales (in `joint` mode of lambda, too), curve after curve."""
    if config.mode == "independent":
        return [Setting(name, {name: v}, alone=True) for name, values in config.scales.items() for v in values]
    grids = [[(name, value) for value in values] for name, values in config.scales.items()]
    shares: Sequence[float | None] = config.lambda_ or [None]
    found = [Setting(JOINT, dict(point), share) for point in itertools.product(*grids) for share in shares]
    if config.sample is not None and config.sample < len(found):
        drawn = random.Random(config.seeds[0]).sample(range(len(found)), config.sample)  # noqa: S311
        found = [found[number] for number in sorted(drawn)]
    return found


def lambda_settings(config: TuneConfig, scales: Mapping[str, float]) -> list[Setting]:
    """With `independent`: what is tried of lambda, with all teachers at ``scales``."""
    return [Setting(LAMBDA, scales, share) for share in config.lambda_] if config.mode == "independent" else []


class Base:
    """The student's config that is tuned. Raises UserError for what is wrong with it."""

    def __init__(self, config: TuneConfig) -> None:
        self._output = config.output.rstrip("/")
        self.where = "student" if isinstance(config.student, dict) else config.student
        self.written: dict[str, Any] = _plain(config.student)
        short = _merged(self.written, config.trial)
        #: The training that `reinforce train` would do, and that of a trial but for its setting.
        self.whole = settings.parse(StudentConfig, self.written, where=f"config {self.where}")
        self.short = settings.parse(StudentConfig, short, where=f"config {self.where} with the keys of `trial`")
        self._short = short

    def of(self, trial: Trial) -> StudentConfig:
        """The training of a trial."""
        data = {**self._short, "output": f"{self._output}/{TRIALS}/{trial.name}", "seed": trial.seed}
        return settings.parse(StudentConfig, with_setting(data, trial.setting))


def with_setting(data: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """A student's config with a setting in place of its own scales and lambda."""
    loss = dict(data.get("loss") or {})
    before = {} if setting.alone else loss.get("logit_scales") or {}
    loss["logit_scales"] = {**before, **setting.scales}
    if setting.share is not None:
        loss.pop("lambda_", None)
        loss["lambda"] = setting.share
    made = {**data, "loss": loss}
    if setting.alone:
        made["data"] = {**data["data"], "teachers": list(setting.scales)}
    return made


def _plain(student: str | Mapping[str, Any]) -> dict[str, Any]:
    """What a user wrote of a student."""
    if not isinstance(student, str):
        return dict(student)
    settings.load(StudentConfig, student)  # tells its faults
    data: dict[str, Any] = yaml.safe_load(Path(student).read_text(encoding="utf-8"))
    return data


def _merged(data: Mapping[str, Any], changes: Mapping[str, Any], place: str = "trial") -> dict[str, Any]:
    """``data`` with the keys of ``changes``, section by section."""
    made = dict(data)
    if place == "trial.train" and {"steps", "epochs"} & changes.keys():  # of which a training has one
        made = {key: value for key, value in made.items() if key not in ("steps", "epochs")}
    for key, value in changes.items():
        if place == "trial" and key in ("output", "seed"):
            raise UserError(f"trial.{key}: each trial has its own. Remove it.")
        before = made.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            made[key] = _merged(before, value, f"{place}.{key}")
        else:
            made[key] = value
    return made
