"""Finished trainings, read from their folders, and the numbers of the questions that they answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.ablations.arms import Arm, Study
from benchmarks.ablations.encoders import read_milliseconds
from benchmarks.ablations.measures import BYTES, REACHED_AT, RETAINED, Curve, Numbers, step_of_level
from benchmarks.ablations.questions import Question
from examples.demo.compare import MEASURES, read_measures
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import MANIFEST, Store
from reinforce.errors import UserError
from reinforce.shipping.latency import machine_name
from reinforce.student.config import StudentConfig
from reinforce.student.train import student_job
from reinforce.training.config import describe_changes
from reinforce.training.log import LOG
from reinforce.training.results import Results, read_results

_TRAINING = "training.json"


@dataclass(frozen=True)
class Training:
    """One seed of an arm. ``course`` identifies it: its config, its length, and its dataset's fingerprints."""

    name: str
    config: StudentConfig
    steps: int
    course: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def begin(self) -> None:
        """Record the training in its folder. Raises UserError if the folder holds another training."""
        store = Store(self.config.output)
        then = store.read_json(_TRAINING)
        if then is None:
            store.write_json(dict(self.course), _TRAINING)
        elif changed := describe_changes(then, self.course):
            raise UserError(
                f"{self.folder} holds a training of another config or dataset:\n  " + "\n  ".join(changed) + "\n"
                f"Delete {self.folder.parent} to train all students again, restore these values, or give another --out."
            )

    def results(self) -> Results | None:
        """Return the results; None unless the training is finished."""
        store = Store(self.config.output)
        if store.read_json(_TRAINING) != self.course:
            return None
        results = read_results(store)
        return results if results is not None and results.steps == self.steps else None

    @property
    def step(self) -> int:
        """The last step in its log."""
        rows = _read_log(self.folder)
        return int(rows[-1]["step"]) if rows else 0


def find_training(study: Study, arm: Arm, seed: int) -> Training | None:
    """Return one seed of an arm; None if its dataset does not exist yet."""
    config, manifest = study.student_config(arm, seed), _read_manifest(study, arm.dataset)
    if manifest is None:
        return None
    steps = config.train.steps
    assert steps is not None  # of the study, or of the arm
    course = {
        "train.steps": steps,
        **student_job(config).fixed_config,
        **{f"fingerprint of {name}": layer["fingerprint"] for name, layer in manifest["layers"].items()},
        **{f"logit scale of {name}": teacher["logit_scale"] for name, teacher in manifest["teachers"].items()},
    }
    return Training(f"{arm.name}-{seed}", config, steps, json.loads(json.dumps(course)))


@dataclass(frozen=True)
class Answer:
    """The numbers of all arms and seeds of a question, and the ``machine`` that they were measured on.

    ``curves`` holds a curve for each seed by label and measure, for questions with a ``target``.
    """

    question: Question
    numbers: Numbers
    machine: str
    curves: Mapping[str, Mapping[str, Sequence[Curve]]] = field(default_factory=dict)


def read_answer(study: Study, question: Question, seeds: int) -> Answer | None:
    """Return the answer to a question; None unless every arm is finished with every seed."""
    numbers: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, dict[str, list[Curve]]] = {}
    for arm in question.arms:
        trainings = [find_training(study, arm, seed) for seed in range(seeds)]
        rows: dict[str, list[float]] = {}
        for training in trainings:
            results = None if training is None else training.results()
            if training is None or results is None:
                return None
            for name, value in read_measures(results).items():
                rows.setdefault(name, []).append(value)
            if question.target is not None:
                for name, (_, metric) in MEASURES.items():
                    curves.setdefault(arm.label, {}).setdefault(name, []).append(_read_curve(training.folder, metric))
        if BYTES in question.columns:
            rows[BYTES] = [bytes_per_sample(study.dataset_url(arm.dataset))] * seeds
        if arm.encoder is not None:
            rows |= {name: [value] * seeds for name, value in read_milliseconds(arm.encoder, study.out).items()}
        numbers[arm.label] = rows
    return add_derived_measures(Answer(question, numbers, machine_name(), curves))


def add_derived_measures(answer: Answer) -> Answer:
    """Return the answer with RETAINED, and with the steps to the accuracy of the target."""
    question, numbers = answer.question, {label: dict(values) for label, values in answer.numbers.items()}
    for label, clean in question.clean.items():
        pairs = zip(numbers[label]["own_style"], numbers[clean]["own_style"], strict=True)
        numbers[label][RETAINED] = [value / before if before else 0.0 for value, before in pairs]
    if question.target is not None:
        for label, by_measure in answer.curves.items():
            for name, curves in by_measure.items():
                finals = numbers[question.target][name]
                numbers[label][name + REACHED_AT] = [
                    step_of_level(curve, final) for curve, final in zip(curves, finals, strict=True)
                ]
    return replace(answer, numbers=numbers)


def bytes_per_sample(url: str) -> float:
    """Return the size of all embedding files of a local dataset, divided by its samples."""
    folder = Path(url)
    size = sum(path.stat().st_size for path in (folder / "embeddings").rglob("*.parquet"))
    return size / sum(pq.read_metadata(path).num_rows for path in (folder / SAMPLES).rglob("*.parquet"))


def _read_manifest(study: Study, dataset: str) -> dict[str, Any] | None:
    store = Store(study.dataset_url(dataset))
    return read_manifest(store) if Path(store.root, MANIFEST).exists() else None


def _read_curve(folder: Path, metric: str) -> Curve:
    rows = [row for row in _read_log(folder) if metric in row.get("metrics", {})]
    return [(row["step"], row["metrics"][metric] or 0.0) for row in rows]


def _read_log(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        for line in (folder / LOG).read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    except (FileNotFoundError, ValueError):  # not started, or truncated when it was killed
        pass
    return rows
