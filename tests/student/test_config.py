"""The config of a student's training."""

from __future__ import annotations

from typing import Any

import pytest

from reinforce import settings
from reinforce.errors import UserError
from reinforce.student.config import Data, Loss, StudentConfig


@pytest.mark.parametrize("datasets", ["a", ["a"], {"url": "a"}, [{"url": "a"}]])
def test_datasets_are_a_url_a_section_or_a_list(datasets: Any) -> None:
    data = settings.parse(Data, {"datasets": datasets})
    assert [(source.url, source.weight) for source in data.datasets] == [("a", 1.0)]


@pytest.mark.parametrize(
    ("captioners", "weights"), [(["a", "b"], {"a": 1.0, "b": 1.0}), ({"a": 3}, {"a": 3.0}), ([], {}), (None, None)]
)
def test_captioners_are_names_or_weights(captioners: Any, weights: Any) -> None:
    assert settings.parse(Data, {"datasets": "a", "captioners": captioners}).captioners == weights


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"targets": "online"}, "targets `online` needs `teachers`"),
        ({"teachers": {"a": {"model": "ViT-B-32"}}}, "`teachers` needs `targets: online`"),
        ({"logit_biases": {"a": -10.0}}, "`logit_biases` needs `form: sigmoid`"),
        ({"learn_scales": True, "form": "sigmoid"}, "learn_scales` needs `form: softmax`"),
        ({"learn_scales": True, "lambda": 0.0}, "a lambda above 0"),
        ({"lambda": 1.5}, "less than or equal to 1"),
        ({"lamda": 0.5}, "unknown key"),
    ],
)
def test_losses_that_contradict_themselves_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings.parse(Loss, keys)


def test_a_config_needs_an_output_a_student_data_and_a_length() -> None:
    with pytest.raises(UserError) as raised:
        settings.parse(StudentConfig, {})
    for key in ("output", "student", "data", "train"):
        assert key in str(raised.value)
