"""Config sections of every training run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from reinforce.errors import UserError
from reinforce.settings import Microbatches, Section, flatten
from teachers.open_clip.catalog import CONFIG_FILE, folder_config
from teachers.redact import redact_values

#: Learnt logit scales are clamped to [1, this], as in open_clip.
HIGHEST_LOGIT_SCALE = 100.0


class Optimizer(Section):
    """AdamW with linear warm-up and decay to ``final_lr``; the defaults are those of MobileCLIP2's paper."""

    lr: float = Field(1e-3, ge=0, description="peak learning rate")
    final_lr: float = Field(1e-6, ge=0, description="learning rate of the last step")
    towers: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="peak learning rate by tower, `image` or `text`, in place of `lr`; students only"
    )
    layer_decay: dict[str, Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None,
        description="by tower, `image` or `text`: factor of the learning rate from each block to the one before; the "
        "tower's head has the tower's rate; students only",
    )
    warmup: int = Field(
        1000,
        ge=0,
        description="steps until the peak learning rate; default: 1,000, in a training run of at most as many steps a "
        "tenth of them",
    )
    hold: int | None = Field(
        None,
        ge=1,
        description="steps at the peak learning rate before it decays; as many as all steps: a constant rate",
    )
    cooldown: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the steps, the last ones, in which the learning rate decays; it is constant before",
    )
    decay: Literal["cosine", "linear"] | None = Field(
        None, description="how the learning rate decays to `final_lr`; default: as a cosine"
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.95), strict=False, description="decay of AdamW's averages of gradients and their squares"
    )
    eps: float = Field(1e-8, gt=0, description="added to AdamW's denominator")
    weight_decay: float = Field(
        0.2,
        ge=0,
        description="of matrices, kernels and token embeddings; not of gains, biases and logit scales, nor of what "
        "modules list in `no_weight_decay()`, such as positional embeddings",
    )
    grad_clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")

    @model_validator(mode="after")
    def _one_start_of_decay(self) -> Optimizer:
        if self.hold is not None and self.cooldown is not None:
            raise ValueError("`hold` and `cooldown` both state when the learning rate decays; remove one of them")
        return self

    def warmup_of(self, steps: int) -> int:
        """The warm-up of a training run of so many steps."""
        return self.warmup if "warmup" in self.model_fields_set or self.warmup < steps else steps // 10


class Compute(Section):
    """Ranks and arithmetic. A rank is a process that drives one accelerator, or some CPU cores."""

    ranks: int = Field(1, ge=1, description="processes that train together; under torchrun, its own number is used")
    gpus: float | None = Field(
        None, ge=0, le=1, description="accelerators per rank; default: 1 if there are any; 0: train on the CPU"
    )
    cpus: int | None = Field(
        None,
        ge=1,
        description="cores per rank: torch threads, and the CPUs that Ray reserves; default: all cores, shared among "
        "the ranks, or an accelerator's part of the cores of its node",
    )
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "fp32",
        description="precision of the forward pass (autocast); auto: bf16 on accelerators that have it, else fp32",
    )
    accumulate: Microbatches = Field(
        "auto",
        description="microbatches of a rank's batch (gradient accumulation); the loss still contrasts the "
        "whole batch; auto: on accelerators as few as fit in memory, found at the start, which a resumed training "
        "keeps; on CPUs one",
    )
    keep_activations: bool | Literal["auto"] = Field(
        "auto",
        description="keep the activations of microbatches, so that they pass the model once and not twice; true: of "
        "all, with several ranks but one; auto: on accelerators of as many as fit in memory, on CPUs of none. Results "
        "are the same",
    )
    sync_batch_norm: bool = Field(
        False,
        description="batch normalisations take their statistics over all ranks; each of the `accumulate` microbatches "
        "has its own",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations instead of storing them")
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile the model; auto: a student on an accelerator, in a training of at least 1,000 "
        "steps, if its passes draw no random numbers and a step equals one without it up to rounding; a resumed "
        "training keeps what it began with",
    )
    deterministic: bool = Field(
        True,
        description="use deterministic CUDA kernels; false: the fastest ones, and a resumed training run may differ "
        "from an uninterrupted one in rounding",
    )

    @property
    def stated_microbatches(self) -> int:
        """The number of microbatches that the config states, 1 for ``auto``."""
        return 1 if self.accumulate == "auto" else self.accumulate


class Checkpoints(Section):
    """When the state is saved; a killed training resumes from the last checkpoint, bit for bit."""

    every: int = Field(1000, ge=1, description="steps between checkpoints")
    keep: int = Field(
        2,
        ge=1,
        description="number of latest checkpoints to keep, in addition to the best one; at least two are kept, the "
        "one before in case that the last one is damaged",
    )


