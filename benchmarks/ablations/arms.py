"""Variants of the demo's two configs: datasets and arms by name; equal variants are made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from benchmarks.ablations.encoders import Encoder
from examples.demo.compare import CONFIG, student_config
from examples.demo.models import WEIGHTS
from reinforce.config import Config, load_config
from reinforce.errors import UserError
from reinforce.images.records import AUGMENTATION_BACKEND
from reinforce.student.config import StudentConfig
from reinforce.training.config import total_steps
from teachers import weights
from teachers.open_clip.catalog import FOLDER_PREFIX, folder_config
from teachers.spec import ModelSpec

DEMO = "configs/demo.yaml"
BASE = "base"
WRONG = "wrong-captions"
#: Arms that are evaluated at POINTS steps during training; the others are evaluated at the end only.
ARMS_WITH_CURVES, POINTS = ("plain", "distilled"), 12
#: Label -> bits for each number of a stored vector, and the codec, by the bytes of a vector.
CODECS: Mapping[str, tuple[float, str]] = {
    "float32": (32, "float32"),
    "float16": (16, "float16"),
    "int8": (8, "int8"),
    "pca": (4, "pca{bytes}"),
    "pq, 2 bits": (2, "pq{bytes}"),
    "pq, 1 bit": (1, "pq{bytes}"),
    "rq, half a bit": (0.5, "rq{bytes}"),
}
#: A training uses one core including its data loading, so that as many can run in parallel as there are cores.
ONE_CORE = ("train.compute.ranks=1", "train.compute.cpus=1", "data.workers=0")
#: Overrides of all students: features are distilled only where they are the question.
_FIXED = (*ONE_CORE, "loss.features=one-sided")

#: Keys of students' configs that are not in a recipe.
_NOT_IN_STUDENTS: dict[str, Any] = {
    "output": True,
    "seed": True,
    "accelerator": True,
    "data": {"workers"},
    "train": {"compute": {"ranks", "gpus", "cpus", "deterministic", "sync_batch_norm", "keep_activations"}},
    "evaluate": {"export", "probes", "index", "segmentation", "agreement"},
}


_FIRST_STALL_SECONDS = 3600.0  # the default before it followed from the batches


def _student_json(config: StudentConfig) -> str:
    """A student's config without what changes no number, and with later defaults and names as they were at first."""
    compute = config.train.compute
    if compute.compile == "auto":
        compute = compute.model_copy(update={"compile": False})
    config = config.model_copy(update={"train": config.train.model_copy(update={"compute": compute})})
    return config.model_dump_json(exclude=_NOT_IN_STUDENTS, exclude_none=True).replace('"grad_clip_norm"', '"clip"')


def _dataset_json(config: Config) -> str:
    """A run's config without what changes no number, and with later keys and defaults as they were at first."""
    exclude: dict[str, Any] = {
        "output": True,
        "workers": True,
        "accelerator": True,
        "scores": True,
        "classifiers": True,
        "failures": {"outage_seconds"},
    }
    if config.augmentations.backend == AUGMENTATION_BACKEND:
        exclude["augmentations"] = {"backend"}
    exclude |= {key: True for key in ("moved", "labels") if not getattr(config, key)}
    if config.failures.stall_seconds is None:
        failures = config.failures.model_copy(update={"stall_seconds": _FIRST_STALL_SECONDS})
        config = config.model_copy(update={"failures": failures})
    for kind in ("teachers", "captioners"):
        specs = {name: spec.model_copy(update=_first_defaults(spec)) for name, spec in getattr(config, kind).items()}
        config = config.model_copy(update={kind: specs})
    return config.model_dump_json(exclude=exclude, exclude_none=True)


def _first_defaults(spec: ModelSpec) -> dict[str, Any]:
    """Keys of a model whose defaults were other ones at first."""
    compiled = {"compile": False} if getattr(spec, "compile", None) == "auto" else {}
    return {"precision": spec.resolved_precision, **compiled}


@dataclass(frozen=True)
class Arm:
    """A student that is trained with several seeds.

    ``name`` is used for folders. ``label`` is used on the page; it may differ between questions that share the arm.
    ``base`` is one of the demo's arms, ``overrides`` are KEY=VALUE of its config, ``dataset`` is its training data, and
    ``x`` its position on a numeric axis. ``encoder`` is its image encoder, unless it is the demo's.
    """

    label: str
    name: str
    base: str
    overrides: tuple[str, ...]
    dataset: str
    x: float | None = None
    encoder: Encoder | None = None


