"""Whether a training run may resume from a checkpoint, and what has changed since then."""

from __future__ import annotations

from reinforce.errors import UserError
from reinforce.training.config import Optimizer, describe_changes
from reinforce.training.optimizer import learning_rate
from reinforce.training.saving.checkpoint import Progress


def check_resumable(before: Progress, now: Progress, steps: int, output: str) -> None:
    """Compare a checkpoint's header with that of a training run of ``steps`` steps that is about to resume from it.

    ``data`` replaces the keys of the config that are resolved by the data. Older checkpoints have no ``data``. Raises
    UserError with one line per difference, and for a checkpoint beyond the last step.
    """
    config = (before.fixed_config, now.fixed_config)
    data = (before.data or {}, (now.data or {}) if before.data is not None else {})
    model = (before.model_config or now.model_config or {}, now.model_config or {})
    changed = describe_changes(*({**c, **d, **m} for c, d, m in zip(config, data, model, strict=True)))
    if changed:
        kind = (
            "on other data"
            if {*changed} - {*describe_changes(*config), *describe_changes(*model)}
            else "of another config"
        )
        raise UserError(
            f"{output} has a training {kind}:\n  " + "\n  ".join(changed) + "\n"
            "Write to another `output`, restore these values (remove keys that were not set), or delete the folder to "
            "start over."
        )
    if before.step > steps:
        raise UserError(
            f"{output} is already at step {before.step:,}, beyond the {steps:,} steps of this config. "
            "Raise train.steps (or epochs), or write to another `output`."
        )


def describe_length(before: Progress, steps: int, optimizer: Optimizer) -> list[str]:
    """A line if the last step of a checkpoint has another learning rate in a training run of ``steps`` steps."""
    if before.steps in (None, steps) or not before.step:
        return []
    last, same = (learning_rate(before.step - 1, length, optimizer) for length in (before.steps, steps))
    if last == same:
        return []
    following = learning_rate(before.step, steps, optimizer)
    return [
        f"the training has {steps:,} steps now and had {before.steps:,} at the last checkpoint, so its learning rate "
        f"decays otherwise: it was {last:.3g} in step {before.step:,} and is {following:.3g} in the next one. What "
        "else depends on the length, such as student.quantize_share, follows the new one, too"
    ]


def describe_differences(before: Progress, now: Progress) -> list[str]:
    """Lines about changes with which a training run may resume, but not bit for bit."""
    notes = []
    if before.samples not in (None, now.samples):
        notes.append(
            f"an epoch has {now.samples:,} samples now and had {before.samples:,} at the last checkpoint: the data "
            "have changed, and the order of samples is another one from here on"
        )
    elif before.files not in (None, now.files):
        notes.append(
            "the files with the samples have changed since the last checkpoint, though not their number of samples: if "
            "they are other samples, write to another `output`"
        )
    if before.division not in (None, now.division):
        notes.append(
            f"a batch is divided into {now.division} now and was divided into {before.division} at the last "
            "checkpoint: batch normalisation and dropout, where the model has them, differ from here on"
        )
    if before.compiled and not now.compiled:
        notes.append(
            "steps ran compiled code up to the last checkpoint and run plain code now: results differ in rounding from "
            "here on"
        )
    return notes
