"""The config sections of every training, which keys may change on resume, and the number of steps."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from reinforce.errors import UserError
from reinforce.training.config import MUTABLE_KEYS, Training, describe_changes, fixed_config
from reinforce.training.job import total_steps
from tests.helpers.trainings import training


def test_a_mutable_key_does_not_hide_keys_that_begin_like_it() -> None:
    assert "steps" not in fixed_config(training(), ["steps"])
    assert "steps" in fixed_config(training(), ["step"])


def test_the_checkpoint_format_depends_on_these_keys() -> None:
    """Checkpoints store the fixed config. A key that is renamed, or added with a value, makes old ones refused."""
    optimizer = ("betas", "clip", "eps", "final_lr", "lr", "warmup", "weight_decay")
    keys = {"batch", "compute.precision", "ema", *(f"optimizer.{name}" for name in optimizer)}
    added = {"optimizer.hold", "optimizer.towers", "optimizer.cooldown", "optimizer.decay"}
    now = fixed_config(training(), MUTABLE_KEYS)
    assert now.keys() == keys | added
    assert describe_changes({key: now[key] for key in keys}, now) == [], "checkpoints of earlier versions"


def test_changes_are_described_key_by_key() -> None:
    changes = describe_changes({"a": 1, "b": [1], "gone": 2}, {"a": 1, "b": [2], "new": "x"})
    assert changes == ["b: [1] before, [2] now", "gone: 2 before, not set now", "new: not set before, 'x' now"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "give either `steps` or `epochs`"),
        ({"steps": None}, "give either `steps` or `epochs`"),
        ({"optimizer": {"hold": 3, "cooldown": 0.5}}, "`hold` and `cooldown` both state when .* remove one"),
        ({"compute": {"accumulate": 0}}, "must be a number of parts, at least 1, or auto, got 0"),
        ({"compute": {"ranks": 2, "accumulate": 3}}, r"batch \(16\) must be a multiple of .* \(6\)"),
        (
            {"compute": {"ranks": 2, "gpus": 0.5}},
            r"0\.5 of an accelerator for each of 2 ranks.* set compute\.gpus to 1",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        training(**changes)


def test_defaults_are_those_of_mobileclip2() -> None:
    optimizer = Training(steps=1).optimizer
    assert (optimizer.lr, optimizer.final_lr, optimizer.betas, optimizer.weight_decay) == (1e-3, 1e-6, (0.9, 0.95), 0.2)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"steps": 12}, 12),
        ({"steps": None, "epochs": 2.5}, 10),  # 2.5 x 64 / 16
        ({"steps": None, "epochs": 0.01, "optimizer": {"warmup": 0}}, 1),
    ],
)
def test_the_length_is_given_in_steps_or_in_epochs(changes: dict[str, Any], steps: int) -> None:
    assert total_steps(training(**changes), samples=64, ranks=1) == steps


def test_the_batch_must_be_divisible_among_ranks_and_parts() -> None:
    with pytest.raises(UserError, match=r"train\.batch \(16\) must be a multiple of .* \(6\)"):
        total_steps(training(compute={"accumulate": 2}), samples=64, ranks=3)


@pytest.mark.parametrize(("length", "steps"), [({"steps": 12}, 12), ({"steps": None, "epochs": 0.5}, 2)])
def test_the_warm_up_must_be_shorter_than_the_training(length: dict[str, Any], steps: int) -> None:
    with pytest.raises(UserError, match=rf"warmup \({steps}\) must be below the training's {steps} steps"):
        total_steps(training(optimizer={"warmup": steps}, **length), samples=64, ranks=1)


def test_the_warm_up_must_end_before_the_cool_down() -> None:
    training(steps=10, optimizer={"warmup": 5, "cooldown": 0.5}).check_warmup(10)
    with pytest.raises(UserError, match=r"cooldown \(0\.5\) begins within the warm-up of 6 steps: lower either"):
        total_steps(training(steps=10, optimizer={"warmup": 6, "cooldown": 0.5}), samples=64, ranks=1)
