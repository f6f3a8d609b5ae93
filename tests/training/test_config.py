"""The config sections of every training, which keys may change on resume, and the number of steps."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from reinforce.errors import UserError
from reinforce.training.config import MUTABLE_KEYS, Training, describe_changes, fixed_config
from reinforce.training.job import total_steps
from tests.helpers.trainings import training


def test_the_checkpoint_format_depends_on_these_keys() -> None:
    """Checkpoints store the fixed config. A key that is renamed, or added with a value, makes old ones refused."""
    optimizer = ("betas", "clip", "eps", "final_lr", "lr", "warmup", "weight_decay")
    keys = {"batch", "compute.precision", "ema", *(f"optimizer.{name}" for name in optimizer)}
    added = {"optimizer.hold", "optimizer.towers", "optimizer.cooldown", "optimizer.decay"}
    now = fixed_config(training(), MUTABLE_KEYS)
    assert now.keys() == keys | added
    defaults = Training(steps=1).optimizer
    assert (defaults.lr, defaults.final_lr, defaults.betas, defaults.weight_decay) == (1e-3, 1e-6, (0.9, 0.95), 0.2)
    assert describe_changes({key: now[key] for key in keys}, now) == [], "checkpoints of earlier versions"
    assert "steps" not in fixed_config(training(), ["steps"])
    assert "steps" in fixed_config(training(), ["step"]), "a mutable key does not hide keys that begin like it"


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


def test_the_length_is_given_in_steps_or_in_epochs_and_must_suit_batch_warm_up_and_cool_down() -> None:
    def steps(ranks: int = 1, **changes: Any) -> int:
        return total_steps(training(**changes), samples=64, ranks=ranks)

    assert steps(steps=12) == 12
    assert steps(steps=None, epochs=2.5) == 10  # 2.5 x 64 / 16
    assert steps(steps=None, epochs=0.01, optimizer={"warmup": 0}) == 1
    assert steps(steps=10, optimizer={"warmup": 5, "cooldown": 0.5}) == 10
    refused: list[tuple[dict[str, Any], str]] = [
        ({"ranks": 3, "compute": {"accumulate": 2}}, r"train\.batch \(16\) must be a multiple of .* \(6\)"),
        ({"steps": 12, "optimizer": {"warmup": 12}}, r"warmup \(12\) must be below the training's 12 steps"),
        ({"steps": None, "epochs": 0.5, "optimizer": {"warmup": 2}}, r"warmup \(2\) must be below .* 2 steps"),
        (
            {"steps": 10, "optimizer": {"warmup": 6, "cooldown": 0.5}},
            r"cooldown \(0\.5\) begins within the warm-up of 6",
        ),
    ]
    for changes, message in refused:
        with pytest.raises(UserError, match=message):
            steps(**changes)
