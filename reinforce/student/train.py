"""Training a student: its config, feed and task put together for the loop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from reinforce import settings
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig, load_student_config
from reinforce.student.data.feed import StudentFeed
from reinforce.student.task import StudentTask
from reinforce.training.config import FREE, course
from reinforce.training.launch import launch, runs_on_ray
from reinforce.training.loop import Job
from reinforce.training.results import Results
from teachers.device import Accelerator
from teachers.open_clip_tokens import Tokenizer

#: Keys that may change when a training goes on: where it writes, how it is judged, how fast it reads.
_FREE = ("output", "evaluate", "data.workers", "data.prefetch", *(f"train.{key}" for key in FREE))


def train(config: StudentConfig | str | Path | dict[str, Any], *, address: str | None = None) -> Results:
    """Train a student to its end, from the last checkpoint in ``output`` if there is one.

    Runs in this process, under torchrun as one of its ranks, or, with ``train.compute.ranks`` above 1 or an
    ``address`` (or RAY_ADDRESS), on Ray Train. Raises UserError for what the user has to mend, and
    ``reinforce.training.stop.Stopped`` after a signal, when a checkpoint is written.
    """
    config = _as_student_config(config)
    Storage(config.output).check_writable()
    job = job_of(config)
    if runs_on_ray(job, address) and config.loss.targets == "stored":
        build(config, Accelerator("cpu"))  # to tell faults of the config before Ray starts
    return launch(partial(build, config), job, address)


def job_of(config: StudentConfig) -> Job:
    """What the loop has to know of a student's training."""
    return Job(
        training=config.train,
        output=config.output,
        seed=config.seed,
        course=course(config, _FREE),
        evaluate_every=config.evaluate.every,
        best=config.evaluate.best_metric,
    )


def build(config: StudentConfig, accelerator: Accelerator) -> tuple[StudentTask, StudentFeed]:
    """The task and the feed of one rank. Raises UserError for what does not fit together."""
    task = StudentTask(config, str(accelerator.device))
    online = config.loss.targets == "online"
    feed = StudentFeed(
        config.data,
        config.seed,
        task.model.image.height,
        Tokenizer(task.model.name),
        teachers=[] if online else task.plan.teachers,
        online=task.plan.teachers if online else (),
        pin=accelerator.device.type == "cuda",
    )
    return task, feed


def _as_student_config(config: StudentConfig | str | Path | dict[str, Any]) -> StudentConfig:
    if isinstance(config, StudentConfig):
        return config
    return settings.parse(StudentConfig, config) if isinstance(config, dict) else load_student_config(config)