class Study:
    """All datasets and arms, in folders of ``out``. ``overrides`` are KEY=VALUE of all students.

    Raises UserError if a config is invalid.
    """

    def __init__(self, out: Path, overrides: Sequence[str] = ()) -> None:
        self.out = out
        self.overrides = tuple(overrides)
        self.demo = load_config(DEMO)
        student = student_config("distilled", out, 0, self.overrides)
        if student.train.steps is None:
            raise UserError(f"{CONFIG} sets its length in epochs. Add --set train.epochs=null --set train.steps=STEPS.")
        total_steps(student.train, samples=1, ranks=1)  # raises UserError if the warm-up is too long
        self.steps: int = student.train.steps
        self.batch = student.train.batch
        #: Names of the teachers and captioners that the demo's student uses.
        self.teachers = list(self.demo.teachers if student.data.teachers is None else student.data.teachers)
        self.captioners = list(self.demo.captioners if student.data.captioners is None else student.data.captioners)
        for name, available in (("teachers", self.demo.teachers), ("captioners", self.demo.captioners)):
            used = getattr(self, name)
            if not used or not set(used) <= set(available):
                raise UserError(
                    f"{CONFIG} has data.{name}: {used}, but {DEMO} has {list(available)}. Use at least one of these."
                )
        self.datasets: dict[str, tuple[str, ...]] = {}
        self._dataset_names: dict[str, str] = {}
        self._arms: dict[str, Arm] = {}
        self.add_dataset(BASE)
        self.plain = self.add_arm("plain", "plain", base="plain")
        self.distilled = self.add_arm("distilled", "distilled")

    def add_dataset(self, name: str, *overrides: str) -> str:
        """Add a dataset with these KEY=VALUE of configs/demo.yaml; return its name, or that of an equal one."""
        config = load_config(DEMO, [*overrides])
        key = config.model_dump_json(exclude={"output"})
        if key not in self._dataset_names:
            assert name not in self.datasets, name
            self._dataset_names[key] = name
            self.datasets[name] = overrides
        return self._dataset_names[key]

    def own_scales(self) -> dict[str, float]:
        """Return the logit scale that each teacher was trained to."""
        scales = {}
        for name in self.teachers:
            with safetensors.safe_open(_weights_file(self.demo.teachers[name]), "numpy") as stored:
                scales[name] = round(float(np.exp(stored.get_tensor("logit_scale"))), 1)
        return scales

    def add_arm(
        self,
        label: str,
        name: str,
        *overrides: str,
        base: str = "distilled",
        dataset: str = BASE,
        x: float | None = None,
        encoder: Encoder | None = None,
    ) -> Arm:
        """Add an arm and return it; if an equal arm exists, its name and folders are used."""
        if encoder is not None:
            overrides = (*overrides, override("student.model", encoder.model(self.out)))
        arm = Arm(label, name, base, overrides, dataset, x, encoder)
        key = self.student_config(arm, 0).model_dump_json(exclude={"output", "seed", "evaluate"})
        return replace(self._arms.setdefault(key, arm), label=label, x=x)

    def add_codec_arm(self, label: str) -> Arm:
        """Add the demo's student with the vectors of all teachers stored in one of CODECS."""
        (bits, codec), teachers = CODECS[label], {}
        for name, teacher in self.demo.teachers.items():
            config = folder_config(teacher.model or "")
            assert config is not None, name
            dim = config["model_cfg"]["embed_dim"]
            teachers[name] = {**model_mapping(teacher), "codec": codec.format(bytes=round(bits * dim / 8))}
        name = label if bits >= 8 else f"codec-{bits:g}"
        return self.add_arm(label, name, dataset=self.add_dataset(name, override("teachers", teachers)), x=bits)

    def dataset_config(self, name: str) -> Config:
        """Return the config of the run that makes a dataset."""
        return load_config(DEMO, [*self.datasets[name], override("output", self.dataset_url(name))])

    def recipe(self, arms: Sequence[Arm]) -> str:
        """Return 16 hex digits that identify the configs of these arms and datasets and the weights of the models.

        Unset keys are excluded, so that a config key added in a later version does not change the result; and so are
        the keys of what computes, which changes no number.
        """
        students = [_student_json(self.student_config(arm, 0)) for arm in arms]
        datasets = [_dataset_json(self.dataset_config(arm.dataset)) for arm in arms]
        return hashlib.sha256("\0".join([*students, *datasets, *self._weights]).encode()).hexdigest()[:16]

    @cached_property
    def _weights(self) -> list[str]:
        """Identities of the weights of the models."""
        models = (*self.demo.teachers.values(), *self.demo.captioners.values())
        return [weights.identity(_weights_file(model)) for model in models]

    def dataset_url(self, name: str) -> str:
        return str(self.out / "datasets" / name)

    @property
    def wrong_shards(self) -> Path:
        """The folder of the shards with exchanged captions."""
        return self.out / "shards-wrong-captions"

    def student_config(self, arm: Arm, seed: int) -> StudentConfig:
        """Return the config of one seed of an arm."""
        every = max(1, self.steps // POINTS) if arm.name in ARMS_WITH_CURVES else None
        dataset = override("data.datasets", self.dataset_url(arm.dataset))
        overrides = [*_FIXED, override("evaluate.every", every), *self.overrides, dataset, *arm.overrides]
        return student_config(arm.base, self.out / "students" / f"{arm.name}-{seed}", seed, overrides)


def _weights_file(model: ModelSpec) -> Path:
    """Return the weights of one of the demo's models, all of which are folders of open_clip."""
    return Path((model.model or "").removeprefix(FOLDER_PREFIX), WEIGHTS)


def override(key: str, value: Any) -> str:
    """Return KEY=VALUE with the value as JSON, so that a whole section may have names with dots in it."""
    return f"{key}={json.dumps(value)}"


def model_mapping(model: ModelSpec) -> dict[str, Any]:
    """Return a teacher or captioner as it is written in a config."""
    return model.model_dump(mode="json", by_alias=True, exclude_unset=True)
