"""The settings of a training run that do not depend on its task, and its number of steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from reinforce.errors import UserError
from reinforce.settings import flatten
from reinforce.training.config import MUTABLE_KEYS, Trackers, Training, fixed_config
from teachers.open_clip.catalog import CONFIG_FILE, folder_config


@dataclass(frozen=True)
class Job:
    """What the loop needs besides the task and its feed.

    ``fixed_config`` is the part of the config that determines the training run, by dotted keys: a checkpoint with
    another one is refused. ``evaluate_every`` is in steps (None: only at the end); ``evaluate_start`` also evaluates
    before the first step. ``best`` is the metric whose best checkpoint is kept (default: the first metric), with
    ``best_of_part`` also where it is of a part of a set or a mean of fewer sets of a suite. ``export`` is the folder of
    ``output`` for the weights: the last ones, or with ``export_best`` those of the best evaluated step, which may be
    the one before the first step. ``trackers`` get the rows of the log, too. ``accelerator`` is that of the config.
    ``model_config`` is the config in the model's folder, by dotted keys; it must not change either. ``earlier`` are
    values of keys that checkpoints of earlier versions lack.
    """

    training: Training
    output: str
    seed: int
    fixed_config: Mapping[str, Any]
    evaluate_every: int | None = None
    evaluate_start: bool = False
    best: str | None = None
    best_of_part: bool = False
    export: str = "student"
    export_best: bool = False
    trackers: Trackers | None = None
    accelerator: Literal["fast", "plain"] = "fast"
    model_config: Mapping[str, Any] | None = None
    earlier: Mapping[str, Any] = field(default_factory=dict)


def make_job(config: Any, models: Sequence[str], mutable: Iterable[str], **options: Any) -> Job:
    """The job of the config of a student or a captioner, whose ``models`` have these names in open_clip.

    ``mutable`` are keys that may change when it resumes, besides where it writes, how it is evaluated and
    ``MUTABLE_KEYS``; ``options`` are further fields of the job.
    """
    evaluate, keys = config.evaluate, (f"train.{key}" for key in MUTABLE_KEYS)
    of_models: dict[str, Any] = {}
    for model in models:
        with contextlib.suppress(ValueError, OSError):  # reported where the model is built
            of_models |= flatten(folder_config(model) or {}, f"{model}/{CONFIG_FILE}: ")
    return Job(
        training=config.train,
        output=config.output,
        seed=config.seed,
        fixed_config=fixed_config(config, ("output", "evaluate", "log", "accelerator", *keys, *mutable)),
        evaluate_every=evaluate.every,
        best=evaluate.best_metric,
        export_best=evaluate.export == "best",
        trackers=config.log,
        accelerator=config.accelerator,
        model_config=of_models or None,
        **options,
    )


def total_steps(training: Training, samples: int, ranks: int) -> int:
    """Number of steps of a training run whose epoch has ``samples`` samples: ``steps``, or epochs * samples / batch.

    Raises UserError if the batch cannot be divided among the ranks or the warm-up is not shorter than the training run.
    """
    count = ranks * training.compute.stated_microbatches
    if training.batch % count:
        raise UserError(
            f"train.batch ({training.batch}) must be a multiple of ranks x compute.accumulate ({count}). Change either."
        )
    if training.steps is not None:
        steps = training.steps
    else:
        assert training.epochs is not None
        steps = max(1, round(training.epochs * samples / training.batch))
    training.check_warmup(steps)
    return steps
