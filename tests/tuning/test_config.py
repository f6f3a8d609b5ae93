"""Validation of the config of `reinforce tune`."""

from __future__ import annotations

from typing import Any

import pytest

from reinforce.errors import UserError
from tests.helpers.tuning import tune_config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scales": {"red": [10.0]}}, "scales.red: 10 is the only value, nothing to compare"),
        ({"scales": {}, "lambda": [1.0]}, "lambda: 1 is the only value, nothing to compare"),
        ({"scales": {}}, "nothing to try"),
        ({"mode": "joint", "scales": {"red": [10.0], "blue": [20.0]}}, "nothing to try"),
        ({"scales": {"red": [10.0, 10.0, 20.0]}}, "scales.red: duplicate value"),
        ({"seeds": [1, 1]}, "seeds: duplicate seed"),
        ({"scales": {"red": [0.0, 10.0]}}, "greater than 0"),
        ({"scales": {"red": {"from": 10, "to": 90}}}, "must be a list of values, or {from, to, count}"),
        ({"scales": {"red": {"from": -1, "to": 90, "count": 3}}}, "`from` and `to` must be numbers above 0"),
        ({"sample": 3}, "`sample` requires `mode: joint`"),
        ({"early_stopping": {"grase": 0.2}}, "known keys here: grace, reduction"),
    ],
)
def test_invalid_configs_are_rejected(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tune_config(**keys)


def test_grid_has_equal_ratios() -> None:
    assert tune_config(scales={"red": {"from": 10, "to": 90, "count": 3}}).scales == {"red": [10.0, 30.0, 90.0]}
