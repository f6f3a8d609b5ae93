"""Training a student: combines its config, feed and task for the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from reinforce import settings
from reinforce.dataset.kinds.registry import target_sections
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig
from reinforce.student.data.feed import StudentFeed
from reinforce.student.task import StudentTask
from reinforce.student.towers import has_weights
from reinforce.training.config import Job, make_job
from reinforce.training.launch import launch, runs_on_ray
from reinforce.training.log import check_trackers
from reinforce.training.results import Results
from teachers.open_clip.catalog import DEFAULT_PREPROCESS
from teachers.open_clip.family import stated_preprocess
from teachers.open_clip.text import Tokenizer
from teachers.runtime.accelerator import Accelerator
from teachers.spec import ModelSpec

#: Keys that may change when a training run resumes: how fast it reads.
_READING = ("data.workers", "data.prefetch", "data.images_from", "data.limits")


def train(config: StudentConfig | str | Path | dict[str, Any], *, address: str | None = None) -> Results:
    """Train a student to its end, from the last checkpoint in ``output`` if there is one.

    ``config`` is a StudentConfig, the path of a YAML file, or a dict of its content. Runs in this process, under
    torchrun as one of its ranks, or, with ``train.compute.ranks`` above 1 or an ``address`` (or RAY_ADDRESS), on Ray
    Train. Raises UserError for errors that the user can fix, and ``reinforce.processes.signals.Stopped`` after a
    signal, when a checkpoint has been written.
    """
    config = settings.as_config(StudentConfig, config)
    Storage(config.output).check_writable()
    job = student_job(config)
    check_trackers(config.log)
    if runs_on_ray(job, address) and config.loss.targets == "stored":
        build(config, Accelerator("cpu"))  # reports errors of the config before Ray starts
    return launch(partial(build, config), job, address)


def student_job(config: StudentConfig) -> Job:
    """The training loop's job for a student config."""
    mutable = (*_READING, *_default_preprocess(config))
    return make_job(
        config,
        [config.student.model or "", *([config.student.text.model] if config.student.text else [])],
        mutable,
        evaluate_start=_evaluates_start(config),
        best_of_part=config.evaluate.best is not None,
    )


def _evaluates_start(config: StudentConfig) -> bool:
    """Whether there are sets to evaluate a pretrained student on before its first step.

    Not if the best step is exported and must have been trained with rounded values.
    """
    spec, sets = config.student, config.evaluate
    if not (sets.own_sets or sets.suite) or (spec.quantize is not None and sets.export == "best"):
        return False
    try:
        if spec.images_alone:
            return spec.backbone.from_weights
        return has_weights(ModelSpec(model=spec.model, pretrained=spec.pretrained))
    except (ValueError, OSError):
        return False  # reported where the model is built


def _default_preprocess(config: StudentConfig) -> Iterator[str]:
    """Keys that state open_clip's default preprocessing. A training run that began before they existed has it, too."""
    teachers = {f"loss.teachers.{name}": spec for name, spec in config.loss.teachers.items()}
    for place, spec in {"student": config.student, **teachers}.items():
        for key, value in stated_preprocess(spec).items():
            if value == DEFAULT_PREPROCESS[key]:
                yield f"{place}.preprocess.{key}"


def build(config: StudentConfig, accelerator: Accelerator) -> tuple[StudentTask, StudentFeed]:
    """Make the task and the feed of one rank. Raises UserError if config, datasets and models do not fit together."""
    task = StudentTask(config, str(accelerator.device))
    read, online = task.terms.models, target_sections("teachers") if config.loss.targets == "online" else ()
    feed = StudentFeed(
        config.data,
        config.seed,
        task.model.image.height,
        Tokenizer(task.model.text_name),
        models=read | dict.fromkeys(online, ()),
        online=[*dict.fromkeys(name for section in online for name in read.get(section, ()))],
        pin=accelerator.device.type == "cuda",
    )
    feed.data |= task.terms.recorded()
    if config.train.batch > feed.rows:
        task.notes.append(
            f"train.batch ({config.train.batch:,}) is larger than the data ({feed.rows:,} samples), so that a batch "
            "contrasts samples with copies of themselves. Lower it."
        )
    return task, feed
