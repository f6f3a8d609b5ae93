"""The parts of a training's config that do not depend on what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from reinforce.settings import Section
from teachers.redact import redact_values

#: The loop keeps learnt logit scales within 1 and this, as open_clip does.
HIGHEST_LOGIT_SCALE = 100.0


class Optimizer(Section):
    """AdamW with linear warm-up and a cosine down to ``final_lr``; defaults as MobileCLIP2 trains."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    final_lr: float = Field(1e-6, ge=0, description="learning rate of the last step")
    warmup: int = Field(1000, ge=0, description="steps to the peak")
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.2, ge=0, description="of matrices; gains, biases and logit scales have none")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null: unbounded")


class Compute(Section):
    """Ranks and arithmetic. One rank drives one accelerator, or some cores."""

    ranks: int = Field(1, ge=1, description="processes that train together; under torchrun its own number counts")
    gpus: float = Field(0.0, ge=0, le=1, description="accelerators per rank")
    cpus: int = Field(1, ge=1, description="cores per rank: threads of its arithmetic, and what Ray keeps for it")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the forward pass (autocast)")
    accumulate: int = Field(
        1,
        ge=1,
        description="parts in which a rank's batch passes the model; the loss still contrasts the whole batch",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations instead of keeping them")
    compile: bool = Field(False, description="torch.compile the model")


class Checkpoints(Section):
    """When the state is saved; a killed training goes on from the last one, bit for bit."""

    every: int = Field(1000, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="the latest ones that are kept; the best is kept besides")


class Training(Section):
    """Length and shape of a training."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; give this or `epochs`")
    epochs: float | None = Field(None, gt=0, description="passes over the data; give this or `steps`")
    batch: int = Field(1024, ge=2, description="samples of one step over all ranks")
    optimizer: Optimizer = Optimizer()
    compute: Compute = Compute()
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an average of the weights, which is judged and exported; it rises to this from 0",
    )
    checkpoints: Checkpoints = Checkpoints()
    log_every: int = Field(50, ge=1, description="steps between log lines")
    retries: int = Field(3, ge=0, description="times that Ray Train starts the ranks again after a failure")

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        parts = self.compute.ranks * self.compute.accumulate
        if self.batch % parts:
            raise ValueError(f"batch ({self.batch}) must be a multiple of compute.ranks x compute.accumulate ({parts})")
        return self


#: Keys of a `Training` that may change when it goes on: its length, where it runs, and what only tells of it.
FREE = (
    *("steps", "epochs", "checkpoints", "log_every", "retries"),
    *(f"compute.{name}" for name in Compute.model_fields if name != "precision"),
)


def course(config: BaseModel, free: Iterable[str]) -> dict[str, Any]:
    """The part of a config that determines a training, by dotted keys; what is under the keys ``free`` is not."""
    prefixes = tuple(f"{key}." for key in free)
    values = _flat(redact_values(config.model_dump(mode="json", by_alias=True)))  # it is stored with each checkpoint
    return {key: value for key, value in values if not f"{key}.".startswith(prefixes)}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two courses, in words."""
    return [
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