class Training(Section):
    """Length, batch size and everything else about a training run that does not depend on its model."""

    place = "train"

    steps: int | None = Field(None, ge=1, description="optimizer steps; give this or `epochs`")
    epochs: float | None = Field(None, gt=0, description="passes over the data; give this or `steps`")
    batch: int = Field(1024, ge=2, description="samples per step over all ranks")
    optimizer: Optimizer = Optimizer()
    compute: Compute = Compute()
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights, which is evaluated and exported; rises from 0 to this",
    )
    checkpoints: Checkpoints = Checkpoints()
    log_every: int = Field(50, ge=1, description="steps between rows of the log")
    profile: int | None = Field(
        None, ge=1, le=20, description="steps after the first ten that rank 0 traces, into `profile/`; default: none"
    )
    retries: int = Field(3, ge=0, description="restarts of the ranks by Ray Train after a failure")

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        count = self.compute.ranks * self.compute.stated_microbatches
        if self.batch % count:
            raise ValueError(f"batch ({self.batch}) must be a multiple of compute.ranks x compute.accumulate ({count})")
        if self.compute.ranks > 1 and self.compute.gpus not in (None, 0, 1):
            raise ValueError(
                f"compute.gpus: {self.compute.gpus:g} of an accelerator for each of {self.compute.ranks} ranks, but "
                "NCCL refuses two ranks on one accelerator; set compute.gpus to 1, or compute.ranks to 1"
            )
        return self

    def check_warmup(self, steps: int | None) -> None:
        """Raise UserError if the warm-up is not shorter than ``steps``, where these are known."""
        if steps is None:
            return
        warmup, share = self.optimizer.warmup_of(steps), self.optimizer.cooldown
        if warmup >= steps:
            raise UserError(
                f"train.optimizer.warmup ({warmup:,}) must be below the training's {steps:,} steps. Lower it, for "
                f"example with --set train.optimizer.warmup={steps // 10}, or remove it, or train for longer."
            )
        if share is not None and warmup > cooldown_start(steps, share) + 1:
            raise UserError(
                f"train.optimizer.cooldown ({share:g}) begins within the warm-up of {warmup:,} steps: lower either, or "
                "train for longer."
            )


def cooldown_start(steps: int, share: float) -> int:
    """The last step (from 0) of ``steps`` before a cool-down in a ``share`` of them; -1 if there is none."""
    return steps - max(1, round(share * steps)) - 1


class Trackers(Section):
    """Trackers that get the rows of log.jsonl, too. One that fails is reported, and the training run continues.

    Each package reads its own variables of the environment where the training runs.
    """

    wandb: str | None = Field(
        None,
        min_length=1,
        description="project of Weights & Biases, with WANDB_API_KEY or `wandb login`; WANDB_ENTITY, WANDB_TAGS and "
        "WANDB_MODE=offline as it documents them; pip install -e '.[wandb]'",
    )
    mlflow: str | None = Field(
        None, min_length=1, description="experiment of MLflow at MLFLOW_TRACKING_URI; pip install -e '.[mlflow]'"
    )
    trackio: str | None = Field(
        None,
        min_length=1,
        description="project of trackio, on this machine or in the Space TRACKIO_SPACE_ID; pip install -e '.[trackio]'",
    )
    name: str | None = Field(None, min_length=1, description="name of the run; default: that of the output folder")


TrackersOfRun = Annotated[
    Trackers | None,
    Field(description="trackers of the training besides log.jsonl and TensorBoard; default: none"),
]

#: Keys of a `Training` that may change when it resumes: its length, where it runs, checkpoints and logs.
MUTABLE_KEYS = (
    *("steps", "epochs", "checkpoints", "log_every", "profile", "retries"),
    *(f"compute.{name}" for name in Compute.model_fields if name != "precision"),
)


def fixed_config(config: BaseModel, mutable: Iterable[str]) -> dict[str, Any]:
    """The part of a config that determines a training run and must not change on resume, by dotted keys.

    Keys in ``mutable``, and all keys below them, are left out; so are credentials, since it is stored in checkpoints.
    """
    prefixes = tuple(f"{key}." for key in mutable)
    values = flatten(redact_values(config.model_dump(mode="json", by_alias=True)))
    return {key: value for key, value in values if not f"{key}.".startswith(prefixes)}


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each key in which two results of ``fixed_config`` differ."""
    lines = []
    for key in sorted({*before, *now}):
        values = before.get(key), now.get(key)
        if values[0] != values[1]:
            old, new = ("not set" if value is None else repr(value) for value in values)
            lines.append(f"{key}: {old} before, {new} now")
    return lines


@dataclass(frozen=True)
class Job:
    """What the loop needs besides the task and its feed.

    ``fixed_config`` is the part of the config that determines the training run, by dotted keys: a checkpoint with
    another one is refused. ``evaluate_every`` is in steps (None: only at the end); ``evaluate_start`` also evaluates
    before the first step. ``best`` is the metric whose best checkpoint is kept (default: the first metric), with
    ``best_of_part`` also where it is of a part of a set or a mean of fewer sets of a suite. ``export`` is the folder of
    ``output`` for the weights: the last ones, or with ``export_best`` those of the best evaluated step, which may be
    the one before the first step. ``trackers`` get the rows of the log, too. ``accelerator`` is that of the config.
    ``model_config`` is the config in the model's folder, by dotted keys; it must not change either.
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
