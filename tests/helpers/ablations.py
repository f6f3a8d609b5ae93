"""Answers and finished trainings of the ablations, without training."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

from benchmarks.ablations import page
from benchmarks.ablations.arms import BASE, Study
from benchmarks.ablations.measures import BYTES, MILLISECONDS, MILLISECONDS_ALONE
from benchmarks.ablations.questions import Question
from benchmarks.ablations.results import Answer, Training, add_derived_measures
from reinforce.dataset.files.store import Store
from reinforce.demo.compare import MEASURES, SECONDS
from tests.helpers import demo


def numbers_of(**arms: Sequence[float]) -> dict[str, dict[str, Sequence[float]]]:
    """Return the unseen style of each arm, for each seed."""
    return {label: {"unseen_style": values} for label, values in arms.items()}


def make_answer(question: Question, levels: Mapping[str, float], seeds: int = 3) -> Answer:
    """Return an answer where every measure of an arm is its level plus 0.001 per seed; curves are linear."""
    numbers: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, dict[str, list[list[tuple[int, float]]]]] = {}
    for arm in question.arms:
        values = [levels[arm.label] + 0.001 * seed for seed in range(seeds)]
        numbers[arm.label] = dict.fromkeys((*MEASURES, SECONDS, BYTES, MILLISECONDS, MILLISECONDS_ALONE), values)
        if question.target is not None:
            curves[arm.label] = {name: [[(50, v / 2), (100, v)] for v in values] for name in MEASURES}
    return add_derived_measures(Answer(question, numbers, "this one", curves))


def rising_answer(question: Question) -> Answer:
    """Return an answer in which each arm is better than the previous one."""
    return make_answer(question, {arm.label: 0.1 + 0.05 * place for place, arm in enumerate(question.arms)})


def write_dataset(study: Study, name: str = BASE) -> None:
    """Write the manifest of a dataset."""
    manifest = {
        "format": "reinforced-dataset",
        "schema_version": 1,
        "images": "embed",
        "augmentations": {"count": 2, "size": 64},
        "layers": {"samples": {"kind": "samples", "fingerprint": "f00d"}},
        "teachers": {name: {"logit_scale": 50.0, "logit_scale_from": "config"} for name in study.teachers},
        "captioners": {},
    }
    Store(study.dataset_url(name)).write_json(manifest, "dataset.json")


def finish_training(training: Training, metric: float, steps: int) -> None:
    """Write the files of a finished training."""
    training.begin()
    demo.finish_training(training.folder, metric, steps)


def write_page(
    study: Study, answers: Sequence[Answer], folder: Path, seeds: int = 3, draw: bool = False
) -> tuple[str, dict[str, object]]:
    """Write the page and the numbers to a folder; return both. Figures are left out by default: they take seconds."""
    info = page.describe_study(study, seeds, [answer.question.name for answer in answers])
    with contextlib.nullcontext() if draw else patch.object(page.figures, "draw"):
        page.write_page(study, answers, info, folder / "page.md", folder / "numbers.json")
    return (folder / "page.md").read_text(), json.loads((folder / "numbers.json").read_text())
