"""Variants of the demo's two configs: datasets and arms by name, those that are equal once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reinforce.config import Config, load_config
from reinforce.demo.compare import CONFIG, student_config
from reinforce.errors import UserError
from reinforce.student.config import StudentConfig
from reinforce.training.job import total_steps
from teachers import weights
from teachers.open_clip_catalog import FOLDER_PREFIX
from teachers.spec import ModelSpec

DEMO = "configs/demo.yaml"
BASE = "base"
WRONG = "wrong-captions"
#: Arms whose accuracy is followed over the steps, at so many points; others are judged at their end.
FOLLOWED, POINTS = ("plain", "distilled"), 12
#: A training takes one core, its reading included, so that as many run side by side as there are cores.
ONE_CORE = ("train.compute.ranks=1", "train.compute.cpus=1", "data.workers=0")


@dataclass(frozen=True)
class Arm:
    """A student of several seeds.

    ``name`` is that of its folders, ``label`` what a page calls it, which may differ where questions share it. ``base``
    is one of the demo's arms, ``changes`` are KEY=VALUE of its config, ``dataset`` is what it learns from, ``x`` its
    place on a numeric axis.
    """

    label: str
    name: str
    base: str
    changes: tuple[str, ...]
    dataset: str
    x: float | None = None


class Study:
    """All datasets and arms, in folders of ``out``. ``changes`` are KEY=VALUE of all students.

    Raises UserError where a config has a fault.
    """

    def __init__(self, out: Path, changes: Sequence[str] = ()) -> None:
        self.out = out
        self.changes = tuple(changes)
        self.demo = load_config(DEMO)
        student = student_config("distilled", out, 0, self.changes)
        if student.train.steps is None:
            raise UserError(
                f"{CONFIG} gives its length in epochs. Add --set train.epochs=null --set train.steps=STEPS."
            )
        total_steps(student.train, samples=1, ranks=1)  # tells a warm-up that does not fit
        self.steps: int = student.train.steps
        self.batch = student.train.batch
        #: The teachers and captioners that the demo's student learns from, by name.
        self.teachers = list(self.demo.teachers if student.data.teachers is None else student.data.teachers)
        self.captioners = list(self.demo.captioners if student.data.captioners is None else student.data.captioners)
        for name, known in (("teachers", self.demo.teachers), ("captioners", self.demo.captioners)):
            used = getattr(self, name)
            if not used or not set(used) <= set(known):
                raise UserError(
                    f"{CONFIG} has data.{name}: {used}, and {DEMO} makes {list(known)}. Name at least one of these."
                )
        self.datasets: dict[str, tuple[str, ...]] = {}
        self._dataset_names: dict[str, str] = {}
        self._arms: dict[str, Arm] = {}
        self.dataset(BASE)
        self.plain = self.arm("plain", "plain", base="plain")
        self.distilled = self.arm("distilled", "distilled")

    # -- names

    def dataset(self, name: str, *changes: str) -> str:
        """The name of the dataset with these KEY=VALUE of configs/demo.yaml: ``name``, or that of an equal one."""
        config = load_config(DEMO, [*changes])
        key = config.model_dump_json(exclude={"output"})
        if key not in self._dataset_names:
            assert name not in self.datasets, name
            self._dataset_names[key] = name
            self.datasets[name] = changes
        return self._dataset_names[key]

    def arm(
        self,
        label: str,
        name: str,
        *changes: str,
        base: str = "distilled",
        dataset: str = BASE,
        x: float | None = None,
    ) -> Arm:
        """An arm, of which the folders are called ``name`` unless there is an equal one."""
        made = Arm(label, name, base, changes, dataset, x)
        key = self.student(made, 0).model_dump_json(exclude={"output", "seed", "evaluate"})
        return replace(self._arms.setdefault(key, made), label=label, x=x)

    # -- configs

    def dataset_config(self, name: str) -> Config:
        """The run that makes a dataset."""
        return load_config(DEMO, [*self.datasets[name], assigned("output", self.dataset_url(name))])

    def recipe(self, arms: Sequence[Arm]) -> str:
        """16 hex digits over all that determines these arms: configs of students and datasets, weights of the demo.

        What is not set is not told, so that a key that comes to the program later changes nothing.
        """
        students = [self.student(arm, 0).model_dump_json(exclude={"output", "seed"}, exclude_none=True) for arm in arms]
        datasets = [
            self.dataset_config(arm.dataset).model_dump_json(exclude={"output"}, exclude_none=True) for arm in arms
        ]
        models = [model.model for model in (*self.demo.teachers.values(), *self.demo.captioners.values())]
        folders = [
            Path(model.removeprefix(FOLDER_PREFIX)) for model in models if model and model.startswith(FOLDER_PREFIX)
        ]
        known = [weights.identity(file) for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        return hashlib.sha256("\0".join([*students, *datasets, *known]).encode()).hexdigest()[:16]

    def dataset_url(self, name: str) -> str:
        return str(self.out / "datasets" / name)

    @property
    def wrong_shards(self) -> Path:
        """The folder of the shards of which some captions are wrong."""
        return self.out / "shards-wrong-captions"

    def student(self, arm: Arm, seed: int) -> StudentConfig:
        """The training of one seed of an arm."""
        every = max(1, self.steps // POINTS) if arm.name in FOLLOWED else None
        fixed = [*ONE_CORE, assigned("evaluate.every", every)]
        changes = [*fixed, *self.changes, assigned("data.datasets", self.dataset_url(arm.dataset)), *arm.changes]
        return student_config(arm.base, self.out / "students" / f"{arm.name}-{seed}", seed, changes)


def assigned(key: str, value: Any) -> str:
    """KEY=VALUE, with the value as JSON, which is YAML too: of a whole section, names in it may have dots."""
    return f"{key}={json.dumps(value)}"


def spec(model: ModelSpec) -> dict[str, Any]:
    """A teacher or a captioner as a config writes it."""
    return model.model_dump(mode="json", by_alias=True, exclude_unset=True)
